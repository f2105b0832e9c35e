"""config.json -> ModelConfig, without transformers.

Sizes are those that the config states. Single layers may differ (uneven pruning): the loader takes their widths from
the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.core.architectures import lookup
from runtime.models._families import FAMILIES, Family
from runtime.models._rope_settings import check_channels, read_ropes
from runtime.models._settings import HARMLESS, Settings, shown
from runtime.models.config import Activation, Experts, LayerConfig, ModelConfig, Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"
_WIDTHS = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "moe_intermediate_size")


def read(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model of a config.json; InputError names the first setting that is wrong or not understood."""
    architecture = lookup(dict(config), where)
    settings = Settings(config, where)
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise settings.wrong("model_type", "a family that the runtime does not run")
    settings.raw("quantization_config")  # the loader reads it
    layers = _layers(settings, family, where)
    biased = family.bias_setting and settings.flag("attention_bias", False)
    hidden = settings.size("hidden_size")
    model = ModelConfig(
        family=config["model_type"],
        hidden=hidden,
        vocab=settings.size("vocab_size"),
        layers=layers,
        max_length=_max_length(settings, layers),
        activation=_activation(settings, family),
        norm_eps=settings.number("rms_norm_eps", family.norm_eps),
        tied=settings.flag("tie_word_embeddings", family.tied),
        norm_plus_one=architecture.norm_plus_one,
        sandwich_norms=family.sandwich_norms,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias or biased,
        o_bias=biased,
        mlp_bias=family.mlp_bias_setting and settings.flag("mlp_bias", False),
        attention_softcap=_softcap(settings, "attn_logit_softcapping", family.score_softcap, family.score_softcap),
        logit_softcap=_softcap(settings, "final_logit_softcapping", family.logit_softcap_setting, family.logit_softcap),
        embedding_scale=hidden**0.5 if family.scales_embedding else 1.0,
    )
    settings.refuse_rest(HARMLESS)
    return model


def _softcap(settings: Settings, key: str, has: object, default: float | None) -> float | None:
    return settings.optional_number(key, default) if has else None


def _activation(settings: Settings, family: Family) -> Activation:
    if family.activation_key != "hidden_act":
        settings.raw("hidden_act")  # Gemma's files carry both; this one has no effect
    name = settings.text(family.activation_key, family.activation)
    if name not in ACTIVATIONS:
        raise settings.wrong(family.activation_key, f"not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _max_length(settings: Settings, layers: tuple[LayerConfig, ...]) -> int:
    limits = [layer.rope.original_length for layer in layers if layer.rope.kind == "longrope"]
    return min([settings.size("max_position_embeddings"), *limits])


def _layers(settings: Settings, family: Family, where: str) -> tuple[LayerConfig, ...]:
    count = settings.size("num_hidden_layers")
    window = _window(settings, family)
    ropes: dict[str, Rope] = dict(zip((FULL, SLIDING), read_ropes(settings, family), strict=True))
    overrides = _overrides(settings, count)
    found = []
    for index, kind in enumerate(_kinds(settings, family, count, window)):
        if kind == SLIDING and window is None:
            raise settings.wrong("sliding_window", f"but layer_types gives layer {index} a window")
        experts = _experts(settings, family, index)
        sizes = _sizes(settings, family, overrides.get(index, {}), experts)
        rope = ropes[kind]
        check_channels(rope, sizes["head_dim"], where)
        scalar = settings.number("query_pre_attn_scalar", family.query_scalar) if family.query_scalar else None
        found.append(
            LayerConfig(
                heads=sizes["heads"],
                kv_heads=sizes["kv_heads"],
                head_dim=sizes["head_dim"],
                ffn=sizes["ffn"],
                scale=(scalar or sizes["head_dim"]) ** -0.5,
                window=window if kind == SLIDING else None,
                rope=rope,
                experts=experts,
            )
        )
    return tuple(found)


def _sizes(settings: Settings, family: Family, override: Mapping[str, int], experts: Experts | None) -> dict[str, int]:
    heads = settings.size("num_attention_heads")
    stated = settings.has("num_key_value_heads")  # null means as many as there are query heads
    kv_heads = settings.size("num_key_value_heads", heads if stated else family.kv_heads or heads)
    head_dim = settings.size("head_dim", family.head_dim or max(1, settings.size("hidden_size") // heads))
    ffn_key = "intermediate_size"
    ffn = settings.size(ffn_key)
    if family.experts and family.experts.own_width:
        own = settings.size("moe_intermediate_size", 768)
        if experts:
            ffn_key, ffn = "moe_intermediate_size", own
    return {
        "heads": override.get("num_attention_heads", heads),
        "kv_heads": override.get("num_key_value_heads", kv_heads),
        "head_dim": override.get("head_dim", head_dim),
        "ffn": override.get(ffn_key, ffn),
    }


def _overrides(settings: Settings, count: int) -> dict[int, dict[str, int]]:
    """Sizes of single layers, as transformers writes them for uneven models."""
    section = settings.raw("per_layer_config", {})
    if not isinstance(section, Mapping):
        raise settings.wrong("per_layer_config", "not a mapping of layer numbers to sizes")
    found = {}
    for number, sizes in section.items():
        if not str(number).isdecimal() or int(number) >= count or not isinstance(sizes, Mapping):
            raise settings.wrong("per_layer_config", f"where {shown(number)} is no layer of {count} with its sizes")
        layer = Settings(sizes, f"config.json: per_layer_config: {number}")
        found[int(number)] = {key: layer.size(key) for key in _WIDTHS if layer.stated(key)}
        layer.refuse_rest()
    return found


def _window(settings: Settings, family: Family) -> int | None:
    if family.windows == "none":
        return None
    if family.window_switch and not settings.flag("use_sliding_window", False):
        settings.raw("sliding_window")
        return None
    default = None if settings.has("sliding_window") else family.window
    if settings.raw("sliding_window", default) is None:
        return None
    return settings.size("sliding_window", default)


def _kinds(settings: Settings, family: Family, count: int, window: int | None) -> list[str]:
    """full_attention or sliding_attention for each layer."""
    numbers = range(count)
    if family.windows == "from_layer":
        first = settings.raw("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise settings.wrong("max_window_layers", "not a layer's number")
        default = [SLIDING if window is not None and index >= first else FULL for index in numbers]
    elif family.windows == "alternate":
        default = [FULL if index % 2 else SLIDING for index in numbers]
    elif family.windows == "pattern":
        every = settings.size("sliding_window_pattern", 6)
        default = [SLIDING if (index + 1) % every else FULL for index in numbers]
    else:
        default = [FULL if window is None else SLIDING] * count
    kinds = settings.raw("layer_types", default)
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise settings.wrong("layer_types", f"not {count} times {FULL} or {SLIDING}")
    if family.windows in ("none", "all") and kinds != default:
        raise settings.wrong("layer_types", "but the layers of this family are all alike")
    return kinds


def _experts(settings: Settings, family: Family, index: int) -> Experts | None:
    """The experts of layer `index`, None for a dense layer."""
    defaults = family.experts
    if defaults is None:
        return None
    count = settings.size("num_local_experts", settings.raw("num_experts", defaults.count))
    if settings.size("num_experts", count) != count:
        raise settings.wrong("num_experts", f"but num_local_experts is {count}")
    active = settings.size("num_experts_per_tok", defaults.active)
    if active > count:
        raise settings.wrong("num_experts_per_tok", f"more than the {count} experts")
    if defaults.normalised is not None:
        return Experts(count, active, defaults.normalised)
    normalised = settings.flag("norm_topk_prob", False)
    dense, step = settings.raw("mlp_only_layers", []), settings.size("decoder_sparse_step", 1)
    if not isinstance(dense, list):
        raise settings.wrong("mlp_only_layers", "not a list of layer numbers")
    return None if index in dense or (index + 1) % step else Experts(count, active, normalised)

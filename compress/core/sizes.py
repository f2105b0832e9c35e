"""The sizes that the shapes of a model are made of, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.core.errors import InputError

PER_LAYER_KEY = "per_layer_config"
"""In config.json: sizes of single layers that are not those of all, by layer number, as transformers writes them."""

EXAMPLES_NOTICE = "the widths of single blocks are found out by the run: those shown are examples as large in all"
UNEVEN_NOTICE = "layers differ in width: only the bundled runtime opens it, others once `compress level` padded it"

_LARGEST = 1 << 40
_WIDTH = "intermediate_size"

# What transformers takes for a family where its config.json leaves a field out
_DEFAULTS: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4},
    "gemma3_text": {"head_dim": 256, "num_key_value_heads": 4},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}


def sizes_of(config: Mapping[str, Any], block: int | None = None) -> dict[str, int]:
    """The sizes that shapes are made of, of all blocks or of one that has its own. InputError names the field that is
    missing or makes no sense."""
    widths = widths_of(config)
    config = with_defaults(config)
    if widths is not None and block is not None and block < len(widths):
        config[_WIDTH] = widths[block]
    hidden = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    return {
        "hidden": hidden,
        "ffn": _size(config, "intermediate_size"),
        "heads": heads,
        "kv_heads": _size(config, "num_key_value_heads", heads),
        "head_dim": _size(config, "head_dim", hidden // heads),
        "vocab": _size(config, "vocab_size"),
        "layers": _size(config, "num_hidden_layers"),
        "expert_ffn": _size(config, "moe_intermediate_size", _size(config, "intermediate_size")),
        "experts": _size(config, "num_local_experts", _size(config, "num_experts", 1)),
    }


def widths_of(config: Mapping[str, Any]) -> list[int] | None:
    """The inner width of each block's feed-forward network where they differ; None where intermediate_size says all.

    InputError for sizes of single layers that are not understood: only these widths may differ, and not in mixtures."""
    given = config.get(PER_LAYER_KEY)
    if not given:
        return None
    config = with_defaults(config)
    if any(config.get(key) for key in ("num_local_experts", "num_experts")):
        raise _not_understood("is of a mixture of experts, whose layers must be alike")
    widest, count = _size(config, _WIDTH), _size(config, "num_hidden_layers")
    if not isinstance(given, Mapping):
        raise _not_understood("is not a mapping of layer numbers to sizes")
    widths = [widest] * count
    for number, sizes in given.items():
        if not str(number).isdecimal() or int(number) >= count:
            raise _not_understood(f"names {number!r}, which is no layer of {count}")
        if not isinstance(sizes, Mapping) or sizes.keys() - {_WIDTH}:
            raise _not_understood(f"gives layer {number} other sizes than {_WIDTH}, which alone may differ")
        widths[int(number)] = _size(sizes, _WIDTH, widest)
    return widths if len(set(widths)) > 1 or widths[0] != widest else None


def width_entries(widths: Sequence[int]) -> dict[str, Any]:
    """What config.json says of the widths of all blocks: goes in the place of intermediate_size and PER_LAYER_KEY.

    The common one is the widest, so that a loader that knows nothing of single layers refuses the narrower shapes."""
    widest, digits = max(widths), len(str(len(widths) - 1))
    own = {f"{index:0{digits}}": {_WIDTH: width} for index, width in enumerate(widths) if width != widest}
    return {_WIDTH: widest} | ({PER_LAYER_KEY: own} if own else {})


def _not_understood(why: str) -> InputError:
    return InputError(f"{PER_LAYER_KEY} {why}", where="config.json")


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's entries, with what transformers takes where it leaves sizes out."""
    stated = {key: value for key, value in config.items() if value is not None}
    return _DEFAULTS.get(str(config.get("model_type")), {}) | stated


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise InputError(f"{key} is {value!r}, not a positive whole number", where="config.json")
    return value

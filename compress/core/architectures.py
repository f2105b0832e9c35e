"""A table of model families, as data: which linear layers share an input, what feeds them, how experts lie on disk.

Adding a family is an entry here and a tiny model in tests/tiny.py: see docs/extending.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from compress.core.errors import InputError

FEED_FORWARD_DEPTH = 2


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Linear layers of a block that read the same input, by their names inside the block.

    `depth` orders the groups along the forward: groups of one depth do not feed each other.
    """

    name: str
    sites: tuple[str, ...]
    depth: int


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: `module` inside the block, and its disk name; names of an expert's layers on disk."""

    module: str
    on_disk: str
    router: str
    gate: str
    up: str
    down: str

    def groups(self, count: int) -> tuple[GroupSpec, ...]:
        """Two groups for each of `count` experts."""
        found = []
        for index in range(count):
            name, path = f"experts.{index}", f"{self.on_disk}.{index}"
            sites = (f"{path}.{self.gate}", f"{path}.{self.up}")
            found.append(GroupSpec(f"{name}.gate_up", sites, FEED_FORWARD_DEPTH))
            found.append(GroupSpec(f"{name}.down", (f"{path}.{self.down}",), FEED_FORWARD_DEPTH + 1))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm inside the block and the groups whose input it scales (what can be folded into them)."""

    name: str
    feeds: tuple[str, ...]


FEEDERS = (("qkv", "o"), ("gate_up", "down"))
"""Groups whose last site (values, up) makes the input of another group, channel by channel: scales can move over."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family. Paths are module names of the transformers model, `model_class` is its causal LM class.

    `output_norms` are norms with weights on what a block adds to the residual stream: behind them it cannot be rotated.
    `scaled_embedding`: the model multiplies embeddings by the root of the stream's width.
    `biases`: groups whose layers (and those that feed them) have biases if an entry of config.json says so.
    `heads_divide`: transformers refuses a config whose hidden_size is no multiple of its heads, though head_dim says
    all there is to know. `twin` is a family that computes the same from the same tensors, if there are no biases.
    """

    model_class: str
    groups: tuple[GroupSpec, ...]
    norms: tuple[Norm, ...]
    experts: Experts | None = None
    norm_plus_one: bool = False
    output_norms: tuple[str, ...] = ()
    scaled_embedding: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    biases: tuple[tuple[str, str], ...] = ()
    heads_divide: bool = False
    twin: str = ""
    base: str = "model"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def groups_of(self, experts: int) -> tuple[GroupSpec, ...]:
        """The groups of a block with that many experts, by their names on disk; 0 is a dense block."""
        if self.experts is None or not experts:
            return self.groups
        attention = tuple(group for group in self.groups if group.depth < FEED_FORWARD_DEPTH)
        return attention + self.experts.groups(experts)

    def disk_name(self, name: str) -> str:
        """Name on disk of a parameter or module inside a block."""
        for module, disk in self.renames:
            if name == module or name.startswith(module + "."):
                return disk + name[len(module) :]
        return name

    def module_name(self, disk_name: str) -> str:
        """The inverse of disk_name()."""
        for module, disk in self.renames:
            if disk_name == disk or disk_name.startswith(disk + "."):
                return module + disk_name[len(disk) :]
        return disk_name


ATTENTION = (
    GroupSpec("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), depth=0),
    GroupSpec("o", ("self_attn.o_proj",), depth=1),
)
DENSE = (
    *ATTENTION,
    GroupSpec("gate_up", ("mlp.gate_proj", "mlp.up_proj"), depth=2),
    GroupSpec("down", ("mlp.down_proj",), depth=3),
)
FUSED = (
    GroupSpec("qkv", ("self_attn.qkv_proj",), depth=0),
    GroupSpec("o", ("self_attn.o_proj",), depth=1),
    GroupSpec("gate_up", ("mlp.gate_up_proj",), depth=2),
    GroupSpec("down", ("mlp.down_proj",), depth=3),
)
PRE_NORMS = (Norm("input_layernorm", ("qkv",)), Norm("post_attention_layernorm", ("gate_up",)))
GEMMA_NORMS = (Norm("input_layernorm", ("qkv",)), Norm("pre_feedforward_layernorm", ("gate_up",)))
GEMMA_OUTPUT_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

ATTENTION_BIAS = (("o", "attention_bias"),)

GEMMA2 = Architecture(
    "Gemma2ForCausalLM",
    DENSE,
    GEMMA_NORMS,
    norm_plus_one=True,
    output_norms=GEMMA_OUTPUT_NORMS,
    scaled_embedding=True,
    biases=ATTENTION_BIAS,
    heads_divide=True,
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        DENSE,
        PRE_NORMS,
        biases=(*ATTENTION_BIAS, ("down", "mlp_bias")),
        heads_divide=True,
        twin="mistral",
    ),
    "mistral": Architecture("MistralForCausalLM", DENSE, PRE_NORMS),
    "qwen2": Architecture("Qwen2ForCausalLM", DENSE, PRE_NORMS),
    "qwen3": Architecture("Qwen3ForCausalLM", DENSE, PRE_NORMS, biases=ATTENTION_BIAS),
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, model_class="Gemma3ForCausalLM"),
    "phi3": Architecture("Phi3ForCausalLM", FUSED, PRE_NORMS),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        ATTENTION,
        PRE_NORMS,
        experts=Experts("mlp.experts", "block_sparse_moe.experts", "block_sparse_moe.gate", "w1", "w3", "w2"),
        renames=(("mlp", "block_sparse_moe"),),
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        DENSE,
        PRE_NORMS,
        experts=Experts("mlp.experts", "mlp.experts", "mlp.gate", "gate_proj", "up_proj", "down_proj"),
        biases=ATTENTION_BIAS,
    ),
}


def lookup(config: dict[str, Any], where: str | None = None) -> Architecture:
    """The architecture of a config.json, or InputError that says what is missing."""
    model_type = config.get("model_type")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if not isinstance(model_type, str):
        raise InputError("config.json names no model_type", where=where)
    text = config.get("text_config")
    if isinstance(text, dict):
        raise InputError(
            f"{model_type!r} wraps a text model ({text.get('model_type', 'unknown')!r}) together with other towers",
            where=where,
            hint="export the language model on its own (its text_config and language_model weights) and pass that",
        )
    known = ", ".join(sorted(ARCHITECTURES))
    raise InputError(
        f"unknown model family {model_type!r}: compress/core/architectures.py has no entry for it (known: {known})",
        where=where,
        hint="docs/extending.md shows how to add one in under 60 lines",
    )

"""The shapes that a config.json promises, by plain formulas, against what lies in the files. Builds no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress.core._verify_folder import Contents, layer_numbers
from compress.core.architectures import ARCHITECTURES, FEED_FORWARD_DEPTH, Architecture
from compress.core.errors import ArtifactError, InputError
from compress.core.formats import Reader, reader_for
from compress.core.safetensors_io import TensorInfo
from compress.core.scheme import Scheme
from compress.core.sizes import sizes_of

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint

Shape = tuple[int, ...]
Tensors = dict[str, TensorInfo]


def module_shapes(sizes: Mapping[str, int], *, in_expert: bool = False) -> dict[str, tuple[int, int]]:
    """Shape [out, in] of linear layers by the last part of their name; the families of the table share these names."""
    hidden, dim = sizes["hidden"], sizes["head_dim"]
    ffn = sizes["expert_ffn"] if in_expert else sizes["ffn"]
    query, key = sizes["heads"] * dim, sizes["kv_heads"] * dim
    return {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "qkv_proj": (query + 2 * key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "gate_up_proj": (2 * ffn, hidden),
        "down_proj": (hidden, ffn),
        "w1": (ffn, hidden),
        "w2": (hidden, ffn),
        "w3": (ffn, hidden),
        "gate": (sizes["experts"], hidden),
    }


def sizes_at(name: str, config: Mapping[str, Any], architecture: Architecture) -> dict[str, int]:
    """The sizes that hold for a module or tensor, by its name."""
    number = name.removeprefix(f"{architecture.blocks}.").partition(".")[0]
    return sizes_of(config, int(number) if number.isdecimal() else None)


def expected_shape(name: str, config: Mapping[str, Any], architecture: Architecture) -> Shape | None:
    """Shape that the config gives tensor `name` of a dense model; None for tensors that no formula covers."""
    sizes = sizes_at(name, config, architecture)
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if module in (architecture.embedding, architecture.head) and kind == "weight":
        return sizes["vocab"], sizes["hidden"]
    if leaf in ("q_norm", "k_norm"):
        return (sizes["head_dim"],)
    if leaf == "norm" or leaf.endswith("layernorm"):
        return (sizes["hidden"],)
    shape = module_shapes(sizes, in_expert=".experts." in name).get(leaf)
    if shape is None or kind not in ("weight", "bias"):
        return None
    return shape if kind == "weight" else shape[:1]


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The family's entry in the table, None if it has none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("model_type is missing", where="config.json")
    return ARCHITECTURES.get(model_type)


def check_shapes(contents: Contents, schemes: Mapping[str, Scheme], reader: Reader | None) -> str:
    """Dense tensors have the config's shapes; each layer of the config is there with all its parts, and none beyond."""
    architecture = architecture_of(contents.config)
    if architecture is None:
        return f"not compared: the family {contents.config['model_type']!r} is unknown here"
    if architecture.head in schemes and contents.config.get("tie_word_embeddings") is True:
        hint = "untie it: set tie_word_embeddings to false"
        raise ArtifactError("is quantized but tied: loaders ignore it silently", where=architecture.head, hint=hint)
    checked = _fit(contents.tensors, contents.config, architecture, schemes, reader)
    return f"{checked} dense tensors, {contents.config['num_hidden_layers']} layers of {contents.config['model_type']}"


def require_shapes(checkpoint: Checkpoint) -> None:
    """InputError that names folder and tensor if a source lacks a weight, or holds one of another shape than its
    config.json asks for. Reads headers only."""
    reader = reader_for(checkpoint.config) if checkpoint.schemes else None
    try:
        _fit(checkpoint.tensors, checkpoint.config, checkpoint.architecture, checkpoint.schemes, reader)
    except InputError as error:
        raise InputError(error.message, where=f"{checkpoint.folder}: {error.where}", hint=error.hint) from None


def unknown_tensors(checkpoint: Checkpoint) -> list[str]:
    """Disk names of tensors that neither the family's modules nor a quantized layer account for."""
    reader = reader_for(checkpoint.config) if checkpoint.schemes else None
    stored = {name for module, scheme in checkpoint.schemes.items() for name in _stored(reader, module, scheme)}
    return [
        name
        for name in checkpoint.tensors
        if name not in stored and expected_shape(name, checkpoint.config, checkpoint.architecture) is None
    ]


def _fit(
    tensors: Tensors,
    config: Mapping[str, Any],
    architecture: Architecture,
    schemes: Mapping[str, Scheme],
    reader: Reader | None,
) -> int:
    """How many dense tensors were compared; ArtifactError for the first thing that does not fit the config."""
    sizes = sizes_of(config)
    stored = {name for module, scheme in schemes.items() for name in _stored(reader, module, scheme)}
    checked = 0
    for name, info in tensors.items():
        wanted = None if name in stored else expected_shape(name, config, architecture)
        if wanted is not None and info.shape != wanted:
            raise ArtifactError(f"has shape {list(info.shape)}, config.json asks for {list(wanted)}", where=name)
        checked += wanted is not None
    _check_layers(tensors, sizes, architecture)
    for module in _required(tensors, config, sizes, architecture, schemes):
        if f"{module}.weight" not in tensors and module not in schemes:
            raise ArtifactError("is missing: it is neither stored dense nor quantized", where=f"{module}.weight")
    return checked


def _stored(reader: Reader | None, module: str, scheme: Scheme) -> tuple[str, ...]:
    return () if reader is None else reader.stored_names(module, scheme)


def _check_layers(tensors: Tensors, sizes: Mapping[str, int], architecture: Architecture) -> None:
    numbers = layer_numbers(tensors, architecture.blocks)
    count = sizes["layers"]
    if len(numbers) != count or (numbers and max(numbers) != count - 1):
        raise ArtifactError(f"num_hidden_layers is {count}, the files hold {len(numbers)} layers", where="config.json")


def _required(
    tensors: Tensors,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    architecture: Architecture,
    schemes: Mapping[str, Scheme],
) -> Iterator[str]:
    """Modules that must have a weight: embedding and head (one of them may stand for both if they are tied), final
    norm, and the norms and linear layers of each block."""
    vocabulary = (architecture.embedding, architecture.head)
    stored = [module for module in vocabulary if f"{module}.weight" in tensors or module in schemes]
    if not stored or not config.get("tie_word_embeddings", True):
        yield from vocabulary
    yield architecture.final_norm
    with_experts = _blocks_with_experts(tensors, architecture)
    for number in range(sizes["layers"]):
        sites = _sites(architecture, with_experts.get(number), sizes["experts"])
        for site in (*sites, *(norm.name for norm in architecture.norms)):
            yield f"{architecture.blocks}.{number}.{site}"


def _blocks_with_experts(tensors: Tensors, architecture: Architecture) -> dict[int, bool]:
    """Blocks that have experts on disk, and whether these lie there one by one (others' tools fuse them)."""
    found: dict[int, bool] = {}
    if architecture.experts is None:
        return found
    marker = f".{architecture.experts.on_disk}."
    for name in tensors:
        block, _, rest = name.partition(marker)
        number = block.removeprefix(f"{architecture.blocks}.")
        if rest and number.isdecimal():
            found[int(number)] = found.get(int(number), False) or rest.split(".")[0].isdecimal()
    return found


def _sites(architecture: Architecture, one_by_one: bool | None, experts: int) -> list[str]:
    """Linear layers of a block. `one_by_one` says how its experts lie on disk; None: it has none."""
    groups = architecture.groups_of(experts if one_by_one else 0)
    if one_by_one is False:
        groups = tuple(group for group in groups if group.depth < FEED_FORWARD_DEPTH)
    router = [architecture.experts.router] if architecture.experts and one_by_one is not None else []
    return [*(site for group in groups for site in group.sites), *router]

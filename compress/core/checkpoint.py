"""A model folder, read lazily: headers at once, tensors when asked for, one block at a time.

build_block(), build_head(), build_model() and stream_model() are the only places of the product that construct models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.core._model_folder import aux_files, load_tokenizer, read_config, read_tensors
from compress.core.architectures import Architecture, lookup
from compress.core.errors import InputError, UsageError
from compress.core.lazy import lazy_module
from compress.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MASKED_KEY
from compress.core.places import recorded_name
from compress.core.safetensors_io import TensorInfo, load_rows, load_tensor, torch_dtype
from compress.core.sizes import widths_of

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

    from compress.core._skeleton import Skeleton
    from compress.core.formats import Reader
    from compress.core.scheme import Scheme
    from compress.core.tensors import QuantTensor

torch = lazy_module("torch")

__all__ = ["Checkpoint", "Source", "load_tokenizer"]

CHECKED_AT_ONCE = 1 << 20
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint came from: a hub id with its commit, or a folder's name with None."""

    id: str
    revision: str | None = None


class Checkpoint:
    """A model folder. Tensors and modules go by their names on disk; block `i` is the i-th decoder layer."""

    def __init__(self, folder: Path, source: Source, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.source = source
        self.config = config
        self.tensors = tensors
        self.architecture: Architecture = lookup(config, str(folder / "config.json"))
        self.model_type: str = config["model_type"]
        self.num_blocks: int = config["num_hidden_layers"]

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
        """Open a folder, or a hub id (downloaded to the hub's cache, safetensors only, pinned to a commit).

        A model that brings its own model class is refused: code from a model folder never runs.
        """
        folder = Path(model)
        source = Source(recorded_name(folder))
        if folder.is_dir() and revision is not None:
            raise UsageError(f"revision {revision!r} is of a model of the hub, and this is a folder", where=str(folder))
        if not folder.is_dir():
            from compress.core.hub import snapshot

            folder, commit = snapshot(str(model), revision=revision, offline=offline)
            source = Source(str(model), commit)
        config = read_config(folder)
        architecture = lookup(config, str(folder / "config.json"))
        _refuse_own_code(config, architecture, folder)
        checkpoint = cls(folder, source, config, read_tensors(folder))
        if checkpoint.kind == "quantized":
            _ = checkpoint.schemes  # refuses formats that are not read
        return checkpoint

    # what it is

    @property
    def origin(self) -> Checkpoint:
        """What this is a view of, for plans: the model before stages changed it; itself where it is no such view."""
        return self

    @cached_property
    def tied(self) -> bool:
        """Whether head and embedding are one tensor. Files may hold it under either name."""
        both = all(self._holds(module) for module in (self.architecture.head, self.architecture.embedding))
        return not both or bool(self.config.get("tie_word_embeddings"))

    def _holds(self, module: str) -> bool:
        """Whether a weight of its own is stored for `module`, dense or quantized."""
        return f"{module}.weight" in self.tensors or module in self.schemes

    @property
    def embedding_tensor(self) -> str:
        """Disk name of the embedding."""
        embedding, head = self.architecture.embedding, self.architecture.head
        return f"{head}.weight" if self._holds(head) and not self._holds(embedding) else f"{embedding}.weight"

    @property
    def head_tensor(self) -> str:
        """Disk name of the head's weight."""
        return self.embedding_tensor if self.tied else f"{self.architecture.head}.weight"

    @cached_property
    def dtype(self) -> dtype:
        """The floating-point dtype that the config states, else that of most weights."""
        stated = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        if stated in ("float32", "float16", "bfloat16"):
            return getattr(torch, stated)
        held: Counter[str] = Counter()
        for info in self.tensors.values():
            held[info.dtype] += info.bytes
        return torch_dtype(max(FLOATS, key=lambda name: held[name]))

    @cached_property
    def kind(self) -> Literal["dense", "masked", "quantized"]:
        """What the stages before this one left."""
        from compress.core.formats import method_of

        if method_of(self.config) is not None:
            return "quantized"
        return "masked" if self.config.get(MASKED_KEY) else "dense"

    @cached_property
    def aux_files(self) -> list[Path]:
        """Files that belong to the model beside config and weights, relative to the folder: tokenizer, generation
        config, chat template, licence; the adapter that makes up for a quantization."""
        adapter = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if self.kind == "quantized" else ()
        return aux_files(self.folder) + [Path(name) for name in adapter if (self.folder / name).is_file()]

    def aux_bytes(self, path: Path) -> bytes:
        """The content of one of them."""
        return (self.folder / path).read_bytes()

    def sha256(self) -> dict[str, str]:
        """Digest of config, weight, tokenizer and other carried files by name. Computed once."""
        return dict(self._sha256)

    @cached_property
    def _sha256(self) -> dict[str, str]:
        from compress.core.files import sha256_file

        weights = {info.file for info in self.tensors.values()}
        files = {self.folder / "config.json", *weights, *(self.folder / name for name in self.aux_files)}
        return {str(path.relative_to(self.folder)): sha256_file(path) for path in sorted(files)}

    # names

    def block_name(self, index: int) -> str:
        """Prefix of block `index` on disk, without a dot at its end."""
        return f"{self.architecture.blocks}.{index}"

    def block_tensors(self, index: int) -> list[str]:
        """Disk names of block `index`, in file order."""
        return list(self._by_block[index])

    def rest_tensors(self) -> list[str]:
        """Disk names of everything outside the blocks: embedding, final norm, head."""
        return list(self._by_block[-1])

    @cached_property
    def _by_block(self) -> list[list[str]]:
        """Disk names of each block, and last those outside."""
        found: list[list[str]] = [[] for _ in range(self.num_blocks + 1)]
        prefix = self.architecture.blocks + "."
        for name in self.tensors:
            number = name[len(prefix) :].split(".")[0] if name.startswith(prefix) else ""
            inside = number.isdecimal() and int(number) < self.num_blocks
            found[int(number) if inside else -1].append(name)
        return found

    def groups(self, index: int) -> list[tuple[str, list[str]]]:
        """(group name, module names on disk) of block `index`, along the forward."""
        return [(name, sites) for name, sites, _ in self.groups_by_depth(index)]

    def groups_by_depth(self, index: int) -> list[tuple[str, list[str], int]]:
        """As groups(), with the depth of each: groups of one depth do not feed each other."""
        block = self.block_name(index)
        specs = self.architecture.groups_of(self.expert_count(index))
        return [(spec.name, [f"{block}.{site}" for site in spec.sites], spec.depth) for spec in specs]

    def expert_count(self, index: int) -> int:
        """How many experts a block has on disk; 0 for a dense block."""
        experts = self.architecture.experts
        if experts is None:
            return 0
        prefix = f"{self.block_name(index)}.{experts.on_disk}."
        return len({name[len(prefix) :].split(".")[0] for name in self._by_block[index] if name.startswith(prefix)})

    def sites(self, index: int) -> list[str]:
        """Module names on disk of block `index`'s linear layers."""
        return [site for _, sites in self.groups(index) for site in sites]

    # tensors

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies; InputError if the files lack it."""
        if name not in self.tensors:
            raise InputError(f"tensor {name!r} is missing", where=str(self.folder))
        return self.tensors[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, mapped from its file."""
        return load_tensor(self.info(name))

    def rows(self, name: str, row_ids: Tensor) -> Tensor:
        """Rows `row_ids` of a matrix; only these are read, or dequantized."""
        packed = self.quant_tensor(name.removesuffix(".weight"))
        return load_rows(self.info(name), row_ids) if packed is None else packed.at(row_ids).dequantize()

    def alters(self, name: str) -> bool:
        """Whether `tensor` gives something else than lies in the file: so in a view that transforms what it reads."""
        return False

    def weight(self, module: str, dtype: dtype | None = None) -> Tensor:
        """The weight of a module; dequantized if it is stored quantized."""
        scheme = self.schemes.get(module)
        if scheme is not None:
            return self._reader.dequantize(module, self.tensor, scheme, dtype or self.dtype)
        weight = self.tensor(f"{module}.weight")
        return weight if dtype is None else weight.to(dtype)

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """Shape [out, in] of a module's weight, dense or quantized, from headers."""
        scheme = self.schemes.get(module)
        if scheme is not None:
            return self._reader.shape_of(module, scheme, self.tensors)
        rows, width = self.info(f"{module}.weight").shape
        return rows, width

    def stored_names(self, module: str) -> list[str]:
        """Disk names of the tensors that hold a module's weight."""
        scheme = self.schemes.get(module)
        names = (f"{module}.weight",) if scheme is None else self._reader.stored_names(module, scheme)
        return [name for name in names if name in self.tensors]

    def quant_tensor(self, module: str) -> QuantTensor | None:
        """The packed weight of a module, None if it is stored dense."""
        scheme = self.schemes.get(module)
        return None if scheme is None else self._reader.decode(module, self.tensor, scheme)

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The quantized modules with their schemes; empty for dense weights."""
        return self._reader.modules(self.tensors) if self.kind == "quantized" else {}

    @cached_property
    def _reader(self) -> Reader:
        from compress.core.formats import reader_for

        return reader_for(self.config, self.source.id)

    # modules

    @cached_property
    def skeleton(self) -> Skeleton:
        """The transformers model of this config without weights."""
        from compress.core._skeleton import Skeleton

        return Skeleton(self.folder, self.architecture, widths=widths_of(self.config))

    def build_block(self, index: int, dtype: dtype, device: str = "cpu") -> nn.Module:
        """Block `index`, computing in `dtype`. Weights of linear layers stay mapped in their stored dtype."""
        return self._filled(self.skeleton.block(index), f"{self.block_name(index)}.", dtype, device)

    def build_head(self, dtype: dtype, device: str = "cpu") -> nn.Module:
        """The causal LM without embedding and blocks: from inputs_embeds through final norm and head to logits."""
        return self._filled(self.skeleton.head(), "", dtype, device)

    def build_model(self, dtype: dtype | None = None, device: str = "cpu") -> Any:
        """The whole transformers model in eval mode; quantized weights are dequantized, and inputs of their layers
        rounded where the scheme says so (not those of experts, which transformers fuses)."""
        compute = dtype or self.dtype
        state = {f"{module}.weight": self.weight(module, compute) for module in self.schemes}
        packed = {name for module, scheme in self.schemes.items() for name in self._reader.stored_names(module, scheme)}
        state |= {name: self.tensor(name) for name in self.tensors if name not in packed}
        model = self.skeleton.load(state, compute, str(self.folder))
        self._round_inputs(model, "")
        return model.to(device)

    def stream_model(self, dtype: dtype, settle: Callable[[nn.Module], object]) -> Any:
        """What build_model gives, on the CPU, with one block at a time in memory: `settle` gets each as soon as it
        has its weights, and may move it or cut it up."""
        model, names = self.skeleton.copied(), self.architecture
        self._round_inputs(model, "")
        for index, block in enumerate(model.get_submodule(names.blocks)):
            self._fill_fused(block, f"{self.block_name(index)}.", dtype)
            settle(block)
        self._fill_fused(model, "", dtype)
        if model.config.tie_word_embeddings:
            model.get_submodule(names.head).weight = model.get_submodule(names.embedding).weight
        return model

    def disk_views(self, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The parameters of a model that build_model gave, by their names on disk: fused experts as views of each."""
        from compress.core._experts import unfused

        names, found = self.architecture, {}
        for name, value in parameters:
            if name.startswith(f"{names.blocks}."):
                number, _, inside = name.removeprefix(f"{names.blocks}.").partition(".")
                parts = unfused(inside, value, names.experts)
                found |= {f"{names.blocks}.{number}.{names.disk_name(path)}": part for path, part in parts}
            else:
                found[self.embedding_tensor if name == f"{names.embedding}.weight" else name] = value
        return found

    def _filled(self, module: nn.Module, prefix: str, dtype: dtype, device: str) -> nn.Module:
        from compress.core._skeleton import fill

        for name, parameter in list(module.named_parameters()):
            disk = prefix + self.architecture.disk_name(name)
            if disk == f"{self.architecture.head}.weight":
                disk = self.head_tensor
            fill(module, name, self._checked(disk, parameter.shape, dtype), dtype, device)
        self._round_inputs(module, prefix)
        return module.eval()

    def _fill_fused(self, module: nn.Module, prefix: str, dtype: dtype) -> None:
        """The same for parameters that have no values yet, all in `dtype`, experts as transformers fuses them."""
        from compress.core._experts import unfused

        names = self.architecture
        own = {f"{names.head}.weight": self.head_tensor, f"{names.embedding}.weight": self.embedding_tensor}
        for name, parameter in list(module.named_parameters()):
            if not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, dtype=dtype)
            for path, part in unfused(name, value, names.experts):
                disk = prefix + names.disk_name(path)
                disk = own.get(disk, disk)
                part.copy_(self._checked(disk, tuple(part.shape), dtype))
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)

    def _round_inputs(self, module: nn.Module, prefix: str) -> None:
        """Let the layers inside round their inputs as they do where the model is deployed."""
        if not any(scheme.activation_bits == 8 for scheme in self.schemes.values()):
            return
        from compress.core._skeleton import stored_linear

        for path, layer in module.named_modules():
            name = prefix + self.architecture.disk_name(f"{path}.weight").removesuffix(".weight")
            scheme = self.schemes.get(name)
            if scheme is not None and scheme.activation_bits == 8:
                scale = self._reader.input_scale(name, self.tensor) if scheme.static_inputs else None
                stored_linear(layer).round_inputs(scheme, None if scale is None else scale.float())

    def _checked(self, name: str, shape: tuple[int, ...], dtype: dtype) -> Tensor:
        """A parameter by its disk name, with the shape that the config asks for and finite values: as stored, or
        dequantized to `dtype`."""
        module = name.removesuffix(".weight")
        value = self.weight(module, dtype) if module in self.schemes else self.tensor(name)
        where = str(self.tensors[name].file if name in self.tensors else self.folder)
        if value.shape != shape:
            raise InputError(
                f"tensor {name!r} has shape {list(value.shape)}, but config.json asks for {list(shape)}", where=where
            )
        if not _finite(value):
            raise InputError(f"tensor {name!r} holds NaN or infinite values", where=where)
        return value


def _refuse_own_code(config: dict[str, Any], architecture: Architecture, folder: Path) -> None:
    """Refuse a model whose repository brings its own class, unless that is the one that transformers has by now."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        return
    own = str(auto_map.get("AutoModelForCausalLM", next(iter(auto_map.values()))))
    if own.rpartition(".")[2] != architecture.model_class:
        raise InputError(
            f"the model asks for code of its own ({own}), which is never run",
            where=str(folder / "config.json"),
            hint=f"if transformers' {architecture.model_class} computes the same, take auto_map out of config.json",
        )


def _finite(value: Tensor) -> bool:
    """Whether all elements are finite. Their sum tells in one pass; only if that overflows each is looked at. Part by
    part, since torch casts what it sums."""
    return all(
        bool(torch.isfinite(part.sum(dtype=torch.float32))) or bool(torch.isfinite(part).all())
        for part in value.reshape(-1).split(CHECKED_AT_ONCE)
    )

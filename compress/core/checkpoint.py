"""A model folder, read lazily: headers at once, tensors when asked for, one block at a time.

build_block() and build_model() are the only places of the product that construct models.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.core.architectures import Architecture, lookup
from compress.core.errors import InputError
from compress.core.lazy import lazy_module
from compress.core.safetensors_io import TensorInfo, load_tensor, read_header, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

    from compress.core._skeleton import Skeleton
    from compress.core.formats import Reader
    from compress.core.scheme import Scheme
    from compress.core.tensors import QuantTensor

torch = lazy_module("torch")

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
WRITTEN_ANEW = ("config.json", "model.safetensors.index.json", "compress.json", "evaluation.json")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint came from: a hub id with its commit, or a folder's name with None."""

    id: str
    revision: str | None = None


class Checkpoint:
    """A model folder. Tensors go by their names on disk; block `i` is the i-th decoder layer."""

    def __init__(self, folder: Path, source: Source, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.source = source
        self.config = config
        self.tensors = tensors
        self.architecture: Architecture = lookup(config, str(folder / "config.json"))
        self.model_type: str = config["model_type"]
        self.num_blocks: int = config["num_hidden_layers"]

    @classmethod
    def open(
        cls, model: str | Path, *, revision: str | None = None, offline: bool = False, allow_code: bool = False
    ) -> Checkpoint:
        """Open a folder, or a hub id (downloaded to the hub's cache, safetensors only, pinned to a commit)."""
        folder = Path(model)
        source = Source(folder.name)
        if not folder.is_dir():
            from compress.core.hub import snapshot

            folder, commit = snapshot(str(model), revision=revision, offline=offline)
            source = Source(str(model), commit)
        config = _read_json(folder / "config.json")
        lookup(config, str(folder / "config.json"))
        return cls(folder, source, config, _read_tensors(folder))

    @cached_property
    def tied(self) -> bool:
        """Whether head and embedding are one tensor. Files may hold it under either name."""
        names = {f"{self.architecture.head}.weight", f"{self.architecture.embedding}.weight"}
        return not names <= set(self.tensors) or bool(self.config.get("tie_word_embeddings"))

    @property
    def embedding_tensor(self) -> str:
        """Disk name of the embedding."""
        names = f"{self.architecture.embedding}.weight", f"{self.architecture.head}.weight"
        return names[1] if names[0] not in self.tensors and names[1] in self.tensors else names[0]

    @property
    def head_tensor(self) -> str:
        """Disk name of the head's weight."""
        return self.embedding_tensor if self.tied else f"{self.architecture.head}.weight"

    @cached_property
    def dtype(self) -> dtype:
        """The dtype that the config states, else that of most weights."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(stated, str) and hasattr(torch, stated.removeprefix("torch.")):
            return getattr(torch, stated.removeprefix("torch."))
        counts: Counter[str] = Counter()
        for info in self.tensors.values():
            counts[info.dtype] += info.bytes
        return torch_dtype(max(FLOATS, key=lambda name: counts[name]))

    @cached_property
    def skeleton(self) -> Skeleton:
        """The transformers model of this config without weights."""
        from compress.core._skeleton import Skeleton

        return Skeleton(self.folder, self.architecture)

    # names

    def block_name(self, index: int) -> str:
        return f"{self.architecture.blocks}.{index}"

    def block_tensors(self, index: int) -> list[str]:
        """Disk names of block `index`, in file order."""
        prefix = self.block_name(index) + "."
        return [name for name in self.tensors if name.startswith(prefix)]

    def rest_tensors(self) -> list[str]:
        """Disk names of everything outside the blocks: embedding, final norm, head."""
        blocks = {self.block_name(index) for index in range(self.num_blocks)}
        depth = self.architecture.blocks.count(".") + 2
        return [name for name in self.tensors if ".".join(name.split(".")[:depth]) not in blocks]

    def groups(self, index: int) -> list[tuple[str, list[str]]]:
        """(group name, module names on disk) of block `index`, along the forward."""
        return [(name, sites) for name, sites, _ in self.groups_by_depth(index)]

    def groups_by_depth(self, index: int) -> list[tuple[str, list[str], int]]:
        """As groups(), with the depth of each: groups of one depth do not feed each other."""
        block = self.block_name(index)
        experts = self.architecture.experts
        count = self._expert_count(block)
        groups = [
            (spec.name, [f"{block}.{site}" for site in spec.sites], spec.depth)
            for spec in self.architecture.groups
            if not (count and spec.depth >= 2)
        ]
        for depth, name, parts in [] if experts is None else [
            (2, "gate_up", (experts.gate, experts.up)), (3, "down", (experts.down,))
        ]:  # fmt: skip
            for e in range(count):
                sites = [f"{block}.{experts.on_disk}.{e}.{part}" for part in parts]
                groups.append((f"experts.{e}.{name}", sites, depth))
        return groups

    def _expert_count(self, block: str) -> int:
        experts = self.architecture.experts
        if experts is None:
            return 0
        prefix = f"{block}.{experts.on_disk}."
        return 1 + max((int(n[len(prefix) :].split(".")[0]) for n in self.tensors if n.startswith(prefix)), default=-1)

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

    def weight(self, module: str, dtype: dtype | None = None) -> Tensor:
        """The weight of a module, dequantized if it is stored quantized."""
        scheme = self.quantized_modules.get(module)
        if scheme is not None and self._reader is not None:
            return self._reader.dequantize(module, self.tensor, scheme, dtype or self.dtype)
        weight = self.tensor(f"{module}.weight")
        return weight if dtype is None else weight.to(dtype)

    def quant_tensor(self, module: str) -> QuantTensor | None:
        """The packed weight of a module, None if it is stored dense."""
        scheme = self.quantized_modules.get(module)
        if scheme is None or self._reader is None:
            return None
        return self._reader.decode(module, self.tensor, scheme)

    @cached_property
    def quantized_modules(self) -> dict[str, Scheme]:
        """The modules that are stored quantized, each with its scheme."""
        return {} if self._reader is None else self._reader.modules(self.tensors)

    @cached_property
    def _reader(self) -> Reader | None:
        from compress.core.formats import reader_for

        return reader_for(self.config, self.folder.name) if self.kind == "quantized" else None

    @cached_property
    def kind(self) -> Literal["dense", "masked", "quantized"]:
        """What the stages before this one left."""
        if "quantization_config" in self.config:
            return "quantized"
        return "masked" if self.config.get("compress_masked") else "dense"

    @cached_property
    def aux_files(self) -> list[Path]:
        """Files that belong to the model beside config and weights, relative to the folder: tokenizer, generation
        config, chat template, licence."""
        return aux_files(self.folder)

    def sha256(self) -> dict[str, str]:
        """Digest of config, weight, tokenizer and other carried files by name. Computed once."""
        return dict(self._sha256)

    @cached_property
    def _sha256(self) -> dict[str, str]:
        from compress.core.files import sha256_file

        weights = {info.file for info in self.tensors.values()}
        files = {self.folder / "config.json", *weights, *(self.folder / name for name in self.aux_files)}
        return {str(path.relative_to(self.folder)): sha256_file(path) for path in sorted(files)}

    # modules

    def build_model(self, dtype: dtype | None = None, device: str = "cpu") -> Any:
        """The whole transformers model in eval mode; quantized weights are dequantized."""
        state: dict[str, Tensor] = {}
        sites = {site for index in range(self.num_blocks) for site in self.sites(index)}
        for name in self.tensors:
            module = name.rpartition(".")[0]
            if module not in sites:
                state[name] = self.tensor(name)
            elif f"{module}.weight" not in state:
                state[f"{module}.weight"] = self.weight(module)
        return self.skeleton.load(state, dtype or self.dtype, str(self.folder)).to(device)

    def build_block(self, index: int, dtype: dtype, device: str = "cpu") -> nn.Module:
        """Block `index`, computing in `dtype`. Weights of linear layers stay mapped in their stored dtype."""
        return self._filled(self.skeleton.block(index), f"{self.block_name(index)}.", dtype, device)

    def build_head(self, dtype: dtype, device: str = "cpu") -> nn.Module:
        """The causal LM without its blocks: inputs_embeds pass through final norm and head (mapped where possible)."""
        model = self.skeleton.head()
        return self._filled(model, "", dtype, device)

    def _filled(self, module: nn.Module, prefix: str, dtype: dtype, device: str) -> nn.Module:
        from compress.core._skeleton import fill

        for name, parameter in list(module.named_parameters()):
            disk = prefix + self.architecture.disk_name(name)
            if disk == f"{self.architecture.head}.weight":
                disk = self.head_tensor
            fill(module, name, self._checked(disk, parameter.shape), dtype, device)
        return module.eval()

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter by its disk name, with the shape that the config asks for and finite values."""
        module, _, leaf = name.rpartition(".")
        is_quantized = leaf == "weight" and module in self.quantized_modules
        value = self.weight(module, self.dtype) if is_quantized else self.tensor(name)
        if value.shape != shape:
            raise InputError(
                f"tensor {name!r} has shape {list(value.shape)}, but config.json asks for {list(shape)}",
                where=str(self.folder),
            )
        if not torch.isfinite(value).all():
            raise InputError(f"tensor {name!r} holds NaN or infinite values", where=str(self.folder))
        return value


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder; no code from the folder runs."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError("the folder has no tokenizer", where=str(folder), hint=f"it needs {TOKENIZER_FILES[0]}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the tokenizer cannot be loaded: {first_line}", where=str(folder)) from error
    rows = _read_json(folder / "config.json").get("vocab_size")
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding only {rows} rows", where=str(folder)
        )
    return tokenizer


def aux_files(folder: Path) -> list[Path]:
    """Files of a model folder to carry over, relative to it: no weights, no code, no files that a run writes anew."""
    names = (path.name for path in folder.iterdir() if path.is_file())
    return sorted(
        Path(name)
        for name in names
        if name not in WRITTEN_ANEW and name.endswith(CARRIED_SUFFIXES) or name.startswith(("LICENSE", "NOTICE"))
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"not a model folder: it has no {path.name}", where=str(path.parent)) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"invalid JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("not a JSON object", where=str(path))
    return data


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise InputError("the folder holds no safetensors weights", where=str(folder))
        return read_header(folder / "model.safetensors")
    weight_map = _read_json(index).get("weight_map", {})
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        tensors |= {n: info for n, info in read_header(folder / file).items() if weight_map.get(n) == file}
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise InputError(f"the index promises tensor {missing[0]!r} in {weight_map[missing[0]]}", where=str(index))
    return tensors

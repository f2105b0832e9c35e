"""inspect: facts about any model folder, from its config and headers alone, but for counts of zeros. Data only; the
command line prints it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.core._verify_folder import Contents, read_json, read_manifest, read_weights
from compress.core._verify_gguf import gguf_file
from compress.core.architectures import ARCHITECTURES
from compress.core.compatibility import Verdict, preflight
from compress.core.errors import InputError, UsageError
from compress.core.formats import NotRead, Reader, method_of, reader_for
from compress.core.model_files import MASKED_KEY
from compress.core.safetensors_io import TensorInfo
from compress.core.scheme import Scheme
from compress.core.sizes import UNEVEN_NOTICE, widths_of
from compress.core.zeros import Zeros, count_zeros


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One module with a weight: its shape [out, in, …], how it is stored, the bytes of all its tensors."""

    name: str
    shape: tuple[int, ...]
    stored: str
    group_size: int | None
    symmetric: bool | None
    bytes: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model folder holds. `scheme` counts layers by how they are stored; `engines` says who loads it."""

    folder: str
    family: str
    supported: bool
    parameters: int
    bytes: int
    bits_per_weight: float
    files: int
    method: str | None
    tied: bool
    schemes: Mapping[str, int]
    layers: tuple[LayerFacts, ...]
    engines: tuple[Verdict, ...]
    source: str | None
    revision: str | None
    zeros: Zeros | None
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data, for --json."""
        data = asdict(self)
        for layer, facts in zip(data["layers"], self.layers, strict=True):
            layer["bits_per_weight"] = round(facts.bits_per_weight, 4)
        return data


def inspect(folder: str | Path, *, zeros: bool = False) -> Inspection:
    """Read config and headers of a model folder. InputError for a folder that holds no readable model.

    Zeros are counted, which reads all weights, in masked models, and with `zeros` in others that are not quantized.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError("there is no such folder", where=str(folder))
    if gguf_file(path) is not None:
        raise InputError(
            "holds a GGUF file, of which only verify knows more", where=str(folder), hint="compress verify"
        )
    if not (path / "config.json").is_file():
        raise InputError("not a model folder: config.json is missing", where=str(folder))
    contents = Contents(path, config=read_json(path / "config.json"))
    contents.manifest = read_manifest(path)
    read_weights(contents)
    notices: list[str] = []
    reader, schemes = _quantized(contents, notices)
    layers = tuple(_layers(contents.tensors, reader, schemes))
    parameters = sum(layer.parameters for layer in layers)
    size = sum(info.bytes for info in contents.tensors.values())
    lineage = {} if contents.manifest is None else contents.manifest.lineage
    family = str(contents.config.get("model_type"))
    uneven = family in ARCHITECTURES and widths_of(contents.config) is not None
    if uneven:
        notices.append(UNEVEN_NOTICE)
    return Inspection(
        folder=str(folder),
        family=family,
        supported=family in ARCHITECTURES,
        parameters=parameters,
        bytes=size,
        bits_per_weight=round(8 * size / parameters, 4) if parameters else 0.0,
        files=len(contents.shards),
        method=method_of(contents.config),
        tied="lm_head.weight" not in contents.tensors and "lm_head" not in schemes,
        schemes=_counts(layers),
        layers=layers,
        engines=_engines(reader, schemes, layers, uneven=uneven),
        source=_text(lineage.get("source")),
        revision=_text(lineage.get("revision")),
        zeros=_zeros(contents, notices) if zeros or contents.config.get(MASKED_KEY) else None,
        notices=tuple(notices),
    )


def _zeros(contents: Contents, notices: list[str]) -> Zeros | None:
    if method_of(contents.config) is not None or contents.config.get("model_type") not in ARCHITECTURES:
        notices.append("zeros are counted in models of known families that are not quantized")
        return None
    from compress.core.checkpoint import Checkpoint

    return count_zeros(Checkpoint.open(contents.folder))


def _quantized(contents: Contents, notices: list[str]) -> tuple[Reader | None, dict[str, Scheme]]:
    if method_of(contents.config) is None:
        return None, {}
    try:
        reader = reader_for(contents.config)
        return reader, reader.modules(contents.tensors)
    except NotRead as refusal:
        notices.append(f"quantized layers are counted as they are stored: {refusal}")
        return None, {}


def _layers(
    tensors: Mapping[str, TensorInfo], reader: Reader | None, schemes: Mapping[str, Scheme]
) -> Iterable[LayerFacts]:
    """Modules in the order of their names on disk: quantized ones as a whole, others tensor by tensor."""
    seen: set[str] = set()
    module_of = {}
    if reader is not None:
        module_of = {name: module for module in schemes for name in reader.stored_names(module, schemes[module])}
    for name in sorted(tensors, key=_natural):
        module = module_of.get(name)
        if module is None or reader is None:
            info = tensors[name]
            yield LayerFacts(name.removesuffix(".weight"), info.shape, info.dtype, None, None, info.bytes)
        elif module not in seen:
            seen.add(module)
            scheme = schemes[module]
            stored = [part for part in reader.stored_names(module, scheme) if part in tensors]
            size = sum(tensors[part].bytes for part in stored)
            shape = reader.shape_of(module, scheme, tensors)
            yield LayerFacts(module, shape, scheme.name, scheme.group_size, scheme.symmetric, size)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    parts = name.split(".")
    return [(int(part), "") if part.isascii() and part.isdigit() and len(part) < 10 else (-1, part) for part in parts]


def _counts(layers: Iterable[LayerFacts]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        label = layer.stored
        if layer.group_size is not None:
            group = "per channel" if layer.group_size == -1 else f"groups of {layer.group_size}"
            label = f"{layer.stored}, {group}{'' if layer.symmetric else ', asymmetric'}"
        counts[label] = counts.get(label, 0) + 1
    return counts


def _engines(
    reader: Reader | None, schemes: Mapping[str, Scheme], layers: Iterable[LayerFacts], *, uneven: bool
) -> tuple[Verdict, ...]:
    """Who loads it; empty for models that are not quantized or not read."""
    if reader is None:
        return ()
    shapes = {layer.name: (layer.shape[0], layer.shape[1]) for layer in layers if layer.name in schemes}
    return tuple(preflight(schemes, shapes, reader.method, uneven=uneven))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

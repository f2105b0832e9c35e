"""Which engine loads which scheme from which format: the table of compatibility.yaml, and questions to it.

Needs no torch. Everything said about a reader carries its version and whether it was run or its rules were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compress.core.scheme import Scheme
from compress.core.yaml_source import parse_yaml

Ok = Literal["yes", "no", "with-conditions", "unknown"]
_WORST_FIRST: tuple[Ok, ...] = ("no", "unknown", "with-conditions", "yes")
_VERBS: dict[Ok, str] = {
    "yes": "loads it",
    "no": "does not load it",
    "with-conditions": "loads it on conditions",
    "unknown": "may load it",
}
Shape = tuple[int, int]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Data(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class When(_Data):
    """Which schemes a rule is about; a list that is left out fits all."""

    bits: list[int] | None = None
    dtypes: list[str] | None = None
    group_sizes: list[int] | None = None
    symmetric: list[bool] | None = None
    activation_bits: list[int] | None = None
    blocks: list[bool] | None = None
    static_inputs: list[bool] | None = None

    def fits(self, scheme: Scheme) -> bool:
        pairs = (
            (self.bits, scheme.bits),
            (self.dtypes, scheme.dtype),
            (self.group_sizes, scheme.group_size),
            (self.symmetric, scheme.symmetric),
            (self.activation_bits, scheme.activation_bits),
            (self.blocks, scheme.blocks),
            (self.static_inputs, scheme.static_inputs),
        )
        return all(allowed is None or value in allowed for allowed, value in pairs)


class Rule(_Data):
    """What a reader does with the schemes that fit `when`. `tiled`: the reader's multiples apply."""

    when: When
    ok: Ok
    because: str = ""
    tiled: bool = True


class MixedRule(_Data):
    """What a reader does with a model whose layers differ in one of these fields of Scheme."""

    differ: list[Literal["bits", "symmetric", "activation_bits", "group_size"]]
    any: When = When()
    ok: Ok
    because: str

    def fits(self, schemes: set[Scheme]) -> bool:
        differs = any(len({getattr(scheme, name) for scheme in schemes}) > 1 for name in self.differ)
        return differs and any(self.any.fits(scheme) for scheme in schemes)


class Outside(_Data):
    """What a reader does with a quantized module outside the blocks: the head or the embedding."""

    ok: Ok
    because: str


class Reader(_Data):
    """How one engine reads one format. Multiples are per tensor-parallel shard; blocks must fill the parts of a layer
    that is fused or split along its outputs; `outside` goes by a module's name, and `experts` says why those of a
    mixture are not read."""

    rules: list[Rule]
    outside: dict[str, Outside] = {}
    mixed: list[MixedRule] = []
    group_divides_shard: bool = False
    fused_agree: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    experts: str = ""


class Engine(_Data):
    """An engine, the version that was looked at, how ("run here" or "by loader rules"), and what it reads."""

    name: str
    title: str
    version: str
    evidence: str
    readers: dict[str, Reader]
    otherwise: str = "it does not read this format"
    uneven: bool = False
    """Whether it reads models whose layers differ in width."""

    @property
    def label(self) -> str:
        return f"{self.title} {self.version}".rstrip()


class Written(_Data):
    """What of a format this version writes, and why no more. Codes of `whole_words` fill 32-bit words both ways;
    modules named in `dense` (head, embedding) cannot be quantized."""

    when: When
    because: str
    whole_words: bool = False
    whole_groups: bool = False
    group_multiple: int = 1
    one_group_size: bool = False
    dense: list[str] = []
    always_asymmetric: bool = False


class Format(_Data):
    """What an on-disk format can hold, and what of it is written."""

    bits: list[int]
    dtypes: list[str] = ["int"]
    activation_bits: list[int]
    ragged_groups: bool
    writes: Written
    notes: list[str] = []


class Table(_Data):
    """The whole of compatibility.yaml."""

    formats: dict[str, Format]
    engines: list[Engine]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an engine will load a model, as one sentence that names version and evidence."""

    engine: str
    ok: Ok
    sentence: str


@cache
def table() -> Table:
    """compatibility.yaml, checked."""
    name = "compatibility.yaml"
    return Table.model_validate(parse_yaml(files("compress.core").joinpath(name).read_text("utf-8"), name).data)


def unwritable(scheme: Scheme, shape: Shape, format: str = "compressed-tensors") -> str | None:
    """Why a weight [out, in] cannot be written under `scheme`, None if it can."""
    held, width = table().formats[format], shape[1]
    kept = scheme.bits in held.bits and scheme.dtype in held.dtypes
    if not kept or scheme.activation_bits not in held.activation_bits:
        return f"{format} does not hold {scheme.name}"
    if not held.ragged_groups and scheme.group_size != -1 and width % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide its {width} input channels, and no reader takes the rest"
    return None


def refusals(schemes: Mapping[str, Scheme], shapes: Mapping[str, Shape], format: str) -> dict[str, str]:
    """Module -> why it cannot be written in `format`; empty if the whole model can. From headers alone."""
    writes = table().formats[format].writes
    found = {}
    for module, scheme in schemes.items():
        reason = unwritable(scheme, shapes[module], format) or _unwritten(writes, module, scheme, shapes[module])
        if reason is not None:
            found[module] = reason
    sizes = sorted({scheme.group_size for scheme in schemes.values()})
    if writes.one_group_size and len(sizes) > 1 and not found:
        found[next(iter(schemes))] = f"{format} has one group size for all layers, and these have {sizes}"
    return found


def _unwritten(writes: Written, module: str, scheme: Scheme, shape: Shape) -> str | None:
    rows, width = shape
    if not writes.when.fits(scheme):
        return writes.because.format(bits=scheme.bits, scheme=scheme.name)
    if writes.whole_words and (rows * scheme.bits % 32 or width * scheme.bits % 32):
        return f"{scheme.bits}-bit codes of {rows} x {width} do not fill whole 32-bit words"
    size = scheme.group_width(width)
    if writes.whole_groups and width % size:
        return f"groups of {size} do not divide its {width} input channels"
    if size % writes.group_multiple:
        return f"groups of {size} are no multiple of its blocks of {writes.group_multiple}"
    if module.rpartition(".")[2] in writes.dense:
        return "its readers expect one that is not quantized"
    return None


def as_written(schemes: Mapping[str, Scheme], format: str) -> dict[str, Scheme]:
    """The schemes that a reader of `format` will find where these were written."""
    if not table().formats[format].writes.always_asymmetric:
        return dict(schemes)
    return {module: replace(scheme, symmetric=False) for module, scheme in schemes.items()}


def formats_for(schemes: Mapping[str, Scheme], shapes: Mapping[str, Shape]) -> list[str]:
    """The formats that can hold the whole model as it is."""
    return [name for name in table().formats if not refusals(schemes, shapes, name)]


def preflight(
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, Shape],
    format: str = "compressed-tensors",
    *,
    tensor_parallel: int = 1,
    uneven: bool = False,
) -> list[Verdict]:
    """What each engine of the table will make of a model: `schemes` of its quantized modules, `shapes` [out, in];
    `uneven`: its layers differ in width."""
    return [
        _narrow_minded(engine)
        if uneven and not engine.uneven
        else _verdict(engine, schemes, shapes, format, tensor_parallel)
        for engine in table().engines
    ]


def unsettled(ways: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """What can be said of each engine while schemes are still to be chosen; `ways`: the verdicts of ways to choose."""
    return [_depending(verdicts) for verdicts in zip(*ways, strict=True)]


def _depending(verdicts: Sequence[Verdict]) -> Verdict:
    first = verdicts[0]
    if len({verdict.ok for verdict in verdicts}) == 1:
        return verdicts[-1]
    worst = min(reversed(verdicts), key=lambda verdict: _WORST_FIRST.index(verdict.ok))
    return Verdict(first.engine, "with-conditions", f"it depends on what is chosen; at worst, {worst.sentence}")


def _narrow_minded(engine: Engine) -> Verdict:
    why = "layers differ in width, which `compress level` mends where weights are dense"
    return Verdict(engine.name, "no", f"{engine.label} does not load it: {why} ({engine.evidence})")


def _verdict(
    engine: Engine, schemes: Mapping[str, Scheme], shapes: Mapping[str, Shape], format: str, shards: int
) -> Verdict:
    reader = engine.readers.get(format)
    label = engine.label
    if reader is None:
        return Verdict(engine.name, "no", f"{label} does not load it: {engine.otherwise} ({engine.evidence})")
    findings: dict[tuple[Ok, str], list[str]] = {}  # (verdict, reason) -> the layers that it is about, if a shape is
    for module, scheme in schemes.items():
        ok, because, is_shape = _layer(reader, module, scheme, shapes.get(module), format, shards)
        findings.setdefault((ok, because), []).extend([module] if is_shape else [])
    if reader.fused_agree:
        for names, parents in _disagreeing(schemes).items():
            findings["no", f"{names} are one layer there and must share one scheme"] = parents
    if reader.experts and (experts := [module for module in schemes if ".experts." in module]):
        findings["no", reader.experts] = experts
    present = set(schemes.values())
    mixed = next((rule for rule in reader.mixed if rule.fits(present)), None)
    if mixed is not None:
        findings[mixed.ok, mixed.because] = []
    said: set[Ok] = {"yes", *(ok for ok, _ in findings)}
    worst = min(said, key=_WORST_FIRST.index)
    reasons = "; ".join(
        _about(layers) + because for (ok, because), layers in findings.items() if ok == worst and because
    )
    verb = _VERBS[worst]
    return Verdict(engine.name, worst, f"{label} {verb}{': ' if reasons else ''}{reasons} ({engine.evidence})")


def _about(layers: list[str]) -> str:
    if not layers:
        return ""
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return f"{layers[0]}{more}: "


def _layer(
    reader: Reader, module: str, scheme: Scheme, shape: Shape | None, format: str, shards: int
) -> tuple[Ok, str, bool]:
    """Verdict, reason, and whether the reason is the layer's shape rather than its scheme."""
    if shape is not None and (reason := unwritable(scheme, shape, format)) is not None:
        return "no", reason, True
    outside = reader.outside.get(module.rpartition(".")[2])
    if outside is not None:
        return outside.ok, outside.because, True
    rule = next((rule for rule in reader.rules if rule.when.fits(scheme)), None)
    if rule is None:
        return "no", f"{scheme.name} is not read", False
    if rule.ok != "no" and shape is not None:
        reason = _misfit(reader, module, scheme, shape, shards, tiled=rule.tiled)
        if reason is not None:
            return "no", reason, True
    return rule.ok, rule.because.format(bits=scheme.bits, group=scheme.group_size), False


def _misfit(reader: Reader, module: str, scheme: Scheme, shape: Shape, shards: int, *, tiled: bool) -> str | None:
    """Why a layer does not fit a reader's limits. Layers that end a block's half are split along their inputs."""
    rows, width = shape
    split_inputs = module.rpartition(".")[2] in ("o_proj", "down_proj", "w2")
    part_width = width // shards if split_inputs else width
    part_rows = rows if split_inputs else rows // shards
    if (width if split_inputs else rows) % shards:
        return f"{width if split_inputs else rows} channels cannot be split over {shards} shards"
    if reader.group_divides_shard and scheme.group_size != -1 and part_width % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide a shard's {part_width} input channels"
    leaf = module.rpartition(".")[2]
    parts_outputs = not split_inputs and (shards > 1 or any(leaf in names for names in FUSED))
    if parts_outputs and part_rows % scheme.rows_per_scale:
        return f"blocks of {scheme.rows_per_scale} do not divide {part_rows} output channels of a fused or split layer"
    if tiled and part_width % reader.in_multiple:
        return f"a shard's {part_width} input channels are no multiple of {reader.in_multiple}"
    if tiled and part_rows % reader.out_multiple:
        return f"a shard's {part_rows} output channels are no multiple of {reader.out_multiple}"
    return None


def _disagreeing(schemes: Mapping[str, Scheme]) -> dict[str, list[str]]:
    """Names that engines fuse into one layer -> the modules where they do not share a scheme, or not all have one."""
    found: dict[str, list[str]] = {}
    for names in FUSED:
        parents = {module.rpartition(".")[0]: None for module in schemes if module.rpartition(".")[2] in names}
        for parent in parents:
            if len({schemes.get(f"{parent}.{name}") for name in names}) > 1:
                found.setdefault(", ".join(names), []).append(parent)
    return found


def markdown() -> str:
    """The table for docs/artifact-format.md: usual schemes by engine."""
    examples = [
        Scheme(4, 128),
        Scheme(4, 128, symmetric=False),
        Scheme(8, 128),
        Scheme(4, 128, activation_bits=8),
        Scheme(8, -1, activation_bits=8),
        Scheme(8, -1, activation_bits=8, static_inputs=True),
        Scheme(8, -1, dtype="fp8", activation_bits=8),
        Scheme(8, 128, dtype="fp8", activation_bits=8, blocks=True),
        Scheme(4, 32, dtype="mxfp4"),
        Scheme(4, 16, dtype="nvfp4"),
        Scheme(4, 16),
        Scheme(3, 128),
        Scheme(2, 64),
    ]
    engines = table().engines
    lines = ["| scheme | " + " | ".join(engine.label for engine in engines) + " |"]
    lines.append("|---" * (len(engines) + 1) + "|")
    for scheme in examples:
        kind = "blocks" if scheme.blocks else "groups"
        group = "per channel" if scheme.group_size == -1 else f"{kind} of {scheme.group_size}"
        label = f"{scheme.name}, {group}{'' if scheme.symmetric else ', asymmetric'}"
        verdicts = preflight({"layer": scheme}, {"layer": (1024, 1024)})
        lines.append(f"| {label} | " + " | ".join(verdict.ok for verdict in verdicts) + " |")
    lines.append("")
    lines += [f"- {engine.label}: {engine.evidence}." for engine in engines]
    return "\n".join(lines) + "\n"


def formats_markdown() -> str:
    """The table for docs/formats.md: the same 4-bit weights in every format that holds them, by engine."""
    engines = table().engines
    lines = ["| format | " + " | ".join(engine.label for engine in engines) + " |"]
    lines.append("|---" * (len(engines) + 1) + "|")
    for name, held in table().formats.items():
        dtypes = held.writes.when.dtypes
        scheme = Scheme(4, 128) if dtypes is None or "int" in dtypes else Scheme(4, 64, dtype="nf4")
        verdicts = preflight(as_written({"layer": scheme}, name), {"layer": (1024, 1024)}, name)
        label = name if scheme.dtype == "int" else f"{name}, {scheme.name}"
        lines.append(f"| {label} | " + " | ".join(verdict.ok for verdict in verdicts) + " |")
    return "\n".join(lines) + "\n"


def describe(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """Verdicts as plain data for --json."""
    return [{"engine": verdict.engine, "ok": verdict.ok, "sentence": verdict.sentence} for verdict in verdicts]

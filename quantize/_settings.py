"""What every weight quantization has in common: its scheme, what it leaves alone, and the plan that follows."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from compress.core.errors import UsageError
from compress.core.passes import Job, LayerPlan, Pass, Plan, WeightKind
from compress.core.patterns import Pattern, covered, unused
from compress.core.quantities import format_bytes
from compress.core.scheme import OWN_GROUPS, Scheme
from quantize._inputs import refuse_experts
from quantize._overrides import Activations, GroupSize, Override, SchemeName, make_scheme
from quantize._prepare import Prepare, order_problem, preparation, prepared_bytes, scheme_problem
from quantize.prepare._transform import Target, Transform

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from compress.core.statistics import Statistic
    from compress.core.tensors import QuantTensor
    from compress.core.walk import Block, Group, Site


_MADE = {"int": "whole numbers", "nf4": "nf4 alone", "fp8": "8-bit floats alone"}
_METHODS = {"fp8": "rtn and fp8", "nf4": "nf4", "mxfp4": "rtn and gptq", "nvfp4": "rtn and gptq"}


class WeightQuantization(Pass):
    """Settings shared by the methods that give every linear layer of the blocks codes."""

    kind: ClassVar = "quantize"
    takes: ClassVar = frozenset({"dense", "masked"})
    gives: ClassVar = "quantized"
    prepares: ClassVar[bool] = False
    """Whether the method takes its blocks from `blocks`, so that transforms of `prepare` reach it."""
    dtypes: ClassVar[tuple[str, ...]] = ("int",)
    """Of the codes that it can make."""
    usual_sizes: ClassVar[tuple[int, ...]] = (256, 128, 96, 64, 48, 32, 16, 8)
    """Group sizes to propose."""
    static: ClassVar[bool] = False
    """Whether it stores the scales of static inputs."""

    scheme: SchemeName = Field(
        "w4a16",
        description="weight and activation bits: w2a16 … w8a16, w4a8, w8a8; mxfp4a16, nvfp4a16 (rtn, gptq); "
        "fp8, fp8_block, fp8a16 (rtn)",
    )
    group_size: GroupSize | None = Field(
        None,
        description="input channels that share a scale; -1: per output channel. Default 128, or what the scheme has",
    )
    symmetric: bool = Field(
        True, description="no zero points; asymmetric artifacts need dequantize=True in transformers"
    )
    activations: Activations = Field(
        "dynamic",
        description="scales of rounded inputs (w8a8, fp8): per token as the model runs, or calibrated, one each",
    )
    clip: Literal["mse", "minmax"] = Field("mse", description="search each group's span, or take minimum to maximum")
    uneven: Literal["refuse", "channel", "smaller"] = Field(
        "refuse", description="layers whose width the group size does not divide: refuse, per channel, smaller groups"
    )
    ignore: tuple[Pattern, ...] = Field(
        (), description="layers left alone, by name pattern: '*.down_proj', 'model.layers.0.*'"
    )
    overrides: tuple[Override, ...] = Field(
        (), description="other schemes for some layers, the last match counts: - {layers: '*.v_proj', scheme: w8a16}"
    )
    head: SchemeName | None = Field(
        None, description="quantize the output head, too (w8a16 …), in groups as the layers; a tied one becomes its own"
    )
    embedding: SchemeName | None = Field(
        None, description="quantize the embedding, too (w8a16 …): stock loaders do not take it, llama.cpp and we do"
    )
    prepare: tuple[Prepare, ...] = Field(  # pyright: ignore[reportInvalidTypeForm]
        (), description="what is done to the weights first: - rotate: {}, - smoothquant: {alpha: 0.5}, - awq_scale: {}"
    )

    @field_validator("prepare")
    @classmethod
    def _ordered(cls, prepare: tuple[Prepare, ...]) -> tuple[Prepare, ...]:  # pyright: ignore[reportInvalidTypeForm]
        problem = f"{cls.__name__} does not compose with transforms" if prepare and not cls.prepares else None
        problem = problem or order_problem(prepare)
        if problem:
            raise ValueError(problem)
        return prepare

    def model_post_init(self, context: object) -> None:
        for scheme in (*self.schemes, *map(self._beside, filter(None, (self.head, self.embedding)))):
            if scheme.dtype not in self.dtypes:
                raise ValueError(f"this method makes {_MADE[self.dtypes[0]]}; {_method_for(scheme)}")
        for scheme in self.schemes:
            problem = scheme_problem(self.prepare, scheme)
            if problem:
                raise ValueError(problem)
        problem = self._static_problem() or self.own_problem()
        if problem:
            raise ValueError(problem)

    def refusal(self, kind: WeightKind) -> str | None:
        mixing = next((step.name for step in self.prepare if step.transform.mixes), None)
        if kind == "masked" and mixing:
            return f"takes dense weights behind prepare: {mixing}, which leaves no zero a zero"
        return super().refusal(kind)

    def _static_problem(self) -> str | None:
        if self.activations == "static" and not self.static:
            return "activations: static is for rtn, fp8 and gptq"
        if self.activations == "static" and not self._has_static:
            return f"activations: static is for w8a8 and fp8, not {self.scheme}"
        return None

    @property
    def _has_static(self) -> bool:
        return any(scheme.static_inputs for scheme in self.schemes)

    def own_problem(self) -> str | None:
        """What else is wrong with these settings, in a sentence."""
        return None

    @cached_property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme that layers get where their width allows it, and then that of each override."""
        settings = (self.scheme, self.group_size, self.symmetric, self.activations)
        found = [make_scheme(*settings)]
        for number, each in enumerate(self.overrides):
            try:
                found.append(each.scheme_in(*settings))
            except ValueError as error:
                raise ValueError(f"overrides[{number}]: {error}") from None
        return tuple(found)

    def wanted(self, name: str) -> Scheme:
        """The scheme of the layer `name` where its width allows it."""
        covering = [number for number, override in enumerate(self.overrides, start=1) if override.covers(name)]
        return self.schemes[covering[-1] if covering else 0]

    def scheme_for(self, name: str, width: int) -> Scheme | None:
        """The scheme of the layer `name` with `width` input channels, None if it is left alone."""
        if covered(name, self.ignore):
            return None
        return self.fitted(self.wanted(name), width)

    def outside_schemes(self, checkpoint: Checkpoint) -> dict[str, Scheme]:
        """Schemes of embedding and head, as far as they are asked for."""
        asked = {checkpoint.architecture.embedding: self.embedding, checkpoint.architecture.head: self.head}
        found = {}
        for module, name in asked.items():
            if name is not None:
                found[module] = self.fitted(self._beside(name), checkpoint.config["hidden_size"])
        return found

    def _beside(self, name: str) -> Scheme:
        """The scheme `name` of head or embedding, in groups as the layers have them."""
        return Override(layers="*", scheme=name).scheme_in(self.scheme, self.group_size, self.symmetric)

    def outside(self, job: Job) -> dict[str, QuantTensor]:
        from quantize._outside import round_outside

        schemes = self.outside_schemes(job.checkpoint)
        return {module: round_outside(job.checkpoint, module, scheme, self.clip) for module, scheme in schemes.items()}

    def fitted(self, wanted: Scheme, width: int) -> Scheme:
        """The scheme wanted, with the groups that `uneven` allows for this width."""
        size = wanted.group_size
        refused = self.uneven == "refuse" or wanted.dtype in OWN_GROUPS  # by name in `plan`, before any work
        if size == -1 or width % size == 0 or refused:
            return wanted
        smaller = max((s for s in range(8, size) if width % s == 0), default=-1) if self.uneven == "smaller" else -1
        return replace(wanted, group_size=smaller, blocks=wanted.blocks and smaller != -1)

    def chosen(self, group: Group) -> list[tuple[Site, Scheme]]:
        """The layers of a group that are not left alone, with their schemes."""
        sites = [(site, self.scheme_for(site.name, site.shape[1])) for site in group.sites]
        return [(site, scheme) for site, scheme in sites if scheme is not None]

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        """Exact bytes from headers; memory and minutes from the shapes."""
        from compress.core.formats import writer_for
        from compress.core.memory import estimate, rounding_bytes

        encoded_bytes = writer_for(self.formats[0]).encoded_bytes

        source_bytes = sum(info.bytes for info in checkpoint.tensors.values())
        checkpoint = self.view(checkpoint)
        layers = []
        outside = self.outside_schemes(checkpoint)
        for name, shape in self._layers(checkpoint, outside):
            info = checkpoint.info(f"{name}.weight")
            scheme = outside.get(name) or self.scheme_for(name, shape[1])
            size = info.bytes if scheme is None else encoded_bytes(shape, scheme, checkpoint.dtype)
            layers.append(LayerPlan(name, shape, info.bytes, size, scheme, "" if scheme else "ignored by the recipe"))
        self._refuse_ragged(layers)
        refuse_experts(layers)
        if not any(layer.scheme for layer in layers):
            raise UsageError("every layer is ignored: there is nothing to quantize", hint="shorten `ignore`")
        names = [layer.name for layer in layers]
        idle = [*unused("ignore", self.ignore, names), *unused("overrides", (o.layers for o in self.overrides), names)]
        added_bytes = sum(info.bytes for info in checkpoint.tensors.values()) - source_bytes
        bytes_out = source_bytes + added_bytes + sum(layer.bytes_out - layer.bytes_in for layer in layers)
        cost = estimate(checkpoint, calibration if self.calibrated else None, true_sequential=self.sequential)
        return Plan(
            layers=tuple(layers),
            bytes_out=bytes_out,
            peak_memory_bytes=max(
                cost.memory_bytes + prepared_bytes(checkpoint, self.first_steps),
                rounding_bytes(sum(layer.bytes_out for layer in layers if layer.name in outside)),
            ),
            disk_bytes=bytes_out + cost.spill_bytes,
            minutes=cost.minutes,
            notices=(*idle, *_untied(added_bytes)),
        )

    def after(self, checkpoint: Checkpoint) -> Checkpoint:
        from compress.core.to_be_quantized import ToBeQuantized

        checkpoint = self.view(checkpoint)
        outside = self.outside_schemes(checkpoint)
        found = {
            name: outside.get(name) or self.scheme_for(name, shape[1])
            for name, shape in self._layers(checkpoint, outside)
        }
        schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
        return ToBeQuantized(checkpoint, schemes, self.formats[0], self.transforms)

    @property
    def first_steps(self) -> tuple[Transform, ...]:
        """The transforms that come first, in order."""
        return tuple(step.transform for step in self.prepare)

    @property
    def transforms(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.prepare)

    @property
    def calibrated(self) -> bool:
        return self.needs_calibration or self._has_static or any(not step.reads for step in self.first_steps)

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        from compress.core.untied import UntiedCheckpoint

        if checkpoint.tied and (self.head or self.embedding):
            checkpoint = UntiedCheckpoint(checkpoint)
        for step in self.first_steps:
            checkpoint = step.view(checkpoint)
        return checkpoint

    def blocks(
        self,
        job: Job,
        collect: frozenset[type[Statistic]] = frozenset(),
        order: Literal["block", "groups"] = "block",
        keep: frozenset[str] = frozenset(),
    ) -> Iterator[Block]:
        """The blocks of a job, prepared: as `job.walk`, which gives them as the checkpoint has them."""
        from compress.core.statistics import AbsMax
        from quantize._rounding import CLIPS

        collect |= {AbsMax} if self._has_static else set()
        job = replace(job, checkpoint=self.view(job.checkpoint))
        target = Target(job.checkpoint, self.scheme_for, CLIPS[self.clip])
        return job.walk(collect, order, keep, self.calibrated, preparation(self.first_steps, target))

    @property
    def sequential(self) -> bool:
        """Whether statistics are gathered group by group (true-sequential) instead of once a block."""
        return False

    def _layers(self, checkpoint: Checkpoint, outside: Iterable[str]) -> list[tuple[str, tuple[int, int]]]:
        inside = (name for index in range(checkpoint.num_blocks) for name in checkpoint.sites(index))
        return [(name, checkpoint.matrix_shape(name)) for name in (*inside, *outside)]

    def _refuse_ragged(self, layers: list[LayerPlan]) -> None:
        ragged = [
            layer for layer in layers if layer.scheme and layer.shape[1] % layer.scheme.group_width(layer.shape[1])
        ]
        if not ragged:
            return
        first = ragged[0].scheme
        size = first.group_size if first else -1
        ragged = [layer for layer in ragged if layer.scheme and layer.scheme.group_size == size]
        widths = sorted({layer.shape[1] for layer in layers})
        hint = self.ragged_hint([s for s in self.usual_sizes if all(width % s == 0 for width in widths)])
        if first and first.dtype in OWN_GROUPS:
            hint = f"{first.name} has no others: give these layers another scheme in `overrides`, or `ignore` them"
        raise UsageError(
            f"group_size {size} does not divide the width of {len(ragged)} layers, e.g. {ragged[0].name} "
            f"({ragged[0].shape[1]} input channels)",
            where="quantize.group_size",
            hint=hint,
        )

    def ragged_hint(self, working: list[int]) -> str:
        """What to do about groups that do not divide a width; `working` are the usual sizes that divide every one."""
        return f"sizes that work: {', '.join(map(str, [*working, -1]))}; or set uneven: channel or smaller"


def _method_for(scheme: Scheme) -> str:
    if scheme.dtype == "int":
        return f"others make {scheme.name}"
    return f"methods for {scheme.name} are {_METHODS[scheme.dtype]}"


def _untied(added_bytes: int) -> list[str]:
    if not added_bytes:
        return []
    return [f"embedding and head are two tensors from here on, which adds {format_bytes(added_bytes)}"]

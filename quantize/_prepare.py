"""`prepare:` of a quantize stage: a list of transforms, each a file of quantize/prepare whose name is its word."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, create_model, model_serializer, model_validator

from compress.core.scheme import Scheme
from quantize import prepare as folder
from quantize.prepare._transform import Target, Transform

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.walk import Block, Preparation


class _OneKey(BaseModel):
    """A mapping of one word to its settings."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", json_schema_extra={"minProperties": 1, "maxProperties": 1}
    )

    @model_validator(mode="after")
    def _one_key(self) -> _OneKey:
        if len(self.model_fields_set) != 1:
            found = ", ".join(sorted(self.model_fields_set)) or "none"
            raise ValueError(f"should be one transform with its settings, like - rotate: {{}}; it has {found}")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {self.name: self.transform.model_dump(mode="json")}

    @property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def transform(self) -> Transform:
        return getattr(self, self.name)


@cache
def transforms() -> dict[str, type[Transform]]:
    """Name -> class of every transform."""
    names = [item.name for item in pkgutil.iter_modules(folder.__path__) if not item.name.startswith("_")]
    return {name: _transform_in(f"{folder.__name__}.{name}") for name in sorted(names)}


def _transform_in(module_name: str) -> type[Transform]:
    module = importlib.import_module(module_name)
    return next(
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Transform) and value.__module__ == module_name
    )


Prepare: type[_OneKey] = create_model(
    "Prepare",
    __base__=_OneKey,
    __doc__=_OneKey.__doc__,
    **{name: (found, None) for name, found in transforms().items()},
)


def order_problem(prepare: tuple[Any, ...]) -> str | None:
    """What is wrong with a list of transforms by itself."""
    names = [step.name for step in prepare]
    for name in names:
        if names.count(name) > 1:
            return f"{name} stands there twice"
    reading = [step.transform.reads for step in prepare]
    if reading != sorted(reading, reverse=True):
        name = next(step.name for step in prepare if step.transform.reads)
        return f"{name} is applied as weights are read: put it first"
    balancing = [step.name for step in prepare if step.transform.balances]
    if len(balancing) > 1:
        return f"{' and '.join(balancing)} move the same scales: choose one"
    return None


def scheme_problem(prepare: tuple[Any, ...], wanted: Scheme) -> str | None:
    """Which transform makes no sense for the scheme, and why."""
    for step in prepare:
        reason = step.transform.refusal(wanted)
        if reason:
            return f"prepare: {step.name} {reason}"
    return None


def prepared_bytes(checkpoint: Checkpoint, transforms: tuple[Transform, ...]) -> int:
    """Memory that transforms take beside what the method takes: a block's weights in fp32, and the statistics of all
    its groups at once (at most a wave of them)."""
    from compress.core._gather import WAVE_BYTES
    from compress.core.memory import groups_of

    kinds = [kind for transform in transforms for kind in transform.statistics()]
    most = 0
    for index in range(checkpoint.num_blocks) if transforms else ():
        groups = groups_of(checkpoint, index)
        statistics = sum(kind.bytes_for(group.width) for kind in kinds for group in groups)
        largest = max(sum(kind.bytes_for(group.width) for kind in kinds) for group in groups)
        weights = sum(4 * group.rows * group.width for group in groups)
        most = max(most, weights + max(largest, min(WAVE_BYTES, statistics)))
    return most


def preparation(transforms: tuple[Transform, ...], target: Target) -> Preparation | None:
    """What the walk does to each block before the method sees it; None if there is nothing to do."""
    from compress.core.walk import Preparation

    on_blocks = [transform for transform in transforms if not transform.reads]
    if not on_blocks:
        return None

    def apply(block: Block) -> None:
        for transform in on_blocks:
            transform.apply(block, target)

    return Preparation(frozenset().union(*(transform.statistics() for transform in on_blocks)), apply)

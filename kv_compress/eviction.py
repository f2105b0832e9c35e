"""Settings of eviction: which method, how much stays, and when."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from compress.core.errors import InputError, UsageError
from compress.core.quantities import parse_size
from kv_compress._budget import Points
from kv_compress.policy import ADDING_UP, KVPolicy

Method = Literal[
    "streaming",
    "key_norm",
    "keydiff",
    "random",
    "tova",
    "snapkv",
    "h2o",
    "expected_attention",
    "pyramidkv",
    "adakv",
]
UNEQUAL = frozenset({"pyramidkv", "adakv"})  # keep more in some layers or heads than in others
_OF_ONE_METHOD = {"beta": "pyramidkv", "alpha_safeguard": "adakv"}
Time = Literal["prefill_chunk", "prefill_end", "decode"]


class Budget(BaseModel):
    """How much of a sequence's keys and values stays at each point; exactly one of the three."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Annotated[int, Field(ge=1, strict=True)] | None = Field(None, description="slots per layer and head")
    ratio: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = Field(
        None, description="share of the tokens so far"
    )
    bytes: StrictInt | StrictStr | None = Field(
        None, description="of all layers together, as a number or a size such as 8MiB"
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in ("tokens", "ratio", "bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget is one of tokens, ratio and bytes, not {' and '.join(given) or 'none of them'}")
        if self.bytes is not None and parse_size(self.bytes) < 1:
            raise ValueError(f"bytes must be above 0, not {self.bytes!r}")
        return self


class EvictionSettings(BaseModel):
    """Which keys and values are dropped, so that their pages go back to the pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field("snapkv", description="how slots are scored; each is a file of this package")
    budget: Budget = Field(description="what stays at each point")
    sinks: int = Field(4, strict=True, ge=0, description="first tokens, which always stay")
    recent: int = Field(
        32, strict=True, ge=1, description="last tokens, which always stay; their queries are those observed"
    )
    every: int = Field(512, strict=True, ge=1, description="tokens from one point to the next")
    when: tuple[Time, ...] = Field(
        ("prefill_end", "decode"),
        description="prefill_chunk: every so many tokens of the prompt; prefill_end: at its end; decode: every so many "
        "generated tokens",
    )

    beta: float = Field(20.0, strict=True, ge=1, description="of pyramidkv: the last layer gets 1 / beta of the mean")
    alpha_safeguard: float = Field(
        0.2, strict=True, ge=0, le=1, description="of adakv: share of the budget that each head gets"
    )

    @model_validator(mode="after")
    def _sound(self) -> EvictionSettings:
        if not self.when or len(set(self.when)) < len(self.when):
            raise ValueError("when names at least one of prefill_chunk, prefill_end and decode, each once")
        if self.budget.tokens is not None and self.budget.tokens < self.least:
            raise ValueError(
                f"a budget of {self.budget.tokens} tokens is less than the {self.least} that always stay "
                f"(sinks {self.sinks}, recent {self.recent})"
            )
        for name, method in _OF_ONE_METHOD.items():
            if self.method != method and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of {method}, and the method is {self.method}: leave it out")
        if self.when == ("prefill_end",) and self.every != type(self).model_fields["every"].default:
            raise ValueError("every is from one point of prefill_chunk or decode to the next, and when names neither")
        return self

    @property
    def least(self) -> int:
        """Slots that stay in any case."""
        return self.sinks + self.recent

    @property
    def is_unequal(self) -> bool:
        """Whether layers and heads keep unequal numbers of slots: each then has pages of its own."""
        return self.method in UNEQUAL

    @property
    def words(self) -> str:
        """Method and budget in a few words: "snapkv 25%"."""
        budget = self.budget
        amount = f"{100 * budget.ratio:g}%" if budget.ratio else f"{budget.tokens or budget.bytes}"
        return f"{self.method} {amount}{' tokens' if budget.tokens else ''}"

    def require_windows(self, windows: Iterable[int | None]) -> None:
        """UsageError where a layer's sliding window is longer than the recent tokens that always stay: it would no
        longer hold consecutive positions."""
        longest = max((window for window in windows if window is not None), default=0)
        if longest > self.recent:
            raise UsageError(
                f"the model has layers with a sliding window of {longest} tokens, of which eviction must not drop "
                f"any, but only {self.recent} recent ones always stay",
                hint=f"set recent to {longest} or more",
            )

    def points(self, token_bytes: int, layers: int = 1, heads: int = 1) -> Points:
        """Where evictions happen, if a token takes `token_bytes` bytes over all of `layers` layers with `heads`
        key-value heads each (which matters to methods that keep unequal numbers). UsageError if the bytes of the
        budget are fewer than what always stays takes."""
        tokens = self.budget.tokens
        if self.budget.bytes is not None:
            wanted = parse_size(self.budget.bytes)
            tokens = wanted // token_bytes
            if tokens < self.least:
                raise UsageError(
                    f"a budget of {wanted:,} bytes holds {tokens:,} tokens of {token_bytes:,} bytes, less than the "
                    f"{self.least:,} that always stay",
                    hint=f"give at least {self.least * token_bytes:,} bytes, or lower sinks and recent",
                )
        return Points(
            prompt_every=self.every if "prefill_chunk" in self.when else 0,
            prompt_end="prefill_end" in self.when,
            decode_every=self.every if "decode" in self.when else 0,
            tokens=tokens,
            ratio=self.budget.ratio or 0.0,
            least=self.least,
            window={"none": 0, "last": 1, "recent": self.recent, "all": 0}[self._queries],
            seeded=self.method == "random",
            salt=hashlib.blake2b(self.model_dump_json().encode(), digest_size=16).hexdigest(),
            layers=layers if self.is_unequal else 0,
            heads=heads if self.is_unequal else 0,
            beta=self.beta if self.method == "pyramidkv" else 0.0,
            alone=self.counts,
        )

    @property
    def counts(self) -> bool:
        """Whether the attention that each slot gets is added up from its beginning on."""
        return self.method in ADDING_UP

    @property
    def _queries(self) -> str:
        return importlib.import_module(f"kv_compress.{self.method}").QUERIES


def eviction_of(policy: KVPolicy | None, where: str = "kv_cache") -> EvictionSettings | None:
    """What a policy, which stands at `where`, asks to drop. InputError names a setting that makes no sense."""
    if policy is None or policy.eviction is None:
        return None
    try:
        return EvictionSettings.model_validate(policy.eviction)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, ("eviction", *problem["loc"])))
        raise InputError(problem["msg"].removeprefix("Value error, "), where=f"{where}.{field}") from None

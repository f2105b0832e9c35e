"""Settings of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compress.core.errors import UsageError
from runtime.policies import POLICIES, check_weights, is_number


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """How much a step holds, who goes first, how careful admission is. UsageError names a field that is wrong."""

    token_budget: int = 2048  # tokens per step; also limits how many sequences run, one token each
    max_sequences: int = 256  # that run at a time
    max_queue: int = 1024  # that wait at a time
    policy: str = "fcfs"  # fcfs, priority or vtc
    chunked_prefill: bool = True  # off: prompts are computed whole, and a long one makes a step over the budget
    prefix_cache: bool = True
    headroom_tokens: int = 32  # by which all that run must still be able to grow after somebody is admitted
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # vtc: shares of tenants; 1 for those not named
    input_weight: float = 1.0  # vtc: cost of a prompt token
    output_weight: float = 2.0  # vtc: cost of a generated token

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_sequences", "max_queue"):
            require_whole(name, getattr(self, name), least=1)
        require_whole("headroom_tokens", self.headroom_tokens, least=0)
        for name in ("input_weight", "output_weight"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < float("inf"):
                raise UsageError(f"{name} must be a number of 0 or more, not {value!r}")
        for name in ("chunked_prefill", "prefix_cache"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.policy not in POLICIES:
            raise UsageError(f"there is no policy {self.policy!r}", hint=f"choose one of {', '.join(POLICIES)}")
        check_weights(self.tenant_weights)


def require_whole(name: str, value: object, *, least: int) -> None:
    """UsageError unless the value is a whole number of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, not {value!r}")

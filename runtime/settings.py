"""Settings of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compress.core.errors import UsageError
from runtime.policies import POLICIES, check_weights


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
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("headroom_tokens", "input_weight", "output_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.policy not in POLICIES:
            raise UsageError(f"there is no policy {self.policy!r}", hint=f"choose one of {', '.join(POLICIES)}")
        check_weights(self.tenant_weights)

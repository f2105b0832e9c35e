"""How much service each tenant got, and how far apart tenants are that all wait for more (VTC, arXiv 2401.00588)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from runtime.settings import SchedulerSettings

_FOLLOWED = 64  # tenants whose gaps are followed at a time; the matrix grows with the square


class ServiceMeter:
    """Service per tenant: weighted tokens, divided by the tenant's weight. Prompts count when they are admitted.

    `largest_gap` is the largest difference in it between two tenants over any window in which both waited: for a pair
    with d(t) = service_i(t) - service_j(t), the largest d(t2) - d(t1), found by keeping the smallest d of the window.
    """

    def __init__(self, settings: SchedulerSettings, capacity_tokens: int) -> None:
        self.service: dict[str, float] = {}
        self.largest_gap = 0.0
        self._settings = settings
        self._capacity_tokens = capacity_tokens
        self._longest_prompt = 0
        self._tenants: list[str] = []
        self._least = np.zeros((0, 0))  # [i, j]: smallest service[i] - service[j] since both wait

    @property
    def bound(self) -> float:
        """What the policy `vtc` holds `largest_gap` below: 2 max(w_p · longest prompt, w_q · tokens in memory)."""
        settings = self._settings
        smallest = min([1.0, *settings.tenant_weights.values()])
        prompt, memory = settings.input_weight * self._longest_prompt, settings.output_weight * self._capacity_tokens
        return 2 * max(prompt, memory) / smallest

    def serve(self, tenant: str, *, prompt: int = 0, generated: int = 0) -> float:
        """Note tokens of a prompt or generated ones; returns the service that they are."""
        settings = self._settings
        self._longest_prompt = max(self._longest_prompt, prompt)
        tokens = settings.input_weight * prompt + settings.output_weight * generated
        amount = tokens / settings.tenant_weights.get(tenant, 1.0)
        self.service[tenant] = self.service.get(tenant, 0.0) + amount
        return amount

    def observe(self, waiting: Iterable[str]) -> None:
        """Take note of the differences now, given the tenants that have requests waiting."""
        tenants = sorted(waiting)[:_FOLLOWED]
        if len(tenants) < 2 and len(self._tenants) < 2:
            return
        service = np.array([self.service.get(tenant, 0.0) for tenant in tenants])
        difference = service[:, None] - service[None, :]
        if tenants != self._tenants:
            self._follow(tenants, difference)
        np.minimum(self._least, difference, out=self._least)
        self.largest_gap = max(self.largest_gap, float((difference - self._least).max(initial=0.0)))

    def _follow(self, tenants: list[str], difference: np.ndarray) -> None:
        """Windows of pairs that waited before go on; the others begin now."""
        before = {tenant: index for index, tenant in enumerate(self._tenants)}
        stayed = [index for index, tenant in enumerate(tenants) if tenant in before]
        old = [before[tenants[index]] for index in stayed]
        least = difference.copy()
        least[np.ix_(stayed, stayed)] = self._least[np.ix_(old, old)]
        self._tenants, self._least = tenants, least

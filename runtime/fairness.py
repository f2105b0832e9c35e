"""How much service each tenant got, and how far apart tenants are that all wait for more (VTC, arXiv 2401.00588)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from runtime.settings import SchedulerSettings

_FOLLOWED = 64  # tenants whose gaps are followed at a time; the matrix grows with the square


class ServiceMeter:
    """Service per tenant: weighted tokens, divided by the tenant's weight. A prompt counts when it is admitted.

    `largest_gap` is the largest difference in service between two tenants over any window in which both waited. For a
    pair with d(t) = service_i(t) - service_j(t) it is the largest d(t2) - d(t1), found by keeping the smallest d of
    the window.

    `bound` is what the policy `vtc` holds that below, whatever comes. A tenant is admitted when its counter is the
    smallest. Until it is the smallest again, the counter grows by that prompt, and by what the tenant's running
    sequences still generate, at most what they may. So no two counters in line are further apart than the largest such
    sum, and over a window the gap is at most twice that. The paper's 2 max(w_p · longest prompt, w_q · tokens in
    memory) takes it that all those tokens are in memory at one time; sequences that end one after the other can exceed
    it.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self.service: dict[str, float] = {}
        self.largest_gap = 0.0
        self._settings = settings
        self._promised: dict[str, int] = {}  # tokens that a tenant's running sequences may still generate
        self._lead: dict[str, float] = {}  # by how much its counter may exceed the smallest, since it was admitted last
        self._largest_lead = 0.0
        self._tenants: list[str] = []
        self._least = np.zeros((0, 0))  # [i, j]: smallest service[i] - service[j] since both wait

    @property
    def bound(self) -> float:
        """What the policy `vtc` holds `largest_gap` below, given what has been admitted so far."""
        return 2 * self._largest_lead

    def cost(self, tenant: str, *, prompt: int = 0, generated: int = 0) -> float:
        """Service that so many tokens are to this tenant."""
        settings = self._settings
        tokens = settings.input_weight * prompt + settings.output_weight * generated
        return tokens / settings.tenant_weights.get(tenant, 1.0)

    def serve(self, tenant: str, *, prompt: int = 0, generated: int = 0) -> float:
        """Note tokens of a prompt or generated ones; returns the service that they are."""
        amount = self.cost(tenant, prompt=prompt, generated=generated)
        self.service[tenant] = self.service.get(tenant, 0.0) + amount
        if generated:
            self._promised[tenant] -= generated
        return amount

    def start(self, tenant: str, promised: int, *, prompt: int = 0, admitted: bool = True) -> None:
        """A sequence of this tenant runs that may generate `promised` tokens, and has to pay for `prompt` ones.

        Not `admitted` is one that a running sequence was forked into.
        """
        self._promised[tenant] = self._promised.get(tenant, 0) + promised
        if admitted:
            self._lead[tenant] = self.cost(tenant, prompt=prompt, generated=self._promised[tenant])
        else:
            self._lead[tenant] = self._lead.get(tenant, 0.0) + self.cost(tenant, generated=promised)
        self._largest_lead = max(self._largest_lead, self._lead[tenant])

    def stop(self, tenant: str, promised: int) -> None:
        """A sequence runs no longer that might have generated `promised` more tokens."""
        self._promised[tenant] -= promised

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

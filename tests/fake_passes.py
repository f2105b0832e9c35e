"""Passes with next to no maths, for tests of what surrounds a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.core.passes import Job, LayerPlan, Pass, Plan

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint


class Shrink(Pass):
    """Multiplies every linear layer of the blocks by `factor` and leaves it dense, in fp32."""

    kind: ClassVar = "prune"
    takes: ClassVar = frozenset({"dense"})
    gives: ClassVar = "dense"
    paper: ClassVar = "none"
    needs_calibration: ClassVar = False

    factor: float = 0.75
    plan_memory_bytes: int = 1 << 20
    plan_disk_bytes: int = 1 << 20

    def plan(self, checkpoint: Checkpoint, calibration: Tokens | None) -> Plan:
        layers = []
        for index in range(checkpoint.num_blocks):
            for name in checkpoint.sites(index):
                info = checkpoint.tensors[f"{name}.weight"]
                layers.append(LayerPlan(name, (info.shape[0], info.shape[1]), info.bytes, info.bytes))
        bytes_out = sum(info.bytes for info in checkpoint.tensors.values())
        return Plan(tuple(layers), bytes_out, self.plan_memory_bytes, self.plan_disk_bytes, 0.01)

    def run(self, job: Job) -> None:
        for block in job.walk(calibrate=False):
            for group in block.groups:
                for site in group.sites:
                    site.replace(site.weight * self.factor)
                    site.note(method="shrink")

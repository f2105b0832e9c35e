"""Round to nearest: every weight goes to the closest point of its group's grid. Needs no calibration data."""

from typing import ClassVar

from compress.core.passes import Job
from quantize._settings import WeightQuantization


class RTN(WeightQuantization):
    """Round-to-nearest with the span of each group searched for the least squared error (clip: mse)."""

    paper: ClassVar = "baseline; span search as in Nagel et al., 2021, arXiv:2106.08295, section 3.1"
    needs_calibration: ClassVar = False
    prepares: ClassVar = True
    dtypes: ClassVar = ("int", "fp8", "mxfp4", "nvfp4")
    static: ClassVar = True

    def run(self, job: Job) -> None:
        from quantize._inputs import input_scale
        from quantize._rounding import round_site, shared_divisor

        dtype = job.checkpoint.dtype

        for block in self.blocks(job):
            for group in block.groups:
                chosen = self.chosen(group)
                divisor = shared_divisor(chosen)
                for site, scheme in chosen:
                    inputs = input_scale(group, scheme, dtype)
                    round_site(site, scheme, dtype, self.clip, input_scale=inputs, divisor=divisor)

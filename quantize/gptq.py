"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): round column by column, later columns make up for the error."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compress.core.passes import Job
from compress.core.scheme import OWN_GROUPS
from quantize._settings import WeightQuantization


class GPTQ(WeightQuantization):
    """GPTQ with static activation order, searched spans and one factorisation per common input."""

    paper: ClassVar = "Frantar et al., 2022, arXiv:2210.17323"
    needs_calibration: ClassVar = True
    prepares: ClassVar = True
    dtypes: ClassVar = ("int", "mxfp4", "nvfp4")
    static: ClassVar = True

    damping: float = Field(0.01, gt=0, le=10, description="part of the Hessian's mean diagonal that is added to it")
    activation_order: bool = Field(True, description="round the channels with the largest inputs first (static groups)")
    order: Literal["block", "groups"] = Field(
        "groups", description="statistics of each group after the groups before it (true sequential), or once a block"
    )
    tokens_per_channel: float = Field(
        2.0, ge=0, description="an expert that saw fewer tokens than this times its width is rounded to nearest"
    )

    refit: Annotated[int, Field(ge=0, le=8)] | Literal["auto"] = Field(
        "auto", description="rounds of fitting scales to codes, then codes to scales; auto: 2 up to 3 bits, else none"
    )

    def own_problem(self) -> str | None:
        unfitted = all(scheme.dtype in OWN_GROUPS for scheme in self.schemes) and self.refit not in ("auto", 0)
        return f"refit fits scales that can be any number; those of {self.schemes[0].name} cannot" if unfitted else None

    @property
    def sequential(self) -> bool:
        return self.order == "groups"

    def run(self, job: Job) -> None:
        from compress.core.statistics import Hessian
        from quantize._gptq import Settings, solve_group

        settings = Settings(self.damping, self.activation_order, self.tokens_per_channel, self.clip, self.refit)
        for block in self.blocks(job, frozenset({Hessian}), self.order):
            for group in block.groups:
                chosen = self.chosen(group)
                if chosen:
                    solve_group(group, chosen, settings, job)
                group.release()

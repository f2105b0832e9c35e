"""An LLM that is looked at while it generates."""

from __future__ import annotations

import pytest
from torch import Tensor

from runtime import compaction, head_compaction
from runtime.llm import LLM
from runtime.small_steps import SmallSteps


class Watched:
    """Takes down, by sequence, logits by position and what each layer kept at each point: slots [G, kept], or a list of
    them for each head where counts are unequal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
        self.logits: dict[int, dict[int, Tensor]] = {}
        self.kept: dict[int, dict[int, list]] = {}
        self.through_c = 0  # whole steps of sequences with tables for each layer and head
        choices: list = []
        run, whole = llm.engine.runner.run, llm.engine.runner.whole

        def watched_run(step, wanted):
            choices.clear()
            found = run(step, wanted)
            ends = {row.sequence: row.start + len(row.tokens) for row in step.rows}
            for index, sequence in enumerate(found.sampled):
                self.logits.setdefault(sequence, {})[ends[sequence] - 1] = found.logits_NV[index].clone()
            for index, done in enumerate(step.compressions):
                of_layers = choices[index :: len(step.compressions)]
                self.kept.setdefault(done.sequence, {})[ends[done.sequence]] = of_layers
            return found

        def choosing(keep):
            def watched_keep(*given):
                choices.append(keep(*given))
                return choices[-1]

            return watched_keep

        monkeypatch.setattr(llm.engine.runner, "run", watched_run)
        monkeypatch.setattr(compaction, "keep", choosing(compaction.keep))
        monkeypatch.setattr(head_compaction, "keep_among", choosing(head_compaction.keep_among))
        if isinstance(whole, SmallSteps):
            covers = whole.covers

            def watched_covers(batch) -> bool:
                covered = covers(batch)
                self.through_c += covered and batch.by_head is not None
                return covered

            monkeypatch.setattr(whole, "covers", watched_covers)

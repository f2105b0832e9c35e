"""A huge bias in one channel of the keys: 4 bits for a token's channels lose everything else, 4 bits per channel do
not; and scores through the runtime are those of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.core.calibration import load_tokens
from compress.core.checkpoint import Checkpoint
from compress.core.recipe import Calibration
from compress.evaluate.scorers import RuntimeScorer
from kv_compress.policy import KVPolicy
from runtime.llm import LLM

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "compress" / "demo"
RECENT = 16
CHANNELS = KVPolicy.uniform("int4", 4, keys="channel", sinks=4, recent=RECENT)
CODED = 16 + 96 + RECENT  # from here on queries see the first coded page


def test_a_planted_bias_harms_no_key_per_channel(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import make_biased_model

        make_biased_model.make_model(DEMO / "model", tmp_path / "model", norm=900, layers=(0, 3))
    checkpoint = Checkpoint.open(tmp_path / "model")
    asked = Calibration(dataset=str(DEMO / "data" / "calibration.jsonl"), samples=1, length=224)
    tokens = load_tokens(asked, checkpoint, None)

    def logprobs(policy: KVPolicy | str) -> torch.Tensor:
        [found] = RuntimeScorer(checkpoint, "cpu", "exact", kv_cache=policy).logits(tokens)
        return found[0].log_softmax(-1)

    full, coded, token = logprobs("full"), logprobs(CHANNELS), logprobs("int4")
    assert torch.equal(full[:CODED], coded[:CODED])  # nothing was coded yet
    kl = [float((full.exp() * (full - each)).sum(-1)[CODED:].mean()) for each in (coded, token)]
    assert 0 < kl[0] < 0.01 and kl[1] > 0.1, kl

    llm = LLM(tmp_path / "model", numerics="exact", kv_cache=CHANNELS, token_budget=50, device="cpu")
    ids = tokens.ids[0].tolist()
    [completion] = llm.generate([ids], max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    told = torch.tensor([each.logprob for each in completion.prompt_logprobs if each is not None])
    wanted = coded[:-1].gather(1, tokens.ids[0][1:, None])[:, 0]
    assert torch.allclose(told, wanted, atol=1e-5)

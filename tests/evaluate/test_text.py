"""Text figures against plain loops in float64, and against transformers' own forward."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.core.calibration import Tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError
from compress.core.recipe import Evaluation, Perplexity
from compress.evaluate import evaluate
from compress.evaluate.text import measure_text
from compress.evaluate.windows import Windows


@pytest.fixture
def windows() -> Windows:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (5, 7), generator=generator)
    tokens = Tokens.of(ids, torch.tensor([7, 5, 2, 7, 6]))
    return Windows(tokens, np.array([1, 3, 1, 1, 2]), np.array([0, 0, 1, 2, 3]), 30, 90, {})


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(seed)) * 2


def batches(logits: torch.Tensor, size: int = 2) -> list[torch.Tensor]:
    return list(logits.split(size))


def plain(windows: Windows, original: torch.Tensor, artifact: torch.Tensor) -> tuple[float, float, list[float], float]:
    """Mean losses, KL of each position, share of flips: one position after another."""
    losses, kls, flips = [], [], []
    for row, (first, end) in enumerate(zip(windows.score_from, windows.lengths, strict=True)):
        for position in range(first, end):
            p, q = (torch.softmax(x[row, position - 1].double(), -1) for x in (original, artifact))
            target = windows.tokens.ids[row, position]
            losses.append((-p[target].log().item(), -q[target].log().item()))
            kls.append((p * (p.log() - q.log())).sum().item())
            flips.append(p.argmax() != q.argmax())
    return *np.mean(losses, axis=0), kls, np.mean(flips)


def test_figures_equal_plain_loops(windows):
    original, artifact = random_logits(2), random_logits(3)
    figures = measure_text(windows, batches(original), batches(artifact))
    loss_original, loss_artifact, kls, flips = plain(windows, original, artifact)
    assert len(kls) == windows.scored
    assert figures["perplexity"]["original"] == pytest.approx(math.exp(loss_original), rel=1e-5)
    assert figures["perplexity"]["artifact"] == pytest.approx(math.exp(loss_artifact), rel=1e-5)
    assert figures["perplexity"]["increase"] == pytest.approx(math.exp(loss_artifact - loss_original) - 1, rel=1e-4)
    assert figures["bits_per_byte"]["artifact"] == pytest.approx(loss_artifact / math.log(2) * 30 / 90, rel=1e-5)
    assert figures["kl"]["mean"] == pytest.approx(np.mean(kls), rel=1e-5)
    assert figures["kl"]["p99"] == pytest.approx(np.quantile(kls, 0.99), rel=1e-4)
    assert figures["flips"]["share"] == pytest.approx(flips)


def test_chunking_and_batching_change_nothing(windows, monkeypatch):
    original, artifact = random_logits(2), random_logits(3)
    whole = measure_text(windows, [original], [artifact])
    monkeypatch.setattr("compress.evaluate.text._CHUNK_VALUES", 22)
    pieces = measure_text(windows, batches(original, 1), batches(artifact, 1))
    assert pieces["kl"]["mean"] == pytest.approx(whole["kl"]["mean"], rel=1e-6)
    assert pieces["perplexity"]["artifact"] == pytest.approx(whole["perplexity"]["artifact"], rel=1e-6)


def test_a_model_does_not_differ_from_itself(windows):
    logits = random_logits(2)
    figures = measure_text(windows, batches(logits), batches(logits))
    assert figures["perplexity"]["increase"] == 0
    assert figures["perplexity"]["interval"] == (0, 0)
    assert figures["kl"] == {"mean": 0, "p99": 0, "interval": (0, 0)}
    assert figures["flips"]["share"] == 0


def test_the_interval_holds_the_figure_and_depends_on_the_seed_only(windows):
    streams = batches(random_logits(2)), batches(random_logits(3))
    first, again, other = (measure_text(windows, *streams, seed=seed) for seed in (0, 0, 1))
    low, high = first["perplexity"]["interval"]
    assert low < first["perplexity"]["increase"] < high
    assert first == again
    assert first["perplexity"]["interval"] != other["perplexity"]["interval"]


def test_without_original_only_the_artifacts_own_figures_are_there(windows):
    figures = measure_text(windows, None, batches(random_logits(3)))
    assert figures["perplexity"]["artifact"] > 1
    assert figures["perplexity"]["original"] is None
    assert figures["kl"] is None


def test_another_vocabulary_is_refused(windows):
    with pytest.raises(InputError, match="share one vocabulary"):
        measure_text(windows, [torch.zeros(5, 7, 12)], [torch.zeros(5, 7, 11)])


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    text = "\n\n".join(" ".join("abcdefghij"[(i * j) % 10] for j in range(3 + i)) for i in range(1, 12))
    (tmp_path / "t.txt").write_text(text)
    return Evaluation(perplexity=Perplexity(dataset=str(tmp_path / "t.txt"), window=32, documents=True))


def test_perplexity_equals_transformers_own_loss(tiny_models, evaluation):
    original, artifact = map(Checkpoint.open, tiny_models)
    figures = evaluate(original, artifact, evaluation, dtype="float32")
    assert figures["kl"]["mean"] > 0
    from compress.evaluate.windows import read_windows

    windows = read_windows(evaluation.perplexity, artifact, None)
    for name, folder in zip(("original", "artifact"), tiny_models, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        total = 0.0
        for row, length in zip(windows.tokens.ids, windows.lengths, strict=True):
            ids = row[None, :length]
            with torch.no_grad():
                total += model(ids, labels=ids).loss.item() * (length - 1)
        assert figures["perplexity"][name] == pytest.approx(math.exp(total / windows.scored), rel=1e-4)


def test_the_result_is_plain_deterministic_json(tiny_models, evaluation):
    original, artifact = map(Checkpoint.open, tiny_models)
    first, again = (evaluate(original, artifact, evaluation) for _ in range(2))
    assert json.dumps(first, allow_nan=False) == json.dumps(again, allow_nan=False)
    assert first["perplexity"]["artifact"] == float(f"{first['perplexity']['artifact']:.6g}")
    assert "/" not in first["protocol"]["text"]["text"]


def test_the_callers_random_state_is_untouched(tiny_models, evaluation):
    original, artifact = map(Checkpoint.open, tiny_models)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    evaluate(original, artifact, evaluation)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()

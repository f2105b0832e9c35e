"""The preflight where whole pages are coded, keys per channel: what it measures is what the runtime computes, and it is
proposed where it protects at fewer bytes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from compress.core.calibration import load_tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.recipe import Calibration
from compress.evaluate.scorers import RuntimeScorer
from kv_compress._kept import (
    Kept,
    fragment,
    numbers,
    points_of,
    policy_of,
    sequence_bytes,
    sizes_of,
    token_bytes,
    uniform,
    usual_points,
)
from kv_compress._preflight import budget_bytes, choose, choose_paged, propose, require_had, total_error
from kv_compress._statistics import Layer, choices, measure, token_losses, unmeasured
from kv_compress._trial import Trial
from kv_compress.stage import KVCache
from runtime.llm import LLM

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "compress" / "demo"
LONG = 1 << 14  # tokens of a sequence
PLANTED = (0, 3)


class Preflight:
    """A model with planted biases, a text whose rows find coded pages in either dtype, and what was measured."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        asked = Calibration(dataset=str(DEMO / "data" / "calibration.jsonl"), samples=2, length=224)
        self.tokens = load_tokens(asked, self.checkpoint, None)
        self.model = self.checkpoint.build_model(torch.float32)
        self.layers = measure(self.model, self.tokens, usual_points([(4, 32)] * 4, 2))
        self.trial = Trial(self.model, self.tokens, self.layers, 2, LONG)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Preflight:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import make_biased_model

        folder = tmp_path_factory.mktemp("planted") / "model"
        make_biased_model.make_model(DEMO / "model", folder, norm=900, layers=PLANTED)
    return Preflight(folder)


def test_keys_per_channel_protect_where_the_bytes_are_too_few_for_keys_per_token(planted: Preflight) -> None:
    """Per token a protected model has fp8 keys in two layers of four and takes 5.75 bits."""
    layers, budget = planted.layers, budget_bytes("5.6", planted.layers)
    best, *others = propose(layers, budget, 2, LONG)
    assert any(each.per_channel for each in best) and not any(each.paged for kept in others for each in kept)
    assert token_bytes(best, layers, 2, LONG) <= budget
    assert total_error(best, layers) < 0.1 * min(total_error(kept, layers) for kept in others)
    assert planted.trial("chosen", best).increase < 0.01
    assert all(planted.trial("per token", kept).increase > 0.05 for kept in others)
    for index in PLANTED:  # 4 bits for a token lose all but the bias
        assert layers[index].paged_key_errors["int4"] < 0.05 * layers[index].key_errors["int4", False]
    # The stage of the fragment means the same codes.
    stage = KVCache.model_validate_json(json.dumps(fragment(best)["kv_cache"])).policy(planted.checkpoint)
    policy = policy_of(best, layers)
    assert (stage.sinks, stage.recent) == (policy.sinks, policy.recent) == (4, 64)
    for ours, theirs in zip(policy.layers, stage.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (a.codec, a.rotate, a.per) == (b.codec, b.rotate, b.per)


def test_what_is_tried_is_what_the_runtime_computes(planted: Preflight) -> None:
    """Logits of exact numerics, whose pages are those of fp32, token for token."""
    mixed = [Kept("int4", "int4", paged=True), Kept("fp8", "int8", paged=True)] * 2
    for kept in (uniform("int4", planted.layers, paged=True), mixed):
        policy, points = policy_of(kept, planted.layers), points_of(kept, planted.layers, 4)
        assert points is not None and points.position(1) < 200
        scorer = RuntimeScorer(planted.checkpoint, "cpu", "exact", kv_cache=policy)
        logs = torch.cat(list(scorer.logits(planted.tokens))).log_softmax(-1)[:, :-1]
        wanted = -logs.gather(-1, planted.tokens.ids[:, 1:, None])[..., 0]
        found = torch.stack(token_losses(planted.model, planted.tokens, policy, points))
        plain = torch.stack(token_losses(planted.model, planted.tokens, None))
        assert (found - plain).abs()[:, points.position(1) :].max() > 0.01
        assert torch.allclose(found.float(), wanted, atol=2e-3)


def test_bytes_are_those_of_a_sequence_in_the_runtime(planted: Preflight) -> None:
    """A pool of so many bytes takes a sequence of the context's length, and one page less does not."""
    kept, context = uniform("int4", planted.layers, paged=True), 400
    points = points_of(kept, planted.layers, 4)
    assert points is not None
    page = 16 * 2 * 4 * 4 * 32 * 4  # tokens, sides, layers, heads, channels, bytes
    pages = sequence_bytes(points, planted.layers, 4, context) * context // page
    for more, fits in ((0, True), (-1, False)):
        llm = LLM(planted.checkpoint, numerics="exact", kv_cache=policy_of(kept, planted.layers), device="cpu",
                  kv_bytes=(pages + more) * page)  # fmt: skip
        assert (llm.kv_tokens >= context) == fits


def drawn_layer(seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(2, 16, torch.ones(2, 16), torch.ones(2, 16))
    for errors in (layer.key_errors, layer.value_errors):
        errors |= {choice: float(torch.rand(1, generator=generator)) for choice in choices(16)} | {("full", False): 0.0}
    for errors in (layer.paged_key_errors, layer.paged_value_errors):
        errors |= {codec: float(torch.rand(1, generator=generator)) for codec in ("int8", "int4", "fp8")}
        errors["full"] = 0.0
    return layer


@pytest.mark.parametrize(("bits", "context"), [(6.0, LONG), (8.0, LONG), (10.5, LONG), (9.5, 512)])
def test_the_choice_of_pages_is_the_best_of_all_that_the_runtime_takes(bits: float, context: int) -> None:
    layers = [drawn_layer(seed) for seed in (1, 2)]
    budget = budget_bytes(str(bits), layers)
    least = float("inf")
    codecs = ("full", "int8", "int4", "fp8")
    for names in product(codecs, repeat=4):
        kept = [Kept(*names[:2], paged=True), Kept(*names[2:], paged=True)]
        policy = policy_of(kept, layers)
        try:
            points = policy.coding_points(sizes_of(layers), 2, 16)
        except UsageError:
            continue
        taken = -(-points.peak(0, 0, context, context) // 16) * 16 * (2 * 2 * 2 * 16 * 2) / context
        if taken <= budget and any(each.per_channel for each in kept):
            least = min(least, total_error(kept, layers))
    found = choose_paged(layers, budget, 2, context)
    assert (total_error(found, layers) if found else float("inf")) == pytest.approx(least)


def test_a_text_that_is_too_short_proposes_no_pages(planted: Preflight) -> None:
    points = usual_points([(4, 32)] * 4, 2)
    assert points is not None
    short = load_tokens(
        Calibration(dataset=str(DEMO / "data" / "calibration.jsonl"), samples=1, length=points.position(1) + 1),
        planted.checkpoint, None,
    )  # fmt: skip
    layers = measure(planted.model, short, points)
    assert not any(layer.paged_key_errors for layer in layers)
    budget = budget_bytes("6", layers)
    assert propose(layers, budget, 2, LONG) == [choose(layers, budget, 2)]
    assert usual_points([(4, 2)], 2) is usual_points([(4, 3)], 2) is None  # nothing is gained, or not coded at all


def test_a_budget_that_nothing_fits_is_refused_by_sizes_alone() -> None:
    """2 layers of 4 heads of 16 channels, bf16: in 512 tokens 16 frames, the most at 511, of 16 tokens of 512 bytes."""
    shapes = unmeasured([(4, 16)] * 2)
    budget = budget_bytes("5.5", shapes)
    with pytest.raises(UsageError, match="the smallest takes 192 bytes a token, 6 bits a number") as refused:
        require_had(budget, shapes, 2, 512, paged=True)
    assert refused.value.where == "--budget"
    assert "takes 256 bytes a token, 8 bits a number in sequences of 512 tokens" in str(refused.value.hint)
    assert "down to 171 bytes a token, 5.34 bits a number with a longer --context" in str(refused.value.hint)
    require_had(budget, shapes, 2, LONG, paged=True)  # 173 bytes
    with pytest.raises(UsageError):
        require_had(budget, shapes, 2, LONG, paged=False)
    require_had(budget_bytes("6", shapes), shapes, 2, 512, paged=False)
    assert numbers(shapes) == 256


def test_what_sizes_refuse_no_choice_fits() -> None:
    layers = [drawn_layer(seed) for seed in (1, 2)]
    refused = 0
    for bits, context in product((5.5, 6.0, 6.5, 7.0), (100, 200, 512, LONG)):
        budget = budget_bytes(str(bits), layers)
        try:
            require_had(budget, layers, 2, context, paged=True)
        except UsageError:
            refused += 1
            assert choose_paged(layers, budget, 2, context) is None
            with pytest.raises(UsageError, match="no choice of precisions fits"):
                choose(layers, budget, 2)
    assert refused

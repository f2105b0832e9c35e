"""The preflight finds a huge bias in keys that full precision never notices, and protects the layers that have it."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.core.calibration import Tokens, load_tokens
from compress.core.checkpoint import Checkpoint
from compress.core.errors import UsageError
from compress.core.recipe import Calibration
from compress.evaluate.scorers import RuntimeScorer
from kv_compress._coding import round_trip
from kv_compress._kept import Kept, fragment, numbers, policy_of, token_bytes, uniform
from kv_compress._observed import Seen, observed
from kv_compress._preflight import _options, budget_bytes, choose
from kv_compress._statistics import Layer, choices, key_bias_norms, losses, measure
from kv_compress.stage import KVCache

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "compress" / "demo"
PLANTED = (0, 3)
BUDGET = 6.5


class Preflight:
    """A model with planted biases, the text, and what was measured."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        asked = Calibration(dataset=str(DEMO / "data" / "calibration.jsonl"), samples=2, length=96)
        self.tokens: Tokens = load_tokens(asked, self.checkpoint, None)
        self.model = self.checkpoint.build_model(torch.float32)
        self.layers = measure(self.model, self.tokens)

    def increase(self, kept: list[Kept]) -> float:
        changed = losses(self.model, self.tokens, policy_of(kept, self.layers))
        return math.expm1(changed - losses(self.model, self.tokens, None))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Preflight:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import make_biased_model

        folder = tmp_path_factory.mktemp("planted") / "model"
        make_biased_model.make_model(DEMO / "model", folder, norm=900, layers=PLANTED)
    return Preflight(folder)


def test_a_planted_bias_is_found_and_protected(planted: Preflight) -> None:
    layers = planted.layers
    norms = key_bias_norms(planted.checkpoint.tensors, planted.checkpoint.tensor)
    assert {layer for layer, norm in norms.items() if norm > 100} == set(PLANTED)
    assert norms[0] == pytest.approx(900, rel=0.01)
    assert {index for index, layer in enumerate(layers) if layer.key_spread > 50} == set(PLANTED)
    kept = choose(layers, budget_bytes(str(BUDGET), layers), 2)
    assert 8 * token_bytes(kept, layers, 2) <= BUDGET * numbers(layers)
    assert all(kept[index].keys in ("fp8", "full") for index in PLANTED)
    assert any("int4" in (each.keys, each.values) for each in kept)  # the budget is felt
    assert planted.increase(uniform("int4", layers)) > 0.1
    assert planted.increase(kept) < 0.01


def test_the_stage_and_the_runtime_do_what_was_tried(planted: Preflight) -> None:
    """The stage of the fragment means the same codes, and the runtime's coded pages cost what the trial said."""
    layers = planted.layers
    kept = choose(layers, budget_bytes(str(BUDGET), layers), 2)
    policy = policy_of(kept, layers)
    stage = KVCache.model_validate_json(json.dumps(fragment(kept)["kv_cache"])).policy(planted.checkpoint)
    for ours, theirs in zip(policy.layers, stage.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (a.codec, a.rotate) == (b.codec, b.rotate)
    for each in (policy, policy_of(uniform("int4", layers), layers)):
        scorer = RuntimeScorer(planted.checkpoint, "cpu", "exact", kv_cache=each)
        logits = torch.cat(list(scorer.logits(planted.tokens)))[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), planted.tokens.ids[:, 1:].flatten())
        assert float(loss) == pytest.approx(losses(planted.model, planted.tokens, each), abs=2e-3)


def test_the_planted_bias_changes_nothing_in_full_precision(planted: Preflight) -> None:
    before = losses(planted.model, planted.tokens, None)
    bias = planted.model.model.layers[0].self_attn.k_proj.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.zero_()
        without = losses(planted.model, planted.tokens, None)
        bias.copy_(kept)
    assert before == pytest.approx(without, abs=1e-4)


def test_errors_are_those_of_attention_on_coded_keys(planted: Preflight) -> None:
    """Against torch's own attention, over all rows of one layer."""
    seen: list[Seen] = []
    with torch.inference_mode(), observed(planted.model, lambda each: seen.append(each) if each.layer == 1 else None):
        for ids in planted.tokens.ids:
            planted.model(input_ids=ids[None])
    error = energy = 0.0
    for each in seen:
        coded = round_trip("int4", each.k_BGSD.transpose(1, 2)).transpose(1, 2)

        def attention(keys: torch.Tensor, each: Seen = each) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                each.q_BHTD, keys, each.v_BGSD, is_causal=True, enable_gqa=True
            )

        plain = attention(each.k_BGSD)
        error += float((attention(coded) - plain).square().sum())
        energy += float(plain.square().sum())
    assert planted.layers[1].key_errors["int4", False] == pytest.approx(error / energy, rel=1e-3)


def drawn_layer(seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(2, 16, torch.ones(2, 16), torch.ones(2, 16))
    for errors in (layer.key_errors, layer.value_errors):
        errors |= {choice: float(torch.rand(1, generator=generator)) for choice in choices(16)} | {("full", False): 0.0}
    return layer


@pytest.mark.parametrize("bits", [6.5, 8.0, 11.3])
def test_the_choice_is_the_best_of_all(bits: float) -> None:
    layers = [drawn_layer(seed) for seed in (1, 2)]
    budget = budget_bytes(str(bits), layers)
    fitting = [kept for kept in product(*map(_options, layers)) if token_bytes(kept, layers, 2) <= budget]

    def loss(kept: Any) -> float:
        return sum(each.error(layer) for each, layer in zip(kept, layers, strict=True))

    assert loss(choose(layers, budget, 2)) == pytest.approx(min(map(loss, fitting)))


def test_budgets_that_nothing_fits_are_refused() -> None:
    layers = [drawn_layer(1)]
    assert budget_bytes("4KiB", layers) == 4096
    with pytest.raises(UsageError, match="the smallest takes 48 bytes a token, 6 bits a number"):
        choose(layers, budget_bytes("4.5", layers), 2)
    with pytest.raises(UsageError, match="is none"):
        budget_bytes("900", layers)


def test_the_stage_says_what_most_layers_have_and_what_others_have_instead() -> None:
    kept = [Kept("fp8", "int4")] + [Kept("int4", "int4", rotate=True)] * 3 + [Kept("fp8", "int4")]
    assert fragment(kept) == {
        "kv_cache": {
            "precision": "int4",
            "rotate": True,
            "overrides": [{"layers": "0, 4", "precision": {"keys": "fp8", "values": "int4"}, "rotate": False}],
        }
    }


def test_words_of_pages_are_in_the_stage() -> None:
    kept = [Kept("int4", "int4", paged=True)] * 3 + [Kept("full", "int8", paged=True)]
    assert fragment(kept) == {
        "kv_cache": {
            "precision": "int4",
            "keys": "channel",
            "sinks": 4,
            "recent": 64,
            "overrides": [{"layers": "3", "precision": {"keys": "full", "values": "int8"}}],
        }
    }
    assert [each.words for each in (kept[0], kept[3])] == ["int4, keys per channel", "full / int8"]

"""The model that copies over long contexts: transformers and the runtime find what stands far back, and only that."""

import random
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORDS = ["the", "a", "boat", "sailed", "over", "grey", "water", "and", "nobody", "knew", "where", "it", "would", "land"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import make_induction_model

        folder = tmp_path_factory.mktemp("induction")
        make_induction_model.make_model(folder, heads=2, kv_heads=1, context_tokens=2048)
    return folder


def prompt(words: int, facts: dict[str, str], asked: str, seed: int = 0) -> str:
    """So many words drawn at random (of about five bytes), the facts between them, and the beginning of one fact."""
    drawn = random.Random(seed)
    text = [drawn.choice(WORDS) for _ in range(words)]
    for key, value in facts.items():
        text.insert(drawn.randrange(len(text)), f"The code of {key} is {value}.")
    return " ".join([*text, f"The code of {asked} is"])


FACTS = {"amber": "58213", "cobalt": "90417", "umbra": "77150"}


def test_transformers_finds_each_of_three_facts(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    for asked, value in FACTS.items():
        ids = tokenizer(prompt(120, FACTS, asked), return_tensors="pt").input_ids
        with torch.no_grad():
            made = network.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(made) == f" {value}."
        assert ids.shape[1] > 600


def test_the_runtime_finds_them_at_any_depth_and_invents_nothing(model: Path) -> None:
    from runtime.llm import LLM

    llm = LLM(model, max_sequences=4, max_length=2048, device="cpu")
    near = [prompt(120, FACTS, asked, seed) for seed in range(3) for asked in FACTS]
    far = prompt(340, {"amber": "58213"}, "amber")
    without = prompt(120, {key: FACTS[key] for key in ("cobalt", "umbra")}, "amber")
    *found, distant, made_up = llm.generate([*near, far, without], max_tokens=7)
    assert [each.text for each in found] == [f" {value}." for value in FACTS.values()] * 3
    assert distant.text == " 58213."
    assert made_up.text != " 58213."

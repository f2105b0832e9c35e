"""The bundled model: small, well-formed, exact in its text, and as good as its card says."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress.demo import EVALUATION, MODEL_DIR
from compress.demo.training.score import bits_per_byte
from compress.demo.training.text import read_stories, split_stories

MEBIBYTE = 2**20
TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def card_figure(row: str) -> float:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    return float(re.search(rf"\| [^|]*{row}[^|]* \| ([0-9.]+) \|", card).group(1))


def test_the_demo_stays_small():
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8_000_000
    files = [path for path in MODEL_DIR.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 12 * MEBIBYTE


def test_shape_and_dtype():
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.model_type == "llama"
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (256, 768, 4)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 32)
    assert (config.vocab_size, config.max_position_embeddings) == (2048, 512)
    assert config.tie_word_embeddings
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in weights
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_special_tokens_agree_with_the_config():
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert len(TOKENIZER) == config.vocab_size
    ids = (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert ids == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert len(set(ids)) == 3


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_decodes_to_itself(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    if not any(token in text for token in TOKENIZER.all_special_tokens):
        assert TOKENIZER.decode(ids[1:]) == text
        assert TOKENIZER.bos_token_id not in ids[1:]


def test_stories_are_short_in_tokens():
    text = json.loads(EVALUATION.read_text(encoding="utf-8").splitlines()[0])["text"]
    assert len(text.encode()) / len(TOKENIZER(text)["input_ids"]) > 3


def test_own_stories_score_what_the_card_says(model):
    own = [json.loads(line)["text"] for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    assert bits_per_byte(model, TOKENIZER, own) == pytest.approx(card_figure("own evaluation stories"), abs=2e-3)


def test_a_story_ends_by_itself(model):
    prompt = TOKENIZER("Once upon a time", return_tensors="pt")
    out = model.generate(**prompt, do_sample=False, max_new_tokens=400)[0]
    assert out[-1] == TOKENIZER.eos_token_id
    text = TOKENIZER.decode(out, skip_special_tokens=True)
    assert text.startswith("Once upon a time")
    assert text[-1] in '.!?"'


@pytest.mark.data
def test_held_out_stories_score_about_what_the_card_says_of_all(model, shared_data):
    files = [shared_data / "text" / f"tinystories-{letter}.txt" for letter in "abc"]
    stories = [story for path in files for story in read_stories(path)]
    _, held_out = split_stories(stories, held_out_share=0.05, seed=0)
    score = bits_per_byte(model, TOKENIZER, held_out[:40])
    assert score <= 1.35
    assert score == pytest.approx(card_figure("held out from training"), abs=0.05)

"""The parts of the demo model's training: text, stream, optimizer, and a run that resumes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.demo.training.loop import Settings, TokenStream, Trainer
from compress.demo.training.muon import Muon, orthogonalize
from compress.demo.training.text import read_stories, split_stories
from compress.demo.training.tokenizer import train_tokenizer

FILLER = "and then they went on walking through the tall green grass until it was time to go home. " * 2 + "The end."


def story(number: int) -> str:
    words = " ".join(f"word{number}x{i}" for i in range(30))
    return f"Story {number}. {words}. The end of story {number}."


STORIES = [story(number) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(STORIES, vocabulary=512, context=512)


def test_stories_are_read_with_and_without_separators(tmp_path):
    first, second = f"One day Ann left.\n\nHer dog, {FILLER}", f"Ben stayed. {FILLER}"
    separated, packed = tmp_path / "separated.txt", tmp_path / "packed.txt"
    separated.write_text(f"{first}\n<|endoftext|>\n{second}\n<|endoftext|>\ntoo short\n", encoding="utf-8")
    packed.write_text(f"{first}\n{second}\n", encoding="utf-8")
    assert read_stories(separated) == [first, second] == read_stories(packed)


def test_the_split_is_seeded_and_whole():
    training, held_out = split_stories([*STORIES, STORIES[3].upper()], 0.25, seed=1)
    assert (training, held_out) == split_stories([*STORIES, STORIES[3].upper()], 0.25, seed=1)
    assert held_out != split_stories(STORIES, 0.25, seed=2)[1]
    assert len(held_out) == 10
    assert sorted(text.lower() for text in training + held_out) == sorted(text.lower() for text in STORIES)


@pytest.mark.parametrize("seed", range(8))
def test_a_near_copy_of_a_held_out_story_is_not_trained_on(seed):
    near_copy = STORIES[0].replace("word0x0 ", "other ")
    training, held_out = split_stories([*STORIES, near_copy], 0.5, seed)
    if {STORIES[0], near_copy} & set(held_out):
        assert {STORIES[0], near_copy}.isdisjoint(training)
    else:
        assert {STORIES[0], near_copy} <= set(training)


def test_the_stream_reads_the_same_tokens_from_any_position(tokenizer):
    stream = TokenStream(tokenizer, STORIES, seed=0)
    length = stream.epoch_tokens
    whole = stream.read(0, 2 * length)
    assert torch.equal(stream.read(length - 50, 100), whole[length - 50 : length + 50])
    assert not torch.equal(whole[:length], whole[length:])
    assert torch.equal(whole[:length].sort().values, whole[length:].sort().values)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_orthogonalize_keeps_directions_and_levels_sizes(shape):
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(shape, generator=generator)
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    sizes = torch.linalg.svdvals(orthogonalize(update))
    assert sizes.min() > 0.5
    assert sizes.max() < 1.3
    aligned = (left.mT @ orthogonalize(update) @ right.mT).diagonal()
    assert torch.allclose(aligned.sort().values, sizes.sort().values, atol=1e-4)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1, momentum=0.9, weight_decay=0.0)


def new_trainer(tokenizer, steps: int, workers: int = 1) -> Trainer:
    settings = Settings(
        steps=steps, batch_tokens=256, short_row_tokens=64, long_row_tokens=128, evaluate_every_steps=2, warmup_steps=1
    )
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return Trainer(model, tokenizer, TokenStream(tokenizer, STORIES[4:], seed=0), STORIES[:4], settings, workers)


def test_a_resumed_run_ends_in_the_same_weights(tokenizer, tmp_path):
    whole = new_trainer(tokenizer, steps=4)
    whole.train(tmp_path / "whole.pt")
    first = new_trainer(tokenizer, steps=4)
    batches = first._batches
    first._batches = lambda: (batch for _, batch in zip(range(2), batches(), strict=False))
    first.train(tmp_path / "half.safetensors")
    second = new_trainer(tokenizer, steps=4)
    second.resume(tmp_path / "half.safetensors")
    second.train(tmp_path / "half.safetensors")
    assert second.step == whole.step == 4
    assert second.best_bits == whole.best_bits < 20
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_two_workers_add_up_to_the_same_gradients(tokenizer):
    losses = []
    for workers in (1, 2):
        trainer = new_trainer(tokenizer, steps=4, workers=workers)
        losses.append([trainer._train_step(*batch) for batch in trainer._batches()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]

"""Vocabulary: which tokens go, that text is written as before with those that stay, and that later stages follow."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compress.core.checkpoint import Checkpoint
from compress.core.errors import InputError, UsageError
from compress.core.events import Event, Progress
from compress.core.files import sha256_file
from compress.core.recipe import parse_recipe
from compress.core.verify import verify
from compress.pipeline import RunOptions, RunResult, plan, run
from prune._tokenizer import BYTES
from prune._tokenizer import Tokenizer as Rewritten
from runtime.llm import LLM
from tests.conftest import TinyModel
from tests.runtime._reference import reference_greedy

STORY = "A small boat sailed to the island and a bird sat on its mast all day. The boat and the bird sailed home. "
OTHER = "zymurgy quixotic vexing jukebox zymurgy quixotic vexing jukebox "
ROWS = 320  # of the tiny model's embedding


def byte_level() -> Tokenizer:
    """256 bytes, merges of two kinds of text, then special tokens; 16 rows of the model have none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=302, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([STORY, OTHER], trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Byte-pair encoding with bytes for what it does not know, as Llama-2 has it."""
    bytes_first = ["<unk>", *sorted(BYTES)]
    merges = [("▁", "a"), ("l", "l"), ("▁a", "ll"), ("b", "o"), ("bo", "a"), ("boa", "t"), ("o", "at"), ("a", "t")]
    tokens = dict.fromkeys([*bytes_first, *"▁abdloty", "é", *("".join(pair) for pair in merges), "oat"])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    pieces = ["▁boat", "▁all", "boat", "at", "▁", "b", "o", "a", "t", "l", "é"]
    entries = [
        ("<unk>", 0.0),
        *((token, -20.0) for token in sorted(BYTES)),
        *((p, -float(len(pieces))) for p in pieces),
    ]
    tokenizer = Tokenizer(models.Unigram(entries, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_pieces() -> Tokenizer:
    pieces = ["[UNK]", "[CLS]", "boat", "bo", "##at", "all", *"abdlot", *(f"##{letter}" for letter in "abdlot")]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[CLS]", 1), ("[CLS]", 1))
    return tokenizer


def without(tokenizer: Tokenizer, *gone: str) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer without some tokens (and without what is made of them), and the new id of each that stays."""
    data = json.loads(tokenizer.to_str())
    found = Rewritten(data, "tokenizer.json")
    removed = {tokenizer.token_to_id(token) for token in gone}
    assert not removed & found.always
    kept = sorted(token for token in found.ids if not found.closure(token) & removed)
    new = {token: place for place, token in enumerate(kept)}
    return Tokenizer.from_str(json.dumps(found.renumbered(new))), new


@pytest.mark.parametrize(
    ("make", "gone"),
    [
        (byte_level, ("bo", "zy", "Ġb")),
        (sentence_pieces, ("boa", "é", "d", "oat")),
        (unigram, ("▁boat", "é", "o")),
        (word_pieces, ("boat", "all")),
    ],
)
def test_text_of_tokens_that_stay_is_cut_as_before(make: Any, gone: tuple[str, ...]) -> None:
    before = make()
    known = tuple(token for token in gone if before.token_to_id(token) is not None)
    after, new = without(before, *known)
    assert after.get_vocab_size() == len(new) < before.get_vocab_size()
    draw = random.Random(0)
    words = ["boat", "all", "a", "ball", "bo", "oat", "tall boat", "zymurgy", "bird", "sailed", "é", "d"]
    same = other = 0
    for _ in range(400):
        text = " ".join(draw.choices(words, k=3))
        old, found = before.encode(text).ids, after.encode(text).ids
        if all(token in new for token in old):
            assert found == [new[token] for token in old], text
            same += 1
        else:
            assert found != old
            other += 1
    assert same > 10 and other > 10


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_any_text_can_still_be_written(make: Any) -> None:
    before = make()
    found = Rewritten(json.loads(before.to_str()), "tokenizer.json")
    kept = sorted(found.always)
    after = Tokenizer.from_str(json.dumps(found.renumbered({token: place for place, token in enumerate(kept)})))
    assert after.get_vocab_size() < 262
    draw = random.Random(1)
    for _ in range(200):
        points = [draw.choice([draw.randrange(32, 127), draw.randrange(160, 0xD800), draw.randrange(0xE000, 0x1FFFF)])]
        points += [draw.choice([draw.randrange(32, 127), draw.randrange(0x10000, 0x1FFFF)]) for _ in range(8)]
        text = "".join(map(chr, points))
        assert after.decode(after.encode(text).ids) == before.decode(before.encode(text).ids) == text


def test_what_is_merged_on_the_way_is_known() -> None:
    tokenizer = sentence_pieces()
    found = Rewritten(json.loads(tokenizer.to_str()), "tokenizer.json")
    parts = {tokenizer.id_to_token(token) for token in found.closure(tokenizer.token_to_id("boat"))}
    assert parts == {"boat", "boa", "bo", "b", "o", "a", "t"}
    parts = {tokenizer.id_to_token(token) for token in found.closure(tokenizer.token_to_id("oat"))}
    assert parts == {"oat", "o", "at", "a", "t"}


def test_tokenizers_that_cannot_be_rewritten_are_named() -> None:
    words = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    with pytest.raises(InputError, match="tokenizers of kind WordLevel are not rewritten"):
        Rewritten(words, "tokenizer.json")


# the whole way


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModel) -> Path:
    """A tied model whose tokenizer has special tokens in the end, and fewer tokens than the model has rows."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    tokenizer = byte_level()
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        path = model / name
        data = json.loads(path.read_text()) | {
            "bos_token_id": start,
            "eos_token_id": [end, start],
            "pad_token_id": None,
        }
        data |= {"suppress_tokens": [0, 300]} if name.startswith("generation") else {}
        path.write_text(json.dumps(data))
    (model / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "text.txt").write_text(STORY * 12)
    return tmp_path


def compress(place: Path, *stages: dict[str, Any], **more: Any) -> RunResult:
    calibration = {"dataset": "text.txt", "samples": 4, "length": 16} | more.pop("calibration", {})
    data = {"model": "model", "calibration": calibration, "stages": list(stages), **more}
    return run(parse_recipe(data, base_folder=place), RunOptions(place / f"out{len(list(place.glob('out*')))}"))


def vocabulary(**settings: Any) -> dict[str, Any]:
    return {"prune": {"method": "vocabulary", **settings}}


def kept_tokens(before: Any, after: Any) -> dict[int, int]:
    """Old id -> new id, by the tokens' text."""
    new = after.get_vocab()
    return {number: new[token] for token, number in before.get_vocab().items() if token in new}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_logits_of_what_stays_are_those_of_before(family: str, place: Path, tiny_model: TinyModel) -> None:
    if family != "llama":
        weights = tiny_model(family)
        config = json.loads((weights / "config.json").read_text())
        mine = json.loads((place / "model" / "config.json").read_text())
        config |= {key: mine[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (place / "model" / "config.json").write_text(json.dumps(config))
        shutil.copy(weights / "model.safetensors", place / "model")
    result = compress(place, vocabulary(keep=280))
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (place / "model", result.artifact))
    new = kept_tokens(before, after)
    assert len(after) == len(new) == 280  # rows without a token went first
    text = "A bird sat all day"
    old_ids, ids = before(text)["input_ids"], after(text)["input_ids"]
    assert ids == [new[token] for token in old_ids]
    assert len(ids) < len(text)
    with torch.inference_mode():
        whole = AutoModelForCausalLM.from_pretrained(place / "model")(torch.tensor([old_ids])).logits
        small = AutoModelForCausalLM.from_pretrained(result.artifact)(torch.tensor([ids])).logits
    order = sorted(new, key=new.__getitem__)
    assert float((small - whole[..., order]).abs().max()) < 1e-5
    assert after.decode(after("Zürich 東京 🦊\n\t x")["input_ids"], skip_special_tokens=True) == "Zürich 東京 🦊\n\t x"
    assert verify(result.artifact, source=place / "model").ok
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    found = LLM(result.artifact, numerics="exact").generate([ids], max_tokens=8, ignore_eos=True)
    assert [list(answer.token_ids) for answer in found] == reference_greedy(result.artifact, [ids], 8)


def test_ids_are_new_wherever_they_are_named(place: Path) -> None:
    result = compress(place, vocabulary(keep=272))
    tokenizer = AutoTokenizer.from_pretrained(result.artifact)
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert (start, end) == (270, 271)
    for name in ("config.json", "generation_config.json"):
        data = json.loads((result.artifact / name).read_text())
        assert (data["bos_token_id"], data["eos_token_id"], data["pad_token_id"]) == (start, [end, start], None)
    assert json.loads((result.artifact / "generation_config.json").read_text())["suppress_tokens"] == [0]
    assert json.loads((result.artifact / "config.json").read_text())["vocab_size"] == 272
    added = json.loads((result.artifact / "tokenizer.json").read_text())["added_tokens"]
    assert [token["id"] for token in added] == [start, end]
    assert tokenizer("bird")["input_ids"][0] == start
    assert not (result.artifact / "merges.txt").exists()


def test_removing_nothing_changes_nothing(place: Path) -> None:
    result = compress(place, vocabulary(keep=ROWS))
    before, after = Checkpoint.open(place / "model"), Checkpoint.open(result.artifact)
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.tensors)
    old, new = (json.loads((folder / "tokenizer.json").read_text()) for folder in (before.folder, after.folder))
    assert old == new


def test_frequent_tokens_stay(place: Path) -> None:
    result = compress(place, vocabulary(keep=288))
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (place / "model", result.artifact))
    new = kept_tokens(before, after)
    assert all(token in new for token in before(STORY)["input_ids"])
    assert not all(token in new for token in before(OTHER)["input_ids"])


def test_later_stages_see_the_new_ids(place: Path) -> None:
    quantize = {"quantize": {"method": "gptq", "scheme": "w8a16", "group_size": 16}}
    both = compress(place, vocabulary(keep=272), quantize)
    first = compress(place, vocabulary(keep=272))
    shutil.rmtree(place / "model")
    shutil.copytree(first.artifact, place / "model")
    second = compress(place, quantize)
    for name, info in Checkpoint.open(second.artifact).tensors.items():
        other = Checkpoint.open(both.artifact)
        assert torch.equal(Checkpoint.open(second.artifact).tensor(info.name), other.tensor(name)), name


def test_token_files_are_translated_or_refused(place: Path) -> None:
    quantize = {"quantize": {"method": "gptq", "scheme": "w8a16", "group_size": 16}}
    ids = torch.tensor(AutoTokenizer.from_pretrained(place / "model")(STORY * 4)["input_ids"])
    save_file({"input_ids": ids[:64].view(4, 16).to(torch.int32)}, place / "ids.safetensors")
    file = {"dataset": "ids.safetensors"}
    result = compress(place, vocabulary(keep=288, min_count=1), quantize, calibration=file)
    assert result.summary["plan"]["bytes"] == result.summary["measured"]["bytes"]
    with pytest.raises(InputError, match=r"token \d+ is removed from the vocabulary, but occurs in the token ids"):
        compress(place, vocabulary(keep=264), quantize, calibration=file)


def test_a_stop_and_a_resume_give_the_same_bytes(place: Path) -> None:
    data = {
        "model": "model",
        "calibration": {"dataset": "text.txt", "samples": 4, "length": 16},
        "stages": [vocabulary(keep=272), {"quantize": {"method": "gptq", "scheme": "w8a16", "group_size": 16}}],
    }
    recipe = parse_recipe(data, base_folder=place)

    def contents(folder: Path) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}

    whole = run(recipe, RunOptions(place / "whole"))
    for stop_at in (2, 5):
        seen = []

        def stop(event: Event, stop_at: int = stop_at, seen: list[int] = seen) -> None:
            if isinstance(event, Progress) and event.stage == "walk":
                seen.append(event.done)
                if len(seen) == stop_at:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(recipe, RunOptions(place / f"stopped{stop_at}"), stop)
        again = run(recipe, RunOptions(place / f"stopped{stop_at}"))
        assert contents(again.artifact) == contents(whole.artifact)


@pytest.mark.parametrize("through", ["runtime", "transformers"])
def test_only_what_counts_by_bytes_is_compared(through: str, place: Path) -> None:
    evaluate = {"perplexity": {"dataset": "text.txt", "window": 16}, "through": through}
    result = compress(place, vocabulary(keep=264), evaluate=evaluate)
    found = result.summary["evaluation"]
    assert found["kl"] is None and found["flips"] is None
    assert found["perplexity"]["original"] is None and found["perplexity"]["increase"] is None
    assert found["perplexity"]["artifact"] > 1
    assert found["bits_per_byte"]["original"] > 0 and found["bits_per_byte"]["artifact"] > 0
    assert any("different vocabularies" in notice for notice in result.summary["notices"])
    assert "only bits per byte are compared" in (result.report_folder / "report.html").read_text()


def test_what_cannot_work_is_refused(place: Path) -> None:
    with pytest.raises(UsageError, match=r"256 of 320 tokens would stay, but 258 must"):
        compress(place, vocabulary(keep=256))
    with pytest.raises(UsageError, match=r"\d+ tokens must stay because of min_count 1, but only 264 may"):
        recipe = parse_recipe(
            {
                "model": "model",
                "calibration": {"dataset": "text.txt", "samples": 4, "length": 16},
                "stages": [vocabulary(keep=264, min_count=1)],
            },
            base_folder=place,
        )
        plan(recipe, RunOptions(place / "planned"))
    (place / "model" / "tokenizer.json").unlink()
    ids = torch.zeros(4, 16, dtype=torch.int32)
    save_file({"input_ids": ids}, place / "ids.safetensors")
    with pytest.raises(InputError, match=r"the model has no tokenizer.json, and only that is rewritten"):
        compress(place, vocabulary(keep=264), calibration={"dataset": "ids.safetensors"})

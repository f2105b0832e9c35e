"""Calibration: what is read, how it is sampled, what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from compress.core.calibration import Encoder, Tokens, load_tokens, read_tokens, save_tokens, tokenizer_sha256
from compress.core.errors import InputError
from compress.core.recipe import Calibration

WORDS = ["<unk>", "<s>", "</s>", "user", "a", "b", "c", "d", "e", "f"]


def asked(dataset: str, **settings) -> Calibration:
    return Calibration(dataset=dataset, **{"samples": 4, "length": 8, **settings})


@pytest.fixture
def checkpoint(tmp_path: Path) -> SimpleNamespace:
    folder = tmp_path / "model"
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": len(WORDS), "num_hidden_layers": 1}
    config |= {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(folder=folder, config=config)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return path.name


def stories(count: int = 30) -> str:
    return "<|endoftext|>".join("a b c d e f" for _ in range(count))


def test_txt_is_packed_to_exact_size_with_the_plain_encodes_special_tokens(tmp_path, checkpoint):
    name = write(tmp_path / "t.txt", stories())
    tokens = load_tokens(asked(name), checkpoint, tmp_path)
    assert tokens.ids.shape == (4, 8)
    assert tokens.ids.dtype == torch.int64
    assert tokens.lengths is None
    assert tokens.ids.flatten().tolist()[:14] == [1, 4, 5, 6, 7, 8, 9] * 2


@pytest.mark.parametrize(
    ("special_tokens", "prefix", "start"),
    [("auto", "", [1, 4]), (False, "", [4, 5]), (False, "f ", [9, 4]), (True, "", [1, 4])],
)
def test_special_tokens_and_prefix(tmp_path, checkpoint, special_tokens, prefix, start):
    name = write(tmp_path / "t.txt", stories())
    tokens = load_tokens(asked(name, special_tokens=special_tokens, prefix=prefix), checkpoint, tmp_path)
    assert tokens.ids[0, :2].tolist() == start


def test_special_tokens_true_adds_the_start_where_plain_encode_does_not():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    assert Encoder(fast, "auto")("a") == [1]
    assert Encoder(fast, True)("a") == [0, 1]


def test_blank_lines_separate_documents_where_no_end_of_text_occurs(tmp_path, checkpoint):
    name = write(tmp_path / "t.txt", "a b\nc\n\n \n d e \n\n\nf")
    tokens = load_tokens(asked(name, samples=3, length=8, pack=False), checkpoint, tmp_path)
    rows = {tuple(row[:length].tolist()) for row, length in zip(tokens.ids, tokens.lengths, strict=True)}
    assert rows == {(1, 4, 5, 6), (1, 7, 8), (1, 9)}
    assert tokens.count == 9


def test_the_seed_decides_and_the_callers_random_state_is_untouched(tmp_path, checkpoint):
    name = write(tmp_path / "t.txt", "\n\n".join(" ".join("abcdef"[i % 6] for _ in range(7)) for i in range(40)))
    before = torch.random.get_rng_state()
    same = [load_tokens(asked(name, seed=3), checkpoint, tmp_path).sha256 for _ in range(2)]
    other = load_tokens(asked(name, seed=4), checkpoint, tmp_path).sha256
    assert same[0] == same[1] != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_long_document_gives_windows_from_all_over_it(tmp_path, checkpoint):
    name = write(tmp_path / "t.txt", " ".join("abcdef"[(i * i // 7) % 6] for i in range(4000)))
    seeds = [load_tokens(asked(name, seed=seed), checkpoint, tmp_path) for seed in (0, 1)]
    assert seeds[0].sha256 != seeds[1].sha256


def test_jsonl_parquet_and_folder_hold_the_same_documents(tmp_path, checkpoint):
    import pyarrow
    import pyarrow.parquet

    texts = ["a b c d e f a b"] * 10
    write(tmp_path / "t.jsonl", "".join(json.dumps({"body": text, "id": 1}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "t.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "t.jsonl").write_bytes((tmp_path / "t.jsonl").read_bytes())
    hashes = {
        load_tokens(asked(dataset, field="body"), checkpoint, tmp_path).sha256
        for dataset in ("t.jsonl", "t.parquet", "data")
    }
    assert len(hashes) == 1


def test_chat_template_renders_message_lists_and_wraps_plain_text(tmp_path, checkpoint):
    rows = [{"text": [{"role": "user", "content": "a b"}]}, {"text": "c d"}]
    name = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    tokens = load_tokens(asked(name, samples=2, pack=False, chat_template=True), checkpoint, tmp_path)
    rows = {tuple(row[:3].tolist()) for row in tokens.ids}
    assert rows == {(3, 4, 5), (3, 6, 7)}


def test_token_file_round_trip_and_defaults_take_all_of_it(tmp_path, checkpoint):
    lengths = torch.tensor([12, 5, *[1] * 148])  # more rows than are taken of a text by default
    made = Tokens.of(torch.arange(4, 10).repeat(150, 2), lengths, "made")
    save_tokens(tmp_path / "t.safetensors", made, tokenizer_sha256=tokenizer_sha256(checkpoint.folder))
    everything = load_tokens(Calibration(dataset="t.safetensors"), checkpoint, tmp_path)
    assert everything.sha256 == made.sha256
    some = load_tokens(asked("t.safetensors", samples=2, length=6), checkpoint, tmp_path)
    assert some.ids.shape == (2, 6)
    assert some.lengths.tolist() == [6, 5]


def test_the_hash_covers_shape_ids_and_lengths():
    ids = torch.arange(12).view(3, 4)
    hashes = {
        Tokens.of(ids).sha256,
        Tokens.of(ids.view(4, 3)).sha256,
        Tokens.of(ids + 1).sha256,
        Tokens.of(ids, torch.tensor([4, 4, 3])).sha256,
    }
    assert len(hashes) == 4
    assert Tokens.of(ids, torch.tensor([4, 4, 4])).sha256 == Tokens.of(ids).sha256


REFUSED = {
    "empty text": ("t.txt", " \n\n ", {}, "no text"),
    "empty file": ("t.jsonl", "", {}, "no text"),
    "too short": ("t.txt", "a b c", {}, "holds 4 tokens, but 4 samples of 8 need 32"),
    "too few documents": ("t.txt", "a\n\nb", {"pack": False}, "holds 2 documents, but 4 samples"),
    "field missing": ("t.jsonl", '{"body": "a", "id": 1}', {}, "no field 'text'; the fields are body, id"),
    "field a number": ("t.jsonl", '{"text": 1}', {}, "neither a text nor a list of messages"),
    "not json": ("t.jsonl", '{"text": "a"}\n{', {}, ":2: the line is not JSON"),
    "not an object": ("t.jsonl", "[1]", {}, "not a JSON object"),
    "messages without template": ("t.jsonl", '{"text": [{"role": "user", "content": "a"}]}', {}, "messages, not text"),
    "unknown type": ("t.csv", "a,b", {}, "cannot be read from a .csv file"),
    "parquet that is text": ("t.parquet", "PAR1 not", {}, "not readable parquet"),
    "length beyond the model": ("t.txt", "a b", {"length": 65}, "more than the model's 64 positions"),
    "another recipe's tokens": ("t.txt", stories(), {"sha256": "0" * 64}, "not those of the recipe"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, checkpoint):
    name, text, settings, message = REFUSED[case]
    write(tmp_path / name, text)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace("[", r"\[")) as caught:
        load_tokens(asked(name, **settings), checkpoint, tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files_are_refused(tmp_path, checkpoint):
    with pytest.raises(InputError, match="no such dataset"):
        load_tokens(asked("gone.txt"), checkpoint, tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(InputError, match="byte 2 is not UTF-8"):
        load_tokens(asked("bad.txt"), checkpoint, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no"):
        load_tokens(asked("empty"), checkpoint, tmp_path)


def test_vocabulary_mismatch_is_refused(tmp_path, checkpoint):
    name = write(tmp_path / "t.txt", stories())
    checkpoint.config["vocab_size"] = 8
    with pytest.raises(InputError, match="token id 9 is outside the model's vocabulary of 8"):
        load_tokens(asked(name), checkpoint, tmp_path)


def test_an_unknown_hub_dataset_is_refused_in_one_sentence(tmp_path, checkpoint):
    with pytest.raises(InputError, match="nobody/nothing: the hub dataset cannot be loaded") as caught:
        load_tokens(asked("nobody/nothing"), checkpoint, tmp_path, offline=True)
    assert "\n" not in str(caught.value)


WRONG_TOKEN_FILES = {
    "no input_ids": ({"tokens": torch.zeros(2, 2, dtype=torch.int64)}, "needs a tensor input_ids; it holds tokens"),
    "floats": ({"input_ids": torch.zeros(2, 2)}, "input_ids is F32, not whole numbers"),
    "one row only": ({"input_ids": torch.zeros(2, dtype=torch.int64)}, "instead of"),
    "lengths of another size": (
        {"input_ids": torch.zeros(2, 2, dtype=torch.int64), "lengths": torch.ones(3, dtype=torch.int64)},
        "lengths has shape",
    ),
    "lengths out of range": (
        {"input_ids": torch.zeros(2, 2, dtype=torch.int64), "lengths": torch.tensor([1, 3])},
        "outside 1 … 2",
    ),
    "negative": ({"input_ids": torch.full((4, 8), -1)}, "token id -1 is outside"),
    "beyond the vocabulary": ({"input_ids": torch.full((4, 8), 10)}, "token id 10 is outside"),
    "fewer than asked": ({"input_ids": torch.ones(2, 8, dtype=torch.int64)}, "holds 2 samples of 8 tokens, but 4 of 8"),
}


@pytest.mark.parametrize("case", WRONG_TOKEN_FILES)
def test_wrong_token_files_are_refused(case, tmp_path, checkpoint):
    tensors, message = WRONG_TOKEN_FILES[case]
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=message):
        load_tokens(asked("t.safetensors"), checkpoint, tmp_path)


def test_a_token_file_of_another_tokenizer_or_with_changed_ids_is_refused(tmp_path, checkpoint):
    made = Tokens.of(torch.ones(4, 8, dtype=torch.int64), source="made")
    save_tokens(tmp_path / "other.safetensors", made, tokenizer_sha256="f" * 64)
    with pytest.raises(InputError, match="another tokenizer"):
        load_tokens(asked("other.safetensors"), checkpoint, tmp_path)
    save_file(
        {"input_ids": torch.zeros(4, 8, dtype=torch.int32)},
        tmp_path / "changed.safetensors",
        metadata={"kind": "compress token ids", "sha256": made.sha256},
    )
    with pytest.raises(InputError, match="do not match the hash"):
        read_tokens(tmp_path / "changed.safetensors")

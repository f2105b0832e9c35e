"""A folder's tokenizer as GGUF metadata, from tokenizer.json: byte-level BPE ("gpt2"), and BPE over words with ▁ and
byte fallback as SentencePiece has it ("llama"). Others, and rules for splitting that llama.cpp lacks, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.core._model_folder import TOKENIZER_FILES, read_json
from compress.core.errors import InputError
from compress.core.formats._gguf_container import Value, f32s, flag, i32s, text, texts, u32

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_SPLITS = {_CONTRACTIONS + "\\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + "\\p{N}" + _REST: "qwen2"}
_SPACE = "▁"


def tokenizer_metadata(folder: Path, config: Mapping[str, Any]) -> dict[str, Value]:
    """Keys `tokenizer.…` of the model in `folder`. A folder without a tokenizer gives a model for token ids alone."""
    path = folder / "tokenizer.json"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return {"tokenizer.ggml.model": text("no_vocab")}
    if not path.is_file():
        raise InputError("only a tokenizer.json can be written as gguf", where=str(folder), hint="save it as one")
    data = read_json(path)
    model = data.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"a tokenizer of type {model.get('type')} is not written as gguf: BPE is", where=str(path))
    kind = _sentencepiece if model.get("byte_fallback") else _byte_level
    tokens, types = _tokens(data, config["vocab_size"], str(path))
    found = {
        **kind(data, tokens, types, str(path)),
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": i32s(types),
    }
    return found | _specials(folder, data, config, tokens)


def _tokens(data: Mapping[str, Any], rows: int, where: str) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token are unused."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [_UNUSED] * rows
    listed = [(token, number, _NORMAL) for token, number in data["model"]["vocab"].items()]
    for entry in data.get("added_tokens") or []:
        listed.append((entry["content"], entry["id"], _CONTROL if entry.get("special") else _USER_DEFINED))
    for token, number, type in listed:
        if not 0 <= number < rows:
            raise InputError(f"token {token!r} has no row in the embedding", where=where)
        tokens[number], types[number] = token, type
    return tokens, types


def _byte_level(data: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Value]:
    normalizer = (data.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise InputError(f"llama.cpp does not normalize text by {normalizer}", where=where)
    pre = _split_rule(data.get("pre_tokenizer") or {}, where)
    if data["model"].get("ignore_merges") and pre != "llama-bpe":
        raise InputError(f"llama.cpp does not leave out merges of {pre} tokenizers", where=where)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre),
        "tokenizer.ggml.merges": texts(merges),
    }


def _split_rule(rule: Mapping[str, Any], where: str) -> str:
    """How llama.cpp calls the way that text is split before it is merged."""
    rules = rule.get("pretokenizers", []) if rule.get("type") == "Sequence" else [rule]
    first, last = rules[0] if len(rules) == 2 else None, rules[-1] if rules else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and len(rules) <= 2:
        splits = last.get("use_regex", True)
        if first is None and splits:
            return "gpt-2"
        if first is not None and first.get("type") == "Digits" and first.get("individual_digits") and splits:
            return "smollm"
        pattern = ((first or {}).get("pattern") or {}).get("Regex")
        isolated = first is not None and first.get("behavior") == "Isolated" and not first.get("invert")
        if isolated and not splits and pattern in _SPLITS:
            return _SPLITS[pattern]
    raise InputError("llama.cpp has no rule that splits text as this tokenizer does", where=f"{where}: pre_tokenizer")


def _sentencepiece(data: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Value]:
    """Scores fall with the rank of the merge that makes a token: llama.cpp joins the best first, as BPE does."""
    prefix = _space_prefix(data, where)
    rank: dict[str, int] = {}
    for number, pair in enumerate(data["model"]["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(left + right, number)
    scores = [-float(rank.get(token, len(rank) + 1)) for token in tokens]
    for number, token in enumerate(tokens):
        if types[number] == _NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = _BYTE
        if token == (data["model"].get("unk_token") or "<unk>"):
            types[number] = _UNKNOWN
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.scores": f32s(scores),
        "tokenizer.ggml.add_space_prefix": flag(prefix),
        "tokenizer.ggml.remove_extra_whitespaces": flag(False),
    }


def _space_prefix(data: Mapping[str, Any], where: str) -> bool:
    """Whether text gets a space in front. Text may only be changed by writing its spaces as ▁."""
    split, normalizer = data.get("pre_tokenizer"), data.get("normalizer")
    steps = (normalizer or {}).get("normalizers") or ([normalizer] if normalizer else [])
    whole = {"type": "Metaspace", "replacement": _SPACE, "split": False}
    if split is not None and not steps and {key: split.get(key) for key in whole} == whole:
        return split.get("prepend_scheme", "always") != "never"
    if split is None and steps:
        kinds = [step.get("type") for step in steps]
        last = steps[-1]
        replaces = last.get("type") == "Replace" and last.get("pattern") == {"String": " "}
        if replaces and last.get("content") == _SPACE and kinds in (["Replace"], ["Prepend", "Replace"]):
            return kinds[0] == "Prepend"
    raise InputError("llama.cpp has no rule that treats spaces as this tokenizer does", where=where)


def _specials(folder: Path, data: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]) -> dict[str, Value]:
    """Special tokens by number, whether a start and an end are added, and the chat template."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    numbers = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = _special(key, settings, config, tokens)
        if number is not None:
            numbers[name] = number
    found = {f"tokenizer.ggml.{name}_token_id": u32(number) for name, number in numbers.items()}
    first, last = _frame(data.get("post_processor") or {})
    is_start = first is not None and tokens.index(first) == numbers.get("bos") if first in tokens else False
    is_end = last is not None and tokens.index(last) == numbers.get("eos") if last in tokens else False
    found["tokenizer.ggml.add_bos_token"] = flag(is_start)
    found["tokenizer.ggml.add_eos_token"] = flag(is_end)
    template = settings.get("chat_template")
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    return found | ({"tokenizer.chat_template": text(template)} if isinstance(template, str) else {})


def _special(key: str, settings: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]) -> int | None:
    """A special token as the tokenizer's settings name it, else as the model's config numbers it."""
    named = settings.get(f"{key}_token")
    named = named.get("content") if isinstance(named, Mapping) else named
    if isinstance(named, str) and named in tokens:
        return tokens.index(named)
    number = config.get(f"{key}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if isinstance(number, int) and 0 <= number < len(tokens) else None


def _frame(rule: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that are put in front of a text and behind it."""
    for part in rule.get("processors") or [rule]:
        single = part.get("single") if part.get("type") == "TemplateProcessing" else None
        if single:
            special = [item.get("SpecialToken", {}).get("id") for item in single]
            return special[0], special[-1]
    return None, None

"""Which tokens stay, and a model of them: rows of embedding and head, ids in its settings, files of its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.core.cuts import Cut
from compress.core.errors import InputError, UsageError
from compress.core.reshaped import ReshapedCheckpoint
from prune._tokenizer import Tokenizer

if TYPE_CHECKING:
    from compress.core.calibration import Tokens
    from compress.core.checkpoint import Checkpoint
    from prune.vocabulary import Vocabulary

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
GENERATION = "generation_config.json"
SAID_TWICE = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Other forms of what tokenizer.json says, which would contradict it."""
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


# what stays


def choose(settings: Vocabulary, checkpoint: Checkpoint, tokens: Tokens | None, count: int) -> list[int]:
    """The ids that stay, ascending: those that must, then the most frequent with all that they are merged from.

    UsageError if `settings.min_count` asks for more than `count`."""
    if tokens is None:
        raise InputError("tokens are counted in calibration text, and there is none")
    rows = checkpoint.config["vocab_size"]
    tokenizer = tokenizer_of(checkpoint)
    seen = _counts(tokens, rows)
    kept = set(always_kept(checkpoint))
    order = sorted(range(rows), key=lambda token: (-seen[token], token not in tokenizer.ids, token))
    waiting: list[int] = []
    for token in order:
        asked = settings.min_count is not None and seen[token] >= settings.min_count
        if not asked and len(kept) >= count:
            break
        needed = tokenizer.closure(token) - kept
        if asked or len(kept) + len(needed) <= count:
            kept |= needed
        else:
            waiting.append(token)
    if len(kept) > count:
        raise UsageError(
            f"{len(kept)} tokens must stay because of min_count {settings.min_count}, but only {count} may",
            where="prune.min_count",
            hint=f"keep {-(-len(kept) // settings.multiple) * settings.multiple} or more, or raise min_count",
        )
    return sorted(_filled(kept, waiting, tokenizer, count))


def _filled(kept: set[int], waiting: Sequence[int], tokenizer: Tokenizer, count: int) -> set[int]:
    """The last places go to what is merged from tokens that stay already."""
    while len(kept) < count:
        fitting = (token for token in waiting if token not in kept and tokenizer.closure(token) - kept == {token})
        kept = kept | {next(fitting)}
    return kept


def _counts(tokens: Tokens, rows: int) -> list[int]:
    return torch.bincount(tokens.ids[tokens.counted], minlength=rows).tolist()


def always_kept(checkpoint: Checkpoint) -> frozenset[int]:
    """The ids that stay whatever the text says: those of bytes or letters, of special tokens, and of settings."""
    rows, tokenizer = checkpoint.config["vocab_size"], tokenizer_of(checkpoint)
    found = tokenizer.always | set(_named(checkpoint.config))
    if Path(GENERATION) in checkpoint.aux_files:
        found |= set(_named(json.loads(checkpoint.aux_bytes(Path(GENERATION)))))
    if Path(SETTINGS) in checkpoint.aux_files:
        named = _named_tokens(json.loads(checkpoint.aux_bytes(Path(SETTINGS))))
        found |= {tokenizer.vocabulary[token] for token in named if token in tokenizer.vocabulary}
    return frozenset(part for token in found if 0 <= token < rows for part in tokenizer.closure(token))


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint; InputError if it is of a kind that cannot be rewritten."""
    where = str(checkpoint.folder / TOKENIZER)
    if Path(TOKENIZER) not in checkpoint.aux_files:
        raise InputError(
            "the model has no tokenizer.json, and only that is rewritten",
            where=where,
            hint="save the tokenizer with transformers' save_pretrained first",
        )
    return _parsed(checkpoint.aux_bytes(Path(TOKENIZER)), where)


@lru_cache(maxsize=2)
def _parsed(text: bytes, where: str) -> Tokenizer:
    try:
        return Tokenizer(json.loads(text), where)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"this is no tokenizer of the tokenizers library: {error}", where=where) from error


# the model of what stays


def with_rows(
    checkpoint: Checkpoint,
    kept: Sequence[int],
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | None] | None = None,
) -> ReshapedCheckpoint:
    """The checkpoint with these rows of embedding and head."""
    cut = Cut.of(0, kept, checkpoint.config["vocab_size"])
    modules = (checkpoint.architecture.embedding, checkpoint.architecture.head)
    names = (f"{module}.{part}" for module in modules for part in ("weight", "bias"))
    cuts = {name: [cut] for name in names if name in checkpoint.tensors}
    return ReshapedCheckpoint(checkpoint, {**(config or {}), "vocab_size": len(cut.kept)}, cuts=cuts, files=files)


def with_tokens(checkpoint: Checkpoint, kept: Sequence[int]) -> ReshapedCheckpoint:
    """The checkpoint with these tokens, numbered anew in config and tokenizer, too."""
    new = {token: place for place, token in enumerate(kept)}
    return with_rows(checkpoint, kept, _renumbered(checkpoint.config, new), _files(checkpoint, new))


def _files(checkpoint: Checkpoint, new: Mapping[int, int]) -> dict[str, bytes | None]:
    """What becomes of the auxiliary files that speak of ids; None: it is left out."""
    work: dict[str, Callable[[dict[str, Any]], Any]] = {
        TOKENIZER: lambda data: Tokenizer(data, TOKENIZER).renumbered(new),
        SETTINGS: lambda data: _settings(data, new),
        ADDED: lambda data: {token: new[place] for token, place in data.items() if place in new},
        GENERATION: lambda data: _renumbered(data, new),
    }
    found: dict[str, bytes | None] = {}
    for path in checkpoint.aux_files:
        if path.name in work:
            text = json.dumps(work[path.name](json.loads(checkpoint.aux_bytes(path))), indent=2, ensure_ascii=False)
            found[path.name] = f"{text}\n".encode()
        elif path.name in SAID_TWICE or path.suffix == ".tiktoken":
            found[path.name] = None
    return found


def _settings(data: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    added = data.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return data
    return data | {"added_tokens_decoder": {str(new[int(key)]): value for key, value in added.items()}}


def _named_tokens(data: Mapping[str, Any]) -> set[str]:
    """Tokens that a tokenizer's settings name: what is missing among them would be added anew, behind all others."""
    special = [value for key, value in data.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = data.get(key) or ()
        special += more.values() if isinstance(more, Mapping) else more
    texts = (token.get("content") if isinstance(token, Mapping) else token for token in special)
    return {text for text in texts if isinstance(text, str)}


def _named(config: Mapping[str, Any]) -> list[int]:
    """Ids that settings name."""
    found: list[int] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _named(value)
        elif key.endswith(("_token_id", "_token_ids")):
            found += [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
    return found


def _renumbered(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Settings with the new ids. What names no row of the model (null, -1) stays."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = _renumbered(value, new)
        elif key.endswith(("_token_id", "_token_ids")):
            found[key] = [new.get(item, item) for item in value] if isinstance(value, list) else new.get(value, value)
        elif key in _LISTS and isinstance(value, list):
            found[key] = _known(value, new)
        else:
            found[key] = value
    return found


def _known(ids: Sequence[Any], new: Mapping[int, int]) -> list[Any]:
    """A list of ids, or of lists of them, without those that name a token that is gone."""
    if ids and all(isinstance(item, list) for item in ids):
        return [[new[token] for token in item] for item in ids if all(token in new for token in item)]
    return [new[token] for token in ids if token in new]

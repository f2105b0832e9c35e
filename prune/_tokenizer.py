"""tokenizer.json as data: what its tokens are made of, and the same tokenizer with fewer of them.

Kept tokens are cut as before. Byte-pair encoding: what is merged on the way to a kept token stays, in the old order, so
that every step of the old encoding is still the first that is possible. Unigram: scores stay, so that the best way
stays the best of fewer. WordPiece: the longest match stays the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from compress.core.errors import InputError

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_KINDS = ("BPE", "Unigram", "WordPiece")

Pair = tuple[str, str]


class Tokenizer:
    """The content of a tokenizer.json. InputError for a model whose tokens cannot be told apart safely."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._model: Mapping[str, Any] = data["model"]
        self.kind = str(self._model.get("type") or ("BPE" if "merges" in self._model else "WordPiece"))
        if self.kind not in _KINDS:
            raise InputError(f"tokenizers of kind {self.kind} are not rewritten: {', '.join(_KINDS)} are", where=where)
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        if self.kind == "BPE" and any(self._model.get(key) for key in affixes):
            raise InputError("byte-pair tokenizers that mark parts of words are not rewritten", where=where)
        vocabulary = self._model["vocab"]
        if self.kind == "Unigram":
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        self.vocabulary: dict[str, int] = dict(vocabulary)
        self.added: dict[str, int] = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
        self.ids = frozenset(self.vocabulary.values()) | frozenset(self.added.values())
        self._closures: dict[int, frozenset[int]] = {}

    # what must stay

    @cached_property
    def always(self) -> set[int]:
        """Ids of added tokens, of what stands for unknown text, of bytes (or letters, where there are no bytes), and of
        what the tokenizer's own steps put into a text."""
        found = set(self.added.values()) | set(_ids_in(self._data.get("post_processor")))
        padding = self._data.get("padding") or {}
        unknown = self._model.get("unk_id") if self.kind == "Unigram" else None
        found |= {token for token in (padding.get("pad_id"), unknown) if type(token) is int}
        steps = (self._data.get(step) for step in ("normalizer", "pre_tokenizer", "decoder"))
        named = {self._model.get("unk_token"), *(text for step in steps for text in _texts(step) if len(text) == 1)}
        covered = bool(self._model.get("byte_fallback")) and self.vocabulary.keys() >= BYTES
        prefix = self._model.get("continuing_subword_prefix") or ""
        for token, number in self.vocabulary.items():
            letter = len(token.removeprefix(prefix)) == 1
            if token in named or (token in BYTES if covered else letter):
                found.add(number)
        return found & self.ids

    def closure(self, token: int) -> frozenset[int]:
        """A token with all that it is merged from."""
        if token not in self._closures:
            last = _last_merge(self._texts_by_id.get(token, ""), self._ranks)
            parts = (self.closure(self.vocabulary[part]) for part in last or () if part in self.vocabulary)
            self._closures[token] = frozenset({token}).union(*parts)
        return self._closures[token]

    @cached_property
    def _texts_by_id(self) -> dict[int, str]:
        return {number: token for token, number in self.vocabulary.items()}

    @cached_property
    def _ranks(self) -> dict[Pair, int]:
        merges = [] if self.kind != "BPE" else self._model["merges"]
        return {_pair(merge): rank for rank, merge in enumerate(merges)}

    # the tokenizer of what stays

    def renumbered(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The file's content for tokens with the old ids in `new`, which says their new ones."""
        model = dict(self._model)
        if self.kind == "Unigram":
            model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
            if type(model.get("unk_id")) is int:
                model["unk_id"] = new[model["unk_id"]]
        else:
            kept = sorted((new[number], token) for token, number in self.vocabulary.items() if number in new)
            model["vocab"] = {token: number for number, token in kept}
        if self.kind == "BPE":
            model["merges"] = [merge for merge in model["merges"] if self._makes_kept(_pair(merge), new)]
        data = dict(self._data) | {"model": model}
        data["added_tokens"] = [token | {"id": new[token["id"]]} for token in data.get("added_tokens") or ()]
        data["post_processor"] = _with_ids(data.get("post_processor"), new)
        if data.get("padding"):
            data["padding"] = data["padding"] | {"pad_id": new.get(data["padding"]["pad_id"], 0)}
        return data

    def _makes_kept(self, pair: Pair, new: Mapping[int, int]) -> bool:
        return all(self.vocabulary.get(text) in new for text in (*pair, "".join(pair)))


def _pair(merge: Any) -> Pair:
    """A merge in either form of the file: "a b" or ["a", "b"]."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _last_merge(text: str, ranks: Mapping[Pair, int]) -> Pair | None:
    """The pair that byte-pair encoding makes `text` of in the end; None if it never does."""
    parts, last = list(text), None
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        place = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))
        last = pairs[place]
        if last not in ranks:
            return None
        parts[place : place + 2] = ["".join(last)]
    return last


def _ids_in(processor: Any) -> Iterator[int]:
    """Ids that a post-processor names, in the forms of the tokenizers library."""
    if not isinstance(processor, Mapping):
        return
    for key in ("sep", "cls"):
        if isinstance(processor.get(key), list):
            yield processor[key][1]
    special = processor.get("special_tokens")
    if isinstance(special, Mapping):
        yield from (token for entry in special.values() for token in entry["ids"])
    for part in processor.get("processors") or ():
        yield from _ids_in(part)


def _with_ids(processor: Any, new: Mapping[int, int]) -> Any:
    if not isinstance(processor, Mapping):
        return processor
    found = dict(processor)
    for key in ("sep", "cls"):
        if isinstance(found.get(key), list):
            found[key] = [found[key][0], new[found[key][1]]]
    if isinstance(found.get("special_tokens"), Mapping):
        special = found["special_tokens"].items()
        found["special_tokens"] = {
            name: entry | {"ids": [new[token] for token in entry["ids"]]} for name, entry in special
        }
    if isinstance(found.get("processors"), list):
        found["processors"] = [_with_ids(part, new) for part in found["processors"]]
    return found


def _texts(step: Any) -> Iterator[str]:
    """All texts in the settings of one of the tokenizer's steps."""
    if isinstance(step, str):
        yield step
    elif isinstance(step, Mapping | list):
        for part in step.values() if isinstance(step, Mapping) else step:
            yield from _texts(part)

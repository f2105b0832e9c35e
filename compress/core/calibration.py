"""Calibration: a dataset becomes token ids, sampled with a seed.

Shape legend: S samples, T tokens per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from compress.core.documents import TOKEN_FILE, Document, local_path, read_documents
from compress.core.errors import InputError
from compress.core.tokens import Tokens, read_tokens, save_tokens, tokenizer_sha256

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Calibration

__all__ = ["Encoder", "Tokens", "check_vocabulary", "load_tokens", "read_tokens", "save_tokens", "tokenizer_sha256"]


@dataclass(frozen=True)
class Encoder:
    """Text to token ids.

    special_tokens "auto": what the tokenizer's plain encode adds; True: the same, and the beginning-of-text token where
    plain encode leaves it out; False: none. `prefix` is put before each document as text. `chat_template` renders
    message lists (a plain text becomes one user message) with the tokenizer's own template.
    """

    tokenizer: Any
    special_tokens: Literal["auto"] | bool = "auto"
    prefix: str = ""
    chat_template: bool = False

    def __call__(self, document: Document) -> list[int]:
        add_special = self.special_tokens is not False
        if self.chat_template:
            text, add_special = self._render(document), False
        elif isinstance(document, str):
            text = document
        else:
            raise InputError("the field holds messages, not text", hint="set chat_template: true")
        ids = self.tokenizer(self.prefix + text, add_special_tokens=add_special, verbose=False)["input_ids"]
        return self._with_start(ids) if self.special_tokens is True and not self.chat_template else ids

    def split(self, text: str, end: str) -> tuple[list[int], list[int]]:
        """The ids of `text` and, apart, those of the `end` that it goes on with: the fewest whose text holds it.

        A token that reaches across (" 58" of "is 5821") belongs to the end. What the tokenizer says of where its tokens
        lie is not asked for: it is wrong where characters were replaced. InputError for an end that it cannot write.
        """
        ids = self(text + end)
        while ids and ids[-1] in self.tokenizer.all_special_ids:
            ids = ids[:-1]  # of those that are put behind every text
        for count in range(1, min(len(ids), 4 * len(end)) + 1):
            if end in self.tokenizer.decode(ids[-count:]):
                return ids[:-count], ids[-count:]
        raise InputError(f"the tokenizer has no tokens that read {end!r}")

    def _with_start(self, ids: list[int]) -> list[int]:
        start = self.tokenizer.bos_token_id
        if start is None:
            raise InputError("special_tokens: true needs a beginning-of-text token, and the tokenizer has none")
        return ids if ids[:1] == [start] else [start, *ids]

    def _render(self, document: Document) -> str:
        import jinja2

        if not self.tokenizer.chat_template:
            raise InputError("chat_template: true needs a template, and the model's tokenizer has none")
        messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (jinja2.TemplateError, KeyError, TypeError) as error:
            raise InputError(f"the chat template refuses a message list: {error}") from error


def load_tokens(
    calibration: Calibration, checkpoint: Checkpoint, base_folder: Path | str | None, *, offline: bool = False
) -> Tokens:
    """The tokens that `calibration` asks for: exactly `samples` rows of `length`, the same for the same seed.

    Packed rows are cut from documents laid end to end in a seeded order (from seeded places, if there is one document
    only); unpacked rows hold one document each, cut at `length` or padded on the right. A token file is taken in its
    own order. Raises InputError for datasets that are missing, empty, too short, or from another vocabulary.
    """
    asked = calibration.dataset
    path = local_path(asked, base_folder)
    if path is not None and path.suffix == TOKEN_FILE:
        tokens = _take(read_tokens(path, tokenizer_sha256=tokenizer_sha256(checkpoint.folder)), calibration, path)
        _check_length(tokens.ids.shape[1], checkpoint)
    else:
        _check_length(calibration.length, checkpoint)
        documents = read_documents(
            asked, field=calibration.field, split=calibration.split, base_folder=base_folder, offline=offline
        )
        tokens = sample_tokens(documents, _encoder(calibration, checkpoint), calibration)
    check_vocabulary(tokens, checkpoint, str(path or asked))
    expected = getattr(calibration, "sha256", None)
    if expected is not None and expected != tokens.sha256:
        raise InputError(f"the tokens are not those of the recipe: sha256 {tokens.sha256}", where=asked)
    return tokens


def _encoder(calibration: Calibration, checkpoint: Checkpoint) -> Encoder:
    from compress.core.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    return Encoder(tokenizer, calibration.special_tokens, calibration.prefix, calibration.chat_template)


def _check_length(length: int, checkpoint: Checkpoint) -> None:
    config = checkpoint.config.get("text_config") or checkpoint.config
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and length > limit:
        raise InputError(f"calibration length {length} is more than the model's {limit} positions")


def sample_tokens(documents: Sequence[Document], encode: Encoder, calibration: Calibration) -> Tokens:
    """`samples` rows of `length` tokens from documents in an order drawn with the seed."""
    generator = torch.Generator().manual_seed(calibration.seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    encoded = (encode(documents[index]) for index in order)
    if not calibration.pack:
        return _one_each(encoded, calibration)
    needed = calibration.samples * calibration.length
    if len(documents) == 1:
        ids = _some_windows(next(encoded), calibration, generator)
    else:
        ids = _first(encoded, needed)
    if len(ids) < needed:
        raise InputError(
            f"the text holds {len(ids):,} tokens, but {calibration.samples} samples of {calibration.length} "
            f"need {needed:,}",
            where=calibration.dataset,
            hint="lower samples or length, or give more text",
        )
    ids_ST = torch.tensor(ids, dtype=torch.int64).view(calibration.samples, calibration.length)
    return Tokens.of(ids_ST, source=_source(calibration))


def _source(calibration: Calibration) -> str:
    """The dataset's name without the folders of this machine."""
    dataset = calibration.dataset
    return Path(dataset).name if Path(dataset).is_absolute() else dataset


def _first(encoded: Iterator[list[int]], needed: int) -> list[int]:
    ids: list[int] = []
    for document in encoded:
        ids += document
        if len(ids) >= needed:
            break
    return ids[:needed]


def _some_windows(ids: list[int], calibration: Calibration, generator: torch.Generator) -> list[int]:
    """One long text: windows from all over it, so that the seed matters; all of it if it is too short."""
    length = calibration.length
    windows = torch.randperm(len(ids) // length, generator=generator)[: calibration.samples].tolist()
    if len(windows) < calibration.samples:
        return ids
    return [token for window in windows for token in ids[window * length : (window + 1) * length]]


def _one_each(encoded: Iterable[list[int]], calibration: Calibration) -> Tokens:
    samples, length = calibration.samples, calibration.length
    ids_ST = torch.zeros(samples, length, dtype=torch.int64)
    lengths_S = torch.zeros(samples, dtype=torch.int64)
    row = 0
    for document in encoded:
        if not document:
            continue
        kept = document[:length]
        ids_ST[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        lengths_S[row] = len(kept)
        row += 1
        if row == samples:
            return Tokens.of(ids_ST, lengths_S, _source(calibration))
    raise InputError(
        f"the dataset holds {row} documents, but {samples} samples are asked for (pack: false)",
        where=calibration.dataset,
        hint="lower samples, or set pack: true",
    )


def check_vocabulary(tokens: Tokens, checkpoint: Checkpoint, where: str) -> None:
    """Raise InputError if a token id has no row in the model's embedding."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    vocabulary = config["vocab_size"]
    lowest, highest = int(tokens.ids.min()), int(tokens.ids.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"token id {wrong} is outside the model's vocabulary of {vocabulary}", where=where)


def _take(tokens: Tokens, calibration: Calibration, path: Path) -> Tokens:
    """The first `samples` × `length` of a token file; all that there is where the recipe leaves it open."""
    rows, width = tokens.ids.shape
    samples = calibration.samples if "samples" in calibration.model_fields_set else rows
    length = calibration.length if "length" in calibration.model_fields_set else width
    if samples > rows or length > width:
        raise InputError(
            f"the file holds {rows} samples of {width} tokens, but {samples} of {length} are asked for", where=str(path)
        )
    lengths_S = None if tokens.lengths is None else tokens.lengths[:samples].clamp(max=length)
    return Tokens.of(tokens.ids[:samples, :length], lengths_S, path.name)

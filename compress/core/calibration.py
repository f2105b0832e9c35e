"""Calibration: a dataset becomes token ids, sampled with a seed, hashed, kept in a file if asked.

Shape legend: S samples, T tokens per sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from compress.core.documents import TOKEN_FILE, Document, local_path, read_documents
from compress.core.errors import InputError

if TYPE_CHECKING:
    from compress.core.checkpoint import Checkpoint
    from compress.core.recipe import Calibration

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_INTEGERS = ("I16", "U16", "I32", "U32", "I64", "U8", "I8")


@dataclass(frozen=True)
class Tokens:
    """Token ids, `lengths` saying how many of each row count (None: all); right padding is never counted.

    `sha256` is over shape, ids and lengths, so it is equal on every machine for equal tokens.
    """

    ids: torch.Tensor
    lengths: torch.Tensor | None
    sha256: str
    source: str

    @classmethod
    def of(cls, ids_ST: torch.Tensor, lengths_S: torch.Tensor | None = None, source: str = "") -> Tokens:
        """Tokens from ids; lengths that leave nothing out are dropped."""
        ids_ST = ids_ST.to(torch.int64).contiguous()
        if lengths_S is not None:
            lengths_S = lengths_S.to(torch.int64).contiguous()
            if bool((lengths_S == ids_ST.shape[1]).all()):
                lengths_S = None
        return cls(ids_ST, lengths_S, _hash(ids_ST, lengths_S), source)

    @property
    def count(self) -> int:
        """Tokens that count, padding left out."""
        return int(self.ids.numel() if self.lengths is None else self.lengths.sum())


def _hash(ids_ST: torch.Tensor, lengths_S: torch.Tensor | None) -> str:
    digest = hashlib.sha256(f"tokens {tuple(ids_ST.shape)} {lengths_S is not None}\n".encode())
    for tensor in (ids_ST, lengths_S):
        if tensor is not None:
            digest.update(tensor.numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


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
    """The first `samples` × `length` of a token file; settings left at their default take what is there, if less."""
    rows, width = tokens.ids.shape
    default = type(calibration).model_fields
    samples = (
        min(rows, calibration.samples) if calibration.samples == default["samples"].default else calibration.samples
    )
    length = min(width, calibration.length) if calibration.length == default["length"].default else calibration.length
    if samples > rows or length > width:
        raise InputError(
            f"the file holds {rows} samples of {width} tokens, but {samples} of {length} are asked for", where=str(path)
        )
    lengths_S = None if tokens.lengths is None else tokens.lengths[:samples].clamp(max=length)
    return Tokens.of(tokens.ids[:samples, :length], lengths_S, path.name)


def tokenizer_sha256(folder: Path) -> str:
    """One hash over the files that hold a tokenizer's vocabulary."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = Path(folder) / name
        if file.is_file():
            digest.update(f"{name}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def save_tokens(
    path: Path | str, tokens: Tokens, *, tokenizer_sha256: str = "", recipe: Mapping[str, Any] | None = None
):
    """Write `input_ids` (int32) and, where rows are padded, `lengths`; the header says where they come from."""
    from compress.core.files import write_safetensors

    tensors = [("input_ids", tokens.ids.to(torch.int32))]
    if tokens.lengths is not None:
        tensors.append(("lengths", tokens.lengths.to(torch.int32)))
    metadata = {
        "kind": "compress token ids",
        "sha256": tokens.sha256,
        "source": tokens.source,
        "tokenizer_sha256": tokenizer_sha256,
        "calibration": json.dumps(recipe or {}, sort_keys=True),
    }
    write_safetensors(Path(path), tensors, metadata=metadata)


def read_tokens(path: Path | str, *, tokenizer_sha256: str = "") -> Tokens:
    """Tokens from a .safetensors file with `input_ids` [S, T] and perhaps `lengths` [S], ours or another tool's.

    Raises InputError for wrong names, shapes and types, for lengths out of range, for a file whose header names another
    tokenizer than `tokenizer_sha256`, and for ids that do not match the header's own hash.
    """
    path = Path(path)
    tensors, metadata = _read_file(path)
    ids_ST, lengths_S = tensors["input_ids"], tensors.get("lengths")
    if ids_ST.dim() != 2 or 0 in ids_ST.shape:
        raise InputError(f"input_ids has shape {list(ids_ST.shape)} instead of [samples, tokens]", where=str(path))
    if lengths_S is not None:
        if lengths_S.shape != ids_ST.shape[:1]:
            raise InputError(f"lengths has shape {list(lengths_S.shape)} for {len(ids_ST)} samples", where=str(path))
        if int(lengths_S.min()) < 1 or int(lengths_S.max()) > ids_ST.shape[1]:
            raise InputError(f"a length is outside 1 … {ids_ST.shape[1]}", where=str(path))
    made_with = metadata.get("tokenizer_sha256", "")
    if made_with and tokenizer_sha256 and made_with != tokenizer_sha256:
        raise InputError("the token ids were made with another tokenizer than the model's", where=str(path))
    tokens = Tokens.of(ids_ST, lengths_S, path.name)
    if metadata.get("kind") == "compress token ids" and metadata.get("sha256") != tokens.sha256:
        raise InputError("the token ids do not match the hash in the file's header", where=str(path))
    return tokens


def _read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from compress.core.safetensors_io import load_tensor, read_header, read_metadata

    header = read_header(path)
    if "input_ids" not in header:
        there = ", ".join(sorted(header)[:5]) or "no tensor"
        raise InputError(f"a token file needs a tensor input_ids; it holds {there}", where=str(path))
    tensors = {}
    for name in ("input_ids", "lengths"):
        if name in header:
            if header[name].dtype not in _INTEGERS:
                raise InputError(f"{name} is {header[name].dtype}, not whole numbers", where=str(path))
            tensors[name] = load_tensor(header[name]).to(torch.int64)
    return tensors, read_metadata(path)

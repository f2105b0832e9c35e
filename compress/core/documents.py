"""Documents: texts or message lists from a hub dataset, a folder, .jsonl, .txt or .parquet.

A .txt file is split at `<|endoftext|>` where that occurs, else at blank lines. Blank documents are left out unless
asked for. Only hub ids are ever downloaded, and not when `offline`; no dataset's code is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from compress.core.errors import InputError

END_OF_TEXT = "<|endoftext|>"
READABLE = (".jsonl", ".txt", ".parquet")
TOKEN_FILE = ".safetensors"
HUB_SHORTHANDS = {"wikitext": "Salesforce/wikitext:wikitext-2-raw-v1"}

Document = str | list[dict[str, Any]]


def local_path(dataset: str, base_folder: Path | str | None) -> Path | None:
    """The file or folder that `dataset` names, or None if it is a hub id. Relative paths start at `base_folder`.

    Raises InputError for what looks like a file but is not there.
    """
    path = Path(dataset).expanduser()
    if not path.is_absolute() and base_folder is not None:
        path = Path(base_folder) / path
    if path.exists():
        return path
    looks_local = dataset.startswith((".", "/", "~")) or re.search(r"\.[A-Za-z]\w*$", dataset.split(":")[0])
    if looks_local:
        raise InputError("there is no such dataset file or folder", where=str(path))
    return None


def read_documents(
    dataset: str,
    *,
    field: str = "text",
    split: str | None = None,
    base_folder: Path | str | None = None,
    offline: bool = False,
    keep_blank: bool = False,
) -> Sequence[Document]:
    """All documents of `dataset` in stored order. `split` matters for hub datasets only.

    Raises InputError for a missing or empty dataset, an unknown file type, a missing field, a line that is not JSON.
    """
    path = local_path(dataset, base_folder)
    documents = _read_hub(dataset, field, split, offline) if path is None else _read_path(path, field)
    if not keep_blank:
        documents = [document for document in documents if not _is_blank(document)]
    if not documents:
        raise InputError("the dataset holds no text", where=str(path or dataset))
    return documents


def _is_blank(document: Document) -> bool:
    return not (document.strip() if isinstance(document, str) else document)


def _read_path(path: Path, field: str) -> list[Document]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in READABLE and not file.name.startswith("."))
        if not files:
            raise InputError(f"the folder holds no {', '.join(READABLE)} file", where=str(path))
        return [document for file in files for document in _read_path(file, field)]
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"a dataset cannot be read from a {path.suffix or 'nameless'} file",
            where=str(path),
            hint=f"give {', '.join(READABLE)}, token ids in {TOKEN_FILE}, a folder or a hub id",
        )
    return reader(path, field)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start} is not UTF-8 text", where=str(path)) from error
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", where=str(path)) from error


def _read_txt(path: Path, field: str) -> list[Document]:
    text = _read_text(path)
    pieces = text.split(END_OF_TEXT) if END_OF_TEXT in text else re.split(r"\n\s*\n", text)
    return [piece.strip() for piece in pieces]


def _read_jsonl(path: Path, field: str) -> list[Document]:
    documents = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"the line is not JSON: {error}", where=where) from error
        if not isinstance(row, dict):
            raise InputError("the line is not a JSON object", where=where)
        documents.append(_field(row, field, where))
    return documents


def _field(row: dict[str, Any], field: str, where: str) -> Document:
    if field not in row:
        raise _no_field(field, list(row), where)
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    raise InputError(f"field {field!r} is neither a text nor a list of messages", where=where)


def _no_field(field: str, there: list[str], where: str) -> InputError:
    return InputError(f"there is no field {field!r}; the fields are {', '.join(there) or 'none'}", where=where)


def _read_parquet(path: Path, field: str) -> list[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise _no_field(field, file.schema_arrow.names, str(path))
        values = file.read(columns=[field])[field].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"the file is not readable parquet: {error}", where=str(path)) from error
    return [_field({field: value}, field, f"{path} row {row}") for row, value in enumerate(values)]


def _read_hub(dataset: str, field: str, split: str | None, offline: bool) -> list[Document]:
    """`owner/name` or `owner/name:configuration`, e.g. Salesforce/wikitext:wikitext-2-raw-v1."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, configuration = HUB_SHORTHANDS.get(dataset, dataset).partition(":")
    try:
        with hub_offline() if offline else nullcontext():
            rows = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        hint = "offline: only datasets already in the cache can be used" if offline else None
        raise InputError(f"the hub dataset cannot be loaded: {reason}", where=dataset, hint=hint) from error
    if field not in rows.column_names:
        raise _no_field(field, rows.column_names, dataset)
    return [_field({field: value}, field, f"{dataset} row {row}") for row, value in enumerate(rows[field])]


@contextmanager
def hub_offline() -> Iterator[None]:
    """No request to the hub inside: both libraries read these switches at each call, and offer no argument for it."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before

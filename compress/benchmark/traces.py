"""Traces: requests of a real service, as lengths and times; no text is in them.

Two formats are read. Azure's CSV (Splitwise, ISCA'24): TIMESTAMP,ContextTokens,GeneratedTokens. Mooncake's JSON lines
(FAST'25): timestamp in milliseconds, input_length, output_length, and hash_ids, which name the content of each 512
tokens of the prompt, so that prompts that began alike do so again.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from compress.core.errors import InputError

BLOCK_TOKENS = 512
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOST_TOKENS = 100_000_000


@dataclass(frozen=True)
class Shape:
    """A request without its text. `blocks` name the content of each BLOCK_TOKENS of the prompt; empty: its own."""

    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path, count: int) -> list[Shape]:
    """The first `count` requests of a trace; times start at 0. InputError names the line that is not understood."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            start = stream.read(1)
            stream.seek(0)
            rows = _mooncake(stream, path) if start == "{" else _azure(stream, path)
            shapes = list(islice(rows, count))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise InputError("is no text", where=str(path), hint=_HINT) from None
    if not shapes:
        raise InputError("holds no request", where=str(path), hint=_HINT)
    first = min(shape.arrival_seconds for shape in shapes)
    started = [
        Shape(shape.arrival_seconds - first, shape.prompt_tokens, shape.output_tokens, shape.blocks) for shape in shapes
    ]
    return sorted(started, key=lambda shape: shape.arrival_seconds)


_HINT = f"a CSV with the columns {','.join(_AZURE)}, or JSON lines with timestamp, input_length, output_length"


def _azure(stream: TextIO, path: Path) -> Iterator[Shape]:
    reader = csv.DictReader(stream)
    if not reader.fieldnames or not set(_AZURE) <= set(reader.fieldnames):
        raise InputError("is no trace that is known here", where=str(path), hint=_HINT)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            time = _time(row["TIMESTAMP"], where)
            yield Shape(time, _tokens(row, "ContextTokens", where), _tokens(row, "GeneratedTokens", where))
    except csv.Error as error:
        raise InputError(f"is no CSV: {error}", where=f"{path}:{reader.line_num}") from None


def _time(text: str | None, where: str) -> float:
    try:
        return datetime.fromisoformat((text or "").strip()).timestamp()
    except ValueError:
        raise InputError(f"TIMESTAMP is {text!r}, not a date and time", where=where) from None


def _mooncake(stream: TextIO, path: Path) -> Iterator[Shape]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError("is not JSON", where=where) from None
        if not isinstance(row, dict):
            raise InputError("is no JSON object", where=where)
        prompt = _tokens(row, "input_length", where)
        yield Shape(
            _milliseconds(row, where), prompt, _tokens(row, "output_length", where), _blocks(row, prompt, where)
        )


def _milliseconds(row: dict[str, Any], where: str) -> float:
    value = row.get("timestamp")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e15:
        raise InputError(f"timestamp is {value!r}, not a number of milliseconds", where=where)
    return value / 1000


def _blocks(row: dict[str, Any], prompt_tokens: int, where: str) -> tuple[int, ...]:
    found = row.get("hash_ids") or []
    if not isinstance(found, list) or any(type(id) is not int or not 0 <= id < 1 << 63 for id in found):
        raise InputError("hash_ids is not a list of whole numbers", where=where)
    if found and len(found) != -(-prompt_tokens // BLOCK_TOKENS):
        raise InputError(
            f"{len(found)} hash_ids do not fit {prompt_tokens} tokens in blocks of {BLOCK_TOKENS}", where=where
        )
    return tuple(found)


def _tokens(row: dict[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value[:20])
    if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
        raise InputError(f"{name} is {value!r}, not a number of tokens", where=where)
    return value

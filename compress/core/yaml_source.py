"""YAML 1.2 text -> plain data, and the line and column of every node. Nothing in the text can run, alias or explode.

Only mappings with text keys, lists, text, whole numbers, numbers, true/false and null come out. Dates and ratios such
as 2:4 stay text, 2_000_000 is a whole number, 1e-5 a number. Anchors, aliases, tags, duplicate keys, several documents,
NUL bytes, non-UTF-8 text and anything over the limits below are refused, each with its position.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from compress.core.errors import RecipeError
from compress.core.positions import ROOT, UNPRINTABLE, Mark, NodePath, YamlSource

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 2_000

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INT64 = 1 << 63


def read_yaml(path: Path) -> YamlSource:
    """Parse the file at `path`; RecipeError if it is missing, unreadable or not acceptable YAML."""
    name = str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError("this is a folder, not a recipe file", where=name) from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe: {error.strerror}", where=name) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"the recipe is larger than {MAX_BYTES} bytes", where=name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise RecipeError("not UTF-8 text", where=f"{name}:{line}:{column}") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> YamlSource:
    """Parse `text`, called `name` in messages. RecipeError with file:line:column for anything but plain YAML 1.2."""
    source = YamlSource(name, text.splitlines())
    if len(text) > MAX_BYTES:
        raise RecipeError(f"the text is larger than {MAX_BYTES} bytes", where=name)
    bad = UNPRINTABLE.search(text)
    if bad:
        raise source.error_at(_mark_at(text, bad.start()), f"the character U+{ord(bad[0]):04X} is not allowed in YAML")
    try:
        _Builder(source, YAML(typ="safe", pure=True).parse(text)).build()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Mark(mark.line + 1, mark.column + 1) if mark else None
        raise source.error_at(position, f"not valid YAML: {_one_line(error.problem or error.context)}") from None
    except YAMLError as error:
        raise source.error_at(None, f"not valid YAML: {_one_line(str(error))}") from None
    return source


def parse_value(text: str, name: str) -> Any:
    """The value that `text` means in YAML, as used by --set key=value."""
    return parse_yaml(text, name).data


def _mark_at(text: str, offset: int) -> Mark:
    line_start = text.rfind("\n", 0, offset) + 1
    return Mark(text.count("\n", 0, offset) + 1, offset - line_start + 1)


def _one_line(text: str | None) -> str:
    return " ".join((text or "unreadable").split())


class _Builder:
    """Turns parser events into data while it records positions and enforces the limits."""

    def __init__(self, source: YamlSource, events: Iterator[Any]) -> None:
        self.source = source
        self.events = events
        self.nodes = 0

    def build(self) -> None:
        documents = 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "several documents in one file: a recipe is one")
            elif isinstance(event, (ScalarEvent, SequenceStartEvent, MappingStartEvent, AliasEvent)):
                self.source.data = self._node(event, ROOT)
            elif isinstance(event, StreamEndEvent):
                return

    def _error(self, event: Any, message: str) -> RecipeError:
        return self.source.error_at(_mark(event), message)

    def _node(self, event: Any, path: NodePath) -> Any:
        self._check(event, path)
        left_out = isinstance(event, ScalarEvent) and not event.value and event.style is None
        self.source.values[path] = self.source.keys.get(path, _mark(event)) if left_out else _mark(event)
        if isinstance(event, ScalarEvent):
            return self._scalar(event)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _check(self, event: Any, path: NodePath) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self._error(event, f"more than {MAX_NODES} values")
        if len(path) > MAX_DEPTH:
            raise self._error(event, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, AliasEvent):
            raise self._error(event, f"aliases are not allowed: write the value of *{event.anchor} out")
        if event.anchor:
            raise self._error(event, f"anchors are not allowed: remove &{event.anchor}")
        if event.tag:
            raise self._error(event, f"tags are not allowed: remove {event.tag}")

    def _sequence(self, path: NodePath) -> list[Any]:
        items: list[Any] = []
        for event in self.events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self._node(event, (*path, len(items))))
        return items

    def _mapping(self, path: NodePath) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for event in self.events:
            if isinstance(event, MappingEndEvent):
                break
            key = self._key(event, path)
            if key in entries:
                first = self.source.keys[(*path, key)]
                raise self._error(event, f"duplicate key {key!r}: it is already given in line {first.line}")
            self.source.keys[(*path, key)] = _mark(event)
            entries[key] = self._node(next(self.events), (*path, key))
        return entries

    def _key(self, event: Any, path: NodePath) -> str:
        self._check(event, path)
        if not isinstance(event, ScalarEvent):
            raise self._error(event, "a key must be text, not a list or mapping")
        if event.value == "<<" and event.style is None:
            raise self._error(event, "merge keys (<<) are not allowed: write the values out")
        if not event.value:
            raise self._error(event, "a key must not be empty")
        return event.value

    def _scalar(self, event: ScalarEvent) -> Any:
        text = event.value
        if event.style is not None:
            return text
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _INT.fullmatch(text) or _HEX.fullmatch(text):
            return self._whole_number(event)
        if _FLOAT.fullmatch(text):
            value = float(text)
            if not math.isfinite(value):
                raise self._error(event, "this number is too large")
            return value
        if _NOT_FINITE.fullmatch(text):
            raise self._error(event, "infinity and not-a-number are not allowed")
        return text

    def _whole_number(self, event: ScalarEvent) -> int:
        text = event.value
        if len(text) > 40:
            raise self._error(event, "this number is too large")
        value = int(text, 0) if _HEX.fullmatch(text) else int(text)
        if not -_INT64 <= value < _INT64:
            raise self._error(event, "this number is too large")
        return value


def _mark(event: Any) -> Mark:
    return Mark(event.start_mark.line + 1, event.start_mark.column + 1)

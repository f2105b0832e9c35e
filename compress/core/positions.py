"""Where each key and value of a text stands, and what is wrong there, said with the line and a caret."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from compress.core.errors import RecipeError

NodePath = tuple[str | int, ...]
ROOT: NodePath = ()

UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""What YAML does not allow in its text."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A position in the text, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the node at `path`; `missing` if it is not there at all."""

    path: NodePath
    message: str
    hint: str | None = None
    at_key: bool = False
    missing: bool = False


@dataclass
class YamlSource:
    """Parsed text: its data, and where each key and value stands. `name` is what messages call the file."""

    name: str
    lines: list[str]
    data: Any = None
    keys: dict[NodePath, Mark] = field(default_factory=dict)
    values: dict[NodePath, Mark] = field(default_factory=dict)
    overrides: dict[NodePath, str] = field(default_factory=dict)

    def errors(self, problems: Iterable[Problem]) -> list[RecipeError]:
        """The problems as errors, in the order of the file; what is missing comes last, since it may be misspelt."""
        return [self.error(problem) for problem in sorted(problems, key=self._order)]

    def error(self, problem: Problem) -> RecipeError:
        """A RecipeError at the problem's node, or at its nearest ancestor that has a position."""
        path = problem.path
        label = f"{dotted(path)}: {problem.message}" if path else problem.message
        for end in range(len(path), 0, -1):
            if path[:end] in self.overrides:
                return RecipeError(label, where=self.overrides[path[:end]], hint=problem.hint)
        return self.error_at(self._mark(problem), label, problem.hint)

    def _mark(self, problem: Problem) -> Mark | None:
        path = problem.path
        if problem.at_key and path in self.keys:
            return self.keys[path]
        if problem.missing and path[:-1] in self.keys:
            return self.keys[path[:-1]]
        return next((self.values[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.values), None)

    def _order(self, problem: Problem) -> tuple[bool, int, int]:
        mark = self._mark(problem) or Mark(0, 0)
        return problem.missing, mark.line, mark.column

    def error_at(self, mark: Mark | None, message: str, hint: str | None = None) -> RecipeError:
        """A RecipeError at a position, with the line and a caret under it."""
        if mark is None:
            return RecipeError(message, where=self.name, hint=hint)
        if self.lines and mark.line > len(self.lines):  # the end of the text is the end of its last line
            mark = Mark(len(self.lines), len(self.lines[-1]) + 1)
        where = f"{self.name}:{mark.line}:{mark.column}"
        return RecipeError(message, where=where, hint=hint, excerpt=self._excerpt(mark))

    def _excerpt(self, mark: Mark) -> str | None:
        if not 1 <= mark.line <= len(self.lines):
            return None
        line = self.lines[mark.line - 1].replace("\t", " ").rstrip()
        first = max(0, min(mark.column - 1, len(line)) - 60)
        shown = UNPRINTABLE.sub("?", line[first : first + 100])
        return f"{shown}\n{' ' * (mark.column - 1 - first)}^"


def dotted(path: NodePath) -> str:
    """("stages", 2, "quantize") -> "stages[2].quantize"."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if len(part) <= 60 else f"{part[:60]}…"
            text += f".{name}" if text else name
    return text


def nested(data: Any, path: NodePath, default: Any = None) -> Any:
    """The value at `path`, or `default` where the path leaves the data."""
    for part in path:
        if isinstance(data, dict):
            if part not in data:
                return default
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return default
    return data

"""Name patterns of layers, as recipes have them: those of a shell, matched against a layer's name on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator


def _shell_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        raise ValueError(f"{pattern!r} is a regular expression; patterns are those of a shell: '*.q_proj'")
    if not pattern:
        raise ValueError("an empty pattern matches nothing: '*' stands for all layers")
    if pattern.count("[") > pattern.count("]"):
        raise ValueError(f"{pattern!r} has a [ without its ]")
    return pattern


Pattern = Annotated[str, AfterValidator(_shell_pattern)]


def covered(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns` matches the layer `name`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def unused(word: str, patterns: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """A sentence for each pattern under the key `word` that matches none of the layers."""
    names = tuple(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield f"{word} pattern {pattern!r} matches no layer"

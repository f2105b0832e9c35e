"""The one console: results to standard output, everything for people to standard error, or one JSON object per line.

Text from recipes, models and datasets is untrusted: control characters are stripped and rich's markup is off.
"""

import json
import logging
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from compress.core.errors import CompressError, RecipeError

SCHEMA_VERSION = 1

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # invisible ones, and those that turn the writing direction
    "\ud800-\udfff]"
)


def clean(text: object) -> str:
    """`text` without characters that a terminal obeys or that hide what is written."""
    return _UNSAFE.sub("", str(text))


def _console(*, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=False)


@dataclass
class Output:
    """How this command speaks. Commands get one from `speak`; errors of the outermost frame use the last one."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    result: Console = field(default_factory=lambda: _console(stderr=False))
    people: Console = field(default_factory=lambda: _console(stderr=True))

    def show(self, renderable: RenderableType) -> None:
        """Part of the result, for a person to read; left out with --json and --quiet."""
        if not self.json and not self.quiet:
            self.result.print(_safe(renderable))

    def line(self, text: object) -> None:
        """A line of the result that must not be broken, such as a path; left out with --json and --quiet."""
        if not self.json and not self.quiet:
            self.result.print(Text(clean(text)), soft_wrap=True)

    def answer(self, text: object) -> None:
        """The result in one line; printed with --quiet, too."""
        if not self.json:
            self.result.print(Text(clean(text)), soft_wrap=True)

    def tell(self, text: object, style: str = "") -> None:
        """A line for people: what goes on, what to know."""
        if not self.quiet and not self.json:
            self.people.print(Text(clean(text), style=style), soft_wrap=True)

    def emit(self, kind: str, **fields: Any) -> None:
        """One JSON object on one line, with --json only."""
        if self.json:
            line = json.dumps({"event": kind, **fields}, ensure_ascii=False, default=str)
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def finish(self, command: str, exit_code: int = 0, **fields: Any) -> None:
        """The last JSON object: what the command came to."""
        self.emit("summary", schema_version=SCHEMA_VERSION, command=command, exit_code=exit_code, **fields)

    def fail(self, error: CompressError) -> None:
        """An error, in the form of the mode."""
        if self.json:
            where = {"message": error.message, "where": error.where, "hint": error.hint}
            self.emit("error", schema_version=SCHEMA_VERSION, exit_code=error.exit_code, **where)
            return
        text = Text("error: ", style="bold red")
        if error.where:
            text.append(f"{clean(error.where)}: ", style="bold")
        text.append(clean(error.message), style="")
        self.people.print(text, soft_wrap=True)
        if isinstance(error, RecipeError) and error.excerpt:
            for line in error.excerpt.split("\n"):
                self.people.print(Text(f"    {clean(line)}", style="dim"), soft_wrap=True)
        if error.hint:
            self.people.print(Text(f"  hint: {clean(error.hint)}", style="cyan"), soft_wrap=True)


def _safe(renderable: RenderableType) -> RenderableType:
    return Text(clean(renderable)) if isinstance(renderable, str) else renderable


_last = Output()

_OF_THE_HUB = ("huggingface_hub.utils._http", "huggingface_hub.file_download", "huggingface_hub.hf_api")


def speak(*, json: bool = False, quiet: bool = False, verbose: bool = False) -> Output:
    """The Output of this command. A quiet one also silences the hub's client, which tells of every new attempt."""
    global _last  # the outermost frame must know in which form to report an error
    for name in _OF_THE_HUB:  # by name, since the library need not be imported yet
        logging.getLogger(name).setLevel(logging.ERROR if quiet else logging.NOTSET)
    _last = Output(json, quiet, verbose)
    return _last


def last_output() -> Output:
    """The Output that the running command speaks through."""
    return _last

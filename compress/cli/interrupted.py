"""Ctrl-C in a command that leaves nothing behind: one line for people, and exit code 130."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from compress.cli.console import Output

INTERRUPTED = 130


@contextmanager
def ends_when_interrupted(output: Output, command: str) -> Iterator[None]:
    """Within the block Ctrl-C ends the command."""
    try:
        yield
    except KeyboardInterrupt:  # typer would end without a word
        output.tell("interrupted", style="yellow")
        output.finish(command, INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None

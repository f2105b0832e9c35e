"""The command `level`: a model with uneven widths for engines that know one width only."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options as opt
from compress.cli.console import speak


def level(
    folder: opt.ArtifactFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that is made.", show_default=False)],
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace an older artifact at --output.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make layers that were pruned unevenly equally wide, so that every engine opens the model.

    Zeros fill them up to the widest. The model computes the same; what that costs is told.
    """
    from compress.core.quantities import format_bytes
    from compress.level import level as work

    speaker = speak(json=json, quiet=quiet, verbose=verbose)
    done = work(folder, output, fresh=fresh)
    speaker.tell(done.sentence)
    speaker.answer(f"{done.folder}: {format_bytes(done.bytes)}, before {format_bytes(done.bytes_before)}")
    speaker.finish(
        "level",
        path=str(done.folder),
        width=done.width,
        parameters_before=done.parameters_before,
        parameters=done.parameters,
        bytes_before=done.bytes_before,
        bytes=done.bytes,
    )


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(level)

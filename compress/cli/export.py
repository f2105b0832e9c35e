"""The command `export`: an artifact in another format."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options as opt
from compress.cli.console import speak

FORMATS = ("awq", "bitsandbytes", "compressed-tensors", "gguf", "gptq")


def export(
    folder: opt.ArtifactFolder,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="awq, bitsandbytes, compressed-tensors, gguf or gptq.",
            autocompletion=lambda: [*FORMATS],
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that is made.", show_default=False)],
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Of gguf: f32, f16, bf16, q8_0, q4_0, q4_k or q6_k for matrices. [default: what they are]",
            show_default=False,
        ),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Of gguf: round quantized weights anew where it lacks their values.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace an older artifact at --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say who would load it; write nothing.")] = False,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="Devices that an engine would split it over.")
    ] = 1,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write an artifact in another format, without calibrating again.

    Weights keep their exact values; a format that cannot hold them is refused, with what would work.
    """
    from compress.cli.tables import SIGNS
    from compress.core.compatibility import describe
    from compress.core.quantities import format_bytes
    from compress.export_artifact import export_artifact, preview

    speaker = speak(json=json, quiet=quiet, verbose=verbose)
    work = preview if dry_run else export_artifact
    done = work(
        folder,
        output,
        format,
        type=type,
        requantize=requantize,
        fresh=fresh,
        tensor_parallel=tensor_parallel,
    )
    for verdict in done.verdicts:
        speaker.show(f"{SIGNS[verdict.ok]} {verdict.sentence}")
    for notice in done.notices:
        speaker.tell(notice, style="yellow")
    if dry_run:
        speaker.answer(f"nothing was written; the artifact would be {done.folder}")
    else:
        speaker.answer(f"{done.folder}: {format}, {format_bytes(done.bytes)}")
    speaker.finish(
        "export",
        path=str(done.folder),
        format=format,
        dry_run=dry_run,
        bytes=done.bytes,
        preflight=describe(list(done.verdicts)),
        notices=done.notices,
    )


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(export)

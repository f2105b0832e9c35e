"""Commands about a finished folder: inspect, verify, push."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import options as opt
from compress.cli.console import Output, clean, speak

if TYPE_CHECKING:
    from compress.core.inspect import Inspection


class Level(StrEnum):
    """How far `verify` goes."""

    integrity = "integrity"
    coverage = "coverage"
    parity = "parity"


Source = Annotated[
    Path | None, typer.Option("--source", help="Folder of the original model, to check coverage.", show_default=False)
]


def inspect(
    folder: opt.ArtifactFolder,
    zeros: Annotated[
        bool, typer.Option("--zeros", help="Count zeros, which reads all weights; always done in pruned models.")
    ] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what a model folder holds."""
    from compress.core.inspect import inspect as look
    from compress.core.quantities import format_bytes

    output = speak(json=json, quiet=quiet, verbose=verbose)
    found = look(opt.model_folder(folder), zeros=zeros)
    _show(found, output)
    if quiet:
        stored = found.method or "not quantized"
        output.answer(
            f"{folder}: {found.family}, {found.parameters:,} parameters, {format_bytes(found.bytes)}, {stored}"
        )
    for notice in found.notices:
        output.tell(notice, style="yellow")
    output.finish("inspect", **found.as_dict())


def verify(
    folder: opt.ArtifactFolder,
    source: Source = None,
    level: Annotated[
        Level | None,
        typer.Option("--level", help="How far to go. [default: as far as the folder allows]", show_default=False),
    ] = None,
    library: Annotated[
        bool, typer.Option("--library", help="Have the format's own library read layers, too; takes seconds.")
    ] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check a folder; exit code 3 if a check fails.

    integrity: hashes, shapes, values, a second decoder; coverage: every tensor of the source; parity: our own runtime.
    """
    from compress.cli.tables import add_row, grid
    from compress.core.errors import InputError
    from compress.core.verify import verify as check

    output = speak(json=json, quiet=quiet, verbose=verbose)
    report = check(folder, source=source, level=level.value if level else None, library=library)
    table = grid("", "check", "detail", figures=False)
    for found in report.checks:
        add_row(table, "ok" if found.ok else "!!", found.name, found.detail)
        output.emit("check", name=found.name, ok=found.ok, detail=found.detail)
    output.show(table)
    for notice in report.notices:
        output.tell(f"not checked: {notice}")
        output.emit("notice", message=notice)
    failed = [found for found in report.checks if not found.ok]
    code = InputError.exit_code if failed else 0
    verdict = (
        f"{len(failed)} of {len(report.checks)} checks failed" if failed else f"all {len(report.checks)} checks passed"
    )
    if quiet:
        for found in failed:
            output.answer(f"{found.name}: {found.detail}")
    output.answer(f"{folder}: {verdict}")
    output.finish("verify", code, path=str(folder), failed=[found.name for found in failed])
    if code:
        raise typer.Exit(code)


def push(
    folder: opt.ArtifactFolder,
    repository: Annotated[str, typer.Argument(help="Hub repository, owner/name.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; private otherwise.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded; send nothing.")] = False,
    message: Annotated[str, typer.Option("--message", help="Commit message.")] = "Upload compressed model",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Upload an artifact to the hub, private by default.

    It is verified first, and not uploaded if it fails. The card names base model and licence.
    """
    from compress.cli.tables import add_row, grid
    from compress.core.quantities import format_bytes
    from compress.push import plan_push, push_artifact

    output = speak(json=json, quiet=quiet, verbose=verbose)
    plan = plan_push(folder, repository)
    table = grid("file", "bytes", "")
    for name, size in plan.files.items():
        add_row(table, name, f"{size:,}", "")
    output.show(table)
    facts = f"base model {plan.base_model or 'unknown'}, licence {plan.licence or 'not stated'}"
    output.show(f"{len(plan.files)} files, {format_bytes(plan.bytes)}; {facts}")
    visibility = "public" if public else "private"
    if dry_run:
        output.answer(f"nothing was sent; it would go to {repository}, {visibility} if it is new")
        output.finish("push", dry_run=True, files=plan.files, bytes=plan.bytes, repository=repository)
        return
    url = push_artifact(plan, private=not public, message=message)
    output.answer(url)
    output.finish("push", url=url, files=plan.files, bytes=plan.bytes, repository=repository)


def _show(found: "Inspection", output: Output) -> None:
    from compress.cli.tables import SIGNS, add_row, grid
    from compress.core.quantities import format_bytes

    facts = grid("model", clean(found.folder))
    add_row(facts, "family", found.family if found.supported else f"{found.family}, which this version cannot compress")
    add_row(facts, "parameters", f"{found.parameters:,}")
    add_row(facts, "weights", f"{format_bytes(found.bytes)} in {found.files} files")
    add_row(facts, "bits per weight", f"{found.bits_per_weight:.2f}")
    add_row(facts, "quantization", found.method or "none")
    if found.zeros is not None:
        held = "all" if found.zeros.two_of_four == found.zeros.layers else f"{found.zeros.two_of_four:,}"
        add_row(facts, "zeros", f"{found.zeros.share:.1%} of {found.zeros.layers:,} layers; 2:4 in {held} of them")
    if found.source:
        add_row(facts, "made from", f"{found.source}{f' at {found.revision}' if found.revision else ''}")
    output.show(facts)
    stored = grid("tensors", "stored as")
    for scheme, count in found.schemes.items():
        add_row(stored, f"{count:,}", scheme)
    output.show(stored)
    if output.verbose:
        layers = grid("layer", "shape", "bits", "stored as")
        for layer in found.layers:
            shape = "×".join(map(str, layer.shape))
            add_row(layers, layer.name, shape, f"{layer.bits_per_weight:.2f}", layer.stored)
        output.show(layers)
    for verdict in found.engines:
        output.show(f"{SIGNS[verdict.ok]} {verdict.sentence}")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (inspect, verify, push):
        app.command()(command)

"""`compress kv`: the kv_cache stages of a recipe; and what keys and values of a model take."""

from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import kv_check
from compress.cli import options as opt
from compress.cli.console import Output, speak
from compress.cli.run import DryRun, Fresh, KeepStages, OutputFolder, execute

if TYPE_CHECKING:
    from compress.kv_report import KVReport

group = typer.Typer(rich_markup_mode=None)


@group.callback(invoke_without_command=True)
def kv(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one.", show_default=False),
    ] = None,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    output: OutputFolder = None,
    set_: opt.Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    keep_stages: KeepStages = False,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    offline: opt.Offline = False,
    allow_code: opt.AllowCode = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Keys and values: run only the kv_cache stages of a recipe (--recipe), or look at them (report, check)."""
    if recipe is None or context.invoked_subcommand is not None:
        opt.help_without_command(context)
        return
    execute("kv_cache", recipe, model, adapter, output, set_ or [], dry_run, fresh, keep_stages, device, dtype, offline,
            tuple(allow_code or ()), speak(json=json, quiet=quiet, verbose=verbose))  # fmt: skip


@group.command("report")
def report(
    model: Annotated[str, typer.Argument(help="Artifact or any model: folder or hub id.", show_default=False)],
    memory: Annotated[str, typer.Option("--memory", help="For keys and values alone: 4GiB, 500MB.")] = "4GiB",
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens of a sequence. [default: the longest]", show_default=False),
    ] = None,
    numerics: opt.Numerics = "fast",
    device: opt.Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of what is kept in full: auto (the runtime's), float32, bfloat16.")
    ] = "auto",
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Say what keys and values take.

    Bytes of a token in each layer, what grouped heads save, and what each codec, and keeping a share of the tokens,
    make of a memory: the sequences that fit, and the longest one.
    """
    from dataclasses import asdict

    from compress.core.errors import UsageError
    from compress.core.quantities import parse_size

    output = speak(json=json, quiet=quiet)
    try:
        memory_bytes = parse_size(memory)
    except ValueError as error:
        raise UsageError(str(error), where="--memory") from None
    opt.check_numerics(numerics)
    asked = opt.check_dtype(dtype)
    import torch

    from compress.core.checkpoint import Checkpoint
    from compress.core.numerics import runtime_dtype
    from compress.kv_report import kv_report
    from runtime.models.reading import read

    held = runtime_dtype(numerics, opt.choose_device(device), None if asked == "auto" else getattr(torch, asked))
    checkpoint = Checkpoint.open(opt.model_name(model), offline=offline)
    context = context or read(checkpoint.config, str(checkpoint.folder / "config.json")).max_length
    found = kv_report(checkpoint, memory_bytes=memory_bytes, context=context, dtype=held)
    _show(found, memory_bytes, context, output)
    output.finish("kv report", memory_bytes=memory_bytes, context=context, **asdict(found))


def _show(found: "KVReport", memory_bytes: int, context: int, output: Output) -> None:
    from compress.cli.tables import add_row, grid
    from compress.core.quantities import format_bytes

    layers = grid("layer", "query heads", "key-value heads", "channels", "keys", "values", "bytes of a token")
    for each in found.layers:
        add_row(layers, each.index, each.heads, each.kv_heads, each.width, each.keys, each.values, f"{each.bytes:,}")
    output.show(layers)
    saved = found.ungrouped_bytes / found.full_bytes
    output.show(
        f"a token takes {found.full_bytes:,} bytes in {found.full_dtype}; without grouped heads it would be {saved:g} "
        "times that"
    )
    ways = grid("kept as", "share of tokens", "bytes of a token", f"sequences of {context:,}", "longest sequence")
    for way in found.ways:
        end = "any" if way.longest is None else f"{way.longest:,}"
        add_row(ways, way.name, f"{way.share:.1%}", f"{way.token_bytes:,}", f"{way.sequences:,}", end)
    output.show(f"in {format_bytes(memory_bytes)} for keys and values, in whole pages:")
    output.show(ways)
    for way in found.ways if output.quiet else ():
        end = "any" if way.longest is None else way.longest
        output.answer(f"{way.name}\t{way.share:g}\t{way.token_bytes}\t{way.sequences}\t{end}")


def register(app: typer.Typer) -> None:
    """Add the group of this file."""
    kv_check.register(group)
    app.add_typer(group, name="kv")

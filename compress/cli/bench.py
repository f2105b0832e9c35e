"""`compress bench`: how fast an artifact serves requests through the runtime, and what memory it takes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli.console import Output, speak
from compress.cli.kv_option import KVOption, kv_settings


def bench(
    artifact: Annotated[str, typer.Argument(help="Artifact or any model: folder or hub id.", show_default=False)],
    requests: Annotated[int, typer.Option("--requests", help="Requests to send; of a trace, its first.")] = 32,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            "--prompt-tokens", help="256, 64-512, lognormal:256,0.8 or exponential:256. [default: 256]", metavar="SPEC"
        ),
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option("--output-tokens", help="Likewise. [default: 64]", metavar="SPEC")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Lengths and times of a trace: Azure CSV, Mooncake JSON lines.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", help="Requests a second, or 0.5x the trace's pace. [default: all at once]"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For lengths, arrivals and token ids.")] = 0,
    against: Annotated[
        str | None, typer.Option("--against", help="Original to take turns with: folder or hub id.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Times each; medians count. [default: 1, or 3 with --against]")
    ] = None,
    numerics: opt.Numerics = "fast",
    device: opt.Device = "auto",
    sparse: opt.Sparse = "auto",
    kv_cache: KVOption = None,
    folder: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report.")] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure speed and memory of a model in the runtime.

    Throughput, time to the first token, time per token, gaps between tokens, and bytes by what they are for.
    Prompts are random token ids. With --against, two models take turns on the same requests; the original keeps its
    keys and values as it says itself.
    """
    from compress.cli.progress import LiveProgress

    output = speak(json=json, quiet=quiet)
    opt.check_numerics(numerics)
    opt.check_sparse(sparse)
    kept = kv_settings(kv_cache)
    from compress.benchmark import Asked, benchmark

    asked = Asked(requests, prompt_tokens, output_tokens, trace, rate, seed)
    if folder is not None:
        from compress.report.speed import require_writable

        require_writable(folder)
    with LiveProgress(output) as listener:
        result = benchmark(
            opt.model_name(artifact), asked, against=against and opt.model_name(against), numerics=numerics,
            device=opt.choose_device(device), sparse=sparse, kv_cache=kept, rounds=rounds, events=listener,
        )  # fmt: skip
    files = _write(result, folder)
    _show(output, result, files)
    for path in files:
        output.answer(path)
    output.finish("bench", **_without_series(result), files=files)


def _show(output: Output, result: dict[str, Any], files: list[str]) -> None:
    from compress.benchmark.fallbacks import sentence
    from compress.cli.tables import add_row, grid
    from compress.core.quantities import format_bytes
    from compress.report.speed import packing_lines, speed_tables

    models = result["models"]
    for table in speed_tables(result):
        shown = grid(table.title, *table.columns[1:], figures=False)
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in table.rows:
            add_row(shown, *row)
        output.show(shown)
    if output.quiet and not files:
        for model in models:
            speed, held = model["figures"]["generated_tokens_per_second"], model["memory"]["total_bytes"]
            output.answer(f"{model['role']}\t{speed:.1f} tokens/s\t{format_bytes(held)}")
    for model in models:
        for item in model["fallbacks"]:
            output.tell(f"{model['role']}: {sentence(item['reason'], item['layers'])}", style="yellow")
    for line in packing_lines(models):
        output.tell(line)


def _write(result: dict[str, Any], folder: Path | None) -> list[str]:
    if folder is None:
        return []
    from compress.report.speed import write_speed_report

    return [str(path) for path in write_speed_report(result, folder)]


def _without_series(result: dict[str, Any]) -> dict[str, Any]:
    """The result without the points of its plots, which would make a line of many kilobytes, and its version."""
    models = [{key: value for key, value in model.items() if key != "series"} for model in result["models"]]
    return {key: value for key, value in result.items() if key != "schema_version"} | {"models": models}


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(bench)

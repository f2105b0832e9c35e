"""`compress run`, and one command for each kind of stage that has methods: a recipe goes in, an artifact comes out."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import options as opt
from compress.cli.console import Output, speak

if TYPE_CHECKING:
    from compress.core.recipe import Recipe
    from compress.pipeline import RunOptions, RunResult

OutputFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the artifact. [default: MODEL-RECIPE]", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done and what it takes; write nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; replaces an older output.")]
KeepStages = Annotated[bool, typer.Option("--keep-stages", help="Keep the folders between stages.")]


def _command(kind: str | None, sentence: str) -> Callable[..., None]:
    """The command for the stages of a kind (None: all), with its help."""

    def command(
        recipe: opt.RecipeName,
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
        execute(kind, recipe, model, adapter, output, set_ or [], dry_run, fresh, keep_stages, device, dtype, offline,
                tuple(allow_code or ()), speak(json=json, quiet=quiet, verbose=verbose))  # fmt: skip

    command.__doc__ = sentence
    return command


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    everything = (
        "Run a recipe: compress, verify, evaluate, report.\n\nInterrupted, the same command goes on where it was."
    )
    app.command("run")(_command(None, everything))
    for kind in ("prune", "distill", "quantize"):
        app.command(kind)(_command(kind, f"Run only the {kind} stages of a recipe."))


def execute(
    kind: str | None,
    recipe_name: str,
    model: str | None,
    adapter: str | None,
    folder: Path | None,
    overrides: list[str],
    dry_run: bool,
    fresh: bool,
    keep_stages: bool,
    device: str,
    dtype: str,
    offline: bool,
    allow_code: tuple[str, ...],
    output: Output,
) -> None:
    """What `run` and its siblings do, once their options are read. `kind`: only stages of it."""
    from compress.cli.shipped import find_recipe
    from compress.core.methods import check_packages
    from compress.core.processes import require_launched
    from compress.core.recipe import load_recipe

    check_packages()
    require_launched()
    path = find_recipe(recipe_name)
    recipe = load_recipe(path, overrides, model, allow_code, adapter)
    if kind:
        recipe = _only(recipe, kind, output)
    opt.check_dtype(dtype)
    from compress.pipeline import RunOptions

    options = RunOptions(
        output=folder or Path(_default_name(recipe, path)),
        fresh=fresh,
        keep_stages=keep_stages,
        device=opt.choose_device(device),
        dtype=dtype,
        offline=offline,
        allow_code=allow_code,
    )
    if dry_run:
        _show_plan(recipe, options, output)
    else:
        _finish(_run(recipe, options, output), output)


def _default_name(recipe: "Recipe", path: Path) -> str:
    return f"{Path(recipe.model).name}-{path.stem}"


def _only(recipe: "Recipe", kind: str, output: Output) -> "Recipe":
    from compress.core.errors import UsageError

    stages = tuple(stage for stage in recipe.stages if stage.kind == kind)
    if not stages:
        kinds = ", ".join(dict.fromkeys(stage.kind for stage in recipe.stages))
        raise UsageError(f"the recipe has no {kind} stage, it has {kinds}", hint="compress run does all of its stages")
    for number, stage in enumerate(recipe.stages):
        if stage.kind != kind:
            output.tell(f"stages[{number}] ({stage.kind}) is left out", style="yellow")
    return recipe.model_copy(update={"stages": stages})


def _run(recipe: "Recipe", options: "RunOptions", output: Output) -> "RunResult":
    from compress.cli.progress import LiveProgress
    from compress.pipeline import run as run_recipe

    output.tell(f"{recipe.model} → {options.output} on {options.device}")
    try:
        with LiveProgress(output) as listener:
            return run_recipe(recipe, options, listener)
    except KeyboardInterrupt:
        output.tell(f"interrupted; finished blocks are kept. To go on:\n  {_resume_line()}", style="yellow")
        output.finish("run", 130, resume=_resume_line())
        raise typer.Exit(130) from None


def _resume_line() -> str:
    """This very command, without --fresh, which would throw the finished blocks away."""
    return shlex.join(["compress", *(word for word in sys.argv[1:] if word != "--fresh")])


def _finish(result: "RunResult", output: Output) -> None:
    from compress.cli.tables import before_after, cost_line
    from compress.core.errors import GateError
    from compress.report.packings import run_notes

    report = result.report_folder / "report.html"
    if not output.quiet:
        output.show(before_after(result.summary))
        output.show(cost_line(result.summary))
        output.line(f"report    {report}")
        output.line(f"artifact  {result.artifact}")
    else:
        output.answer(result.artifact)
    for note in run_notes(result.summary):
        output.tell(note)
    for failure in result.gate_failures:
        output.tell(f"gate: {failure}", style="red")
    code = GateError.exit_code if result.gate_failures else 0
    summary = {key: result.summary.get(key) for key in ("source", "artifact", "evaluation", "measured", "plan", "gate")}
    summary["fallbacks"] = result.summary.get("fallbacks")
    summary["stages"] = [  # the plan leaves the evaluation out, what was measured in all does not
        {key: stage.get(key) for key in ("kind", "method", "seconds", "peak_memory_bytes")}
        for stage in result.summary.get("stages") or []
    ]
    output.finish("run", code, report=str(report), **summary)
    if code:
        raise typer.Exit(code)


def _show_plan(recipe: "Recipe", options: "RunOptions", output: Output) -> None:
    from compress.cli.tables import SIGNS, layers_table, plan_table
    from compress.core.compatibility import as_written, describe, preflight, unsettled
    from compress.pipeline import plan as plan_run

    plan = plan_run(recipe, options)
    shapes, format = {layer.name: layer.shape for layer in plan.layers}, recipe.export.format
    ways = [as_written(schemes, format) for schemes in plan.possible_schemes()]
    verdicts = unsettled([preflight(way, shapes, format, uneven=plan.uneven) for way in ways])
    for stage, planned in zip(recipe.stages, plan.stages, strict=True):
        output.show(layers_table(planned, f"{stage.kind}: {stage.method}", every=output.verbose))
    output.show(plan_table(plan))
    for verdict in verdicts:
        output.show(f"{SIGNS[verdict.ok]} {verdict.sentence}")
    for notice in plan.notices:
        output.show(f"! {notice}")
    output.answer(f"nothing was written; the artifact would be {options.output}")
    layers = [_layer(layer) for layer in plan.layers] if output.verbose else None
    output.finish(
        "run",
        dry_run=True,
        bytes=plan.bytes_out,
        artifact_bytes=plan.artifact_bytes,
        peak_memory_bytes=plan.peak_memory_bytes,
        disk_bytes=plan.disk_bytes,
        minutes=plan.minutes,
        notices=plan.notices,
        preflight=describe(verdicts),
        layers=layers,
    )


def _layer(layer: object) -> dict[str, object]:
    from compress.facts import layer_facts

    return layer_facts(layer)  # type: ignore[arg-type]

"""Commands about quality: eval, report, compare."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli.console import Output, speak

_USUAL_WINDOW = 2048

Against = Annotated[
    str | None, typer.Option("--against", help="Original to compare with: hub id or folder.", show_default=False)
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", help="Measure as this recipe says.", autocompletion=opt.complete_recipe, show_default=False
    ),
]
OutputFolder = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the report.", show_default=False)]


def evaluate(
    artifact: Annotated[str, typer.Argument(help="Artifact or any model: folder or hub id.", show_default=False)],
    against: Against = None,
    recipe: RecipeOption = None,
    text: Annotated[str | None, typer.Option("--text", help="Data set for perplexity.", show_default=False)] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens per window of perplexity. [default: 2048, or the recipe's]")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks: a,b,c.", show_default=False)] = None,
    task_folder: Annotated[
        str | None, typer.Option("--task-folder", help="Tasks from files.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Documents per task.", show_default=False)] = None,
    through: Annotated[
        str | None, typer.Option("--through", help="runtime or transformers; as the recipe says.", show_default=False)
    ] = None,
    numerics: Annotated[
        str | None, typer.Option("--numerics", help="Of the runtime: fast or exact.", show_default=False)
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure a model, beside its original.

    Perplexity, KL divergence, flips and lm-eval tasks. Without options: as the artifact's own recipe says.
    """
    from compress.cli.progress import LiveProgress
    from compress.cli.tables import add_row, figure, grid, quality_rows

    output = speak(json=json, quiet=quiet, verbose=verbose)
    asked, base_folder = _what_to_measure(artifact, recipe, text, window, tasks, task_folder, limit)
    asked = _run_by(asked, through, numerics)
    opt.check_dtype(dtype)
    from compress.evaluate import evaluate_folder

    with LiveProgress(output) as listener:
        result = evaluate_folder(
            artifact, asked, base=against, base_folder=base_folder, device=opt.choose_device(device), dtype=dtype,
            offline=offline, events=listener,
        )  # fmt: skip
    table = grid("", "original", "this model", "change")
    for row in quality_rows(result):
        add_row(table, *row)
    output.show(table)
    if quiet:
        for row in quality_rows(result):
            output.answer("\t".join(cell for cell in row if cell))
    for notice in result.get("notices") or ():
        output.tell(notice, style="yellow")
    if result["fast_to_exact"]:
        output.tell(f"measured in fast numerics; KL from exact ones: {figure(result['fast_to_exact']['kl'])} nats")
    if against is None:
        output.tell("give --against ORIGINAL to see what the compression costs")
    output.finish("eval", evaluation=result)


def _what_to_measure(
    artifact: str,
    recipe: str | None,
    text: str | None,
    window: int | None,
    tasks: str | None,
    task_folder: str | None,
    limit: int | None,
) -> tuple[Any, Path]:
    """The Evaluation, and where its relative paths start."""
    from compress.cli.shipped import find_recipe
    from compress.core.errors import UsageError
    from compress.core.recipe import load_recipe, parse_evaluation

    if text or tasks:
        data: dict[str, Any] = {"tasks": tasks.split(",") if tasks else [], "task_folder": task_folder, "limit": limit}
        if text:
            data["perplexity"] = {"dataset": text, "window": window or _USUAL_WINDOW}
        return parse_evaluation(data).located(Path.cwd()), Path.cwd()
    own = Path(artifact) / "recipe.yaml"
    if recipe is None and not own.is_file():
        raise UsageError("nothing says what to measure", hint="give --text DATASET, --tasks a,b or --recipe FILE")
    loaded = load_recipe(find_recipe(recipe) if recipe else own)
    if loaded.evaluate is None:
        raise UsageError("the recipe has no evaluate section", hint="give --text DATASET or --tasks a,b")
    places = [loaded.base_folder] if recipe else [loaded.base_folder, Path.cwd()]
    asked, folder = _located(loaded.evaluate, places, None if recipe else own)
    return _changed(asked, window, limit), folder


def _located(evaluate: Any, places: list[Path], own: Path | None) -> tuple[Any, Path]:
    """The Evaluation with its paths found in the first place that has them all: an artifact's own recipe names data as
    they lay beside the recipe that was run. UsageError if that is `own` and they lie nowhere."""
    from compress.core.errors import UsageError

    for place in places:
        asked = evaluate.located(place)
        names = [name for name in (asked.perplexity and asked.perplexity.dataset,) if name and Path(name).suffix]
        names += [asked.task_folder] if asked.task_folder else []
        names += [asked.refusals.prompts] if asked.refusals and asked.refusals.prompts else []
        missing = next((name for name in names if not Path(name).is_absolute()), None)
        if missing is None or own is None:
            return asked, place
    raise UsageError(
        f"its recipe names data by a path that leads nowhere from here: {missing}",
        where=str(own),
        hint="give --recipe with the recipe that was run, or --text FILE",
    )


def _changed(asked: Any, window: int | None, limit: int | None) -> Any:
    """A recipe's Evaluation with what the command line says beside it."""
    if window is not None and asked.perplexity is not None:
        asked = asked.model_copy(
            update={"perplexity": asked.perplexity.model_copy(update={"window": window, "stride": None})}
        )
    return asked if limit is None else asked.model_copy(update={"limit": limit})


def _run_by(asked: Any, through: str | None, numerics: str | None) -> Any:
    """The Evaluation with what the command line says of who runs the models."""
    from compress.core.errors import UsageError

    update: dict[str, str] = {}
    for name, value, known in (
        ("through", through, ("runtime", "transformers")),
        ("numerics", numerics, ("fast", "exact")),
    ):
        if value is not None and value not in known:
            raise UsageError(f"--{name} is {known[0]} or {known[1]}, not {value!r}")
        update |= {name: value} if value else {}
    found = asked.model_copy(update=update)
    if found.through == "transformers" and numerics:
        raise UsageError("--numerics is of the runtime: transformers would not heed it")
    return found


def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="OUTPUT.report folder, its run.json, the artifact, or what bench wrote.", show_default=False
        ),
    ],
    output: OutputFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write the report of a run, or of a benchmark, again.

    One HTML file, Markdown and JSON, from OUTPUT.report/run.json or from bench's benchmark.json.
    """
    say = speak(json=json, quiet=quiet)
    data, folder = _read_run(run)
    from compress.report import write_report
    from compress.report.speed import write_speed_report

    write = write_speed_report if data.get("kind") == "benchmark" else write_report
    _say_paths(say, "report", write(data, output or folder))


def _read_run(path: Path) -> tuple[dict[str, Any], Path]:
    """The content of run.json and its folder, wherever `path` points to."""
    from compress.core.errors import InputError

    beside = path.with_name(f"{path.name}.report")
    places = [path, path / "run.json", beside / "run.json", path / "benchmark.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            "there is no run.json or benchmark.json here",
            where=str(path),
            hint="give the OUTPUT.report folder of a run",
        )
    try:
        data = json_module.loads(found.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"not readable as JSON: {error}", where=str(found)) from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InputError("this is no run.json or benchmark.json of ours", where=str(found))
    return data, found.parent


def compare(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts, two or more.", show_default=False)],
    output: OutputFolder = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Put several artifacts into one report."""
    from compress.core.errors import UsageError

    say = speak(json=json, quiet=quiet)
    if len(artifacts) < 2:
        raise UsageError("compare needs two artifacts or more", hint="compress report shows one")
    from compress.report import compare as compare_artifacts

    _say_paths(say, "compare", compare_artifacts(artifacts, output or Path("comparison")))


def _say_paths(say: Output, command: str, paths: Any) -> None:
    for path in paths:
        say.answer(path)
    say.finish(command, files=[str(path) for path in paths])


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("eval")(evaluate)
    app.command()(report)
    app.command()(compare)

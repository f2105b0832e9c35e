"""`compress recipes …`: list, show, init, validate, schema, diff. None of them imports torch or downloads anything."""

import difflib
import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options as opt
from compress.cli.console import Output, speak

group = typer.Typer(rich_markup_mode=None)


@group.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List, show, write and check recipes."""
    opt.help_without_command(context)


@group.command("list")
def list_recipes(json: opt.Json = False, quiet: opt.Quiet = False) -> None:
    """List the shipped recipes with what they do."""
    from compress.cli.shipped import description, shipped_recipes
    from compress.cli.tables import add_row, grid

    output = speak(json=json, quiet=quiet)
    table = grid("recipe", "what it does")
    for name, path in shipped_recipes().items():
        add_row(table, name, description(path))
        output.emit("recipe", name=name, description=description(path), path=str(path))
        if quiet:
            output.answer(name)
    output.show(table)
    output.show("compress recipes show NAME prints one; compress run --recipe NAME --model MODEL runs it.")
    output.finish("recipes list", recipes=list(shipped_recipes()))


@group.command()
def show(
    recipe: opt.RecipeArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="With all defaults, and where paths lead.")] = False,
    set_: opt.Set = None,
    model: opt.Model = None,
    json: opt.Json = False,
) -> None:
    """Print a recipe, as written or with every default filled in."""
    from compress.cli.shipped import find_recipe
    from compress.core.recipe import load_recipe
    from compress.core.recipe_text import recipe_yaml
    from compress.core.yaml_source import read_yaml

    output = speak(json=json)
    path = find_recipe(recipe)
    loaded = load_recipe(path, set_ or [], model)
    if json:
        output.finish("recipes show", path=str(path), recipe=loaded.model_dump(mode="json"))
        return
    changed = resolved or set_ or model
    output.answer(recipe_yaml(loaded).rstrip() if changed else "\n".join(read_yaml(path).lines))
    if resolved:
        for name, place in _places(loaded).items():
            output.tell(f"{name}: {place}")


def _places(recipe: object) -> dict[str, str]:
    """What the recipe will read, by name: folders and files of this machine, or hub ids."""
    located = recipe.located()  # type: ignore[attr-defined]
    places = {"model": located.model}
    if located.calibration:
        places["calibration.dataset"] = located.calibration.dataset
    if located.evaluate and located.evaluate.perplexity:
        places["evaluate.perplexity.dataset"] = located.evaluate.perplexity.dataset
    if located.evaluate and located.evaluate.task_folder:
        places["evaluate.task_folder"] = located.evaluate.task_folder
    return places


@group.command()
def validate(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipe files or shipped names.", autocompletion=opt.complete_recipe)
    ],
    set_: opt.Set = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Check recipes for mistakes.

    Keys, types, methods, order of stages, gates. Reads nothing but the recipe: no GPU, no download.
    """
    from compress.cli.shipped import find_recipe
    from compress.core.errors import RecipeError
    from compress.core.recipe import check_recipe
    from compress.core.yaml_source import read_yaml

    output = speak(json=json, quiet=quiet)
    bad = 0
    for name in recipes:
        try:
            _, problems = check_recipe(read_yaml(find_recipe(name)), set_ or [])
        except RecipeError as error:
            problems = [error]
        bad += bool(problems)
        for problem in problems:
            output.fail(problem)
        if not problems:
            output.line(f"{name}: valid")
    output.finish("recipes validate", 2 if bad else 0, checked=len(recipes), invalid=bad)
    if bad:
        raise typer.Exit(2)


@group.command()
def schema(
    json: Annotated[bool, typer.Option("--json", help="No change: the schema is JSON already.")] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from compress.core.recipe_text import recipe_schema

    typer.echo(json_module.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@group.command()
def diff(first: opt.RecipeArgument, second: opt.RecipeArgument, json: opt.Json = False) -> None:
    """Show how two recipes differ once every default is filled in."""
    from compress.cli.shipped import find_recipe
    from compress.core.recipe import load_recipe
    from compress.core.recipe_text import recipe_yaml

    output = speak(json=json)
    texts = [recipe_yaml(load_recipe(find_recipe(name))).splitlines() for name in (first, second)]
    lines = list(difflib.unified_diff(*texts, first, second, lineterm="", n=2))
    for line in lines:
        output.answer(line)
    if not lines:
        output.tell("they ask for the same")
    output.finish("recipes diff", equal=not lines, diff=lines)


@group.command()
def init(
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id or folder.", show_default=False)],
    budget: Annotated[
        str | None, typer.Option("--budget", help="Size to stay under, e.g. 6GB.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; - for standard output.")] = Path(
        "recipe.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a commented recipe for a model, with bits chosen for the budget."""
    from compress.cli.draft import draft_recipe
    from compress.core.errors import UsageError
    from compress.core.files import atomic_write
    from compress.core.quantities import parse_size

    say = speak(json=json, quiet=quiet)
    to_file = str(output) != "-"
    if to_file and output.exists() and not force:
        raise UsageError("the file exists", where=str(output), hint="choose another --output, or --force")
    try:
        budget_bytes = parse_size(budget) if budget else None
    except ValueError as error:
        raise UsageError(str(error), where="--budget") from None
    if to_file and Path(model).is_dir() and output.absolute().parent != Path.cwd():
        model = str(Path(model).absolute())  # from there the name would lead elsewhere
    text, choice = draft_recipe(model, budget_bytes, offline=offline)
    if not to_file:
        say.answer(text.rstrip())
        say.tell(choice)
        say.finish("recipes init", recipe=text, choice=choice)
        return
    atomic_write(output, text)
    _say_choice(say, output, choice)


def _say_choice(say: Output, output: Path, choice: str) -> None:
    say.show(choice)
    say.line(f"next: compress run --recipe {output} --dry-run")
    if say.quiet:
        say.answer(output)
    say.finish("recipes init", path=str(output), choice=choice)


def register(app: typer.Typer) -> None:
    """Add the group of this file."""
    app.add_typer(group, name="recipes")

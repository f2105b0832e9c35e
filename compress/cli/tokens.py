"""`compress calibrate`: turns a recipe's calibration text into a file of token ids, to be looked at, shared, reused."""

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options as opt
from compress.cli.console import speak


def calibrate(
    recipe: opt.RecipeName,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, .safetensors.")] = Path(
        "tokens.safetensors"
    ),
    model: opt.Model = None,
    set_: opt.Set = None,
    offline: opt.Offline = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a recipe's calibration tokens to a file.

    Other recipes can name the file as their dataset.
    """
    from compress.cli.shipped import find_recipe
    from compress.core.errors import UsageError
    from compress.core.recipe import load_recipe

    say = speak(json=json, quiet=quiet)
    loaded = load_recipe(find_recipe(recipe), set_ or [], model).located()
    if loaded.calibration is None:
        raise UsageError("the recipe has no calibration", hint="--set calibration.dataset=…")
    if output.suffix != ".safetensors":
        raise UsageError("token ids are written as .safetensors", where=str(output))
    _require_place(output)
    from compress.core.calibration import load_tokens, save_tokens, tokenizer_sha256
    from compress.core.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(loaded.model, revision=loaded.revision, offline=offline)
    tokens = load_tokens(loaded.calibration, checkpoint, loaded.base_folder, offline=offline)
    asked = loaded.calibration.model_dump(mode="json")
    save_tokens(output, tokens, tokenizer_sha256=tokenizer_sha256(checkpoint.folder), recipe=asked)
    samples, length = tokens.ids.shape
    say.line(f"{samples} samples of {length} tokens, {tokens.count:,} in all, sha256 {tokens.sha256}")
    say.answer(output)
    say.finish("calibrate", path=str(output), samples=samples, length=length, tokens=tokens.count, sha256=tokens.sha256)


def _require_place(output: Path) -> None:
    """UsageError where a file lies that is no file of token ids, or where no file can lie."""
    from compress.core.errors import InputError, UsageError
    from compress.core.safetensors_io import read_header

    if not output.absolute().parent.is_dir():
        raise UsageError("there is no such folder", where=str(output.parent))
    if not output.exists():
        return
    try:
        holds_ids = "input_ids" in read_header(output)
    except InputError:
        holds_ids = False
    if not holds_ids:
        raise UsageError("is there already, and holds no token ids", where=str(output), hint="choose another --output")


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(calibrate)

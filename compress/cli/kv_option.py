"""`--kv-cache`: how keys and values are kept, in a word or a file, instead of what the artifact says."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from kv_compress.stage import KVCache

KVOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="SPEC",
        help="int8, int4, fp8, full; snapkv:512 or snapkv:25% drops the rest; int8,snapkv:25%; or a .yaml file.",
        show_default=False,
    ),
]


def kv_settings(text: str | None) -> "KVCache | None":
    """What the option says, as the settings of a kv_cache stage; UsageError for what makes no sense.

    A precision, METHOD:BUDGET (512 tokens, 25%, 8MiB), both with a comma, or a file that `compress kv check --output`
    wrote. A precision that is not named is full.
    """
    if text is None:
        return None
    if text.endswith((".yaml", ".yml")):
        return _in_file(Path(text))
    from compress.core.errors import UsageError

    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, colon, amount = part.strip().partition(":")
        key = "eviction" if colon else "precision"
        if not name or (colon and not amount) or key in settings:
            hint = "for example int8, snapkv:512, snapkv:25%, snapkv:8MiB, or int8,snapkv:25%"
            raise UsageError(f"is a precision, METHOD:BUDGET, or both, not {text!r}", where="--kv-cache", hint=hint)
        settings[key] = {"method": name, "budget": _budget(amount)} if colon else name
    return _stage([{"kv_cache": {"precision": "full"} | settings}], "--kv-cache")


def _budget(amount: str) -> dict[str, Any]:
    """What 512, 25% and 8MiB mean."""
    if amount.isdecimal():
        return {"tokens": int(amount)}
    share = amount.removesuffix("%")
    if share != amount and share.replace(".", "", 1).isdecimal():
        return {"ratio": float(share) / 100}
    return {"bytes": amount}


def _in_file(path: Path) -> "KVCache":
    """The stage that a file holds; RecipeError with the line of what is wrong."""
    from compress.core.yaml_source import read_yaml

    source = read_yaml(path)
    return _stage(source.data, str(path), source)


def _stage(data: Any, where: str, source: Any = None) -> "KVCache":
    from compress.core.errors import UsageError
    from compress.core.recipe_stages import read_stages
    from kv_compress.stage import KVCache

    stages, problems = read_stages({"stages": data}, ())
    if problems and source is not None:
        raise source.errors(replace(problem, path=problem.path[1:]) for problem in problems)[0]
    if problems:
        [problem, *_] = problems
        field = ".".join(map(str, problem.path[3:]))
        raise UsageError(f"{field}: {problem.message}" if field else problem.message, where=where, hint=problem.hint)
    if [stage.kind for stage in stages] != ["kv_cache"]:
        hint = "- kv_cache: {precision: int8}"
        raise UsageError("holds one kv_cache stage and nothing else", where=where, hint=hint)
    return cast(KVCache, stages[0].settings)

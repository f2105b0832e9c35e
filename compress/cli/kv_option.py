"""`--kv-cache`: how keys and values are kept, in a word or a file, instead of what the artifact says."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

if TYPE_CHECKING:
    from kv_compress.stage import KVCache

_HINT = "for example int8, snapkv:512, snapkv:25%, snapkv:8MiB, or int8,snapkv:25%"
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
        _require_kind(name, colon)
        key = "eviction" if colon else "precision"
        if not name or (colon and not amount) or key in settings:
            raise UsageError(f"is a precision, METHOD:BUDGET, or both, not {text!r}", where="--kv-cache", hint=_HINT)
        settings[key] = {"method": name, "budget": _budget(amount)} if colon else name
    return _stage([{"kv_cache": {"precision": "full"} | settings}], "--kv-cache")


def _require_kind(name: str, colon: str) -> None:
    """UsageError for a method of eviction without its budget, and for a precision with one."""
    from compress.core.errors import UsageError
    from kv_compress.eviction import Method
    from kv_compress.stage import Precision

    if not colon and name in get_args(Method):
        hint = f"for example {name}:512 (tokens), {name}:25% or {name}:8MiB"
        raise UsageError(f"{name} drops keys and values: say how much stays", where="--kv-cache", hint=hint)
    if colon and name in get_args(Precision):
        raise UsageError(f"{name} keeps every token and takes no budget", where="--kv-cache", hint=_HINT)


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
    from compress.core.errors import UsageError
    from compress.core.yaml_source import read_yaml

    if not path.is_file():
        raise UsageError("there is no such file", where=f"--kv-cache {path}", hint=f"{_HINT}; or a file of kv check")
    source = read_yaml(path)
    if isinstance(source.data, dict) and "stages" in source.data:
        hint = "give its kv_cache stage in a file of its own (- kv_cache: {precision: int8}), or run it: compress run"
        raise UsageError("is a whole recipe, not a kv_cache stage alone", where=f"--kv-cache {path}", hint=hint)
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

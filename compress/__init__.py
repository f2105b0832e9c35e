"""One recipe takes a Hugging Face causal language model through compression to one verified artifact.

    import compress
    recipe = compress.load_recipe("recipe.yaml", ["stages[0].quantize.group_size=32"])
    result = compress.run(recipe, compress.RunOptions(output=Path("out")))
    compress.LLM("out").generate("Once upon a time", max_tokens=32)

Names are imported when first used, so that importing this package costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from compress.core.artifact import open_artifact
    from compress.core.recipe import load_recipe, parse_recipe
    from compress.core.verify import verify
    from compress.evaluate import evaluate_folder
    from compress.pipeline import RunOptions, plan, run
    from runtime.llm import LLM

_HOMES = {
    "load_recipe": "compress.core.recipe",
    "parse_recipe": "compress.core.recipe",
    "RunOptions": "compress.pipeline",
    "plan": "compress.pipeline",
    "run": "compress.pipeline",
    "open_artifact": "compress.core.artifact",
    "verify": "compress.core.verify",
    "evaluate_folder": "compress.evaluate",
    "LLM": "runtime.llm",
}

__all__ = [
    "LLM",
    "RunOptions",
    "__version__",
    "evaluate_folder",
    "load_recipe",
    "open_artifact",
    "parse_recipe",
    "plan",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Recipes that come with the project, by name. Reading names and first comments needs no YAML."""

from pathlib import Path

from compress.core.errors import UsageError

_PLACES = (Path(__file__).parent.parent / "_recipes", Path(__file__).parent.parent.parent / "recipes")


def recipes_folder() -> Path:
    """Where shipped recipes lie: inside the installed package, or beside it in a checkout."""
    return next((place for place in _PLACES if place.is_dir()), _PLACES[-1])


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe, sorted."""
    found = [path for pattern in ("*.yaml", "pipelines/*.yaml") for path in recipes_folder().glob(pattern)]
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem)}


def description(path: Path) -> str:
    """The first sentence of a recipe's leading comment."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if text.startswith("yaml-language-server"):
            continue
        if not text and words:
            break
        words.append(text)
    return " ".join(words).split(". ")[0].rstrip(".")


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by shipped name. UsageError says what there is."""
    from compress.core.methods import suggestion

    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file() or len(path.parts) > 1:
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    hint = suggestion(name, list(shipped)) or "compress recipes list"
    raise UsageError(f"there is no recipe file and no shipped recipe called {name!r}", hint=hint)

"""Where the names in a recipe lead: bundled data, files beside the recipe, or the hub."""

from pathlib import Path

from compress.core.errors import RecipeError

DEMO = "demo"


def locate(text: str, place: str, base_folder: Path) -> str:
    """Absolute path of bundled data or of what lies at `base_folder`/`text`; else `text` as it is, a hub id.

    `place` is "model", "calibration", "evaluation" or "tasks": what a bare `demo` stands for.
    """
    if text == DEMO or text.startswith(f"{DEMO}/"):
        return str(_bundled(text, place))
    path = base_folder / Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text


def recorded_name(folder: Path) -> str:
    """What a model folder is called in records: `demo` for the bundled model, else its own name. Never its path, so
    that an artifact is the same wherever the model lay."""
    from compress import demo

    return DEMO if folder.absolute() == demo.MODEL_DIR else folder.absolute().name


def _bundled(text: str, place: str) -> Path:
    from compress import demo

    paths = {
        "model": demo.MODEL_DIR,
        "calibration": demo.CALIBRATION,
        "evaluation": demo.EVALUATION,
        "tasks": demo.TASKS_DIR,
    }
    name = place if text == DEMO else text.removeprefix(f"{DEMO}/")
    if name not in paths:
        raise RecipeError(f"there is no bundled data {text!r}: there are {', '.join(f'demo/{key}' for key in paths)}")
    return Path(paths[name])

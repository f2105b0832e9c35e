"""Task files: a folder of lm-eval task YAMLs, read without lm-eval, with data files found beside them.

A relative path in `dataset_kwargs.data_files`, or a relative folder in `dataset_path`, starts at the YAML's own folder,
so that a task folder works from anywhere. `include:` is followed. A file with `group:` or `tag:` names several tasks.
Python in a task file (`!function`) is refused: such tasks are used by their name from lm-eval itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.core.errors import InputError, RecipeError
from compress.core.yaml_source import read_yaml

if TYPE_CHECKING:
    from compress.core.recipe import Evaluation

_MAX_INCLUDES = 8


def read_task_folder(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Tasks of a folder by the names they answer to: their own, and that of each group or tag they are in."""
    if not folder.is_dir():
        raise InputError("there is no such task folder", where=str(folder))
    configs = [_read(file, _MAX_INCLUDES) for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")])]
    tasks = {config["task"]: config for config in configs if isinstance(config.get("task"), str)}
    if not tasks:
        raise InputError("the folder holds no task: a task is a .yaml file with a key task", where=str(folder))
    names = {name: [_without_structure(config)] for name, config in tasks.items()}
    for config in configs:
        members = config.get("task")
        if isinstance(members, list) and isinstance(config.get("group"), str):
            names[config["group"]] = [_member(member, tasks, config["group"], folder) for member in members]
    for config in tasks.values():
        tags = config.get("tag") or []
        for tag in [tags] if isinstance(tags, str) else tags:
            names.setdefault(tag, []).append(_without_structure(config))
    return names


def _without_structure(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("tag", "group", "include")}


def _member(member: Any, tasks: dict[str, dict[str, Any]], group: str, folder: Path) -> dict[str, Any]:
    if not isinstance(member, str) or member not in tasks:
        raise InputError(
            f"group {group!r} names a task {member!r} that no file of the folder defines", where=str(folder)
        )
    return _without_structure(tasks[member])


def _read(file: Path, includes_left: int) -> dict[str, Any]:
    try:
        data = read_yaml(file).data
    except RecipeError as error:
        hint = (
            "a task that runs Python is used by its name, without task_folder" if "tag" in error.message else error.hint
        )
        raise InputError(f"the task file is refused: {error.message}", where=error.where, hint=hint) from error
    if not isinstance(data, dict):
        raise InputError("a task file is a mapping of keys to values", where=str(file))
    if "include" in data:
        if includes_left == 0:
            raise InputError("include: goes round in a circle", where=str(file))
        data = {**_read(file.parent / str(data["include"]), includes_left - 1), **data}
    return _with_paths(data, file.parent)


def _with_paths(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    path, arguments = config.get("dataset_path"), config.get("dataset_kwargs")
    if isinstance(path, str) and (folder / path).is_dir():
        config = {**config, "dataset_path": str((folder / path).absolute())}
    if isinstance(arguments, dict) and "data_files" in arguments:
        config = {**config, "dataset_kwargs": {**arguments, "data_files": _found(arguments["data_files"], folder)}}
    return config


def _found(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _found(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_found(value, folder) for value in files]
    if "://" in str(files):
        return files
    path = (folder / str(files)).absolute()
    if not path.is_file():
        raise InputError("there is no such data file of a task", where=str(path))
    return str(path)


def is_local(config: dict[str, Any]) -> bool:
    """Whether a task's data lie on this machine, so that nothing has to be asked of the hub."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return Path(str(config.get("dataset_path", ""))).is_dir() or (files is not None and "://" not in str(files))


def choose(names: Sequence[str], folder: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """(configs from the folder, names left for lm-eval's own tasks), in the order asked, each task once."""
    there = read_task_folder(folder) if folder else {}
    configs: dict[str, dict[str, Any]] = {}
    for name in names:
        for config in there.get(name, []):
            configs[config["task"]] = config
    return list(configs.values()), [name for name in names if name not in there]


def require_tasks(evaluation: Evaluation, base_folder: Path | str | None = None) -> None:
    """RecipeError for tasks that are neither in the task folder nor among lm-eval's own. Does not import lm-eval."""
    folder = Path(base_folder or ".") / evaluation.task_folder if evaluation.task_folder else None
    there = read_task_folder(folder) if folder else {}
    unknown = sorted(_unknown_to_lm_eval({name for name in evaluation.tasks if name not in there}))
    if unknown:
        places = f"neither in {folder} nor among lm-eval's own" if folder else "not among lm-eval's own"
        raise RecipeError(
            f"no such task: {', '.join(unknown)}, {places}",
            where="evaluate.tasks",
            hint=f"the folder has {', '.join(sorted(there))}" if there else "`lm-eval ls tasks` lists them",
        )


def _unknown_to_lm_eval(names: set[str]) -> set[str]:
    """Those of the names that no task file of the installed lm-eval defines: seconds less than its own index takes.

    Patterns and paths, which lm-eval takes as well, are left to it; so is everything where it is not installed.
    """
    unknown = {name for name in names if not re.search(r"[*?\[/]|\.ya?ml$", name)}
    spec = find_spec("lm_eval")
    if not unknown or spec is None or spec.origin is None:
        return set()
    files = Path(spec.origin).with_name("tasks").rglob("*ml")  # .yaml, .yml, and templates called name_yaml
    for file in sorted(files, key=lambda file: (file.stem not in unknown, file)):
        if not unknown:
            break
        unknown -= _defined(file.read_text(encoding="utf-8", errors="replace"), unknown)
    return unknown


def _defined(text: str, names: set[str]) -> set[str]:
    """Those of the names that a task file calls a task, group or tag: alone on a line, or in a list in brackets."""
    either = "|".join(re.escape(name) for name in sorted(names))
    alone = rf"^\s*(?:-\s+)*(?:[\"']?(?:task|group|tag)[\"']?:\s*)?[\"']?({either})[\"']?\s*(?:#.*)?$"
    found = set(re.findall(alone, text, re.MULTILINE))
    for inside in re.findall(r"\b(?:task|group|tag):\s*\[([^\]]*)\]", text):
        found |= names & {part.strip(" \n\t\"'") for part in inside.split(",")}
    return found

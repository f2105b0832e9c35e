"""Rules of the house that a linter has no words for, held by reading the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "quantize", "prune", "distill", "kv_compress", "runtime")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

NEVER = {
    "pickle", "dill", "marshal", "shelve", "cloudpickle", "torch.load", "torch.save", "numpy.load", "np.load",
    "yaml.load", "eval", "exec", "torch.manual_seed", "random.seed", "np.random.seed", "os.system",
}  # fmt: skip
ONLY_IN_FILES = {
    "os.rename", "os.replace", "os.link", "os.symlink", "os.fsync", "shutil.rmtree", "shutil.copyfile", "shutil.copy",
    "shutil.copytree", "shutil.move", "write_text", "write_bytes", "os.makedirs", "os.mkdir", "save_file",
}  # fmt: skip
HOOKS = {
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_module_forward_hook",
}
MODELS = {"AutoModelForCausalLM", "AutoModel", "from_config", "_from_config"}


def calls(path: Path) -> Iterator[tuple[str, int]]:
    """Names that are called or imported, dotted as written, with their line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            dotted = ast.unparse(node.func)
            yield dotted, node.lineno
            yield dotted.rpartition(".")[2], node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.lineno


def offences(forbidden: set[str], allowed: tuple[str, ...] = ()) -> list[str]:
    found = []
    for path in SOURCES:
        relative = path.relative_to(ROOT).as_posix()
        if not any(relative == name or (name.endswith("/") and relative.startswith(name)) for name in allowed):
            found += [f"{relative}:{line} {name}" for name, line in calls(path) if name in forbidden]
    return found


def test_there_is_source_to_read() -> None:
    assert len(SOURCES) > 40


def test_nothing_unpickles_evaluates_or_reseeds() -> None:
    bare = {"eval", "exec"}  # model.eval() is another matter
    found = [line for line in offences(NEVER) if line.split()[-1] not in bare]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in bare:
                found.append(f"{path}:{node.lineno} {node.func.id}")
    assert found == []


def test_only_files_touches_the_disk() -> None:
    allowed = ("compress/core/files.py", "compress/core/lock.py", "compress/demo/")
    assert offences(ONLY_IN_FILES, allowed) == []


def test_only_the_walk_hooks_modules() -> None:
    assert offences(HOOKS, ("compress/core/_gather.py", "compress/core/curvature.py")) == []


def test_only_the_checkpoint_builds_models() -> None:
    allowed = ("compress/core/checkpoint.py", "compress/core/_skeleton.py", "compress/demo/")
    assert offences(MODELS, allowed) == []


def test_public_functions_and_classes_say_what_they_are() -> None:
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            silent.append(f"{path.relative_to(ROOT)}: module")
        silent += [
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
    assert silent == []


@pytest.mark.parametrize("words", [["import compress"], ["from compress.core.recipe import Recipe"]])
def test_importing_needs_no_torch(words: list[str]) -> None:
    script = (
        f"import sys; {words[0]}; sys.exit(', '.join({{'torch._C', 'transformers.utils'}} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr

"""Finds methods: the folder is the kind, the file name is the method, and the file exposes one Pass.

Folders are packages beside this one, named here as text: nothing of them is imported before a recipe names a method.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from difflib import get_close_matches
from pathlib import Path

from compress.core.errors import EnvironmentRefused, UsageError
from compress.core.passes import Pass

FOLDERS = {"prune": "prune", "distill": "distill", "quantize": "quantize", "kv_cache": "kv_compress"}
"""Kind of stage -> package that holds its methods, in the order in which stages usually run."""

ONE_PASS = {"kv_cache": "stage"}
"""Kinds with one Pass for all that they do, and its file. Its method has the name of the kind; recipes leave it out."""

PACKAGES = ("quantize", "prune", "distill", "kv_compress", "runtime")


def check_packages() -> None:
    """EnvironmentRefused if one of our packages is missing, or another project's of that name shadows it."""
    for package in PACKAGES:
        package_folder(package)


def package_folder(package: str) -> Path:
    """The folder of one of our packages; EnvironmentRefused if Python would import another project's instead."""
    import compress

    ours = Path(compress.__path__[0]).resolve().parent / package
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentRefused(
            f"the package {package!r} of compress-llm is missing; expected {ours}", hint="reinstall"
        )
    found = Path(next(iter(spec.submodule_search_locations))).resolve()
    if found != ours:
        raise EnvironmentRefused(
            f"another package is called {package!r}: Python finds {found} instead of {ours}",
            hint="run compress in an environment of its own, or from another folder",
        )
    return found


def list_methods(kind: str) -> list[str]:
    """Names of the methods of `kind`, sorted: its folder's files that do not start with _. Imports none of them."""
    folder = package_folder(FOLDERS[kind])
    names = [item.name for item in pkgutil.iter_modules([str(folder)]) if not item.ispkg]
    if kind in ONE_PASS:
        return [kind] if ONE_PASS[kind] in names else []
    return sorted(name for name in names if not name.startswith("_"))


def available_kinds() -> dict[str, list[str]]:
    """Kinds that have methods, with them."""
    return {kind: methods for kind in FOLDERS if (methods := list_methods(kind))}


def find_pass(kind: str, method: str, allow_code: tuple[str, ...] = ()) -> type[Pass]:
    """The Pass of `method`. UsageError names the methods that exist.

    A dotted name (my_package.my_method) is imported only if `allow_code` names its package.
    """
    if "." in method:
        return _pass_in(_dotted_module(kind, method, allow_code), kind)
    methods = list_methods(kind)
    if method not in methods:
        raise UsageError(_unknown(kind, method, methods), hint=suggestion(method, methods))
    return _pass_in(f"{FOLDERS[kind]}.{ONE_PASS.get(kind, method)}", kind)


def suggestion(word: str, known: list[str]) -> str | None:
    """ "did you mean …?" for the known word that is closest to `word`, if one is close."""
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(word[:80].lower(), by_lower, n=1, cutoff=0.65)
    return f"did you mean {by_lower[close[0]]}?" if close else None


def _unknown(kind: str, method: str, methods: list[str]) -> str:
    if methods:
        return f"unknown {kind} method {method!r}: there are {', '.join(methods)}"
    kinds = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in available_kinds().items())
    return f"this version has no {kind} methods; it has {kinds or 'none at all'}"


def _dotted_module(kind: str, method: str, allow_code: tuple[str, ...]) -> str:
    if not all(part.isidentifier() for part in method.split(".")):
        raise UsageError(f"{method!r} is no {kind} method", hint="a method is a name or package.module, no path")
    package = method.split(".")[0]
    if package not in allow_code:
        raise UsageError(
            f"method {method!r} is code of the package {package!r}, which is not allowed here",
            hint=f"if you trust it, add --allow-code {package}",
        )
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UsageError(f"method {method!r}: there is no package {package!r}")
    if Path(spec.origin).resolve().is_relative_to(Path.cwd()) and "site-packages" not in spec.origin:
        raise UsageError(
            f"method {method!r} lies in the current folder, and code is never taken from there",
            hint="install the package",
        )
    return method


def _pass_in(module_name: str, kind: str) -> type[Pass]:
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__
        if not inspect.isabstract(value)
    ]
    if len(found) != 1 or found[0].kind != kind:
        raise UsageError(f"{module_name} must define exactly one Pass of kind {kind}, it defines {len(found)}")
    return found[0]

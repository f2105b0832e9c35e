"""Help is quick and light; options are few, worded, and do not grow unseen."""

import os
import subprocess
import sys

import pytest
import typer

from compress.cli.app import app

_OF_RUNS = (
    "recipe model adapter output set dry-run fresh keep-stages device dtype offline allow-code json quiet verbose"
)
OPTIONS = {
    "run": _OF_RUNS,
    "prune": _OF_RUNS,
    "distill": _OF_RUNS,
    "quantize": _OF_RUNS,
    "calibrate": "recipe output model set offline json quiet",
    "inspect": "zeros json quiet verbose",
    "verify": "source level library json quiet verbose",
    "export": "format output type requantize fresh dry-run tensor-parallel json quiet verbose",
    "level": "output fresh json quiet verbose",
    "push": "public dry-run message json quiet verbose",
    "eval": (
        "against recipe text window tasks task-folder limit through numerics device dtype offline json quiet verbose"
    ),
    "generate": (
        "file max-tokens temperature top-k top-p min-p seed stop n chat numerics device sparse kv-cache json quiet"
    ),
    "bench": (
        "requests prompt-tokens output-tokens trace rate seed against rounds numerics device sparse kv-cache output "
        "json quiet"
    ),
    "report": "output json quiet",
    "compare": "output json quiet",
    "kv report": "memory context numerics device dtype offline json quiet",
    "kv check": (
        "text samples length prefix budget context max-increase output numerics device dtype offline json quiet verbose"
    ),
    "doctor": "json quiet verbose",
    "recipes list": "json quiet",
    "recipes show": "resolved set model json",
    "recipes validate": "set json quiet",
    "recipes schema": "json",
    "recipes diff": "json",
    "recipes init": "model budget output force offline json quiet",
}
"""Every command and its options. A new option is a decision: add it here, and see whether the recipe is its place."""


def commands() -> dict[str, typer.main.TyperCommand]:
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        for sub, child in getattr(command, "commands", {"": command}).items():
            found[f"{name} {sub}".strip()] = child
    return found


def test_no_command_or_option_is_added_unseen() -> None:
    found = {
        name: {
            option.removeprefix("--") for parameter in command.params for option in parameter.opts if option[:2] == "--"
        }
        for name, command in commands().items()
    }
    assert {name: options - {"help"} for name, options in found.items()} == {
        name: set(options.split()) for name, options in OPTIONS.items()
    }


def test_no_command_has_more_than_16_options() -> None:
    assert max(len(options.split()) for options in OPTIONS.values()) <= 16


@pytest.mark.parametrize("name", OPTIONS)
def test_every_command_and_option_says_what_it_is_for(name: str, call) -> None:
    called = call(*name.split(), "--help")
    assert called.code == 0
    assert called.err == ""
    assert max(map(len, called.out.splitlines())) <= 80
    command = commands()[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name}: {parameter.name}"


def test_help_without_a_command(call) -> None:
    for arguments in ((), ("--help",), ("recipes",)):
        called = call(*arguments)
        assert called.code == 0
        assert "Usage: compress" in called.out
    assert "Exit codes: 0 done" in call("--help").out


def test_the_version_is_the_package_s(call) -> None:
    from compress import __version__

    assert call("--version").out == f"compress {__version__}\n"


HEAVY = ("torch", "transformers", "numpy", "datasets", "lm_eval", "huggingface_hub", "matplotlib", "pydantic", "ruamel")


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], ()),
        (["run", "--help"], ("pydantic",)),  # typer looks at it
        (["recipes", "list"], ("pydantic",)),
        (["recipes", "validate", "demo-w4"], ("pydantic", "ruamel")),
        (["recipes", "schema"], ("pydantic", "ruamel")),
    ],
)
def test_what_needs_no_torch_imports_none(arguments: list[str], allowed: tuple[str, ...]) -> None:
    # a lazy module that nobody has asked for anything yet is of another type
    code = (
        "import sys\n"
        "from compress.cli.app import run_command\n"
        f"code = run_command({arguments!r})\n"
        f"print(*(name for name in {HEAVY!r} if type(sys.modules.get(name)) is type(sys)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()) <= set(allowed)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, compress; print(*(name for name in {HEAVY!r} if name in sys.modules)); compress.load_recipe"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_public_names_are_there() -> None:
    import compress

    for name in compress.__all__:
        assert getattr(compress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compress.nothing


def test_the_shell_completes_commands_and_recipe_names() -> None:
    for words, expected in (
        ("compress rec", "recipes"),
        ("compress run --recipe demo", "demo-w4"),
        ("compress gen", "generate"),
        ("compress bench folder --numerics e", "exact"),
    ):
        environment = {
            **os.environ,
            "_COMPRESS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        done = subprocess.run(
            [sys.executable, "-m", "compress"], env=environment, capture_output=True, text=True, check=False
        )
        assert expected in done.stdout.split(), (words, done.stdout, done.stderr)

"""Options that several commands share, worded once."""

from pathlib import Path
from typing import Annotated

import typer

NUMERICS = ("fast", "exact")
SPARSE = ("auto", "off")


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes for the shell's completion."""
    from compress.cli.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one.", autocompletion=complete_recipe),
]
RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a shipped one.", autocompletion=complete_recipe)
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Hub id or folder, instead of the recipe's model.", show_default=False),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", help="LoRA adapter of PEFT that is merged into the model first.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Override, e.g. stages[0].quantize.group_size=32.", show_default=False
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one.")]
DType = Annotated[str, typer.Option("--dtype", help="Dtype to compute in: auto (the model's), float32, bfloat16.")]
Numerics = Annotated[
    str,
    typer.Option("--numerics", help="Of the runtime: fast, or exact (fp32).", autocompletion=lambda: [*NUMERICS]),
]
Sparse = Annotated[
    str,
    typer.Option(
        "--sparse", help="Zeros of a pruned model: auto, packed where faster; off.", autocompletion=lambda: [*SPARSE]
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use nothing that is not on this machine.")]
AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code", metavar="PACKAGE", help="Let the recipe use methods of this package.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail; tracebacks.")]
ArtifactFolder = Annotated[Path, typer.Argument(help="Folder of an artifact.", show_default=False)]


def model_name(text: str) -> str:
    """A model as the command line names it: `demo` is the bundled one, as in a recipe."""
    from compress.core.places import locate

    return text if Path(text).exists() else locate(text, "model", Path())


def model_folder(path: Path) -> Path:
    """Likewise, of a folder."""
    return Path(model_name(str(path)))


def help_without_command(context: typer.Context) -> None:
    """Show the help of a group that was called without a command."""
    if context.invoked_subcommand is None and not context.resilient_parsing:
        typer.echo(context.get_help())
        raise typer.Exit


def choose_device(device: str) -> str:
    """The device to use; EnvironmentRefused if this machine lacks the one asked for."""
    import torch

    from compress.core.errors import EnvironmentRefused, UsageError

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError(f"unknown device {device!r}", where="--device", hint="cpu, cuda, cuda:1 or auto")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EnvironmentRefused("torch finds no GPU on this machine", where="--device", hint="--device cpu")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EnvironmentRefused(f"there is no {device}: this machine has {count} GPU", where="--device")
    return device


DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> str:
    """`dtype` if it is one that we compute in."""
    from compress.core.errors import UsageError
    from compress.core.methods import suggestion

    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}", hint=suggestion(dtype, [*DTYPES]))
    return dtype


def check_numerics(numerics: str) -> str:
    """`numerics` if the runtime knows it."""
    from compress.core.errors import UsageError

    if numerics not in NUMERICS:
        raise UsageError(f"--numerics is fast or exact, not {numerics!r}")
    return numerics


def check_sparse(sparse: str) -> str:
    """`sparse` if the runtime knows it."""
    from compress.core.errors import UsageError

    if sparse not in SPARSE:
        raise UsageError(f"--sparse is auto or off, not {sparse!r}")
    return sparse

"""The command `compress`: its sub-commands and its outermost frame, where every error becomes an exit code."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from compress.cli import artifacts, bench, doctor, evaluation, export, generate, kv, level, recipes, run, tokens
from compress.cli import options as opt
from compress.cli.console import last_output, speak
from compress.core.errors import CompressError, ResourceError, UsageError

PURPOSE = "Compress Hugging Face causal language models: one recipe, one verified artifact."

INTERRUPTED = 130
_TRACEBACK = "COMPRESS_TRACEBACK"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class _Commands(typer.core.TyperGroup):
    """The sub-commands. Ctrl-C in any of them is one line and exit code 130; typer would end without a word."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            last_output().tell("interrupted", style="yellow")
            last_output().finish(ctx.invoked_subcommand or "compress", INTERRUPTED)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="compress",
    cls=_Commands,
    help=PURPOSE,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 bug, 2 usage or recipe, 3 input refused, 4 resources or lock (run again to go on), "
    "5 quality gate, 6 environment, 130 interrupted (run again to go on).",
    context_settings={"help_option_names": ["-h", "--help"]},
)
run.register(app)
recipes.register(app)
tokens.register(app)
artifacts.register(app)
export.register(app)
level.register(app)
evaluation.register(app)
generate.register(app)
bench.register(app)
kv.register(app)
doctor.register(app)


def _version(asked: bool) -> None:
    if asked:
        from compress import __version__

        typer.echo(f"compress {__version__}")
        raise typer.Exit


@app.callback(help=PURPOSE, invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options that need no command; without one the help is shown."""
    opt.help_without_command(context)


def run_command(arguments: Sequence[str]) -> int:
    """Run the command line and give its exit code. The only place that catches everything."""
    command = typer.main.get_command(app)
    speak(json="--json" in arguments, verbose="-v" in arguments or "--verbose" in arguments)
    try:
        code = command.main(list(arguments), prog_name="compress", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.exceptions.TyperException as error:
        return _usage(error)
    except CompressError as error:
        last_output().fail(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        last_output().tell("interrupted", style="yellow")
        return INTERRUPTED
    except SystemExit:  # typer's way to say that nobody reads standard output any more
        return 0
    except BrokenPipeError:
        _end_output()  # nobody reads any more
        return 0
    except OSError as error:
        return _no_room(error) if error.errno in _FULL else _bug(error)
    except Exception as error:  # noqa: BLE001  the outermost frame
        return _bug(error)


def _usage(error: typer.exceptions.TyperException) -> int:
    message = error.format_message().replace("Value error, ", "")  # of the library that reads the options
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context else "compress --help"
    last_output().fail(UsageError(message.rstrip("."), hint=hint))
    return error.exit_code if error.exit_code != 1 else UsageError.exit_code


def _end_output() -> None:
    """What is still to be written to standard output goes nowhere: no noise at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _no_room(error: OSError) -> int:
    """What is printed goes to a file whose disk is full: our own files are written with care, and say their names."""
    _end_output()
    refused = ResourceError(f"the output cannot be written: {error.strerror}")
    last_output().fail(refused)
    return refused.exit_code


def _bug(error: Exception) -> int:
    output = last_output()
    shown = output.verbose or bool(os.environ.get(_TRACEBACK))
    if shown:
        traceback.print_exception(error, file=sys.stderr)
    report = "please report it with the traceback"
    hint = report if shown else f"run again with {_TRACEBACK}=1 in the environment, and {report}"
    output.fail(CompressError(f"this is a bug in compress: {type(error).__name__}: {error}", hint=hint))
    return CompressError.exit_code

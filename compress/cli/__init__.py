"""The command line. Standard output is the result, standard error is for people. Help imports no torch."""

from collections.abc import Callable


def main() -> None:
    """Entry point of the command `compress`: run it and exit with its code."""
    import gc
    import os
    import sys

    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # a search through every installed package
    gc.disable()  # the imports leave no garbage, only objects that stay: looking for some takes a tenth of the start
    from compress.cli.app import run_command
    from compress.core.processes import launched

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # a terminal of another encoding shows marks instead of what it cannot
            stream.reconfigure(errors="replace")
    gc.freeze()
    gc.enable()
    sys.exit(run_command(sys.argv[1:]) if launched() == 1 else _one_of_several(run_command))


def _one_of_several(run_command: Callable[[list[str]], int]) -> int:
    """The main process of those that a launcher started runs the command, the others work for it."""
    import sys

    from compress.cli.console import last_output
    from compress.core.errors import CompressError
    from compress.core.processes import current, end_with_launcher
    from compress.core.workers import serve

    try:
        if not current().is_main:
            return serve()
        end_with_launcher()
        code = run_command(sys.argv[1:])
        if code == 0:  # else the others end with their connection to this one
            current().dismiss()
    except CompressError as error:
        last_output().fail(error)
        return error.exit_code
    return code

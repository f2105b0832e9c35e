"""The command line. Standard output is the result, standard error is for people. Help imports no torch."""


def main() -> None:
    """Entry point of the command `compress`: run it and exit with its code."""
    import gc
    import os
    import sys

    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # a search through every installed package
    gc.disable()  # the imports leave no garbage, only objects that stay: looking for some takes a tenth of the start
    from compress.cli.app import run_command

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # a terminal of another encoding shows marks instead of what it cannot
            stream.reconfigure(errors="replace")
    gc.freeze()
    gc.enable()
    sys.exit(run_command(sys.argv[1:]))

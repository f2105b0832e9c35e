"""The command line. Standard output is the result, standard error is for people. Help imports no torch."""


def main() -> None:
    """Entry point of the command `compress`: run it and exit with its code."""
    import sys

    from compress.cli.app import run_command

    sys.exit(run_command(sys.argv[1:]))

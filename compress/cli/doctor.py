"""`compress doctor`: is this machine, and this installation, as we need it?"""

import typer

from compress.cli import options as opt
from compress.cli.console import speak


def doctor(json: opt.Json = False, quiet: opt.Quiet = False, verbose: opt.Verbose = False) -> None:
    """Check this machine and installation.

    Exit code 6 if something must be put right.
    """
    from compress.cli.tables import add_row, grid
    from compress.doctor import examine

    output = speak(json=json, quiet=quiet, verbose=verbose)
    findings = examine()
    table = grid("", "check", "found", figures=False)
    for finding in findings:
        add_row(table, "ok" if finding.ok else "!!", finding.name, finding.detail)
        output.emit("check", name=finding.name, ok=finding.ok, detail=finding.detail, hint=finding.hint)
    output.show(table)
    bad = [finding for finding in findings if not finding.ok]
    for finding in bad:
        output.tell(f"{finding.name}: {finding.hint}", style="yellow")
    code = 6 if any(finding.needed for finding in bad) else 0
    output.finish("doctor", code, bad=[finding.name for finding in bad])
    if code:
        raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(doctor)

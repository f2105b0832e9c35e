"""`compress kv`: what keys and values of a model take, and what codes would do to them."""

import typer

from compress.cli import kv_check
from compress.cli import options as opt

group = typer.Typer(rich_markup_mode=None)


@group.callback(invoke_without_command=True)
def kv(context: typer.Context) -> None:
    """Keys and values of a model."""
    opt.help_without_command(context)


def register(app: typer.Typer) -> None:
    """Add the group of this file."""
    kv_check.register(group)
    app.add_typer(group, name="kv")

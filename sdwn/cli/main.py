"""The command line: all commands under one name."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from sdwn.cli import (
    evaluating,
    exchanging,
    following,
    looking,
    planning,
    releasing,
    submitting,
    terminal,
    trying,
    whole,
)
from sdwn.io import require_home

app = typer.Typer(
    name="sdwn",
    help="Large synthetic image datasets out of Stable Diffusion and WordNet, on a SLURM cluster.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# As --help lists them: the order in which a dataset is made.
for group in (
    planning,
    trying,
    submitting,
    following,
    releasing,
    exchanging,
    evaluating,
    looking,
    whole,
):
    app.add_typer(group.commands)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Plan, generate, merge, evaluate."""
    terminal.debug = debug
    if not debug:
        _quiet_libraries()
    if version:
        from sdwn import __version__

        typer.echo(f"sdwn {__version__}")
        raise typer.Exit


def _quiet_libraries() -> None:
    """Show of what libraries say only errors: their warnings are for who writes code."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:
        logging.lastResort.addFilter(
            lambda record: record.name.startswith("sdwn") or record.levelno >= logging.ERROR
        )
    # These log by handlers of their own, and read this when they are imported.
    for library in ("HF_HUB", "TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    # A terminal may know few letters, and a file's name need not be UTF-8.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(terminal.guarded(lambda: _run(arguments)))


def _run(arguments: list[str] | None) -> None:
    require_home()
    app(arguments)

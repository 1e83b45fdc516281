"""The command line: all commands under one name, and how a command ends."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer
from typer import Option

from sdwn.cli import (
    browse,
    console,
    evaluate,
    exchange,
    plan,
    preflight,
    release,
    run,
    status,
    submit,
)
from sdwn.errors import SdwnError
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
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan.plan_command,
    "prefetch": plan.prefetch_command,
    "tune": preflight.tune_command,
    "pilot": preflight.pilot_command,
    "doctor": preflight.doctor_command,
    "submit": submit.submit_command,
    "retry": submit.retry_command,
    "cancel": submit.cancel_command,
    "status": status.status_command,
    "logs": status.logs_command,
    "merge": release.merge_command,
    "verify": release.verify_command,
    "regenerate": release.regenerate_command,
    "export": exchange.export_command,
    "import": exchange.import_command,
    "evaluate": evaluate.evaluate_command,
    "compare": evaluate.compare_command,
    "report": evaluate.report_command,
    "show": browse.show_command,
    "browse": browse.browse_command,
    "run": run.run_command,
}
for name, function in COMMANDS.items():
    app.command(name)(function)

INTERRUPTED = 130


@dataclass(slots=True)
class Invocation:
    """Options before a command's name: ``debug`` shows tracebacks and warnings."""

    debug: bool = False


@app.callback()
def read_options(
    context: typer.Context,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[bool, Option("--version", help="Show the version.")] = False,
) -> None:
    """Plan, generate, merge, evaluate."""
    context.ensure_object(Invocation).debug = debug
    logging.getLogger("sdwn").setLevel(logging.DEBUG if debug else logging.NOTSET)
    if not debug:
        _quiet_libraries()
    if version:
        from sdwn import __version__

        typer.echo(f"sdwn {__version__}")
        raise typer.Exit


def _quiet_libraries() -> None:
    """Show only the errors of libraries: their warnings are for who writes code."""
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
    invocation = Invocation()

    def run_app() -> None:
        require_home()
        app(arguments, obj=invocation)

    sys.exit(exit_code(run_app, invocation))


def exit_code(work: Callable[[], None], invocation: Invocation) -> int:
    """Run a function; turn its error into one message and an exit code."""
    try:
        work()
    except SdwnError as error:
        return console.fail(str(error), error.exit_code, invocation.debug)
    except KeyboardInterrupt:
        return console.fail("interrupted", INTERRUPTED, invocation.debug)
    except SystemExit as ended:
        # typer turns an interruption into an exit, without a word.
        if ended.code == INTERRUPTED:
            return console.fail("interrupted", INTERRUPTED, invocation.debug)
        raise
    except OSError as error:
        return console.fail(str(error), 1, invocation.debug)
    except UnicodeEncodeError as error:
        name = f"{error.object:.200}".strip()
        message = f"{name!r}: a name that is no UTF-8; rename the file or folder"
        return console.fail(message, 1, invocation.debug)
    return 0

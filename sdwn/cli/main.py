"""The command line: all commands under one name, and how a command ends."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand, TyperGroup

from sdwn.cli import console, evaluate, preflight, release, run
from sdwn.errors import SdwnError
from sdwn.io import require_home


class _Plain:
    """Help in which a flag has no type: ``<bool>`` tells nobody anything."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for one in params:
            if getattr(one, "is_flag", False):
                one.metavar = ""
        return params


class PlainCommand(_Plain, TyperCommand):
    """A command with such help."""


class PlainGroup(_Plain, TyperGroup):
    """All commands, with such help."""


app = typer.Typer(
    name="sdwn",
    cls=PlainGroup,
    help="Large synthetic image datasets out of Stable Diffusion and WordNet, on a SLURM cluster.",
    epilog="Begin with: sdwn run demo RUN",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# As --help lists them, in the order in which a dataset is made; with the examples of their help.
COMMANDS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "plan": (
        preflight.plan_command,
        ("sdwn plan demo RUN", "sdwn plan paper RUN --profile mysite.yaml --set seed=7"),
    ),
    "prefetch": (preflight.prefetch_command, ("sdwn prefetch RUN", "sdwn prefetch paper")),
    "tune": (
        preflight.tune_command,
        ("sdwn tune paper", "sdwn tune paper --profile mysite.yaml --gpus v100,a100"),
    ),
    "pilot": (preflight.pilot_command, ("sdwn pilot RUN --profile mysite.yaml",)),
    "doctor": (preflight.doctor_command, ("sdwn doctor RUN --profile mysite.yaml --probe",)),
    "submit": (
        run.submit_command,
        (
            "sdwn submit RUN --wait",
            "sdwn submit RUN --profile mysite.yaml --dry-run",
            "sdwn submit RUN --profile mysite.yaml --then merge,evaluate,report",
        ),
    ),
    "retry": (run.retry_command, ("sdwn retry RUN --wait", "sdwn retry RUN --time 120")),
    "cancel": (run.cancel_command, ("sdwn cancel RUN",)),
    "status": (run.status_command, ("sdwn status RUN", "sdwn status RUN --watch")),
    "logs": (run.logs_command, ("sdwn logs RUN", "sdwn logs RUN --shard 3 --lines 100")),
    "merge": (
        release.merge_command,
        ("sdwn merge RUN --release RELEASE", "sdwn merge RUN RUN2 --release RELEASE --evaluate"),
    ),
    "verify": (release.verify_command, ("sdwn verify RELEASE",)),
    "regenerate": (release.regenerate_command, ("sdwn regenerate RELEASE zebra 3",)),
    "export": (
        release.export_command,
        (
            "sdwn export RELEASE PICTURES --format imagefolder",
            "sdwn export RELEASE DOGS --format webdataset --below dog.n.01 --quality 90",
        ),
    ),
    "import": (release.import_command, ("sdwn import PHOTOGRAPHS REAL --format imagefolder",)),
    "evaluate": (
        evaluate.evaluate_command,
        ("sdwn evaluate RELEASE", "sdwn evaluate RELEASE --profile mysite.yaml --wait"),
    ),
    "compare": (
        evaluate.compare_command,
        ("sdwn compare RELEASE OTHER --out COMPARISON",),
    ),
    "report": (evaluate.report_command, ("sdwn report RELEASE",)),
    "show": (evaluate.show_command, ("sdwn show RELEASE zebra --open",)),
    "browse": (evaluate.browse_command, ("sdwn browse RELEASE", "sdwn browse RELEASE OTHER")),
    "run": (run.run_command, ("sdwn run demo RUN", "sdwn run mine.yaml RUN --profile mysite.yaml")),
}
for name, (function, examples) in COMMANDS.items():
    app.command(name, cls=PlainCommand, epilog="\n\n".join(("Examples:", *examples)))(function)

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

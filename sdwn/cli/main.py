"""The command line: all commands under one name, and how a command ends."""

from __future__ import annotations

import functools
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand, TyperGroup

from sdwn import __version__
from sdwn.cli import console, preflight, release, results, run
from sdwn.cli.console import Result
from sdwn.cli.options import PANEL, SITE, SWEEPING, AsJson, kind_of
from sdwn.errors import SdwnError, UsageError, plain_message
from sdwn.io import require_home

# The order in which --help lists the commands; the help of each ends with its own lines.
EXAMPLES = """\
sdwn plan demo RUN
sdwn plan paper RUN --profile mysite.yaml --set seed=7
sdwn sweep demo-sweep SWEEP
sdwn sweep mine.yaml SWEEP --set images_per_synset=20
sdwn extend RELEASE RUN --set images_per_synset=50
sdwn extend RELEASE RUN --set catalog.name=imagenet-1k
sdwn extend RELEASE RUN --set images_per_synset=50 --only list.csv
sdwn prefetch RUN
sdwn prefetch paper
sdwn tune paper
sdwn tune paper --profile mysite.yaml --gpus v100,a100
sdwn pilot RUN --profile mysite.yaml
sdwn doctor RUN --profile mysite.yaml --probe
sdwn selftest --quick
sdwn selftest --profile mysite.yaml --page gpu-CARD.md
sdwn submit RUN --wait
sdwn submit RUN --profile mysite.yaml --dry-run
sdwn submit RUN --profile mysite.yaml --then merge,evaluate,report
sdwn retry RUN --wait
sdwn retry RUN --time 120
sdwn retry SWEEP/guidance_scale=3 --wait
sdwn cancel RUN
sdwn status RUN
sdwn status RUN --watch
sdwn status SWEEP
sdwn logs RUN
sdwn logs RUN --shard 3 --lines 100
sdwn merge RUN --release RELEASE
sdwn merge RUN OTHER --release RELEASE --evaluate
sdwn merge SWEEP
sdwn verify RELEASE
sdwn regenerate RELEASE zebra 3
sdwn export RELEASE PICTURES --format imagefolder
sdwn export RELEASE DOGS --format webdataset --below dog.n.01 --quality 90
sdwn export RELEASE BEST --format release --where "correct" --per-synset 10
sdwn push RELEASE lab/zebras --private
sdwn push TARS lab/zebras
sdwn import PHOTOGRAPHS REAL --format imagefolder
sdwn evaluate RELEASE
sdwn evaluate RELEASE --profile mysite.yaml --wait
sdwn features RELEASE
sdwn features RELEASE --model clip:openai/clip-vit-large-patch14 --profile mysite.yaml --wait
sdwn measure RELEASE
sdwn measure RELEASE --reference REAL
sdwn transfer RELEASE --test REAL
sdwn transfer RELEASE --test TEST --train TRAIN --features dinov2
sdwn duplicates RELEASE
sdwn duplicates RELEASE --against REAL
sdwn query RELEASE "SELECT status, count(*) FROM images GROUP BY status"
sdwn query RELEASE "SELECT id, avg(confidence) FROM scores GROUP BY id" --csv
sdwn compare RELEASE OTHER --out COMPARISON
sdwn compare SWEEP
sdwn report RELEASE
sdwn show RELEASE
sdwn show RELEASE zebra --open
sdwn show RELEASE zebra teapot --save grid.pdf
sdwn browse RELEASE
sdwn browse RELEASE OTHER
sdwn run demo RUN
sdwn run mine.yaml RUN --profile mysite.yaml
sdwn run demo-sweep SWEEP
"""


@functools.cache  # one for all commands, at every start
def _plain(kind: Any) -> Any:
    """Return a kind of command whose help gives a flag no type: ``<bool>`` says nothing."""

    class Plain(kind):  # type: ignore[misc]
        def get_params(self, ctx: Any) -> list[Any]:
            params: list[Any] = super().get_params(ctx)
            for one in params:
                if getattr(one, "is_flag", False):
                    one.metavar = ""
            return params

    return Plain


app = typer.Typer(
    name="sdwn",
    cls=_plain(TyperGroup),
    help="Large image datasets from text-to-image models and WordNet, on a SLURM cluster.",
    epilog="Begin with: sdwn run demo RUN",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def as_command(name: str, function: Callable[..., Result | None]) -> Callable[..., None]:
    """Return a command that prints what a function returns.

    It has ``--json``, for a parameter ``site`` a flag for each field of a profile, and does all
    cells of a sweep if it is one of ``SWEEPING``.
    """
    own = dict(inspect.signature(function, eval_str=True).parameters)
    first, *_ = own

    @functools.wraps(function)
    def wrapped(as_json: bool, **arguments: Any) -> None:
        if "site" in own:
            flags = {flag: arguments.pop(flag) for flag in SITE}
            arguments["site"] = {flag: text for flag, text in flags.items() if text is not None}
        if "as_json" in own:
            arguments["as_json"] = as_json
        given = arguments[first]
        one = given[0] if isinstance(given, list) else given
        if name in SWEEPING and kind_of(Path(one)) == "sweep":
            found: Result | None = run.do_cells(function, arguments, first, as_json)
        else:
            found = function(**arguments)
        if found is not None:
            found.print(as_json)
            if found.failed:
                raise typer.Exit(1)

    # typer reads the signature.
    kinds = {parameter: (one.annotation, one.default) for parameter, one in own.items()}
    kinds["as_json"] = (AsJson, False)
    if kinds.pop("site", None):
        for flag, text in SITE.items():
            option = Option(metavar="VALUE", help=text, rich_help_panel=PANEL)
            kinds[flag] = (Annotated[str | None, option], None)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(parameter, keyword, annotation=kind, default=default)
        for parameter, (kind, default) in kinds.items()
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return wrapped


_functions = {**vars(preflight), **vars(run), **vars(release), **vars(results)}
for name in dict.fromkeys(line.split()[1] for line in EXAMPLES.splitlines()):
    function = _functions[f"{name}_command"]
    own = [line for line in EXAMPLES.splitlines() if line.split()[1] == name]
    # Else a terminal of 80 columns breaks lines of the docstring a second time.
    text = "\n\n".join(" ".join(one.split()) for one in function.__doc__.split("\n\n"))
    epilog = "\n\n".join(["Examples:", *own])
    command = app.command(name, cls=_plain(TyperCommand), help=text, epilog=epilog)
    command(as_command(name, function))

INTERRUPTED = 130


@app.callback()
def read_options(
    context: typer.Context,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[bool, Option("--version", help="Show the version.")] = False,
) -> None:
    """Plan, generate, merge, evaluate."""
    context.ensure_object(dict)["debug"] = debug
    logging.getLogger("sdwn").setLevel(logging.DEBUG if debug else logging.NOTSET)
    if not debug:
        # Warnings of libraries are for who writes code.
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if logging.lastResort is not None:
            logging.lastResort.addFilter(
                lambda record: record.name.startswith("sdwn") or record.levelno >= logging.ERROR
            )
        # These log by handlers of their own, and read this when they are imported.
        for library in ("HF_HUB", "TRANSFORMERS", "DIFFUSERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if version:
        typer.echo(f"sdwn {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code; an error becomes one message."""
    # A terminal may know few letters, and a file's name need not be UTF-8.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Arrow's own allocator keeps much of what is freed to itself, an eighth of a merge's memory.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    given = {"debug": False}
    try:
        require_home()
        # As a path it would be the current folder.
        if any(re.fullmatch(r"(--[a-z-]+=)?", word) for word in arguments or sys.argv[1:]):
            raise UsageError("expected no empty argument, found one: is a shell variable not set?")
        app(arguments, obj=given)
    except (SdwnError, OSError, UnicodeEncodeError, KeyboardInterrupt, SystemExit) as error:
        # typer turns an interruption into an exit, without a word.
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:
            raise
        ended = isinstance(error, KeyboardInterrupt | SystemExit)
        console.fail("interrupted" if ended else plain_message(error), given["debug"])
        sys.exit(INTERRUPTED if ended else getattr(error, "exit_code", 1))

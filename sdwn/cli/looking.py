"""The commands that look into a release: show, browse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdwn.cli import terminal, texts
from sdwn.cli.options import AsJson, ReleaseFolder

commands = typer.Typer()


@commands.command()
def show(
    release: ReleaseFolder,
    synset: Annotated[str, typer.Argument(metavar="SYNSET", help="By name, wnid or lemma.")],
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, by name; default: the latest.")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Open its sheet in the browser, without a server.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write its sheet: FILE.html, or a picture, FILE.png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a synset: what it is, each image with its seed, and what the classifier saw in it."""
    from sdwn.cli.steps_showing import show

    found = show(release, synset, evaluation, save, open_)
    terminal.result(found, as_json, text=texts.sheet_text(found))


@commands.command()
def browse(
    release: ReleaseFolder,
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="Another release of the same synsets, beside it."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Listen here, 0 for any; default: 8642, or the next free one."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Listen at this address; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, by name; default: the latest.")
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Let in only who has the address with its token.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look through a release in the browser: search, WordNet's tree, each image; end by Ctrl-C."""
    from sdwn.cli.steps_browsing import Where, browse

    browse(release, other, evaluation, Where(host, port, token), as_json)

"""The step of looking through releases, with what a person sees of it meanwhile."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.cli import terminal

if TYPE_CHECKING:
    from sdwn.browser.library import Library
    from sdwn.browser.server import Listening


@dataclass(frozen=True, slots=True)
class Where:
    """Where to listen: without a port at the first free one; off loopback always with a token."""

    host: str
    port: int | None
    token: bool


def browse(
    release: Path, other: Path | None, evaluation: str | None, where: Where, as_json: bool
) -> None:
    """Serve the pages of a release, and perhaps of another beside it, until Ctrl-C or SIGTERM."""
    from sdwn.browser.app import make_app
    from sdwn.browser.library import open_release
    from sdwn.browser.server import listen, serve

    if terminal.debug:
        logging.getLogger("sdwn").setLevel(logging.DEBUG)
    with listen(where.host, where.port, where.token) as listening:
        with terminal.working("opening the release"):
            here = open_release(release, evaluation)
            there = open_release(other, evaluation) if other else None
        app = make_app(here, there, token=listening.token, hosts=listening.hosts)

        def ready() -> None:
            _told(here, listening, as_json)
            for library in filter(None, (here, there)):
                library.warm()

        serve(app, listening, ready)


def _told(here: Library, listening: Listening, as_json: bool) -> None:
    """Say where the pages are; whoever started the command may read that from a pipe."""
    terminal.result(_found(here, listening), as_json, text=f"{listening.url}\n")
    sys.stdout.flush()
    if as_json:
        return
    if listening.tunnel:
        terminal.say(f"on your own machine, before you open it: {listening.tunnel}")
        if not listening.token:
            terminal.say("whoever is logged in here can open it too; --token keeps them out")
    for name, reason in here.refused.items():
        terminal.say(f"the evaluation {name} is not shown: {reason}")
    if here.tree_missing:
        terminal.say(f"no tree: {here.tree_missing}")
    terminal.say("Ctrl-C ends it")


def _found(here: Library, listening: Listening) -> dict[str, Any]:
    return {
        "url": listening.url,
        "port": listening.port,
        "pid": os.getpid(),
        "tunnel": listening.tunnel,
        "release": here.root,
        "images": len(here.release),
        "synsets": len(here.collection),
        "evaluation": here.predictions.name if here.predictions else None,
    }

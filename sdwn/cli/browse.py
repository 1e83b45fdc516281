"""The commands that look into a release: show, browse."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from sdwn.cli import console
from sdwn.cli.folders import require_savable
from sdwn.cli.options import AsJson, EvaluationName, ReleaseFolder, SynsetName
from sdwn.errors import counted

PAGE, PICTURES = ".html", (".png", ".jpg", ".webp")


def show_command(
    release: ReleaseFolder,
    synset: SynsetName,
    evaluation: EvaluationName = None,
    open_: Annotated[bool, Option("--open", help="Open its sheet in the browser.")] = False,
    save: Annotated[Path | None, Option(help="Write its sheet to FILE.html or FILE.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a synset: its images and their classification."""
    from PIL import Image

    from sdwn.browser.library import Library
    from sdwn.browser.sheet import sheet_page, sheet_picture, sheet_record
    from sdwn.exchange.export_source import path_name
    from sdwn.io import atomic, write_text

    if save is not None:
        require_savable(save, release, (PAGE, *PICTURES))
    with console.working("opening the release"):
        library = Library(release, evaluation)
    for name, reason in library.refused.items():
        console.say(f"the evaluation {name} is not shown: {reason}")
    entry = library.find(synset)
    found = sheet_record(library, entry)
    if save is None and open_:
        # A folder that only its owner may read; it stays, for the browser reads it later.
        folder = Path(tempfile.mkdtemp(prefix="sdwn-"))
        save = folder / f"{path_name(entry.synset)}{PAGE}"
    if save is not None:
        if save.suffix.lower() == PAGE:
            write_text(save, sheet_page(library, entry))
        else:
            with atomic(save) as temporary:
                form = Image.registered_extensions()[save.suffix.lower()]
                sheet_picture(library, entry).save(temporary, form)
        found["path"] = str(save)
        display = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
        screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, display))
        if open_ and not (screen and webbrowser.open(save.absolute().as_uri())):
            console.say(f"no display here to open it on; copy it to where there is one: {save}")
    console.result(found, as_json, console.rows(sheet_rows(found)), "\n", sheet_table(found))


def sheet_rows(found: dict[str, Any]) -> dict[str, Any]:
    """Return a synset's facts as rows."""
    if found["evaluation"] is None:
        correct = "not evaluated yet"
    else:
        other = found["evaluation"] != found["model"]
        by = f"by {found['model']}" + f" ({found['evaluation']})" * other
        counts = f"{found['right']:,} of {found['judged']:,}"
        correct = f"{counts}, {by}" if found["judged"] else f"no ImageNet class, {by}"
    return {
        found["synset"]: found["wnid"],
        "lemmas": ", ".join(found["lemmas"]) or None,
        "definition": found["definition"] or None,
        "prompt": found["prompt"] or "not recorded, or one for each image",
        "above": " > ".join(found["above"]) or None,
        "images": counted(found["images"], "image") + f", {found['black']} of them black",
        "correct": correct,
        "regenerate": found["regenerate"] or "imported: how they were made is not recorded",
        "sheet": found.get("path"),
    }


def sheet_table(found: dict[str, Any]) -> Table:
    """Return a table of a synset's images: seed, status, best class, whether it is correct."""
    table = Table("image", "seed", "status", "classified as", "", "", box=None)
    states = {"right": "correct", "wrong": "incorrect", "black": "black"}
    for image in found["shots"]:
        best = (image["top5"] or [None])[0]
        seen = [best["name"], f"{100 * best['probability']:.0f} %"] if best else ["", ""]
        seed = "" if image["seed"] is None else str(image["seed"])
        state, share = states.get(image["state"], ""), image["subtree_probability"]
        if image["state"] == "other" and share is not None:
            state = f"{100 * share:.0f} % at or below it"
        cells = [str(image["number"]), seed, image["status"], *seen, state]
        table.add_row(*(Text(console.without_controls(cell)) for cell in cells))
    return table


def browse_command(
    release: ReleaseFolder,
    other: Annotated[
        Path | None, Argument(metavar="OTHER", help="A release of the same synsets.")
    ] = None,
    port: Annotated[
        int | None, Option(min=0, max=65535, help="0: any; default: 8642, or the next free one.")
    ] = None,
    host: Annotated[
        str, Option(help="Address to listen at; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    evaluation: EvaluationName = None,
    token: Annotated[
        bool, Option("--token", help="Require the token in the printed address.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look through a release in the browser.

    Search, WordNet's tree, each image and its classification. Ctrl-C ends it.
    """
    from sdwn.browser.library import Library
    from sdwn.browser.server import listen, make_app, serve

    with listen(host, port, token) as listening:
        with console.working("opening the release"):
            here = Library(release, evaluation)
            there = Library(other, evaluation) if other else None
        app = make_app(here, there, token=listening.token, hosts=listening.hosts)

        def on_ready() -> None:
            found = {
                "url": listening.url,
                "port": listening.port,
                "pid": os.getpid(),
                "tunnel": listening.tunnel,
                "release": here.root,
                "images": len(here.release),
                "synsets": len(here.collection),
                "evaluation": here.predictions.name if here.predictions else None,
            }
            console.result(found, as_json, f"{listening.url}\n")
            sys.stdout.flush()  # whoever started the command may read it from a pipe
            if not as_json:
                if listening.tunnel:
                    console.say(f"first, on your own machine, run: {listening.tunnel}")
                    if not listening.token:
                        console.say(
                            "other users of this machine can open it too; --token keeps them out"
                        )
                for name, reason in here.refused.items():
                    console.say(f"the evaluation {name} is not shown: {reason}")
                if here.tree_missing:
                    console.say(f"without WordNet's tree: {here.tree_missing}")
                console.say("Ctrl-C ends it")
            for library in filter(None, (here, there)):
                library.warm()

        serve(app, listening, on_ready)

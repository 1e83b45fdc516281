"""The step of showing one synset, with what a person sees of it meanwhile."""

from __future__ import annotations

import os
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.cli import terminal
from sdwn.cli.steps_releasing import require_savable

if TYPE_CHECKING:
    from sdwn.browser.sheet import Sheet

PAGE, PICTURES = ".html", (".png", ".jpg", ".webp")


def show(
    root: Path, synset: str, evaluation: str | None, save: Path | None, opens: bool
) -> dict[str, Any]:
    """Gather a synset's sheet; write it as a page or picture too, and open that, if asked."""
    from sdwn.browser.library import open_release
    from sdwn.browser.sheet import open_sheet, sheet_record

    if save is not None:
        require_savable(save, root, (PAGE, *PICTURES))
    with terminal.working("opening the release"):
        library = open_release(root, evaluation)
    for name, reason in library.refused.items():
        terminal.say(f"evaluation {name} is passed over: {reason}")
    sheet = open_sheet(library, synset)
    found = sheet_record(sheet)
    if save is not None or opens:
        written = _written(sheet, save)
        found["path"] = str(written)
        if opens:
            _open(written)
    return found


def _written(sheet: Sheet, save: Path | None) -> Path:
    from PIL import Image

    from sdwn.browser.sheet import sheet_page, sheet_picture
    from sdwn.exchange.export_source import path_name
    from sdwn.io import atomic, write_text

    if save is None:
        # A folder that only its owner may read; it stays, for the browser reads it later.
        folder = Path(tempfile.mkdtemp(prefix="sdwn-"))
        save = folder / f"{path_name(sheet.entry.synset)}.html"
    if save.suffix.lower() == PAGE:
        write_text(save, sheet_page(sheet))
    else:
        with atomic(save) as temporary:
            sheet_picture(sheet).save(temporary, Image.registered_extensions()[save.suffix.lower()])
    return save


def _open(page: Path) -> None:
    if _has_display() and webbrowser.open(page.absolute().as_uri()):
        return
    terminal.say(f"no display here to open it on; copy it to where there is one: {page}")


def _has_display() -> bool:
    """Tell whether a browser has somewhere to show a page, or the user named one."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in names)

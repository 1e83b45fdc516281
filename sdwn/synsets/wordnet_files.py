"""Where WordNet may lie on this machine, told without NLTK, which takes seconds to import."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

# wnids are the offsets of this version.
VERSION = "3.0"
THREE_WAYS = (
    "on a machine with network: python -m nltk.downloader wordnet; "
    "on Debian or Ubuntu: apt-get install wordnet-base wordnet-sense-index; "
    "elsewhere: unpack WordNet 3.0 and set WNSEARCHDIR to its dict folder"
)

SYSTEM_FOLDERS = (
    "/usr/share/wordnet",  # Debian, Ubuntu
    "/usr/share/wordnet-3.0/dict",  # Fedora
    "/usr/local/WordNet-3.0/dict",  # the installer of Princeton
)


def system_folders() -> list[Path]:
    """List the folders that WordNet's own two variables name, wn(1WN), and the system's."""
    own = [
        os.environ.get("WNSEARCHDIR"),
        os.environ.get("WNHOME", "") and os.environ["WNHOME"] + "/dict",
    ]
    return [Path(folder) for folder in (*own, *SYSTEM_FOLDERS) if folder]


def installed() -> Path | None:
    """Find a WordNet of the version that sdwn takes, without the network; None if there is none."""
    folders = [*(folder / "corpora/wordnet" for folder in _nltk_folders()), *system_folders()]
    return next((path for path in folders if version_of(_header(path)) == VERSION), None)


def version_of(header: Iterable[str]) -> str | None:
    """Read WordNet's version from the first lines of one of its files.

    >>> version_of(["  1 This software", "  3 WordNet 3.0 Copyright 2006 by Princeton"])
    '3.0'
    """
    match = re.search(r"Word[nN]et ([\d.]+\+?) Copyright", "".join(header))
    return match.group(1) if match else None


def _nltk_folders() -> list[Path]:
    named = filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep))
    own = (Path(sys.prefix) / name for name in ("nltk_data", "share/nltk_data", "lib/nltk_data"))
    system = (Path(top) / "nltk_data" for top in ("/usr/share", "/usr/local/share", "/usr/lib"))
    return [*map(Path, named), Path.home() / "nltk_data", *own, *system]


def read_nouns(folder: Path) -> bytes:
    """Read a corpus's file of nouns, unpacked or as NLTK downloads it."""
    with _open(folder) as file:
        return file.read()


def _header(folder: Path) -> list[str]:
    try:
        with _open(folder) as lines:
            return [line.decode("utf-8", "replace") for line in islice(lines, 30)]
    except (OSError, zipfile.BadZipFile, KeyError):
        return []


@contextmanager
def _open(folder: Path) -> Iterator[IO[bytes]]:
    archive = folder.with_suffix(".zip")
    if (folder / "data.noun").is_file() or not archive.is_file():
        with (folder / "data.noun").open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(archive) as packed, packed.open("wordnet/data.noun") as file:
            yield file

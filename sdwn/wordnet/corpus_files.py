"""Where WordNet may lie on this machine, told without NLTK, which takes seconds to import."""

from __future__ import annotations

import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

# wnids are the offsets of this version.
VERSION = "3.0"
# What NLTK opens, but lexnames, and how the last line of those that sdwn asks for begins.
PARTS = ("noun", "verb", "adj", "adv")
FILES = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in PARTS)
FILES += ("cntlist.rev", "index.sense", *(f"{part}.exc" for part in PARTS))
LAST = {"data.noun": b"15300051 ", "index.noun": b"zyrian "}
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


def look(folders: Iterable[str | Path] | None = None) -> tuple[Path | None, list[str]]:
    """Find a whole WordNet of the version that sdwn takes, without the network.

    Args:
        folders: those that may hold NLTK's corpora, in the place of NLTK's own.

    Returns:
        A corpus's folder or zip, or None; and why the corpora before it are passed over.
    """
    passed: list[str] = []
    for corpus in _candidates(_nltk_folders() if folders is None else folders):
        if (reason := fault(corpus)) is None:
            return corpus, passed
        passed.append(f"{corpus} {reason}")
    return None, passed


def fault(corpus: Path) -> str | None:
    """Return why a corpus cannot be used; None where it can."""
    try:
        for name in FILES:
            head, tail = _ends(corpus, name)
            if name == "data.noun":
                version = version_of(head.decode("utf-8", "replace").splitlines()[:30])
                if version != VERSION:
                    return f"holds WordNet {version or 'of no known version'}"
            last = tail.rstrip(b"\n").rpartition(b"\n")[2]
            if not last.startswith(LAST.get(name, b"")) or not tail.endswith(b"\n"):
                return f"is damaged: {name} is cut short"
    except (OSError, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        return f"is incomplete: {error}"
    except (zipfile.BadZipFile, zlib.error) as error:
        return f"is damaged: {error}"
    return None


def _ends(corpus: Path, name: str) -> tuple[bytes, bytes]:
    """Read the first and the last 4 kB of a file; one in a zip whole, which checks its CRC."""
    if corpus.suffix == ".zip":
        content = read(corpus, name)
        return content[:4096], content[-4096:]
    with (corpus / name).open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return head, file.read()


def read(corpus: Path, name: str) -> bytes:
    """Read a file of a corpus, unpacked or as NLTK downloads it."""
    if corpus.suffix != ".zip":
        return (corpus / name).read_bytes()
    with zipfile.ZipFile(corpus) as packed:
        return packed.read(f"wordnet/{name}")


def _candidates(folders: Iterable[str | Path]) -> Iterator[Path]:
    names = ("corpora/wordnet", "corpora/wordnet.zip")
    own = (Path(folder) / name for folder in folders for name in names)
    for path in (*own, *system_folders()):
        # What lies behind a folder that one may not look into is no candidate.
        with suppress(PermissionError):
            if path.exists():
                yield path


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
    tops = ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")
    system = (Path(top) / "nltk_data" for top in tops)
    home = Path("~/nltk_data").expanduser()
    return [*map(Path, named), home, *own, *system]

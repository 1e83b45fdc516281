"""Which code runs: the version, and a digest of the package's own files."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def code() -> str:
    """Name the code that runs here: version and the first digits of its files' SHA-256.

    Of the files as they are on disk at the first call: a task's own, when it starts.
    """
    from sdwn import __version__

    return f"{__version__}+{_digest(Path(__file__).resolve().parent)}"


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()[:12]

"""The name of the code that runs: its version and a digest of its files."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def code() -> str:
    """Return the version and the first digits of the SHA-256 of the package's files.

    The files are read at the first call, in a task when it starts.
    """
    from sdwn import __version__

    package, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + content)
    return f"{__version__}+{digest.hexdigest()[:12]}"

"""Names of files and folders for synsets, whatever these are called."""

from __future__ import annotations

import hashlib
from urllib.parse import quote

# A file name may have 255 bytes; a number and an extension are still to come.
LONGEST = 150


def file_name(name: str) -> str:
    """Turn a synset's name or wnid into one harmless component of a path.

    Different names stay different.

    >>> file_name("dog.n.01"), file_name("read/write_head.n.01"), file_name("..")
    ('dog.n.01', 'read%2Fwrite_head.n.01', '%2E.')
    """
    quoted = quote(name, safe="", errors="surrogatepass")
    if not quoted or quoted[0] in ".-~":
        # No name but the empty one gives a lone percent sign.
        quoted = f"%{ord(quoted[0]):02X}{quoted[1:]}" if quoted else "%"
    if len(quoted) <= LONGEST:
        return quoted
    # Longer than any name that is not cut, and so never equal to one.
    return f"{quoted[:LONGEST]}-{hashlib.sha256(quoted.encode()).hexdigest()[:32]}"

"""Names of files and folders for synsets, whatever these are called."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote

# A file name may have 255 bytes; a number and an extension are still to come.
LONGEST = 150
# Between separators, these words make Hugging Face datasets take a folder for one split of
# several, and leave out every folder without such a word.
_SPLIT_WORD = re.compile(
    r"(?<![^-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)"
    r"(?![^-._ 0-9])"
)


def file_name(name: str) -> str:
    """Turn a synset's name or wnid into one harmless component of a path.

    Different names stay different; ``urllib.parse.unquote`` gives back all but overlong ones.

    >>> file_name("dog.n.01"), file_name("read/write_head.n.01"), file_name("..")
    ('dog.n.01', 'read%2Fwrite_head.n.01', '%2E.')
    >>> file_name("test_tube.n.01"), file_name("contest.n.01")
    ('tes%74_tube.n.01', 'contest.n.01')
    """
    quoted = quote(name, safe="", errors="surrogatepass")
    if not quoted or quoted[0] in ".-~":
        # No name but the empty one gives a lone percent sign.
        quoted = f"%{ord(quoted[0]):02X}{quoted[1:]}" if quoted else "%"
    quoted = _SPLIT_WORD.sub(lambda word: f"{word[0][:-1]}%{ord(word[0][-1]):02X}", quoted)
    if len(quoted) <= LONGEST:
        return quoted
    # Longer than any name that is not cut, and so never equal to one; a percent sign ends no word.
    return f"{quoted[:LONGEST]}%{hashlib.sha256(quoted.encode()).hexdigest()[:32]}"

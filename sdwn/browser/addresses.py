"""Addresses of pages and images, and the views that they describe.

All that a page shows stands in its address, so that it can be kept, sent and opened again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import quote, urlencode

from sdwn.errors import UsageError

# Addresses keep these words; pages say those of `templates.KINDS`.
SHOWS = ("all", "right", "wrong", "black", "ok", "unjudged")
ORDERS = ("best", "name", "rate", "-rate", "images", "shuffled")
# In pixels: a thumbnail in a list, and one on the page of its synset.
SMALL, LARGE = 192, 384
# Longer texts are cut.
LONGEST_TEXT = 200


class BadViewError(UsageError):
    """An address that asks for something that does not exist."""


@dataclass(frozen=True, slots=True)
class View:
    """A view of a release; its fields are the parameters of an address.

    Attributes:
        q: words to search for.
        show: which images: all, right or wrong (as classified), black, ok (not black), or
            unjudged (not known to be right or wrong).
        group: a group of the evaluation.
        imagenet: synsets that are ImageNet-1k classes only.
        below: a synset; it and everything below it.
        seen: an ImageNet class; images that were classified as it.
        order: by relevance, by name, by the share of correct images (lowest first, or highest
            first with ``-rate``), by the number of images (most first), or shuffled (the same
            each time).
        page: from 1.
    """

    q: str = ""
    show: str = "all"
    group: str | None = None
    imagenet: bool = False
    below: str | None = None
    seen: str | None = None
    order: str = "best"
    page: int = 1

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> View:
        """Read a view from an address's parameters; others, and empty ones, are ignored.

        Raises:
            BadViewError: a value is none of the possible ones.

        >>> View.parse({"q": "zebra", "show": "wrong", "page": "2", "group": ""})
        View(q='zebra', show='wrong', group=None, imagenet=False, below=None, seen=None, \
order='best', page=2)
        """
        found: dict[str, Any] = {}
        for name, (pattern, read, expected) in _PARAMETERS.items():
            if value := params.get(name):
                if not re.fullmatch(pattern, value, re.DOTALL):
                    shown = repr(value if len(value) <= 40 else f"{value[:40]}…")
                    raise BadViewError(f"{name}={shown}: expected {expected}")
                found[name] = read(value)
        return cls(**found)

    def parameters(self, **changes: Any) -> dict[str, Any]:
        """Return the address's parameters, with changes: what is not the default.

        A change of anything but the page goes back to the first page.

        >>> View(q="red fox", page=3).parameters(show="wrong")
        {'q': 'red fox', 'show': 'wrong'}
        """
        view = replace(self, **{**({"page": 1} if changes else {}), **changes})
        return _not_default({field.name: getattr(view, field.name) for field in fields(View)})


def url(*parts: str | int, **parameters: Any) -> str:
    """Return the address of a page or image: parts of its path, and parameters.

    >>> url("synsets", "n02391049", 3, show="wrong"), url("tree", order="best"), url(q="a&b")
    ('/synsets/n02391049/3?show=wrong', '/tree', '/?q=a%26b')
    """
    path = "/".join(quote(str(part), safe="") for part in parts)
    return f"/{path}?{urlencode(_not_default(parameters))}".removesuffix("?")


def _not_default(parameters: dict[str, Any]) -> dict[str, Any]:
    given = {name: v for name, v in parameters.items() if v and v != DEFAULTS.get(name)}
    return {name: "1" if value is True else value for name, value in given.items()}


def _clean(text: str) -> str:
    # Half of a character, which a hand-made address may hold, cannot be written again.
    whole = text[:LONGEST_TEXT].encode("utf-8", "ignore").decode("utf-8")
    return " ".join(whole.replace("\0", " ").split())


# Of each parameter: a pattern of its values, how one is read, and what is expected.
_PARAMETERS: dict[str, tuple[str, Any, str]] = {
    "q": (".*", _clean, "text"),
    "show": ("|".join(SHOWS), str, f"one of {', '.join(SHOWS)}"),
    "group": (".*", _clean, "text"),
    "imagenet": ("[01]", "1".__eq__, "1 or nothing"),
    "below": ("n[0-9]{8}", str, "a wnid such as n02084071"),
    "seen": ("n[0-9]{8}", str, "a wnid such as n02084071"),
    "order": ("|".join(ORDERS), str, f"one of {', '.join(ORDERS)}"),
    "page": ("0{0,8}[1-9][0-9]{0,8}", int, "the number of a page, from 1"),
}

# A parameter that has its default is left out of an address.
DEFAULTS = {"size": SMALL, **{field.name: field.default for field in fields(View)}}

"""Addresses of pages and images: what one asks for, read and written.

All that a page shows stands in its address, so that it can be kept, sent and gone back to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from sdwn.errors import UsageError

if TYPE_CHECKING:
    from sdwn.browser.collection import ImageView

# Addresses keep these words; pages say correct, incorrect and not classified.
SHOWS = ("all", "right", "wrong", "black", "ok", "unjudged")
ORDERS = ("best", "name", "rate", "-rate", "images", "shuffled")
# In pixels: a thumbnail in a list, and one on the page of its synset.
SMALL, LARGE = 192, 384
# Longer texts are cut: nobody searches for more.
LONGEST_TEXT = 200


class BadViewError(UsageError):
    """An address that asks for something that does not exist."""


@dataclass(frozen=True, slots=True)
class View:
    """What an address asks for; its fields are the parameters of the address.

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

    def query(self, **changes: Any) -> str:
        """Write this view, with changes, as an address's parameters: what is not the default.

        A change of anything but the page goes back to the first page.

        >>> View(q="red fox", page=3).query(show="wrong")
        'q=red+fox&show=wrong'
        """
        return urlencode(replace(self, **{**({"page": 1} if changes else {}), **changes}).given)

    @property
    def given(self) -> dict[str, Any]:
        """The address's parameters: what is not the default."""
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        shown = [(name, value) for name, value, default in values if value != default]
        return {name: "1" if value is True else value for name, value in shown}


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


def _query(**values: str | int | None) -> str:
    """Write a query; what is None, empty or 0 is left out.

    >>> _query(q="a&b", page=2, group=None), _query()
    ('?q=a%26b&page=2', '')
    """
    given = {name: value for name, value in values.items() if value}
    return f"?{urlencode(given)}" if given else ""


def url_view(view: View | None = None, **changes: str | int | bool | None) -> str:
    """Return the address of a search, as it is or changed; without one, of all synsets."""
    return f"/?{(view or View()).query(**changes)}".rstrip("?")


def url_list(view: View) -> str:
    """Return the address of a search's list of images, which ``sdwn export --only`` reads."""
    return f"/list.csv?{view.query()}".rstrip("?")


def url_synset(wnid: str, show: str | None = None, page: int = 1) -> str:
    """Return the address of a synset's page, with all its images or those of one kind.

    >>> url_synset("n02391049"), url_synset("n02391049", "wrong", 2)
    ('/synsets/n02391049', '/synsets/n02391049?show=wrong&page=2')
    """
    kind = None if show == "all" else show
    return f"/synsets/{quote(wnid, safe='')}{_query(show=kind, page=None if page == 1 else page)}"


def url_zip(wnid: str) -> str:
    """Return the address of a synset's images as one file."""
    return f"{url_synset(wnid)}.zip"


def url_image(image: ImageView, show: str | None = None) -> str:
    """Return the address of an image's page, among all of its synset or those of one kind."""
    kind = None if show == "all" else show
    return f"{url_synset(image.wnid)}/{image.number}{_query(show=kind)}"


def url_bytes(image: ImageView, download: bool = False, other: bool = False) -> str:
    """Return the address of an image as it is stored."""
    path = f"/images/{quote(image.wnid, safe='')}/{image.number}"
    return f"{'/other' if other else ''}{path}{'?download' if download else ''}"


def url_thumbnail(image: ImageView, size: int = SMALL, other: bool = False) -> str:
    """Return the address of an image made small, for a list or for its synset's page."""
    path = f"/thumbnails/{quote(image.wnid, safe='')}/{image.number}"
    return f"{'/other' if other else ''}{path}{_query(size=None if size == SMALL else size)}"


def url_tree(wnid: str | None = None, order: str | None = None) -> str:
    """Return the address of a node of WordNet's tree, without a wnid of its root."""
    path = f"/tree/{quote(wnid, safe='')}" if wnid else "/tree"
    return path + _query(order=None if order == "best" else order)


def url_compare(wnid: str | None = None, page: int = 1) -> str:
    """Return the address of two releases side by side: all synsets, or one."""
    path = f"/compare/{quote(wnid, safe='')}" if wnid else "/compare"
    return path + _query(page=None if page == 1 else page)


def url_map(group: str | None = None) -> str:
    """Return the address of the map, with all groups or one of them.

    >>> url_map("dogs & cats")
    '/map?group=dogs+%26+cats'
    """
    return f"/map{_query(group=group)}"

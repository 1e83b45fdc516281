"""The addresses of pages and pictures: every view has one, with all of its state in it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

if TYPE_CHECKING:
    from sdwn.browser.shot import Shot
    from sdwn.browser.view import View

# In pixels, of a picture in a list, and of one on its synset's page.
SMALL, LARGE = 192, 384


def query(**values: str | int | None) -> str:
    """Write a query; what is None, empty or 0 is left out.

    >>> query(q="a&b", page=2, group=None), query()
    ('?q=a%26b&page=2', '')
    """
    given = {name: value for name, value in values.items() if value}
    return f"?{urlencode(given)}" if given else ""


def url_view(view: View | None = None, **changes: str | int | bool | None) -> str:
    """Address a search, as it is or with changes; without one, everything with these changes."""
    return f"/{_asked(view, changes)}"


def url_list(view: View) -> str:
    """Address a search's list of images, the one that ``sdwn export --only`` takes."""
    return f"/list.csv{_asked(view, {})}"


def _asked(view: View | None, changes: dict[str, str | int | bool | None]) -> str:
    from sdwn.browser.view import View

    written = (view or View()).query(**changes).removeprefix("?")
    return f"?{written}" if written else ""


def url_synset(wnid: str, show: str | None = None, page: int = 1) -> str:
    """Address a synset's page, with all its images or those of one kind.

    >>> url_synset("n02391049"), url_synset("n02391049", "wrong", 2)
    ('/synsets/n02391049', '/synsets/n02391049?show=wrong&page=2')
    """
    leaf = None if page == 1 else page
    return f"/synsets/{quote(wnid, safe='')}{query(show=_kind(show), page=leaf)}"


def _kind(show: str | None) -> str | None:
    return None if show == "all" else show


def url_zip(wnid: str) -> str:
    """Address a synset's images as one file."""
    return f"{url_synset(wnid)}.zip"


def url_image(shot: Shot, show: str | None = None) -> str:
    """Address an image's page, among all of its synset or those of one kind."""
    return f"{url_synset(shot.wnid)}/{shot.number}{query(show=_kind(show))}"


def url_bytes(shot: Shot, download: bool = False, other: bool = False) -> str:
    """Address an image as it is stored."""
    return f"{_place('images', shot, other)}{'?download' if download else ''}"


def thumb(shot: Shot, size: int = SMALL, other: bool = False) -> str:
    """Address an image made small, for a list or for its synset's page."""
    return _place("thumbnails", shot, other) + query(size=None if size == SMALL else size)


def _place(kind: str, shot: Shot, other: bool) -> str:
    root = "/other" if other else ""
    return f"{root}/{kind}/{quote(shot.wnid, safe='')}/{shot.number}"


def url_tree(wnid: str | None = None, order: str | None = None) -> str:
    """Address a node of WordNet's tree, without one its root; what is below it in an order."""
    return _one("/tree", wnid) + query(order=None if order == "best" else order)


def url_compare(wnid: str | None = None, page: int = 1) -> str:
    """Address two releases side by side: all synsets, or one."""
    return _one("/compare", wnid) + query(page=None if page == 1 else page)


def _one(page: str, wnid: str | None) -> str:
    return f"{page}/{quote(wnid, safe='')}" if wnid else page


def url_map(group: str | None = None) -> str:
    """Address the map, with all groups or one of them.

    >>> url_map("dogs & cats")
    '/map?group=dogs+%26+cats'
    """
    return f"/map{query(group=group)}"

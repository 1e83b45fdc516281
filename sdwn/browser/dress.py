"""What the pages wear: templates, style and scripts, all of them from this package's files."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sdwn.browser import links
from sdwn.reports.page import house_style, plain
from sdwn.wordnet.imagenet import class_lemmas

if TYPE_CHECKING:
    from sdwn.browser.library import Library

FOLDER = "templates/browse"
SCRIPT, STYLE = "text/javascript", "text/css"
HELPERS = (
    *(links.url_view, links.url_list, links.url_synset, links.url_zip, links.url_image),
    *(links.url_bytes, links.thumb, links.url_tree, links.url_compare, links.url_map),
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that pages need: its bytes, what they are, and the first digits of their SHA-256."""

    content: bytes
    media_type: str
    digest: str


@cache
def assets() -> dict[str, Asset]:
    """Read all files that pages need, by name."""
    htmx = files("js_lib_htmx").joinpath("static/htmx/htmx.min.js").read_bytes()
    return {
        "htmx.min.js": _asset(htmx, SCRIPT),
        "browse.css": _asset(house_style().encode() + _own("browse.css"), STYLE),
        "browse.js": _asset(_own("browse.js"), SCRIPT),
        "map.js": _asset(_own("map.js"), SCRIPT),
        "icon.svg": _asset(_own("icon.svg"), "image/svg+xml"),
    }


def _own(name: str) -> bytes:
    return files("sdwn").joinpath(FOLDER, name).read_bytes()


def _asset(content: bytes, media_type: str) -> Asset:
    return Asset(content, media_type, hashlib.sha256(content).hexdigest()[:16])


def asset(name: str) -> str:
    """Address such a file; a changed one has another address, so that a browser may keep it."""
    return f"/assets/{name}?v={assets()[name].digest}"


def render(template: str, values: dict[str, Any]) -> str:
    """Write a page, or a part of one, as HTML."""
    found = _environment().get_template(template).render(values)
    # A folder's name may be no text.
    return found.encode("utf-8", "replace").decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sdwn", FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({helper.__name__: helper for helper in HELPERS}, asset=asset)
    named = (plain, spoken, short, clipped, quoted, class_name, called)
    environment.filters.update({filter_.__name__: filter_ for filter_ in named})
    return environment


def spoken(name: object) -> str:
    """Write a name as people do.

    >>> spoken("tiger_cat")
    'tiger cat'
    """
    return str(name).replace("_", " ")


def short(name: str) -> str:
    """Write a synset's name without its part of speech and sense; a lemma stays.

    >>> short("hunting_dog.n.01"), short("St. Bernard")
    ('hunting dog', 'St. Bernard')
    """
    word, sense, _ = name.rpartition(".n.")
    return spoken(word if sense else name)


def clipped(text: str, most: int = 80) -> str:
    """Cut what is long.

    >>> clipped("zebra", 4)
    'zebr…'
    """
    return text if len(text) <= most else f"{text[:most]}…"


def quoted(path: str) -> str:
    """Write a path as a shell takes it."""
    return shlex.quote(path)


def class_name(wnid: str) -> str:
    """Name an ImageNet class by its first lemma."""
    return spoken(class_lemmas().get(wnid, wnid)).partition(", ")[0]


def called(wnid: str, library: Library) -> str:
    """Name a synset that need not be in the release."""
    node = library.tree.node(wnid) if library.tree else None
    return short(node.name) if node else wnid

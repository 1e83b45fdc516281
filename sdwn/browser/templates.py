"""Templates, style and scripts of the pages, all of them from this package's files."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sdwn.browser.addresses import url
from sdwn.reports.page import house_style, plain
from sdwn.wordnet.imagenet import class_name

FOLDER = "templates/browse"
# What pages say of each `View.show`: a sign and a word, never a colour alone.
KINDS = {
    "all": "all",
    "right": "✓ correct",
    "wrong": "✗ incorrect",
    "black": "■ black",
    "ok": "not black",
    "unjudged": "no ImageNet class",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that pages load: its bytes, their kind, and the first digits of their SHA-256."""

    content: bytes
    media_type: str
    digest: str


@cache
def assets() -> dict[str, Asset]:
    """Read all files that pages load, by name."""

    def own(name: str) -> bytes:
        return files("sdwn").joinpath(FOLDER, name).read_bytes()

    htmx = files("js_lib_htmx").joinpath("static/htmx/htmx.min.js").read_bytes()
    found = {
        "htmx.min.js": (htmx, "text/javascript"),
        "browse.css": (house_style().encode() + own("browse.css"), "text/css"),
        "browse.js": (own("browse.js"), "text/javascript"),
        "map.js": (own("map.js"), "text/javascript"),
        "icon.svg": (own("icon.svg"), "image/svg+xml"),
    }
    return {
        name: Asset(content, kind, hashlib.sha256(content).hexdigest()[:16])
        for name, (content, kind) in found.items()
    }


def url_asset(name: str) -> str:
    """Return the address of such a file; a changed one has another, so browsers may keep it."""
    return f"/assets/{name}?v={assets()[name].digest}"


def render_page(template: str, values: dict[str, Any]) -> str:
    """Render a page, or a part of one, as HTML."""
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
    environment.globals.update(url=url, url_asset=url_asset, kinds=KINDS)
    environment.filters.update(
        plain=plain, quoted=shlex.quote, spoken=spoken, short=short_name, class_name=class_name
    )
    return environment


def spoken(name: object) -> str:
    """Return a name as people say it, ``tiger cat`` for ``tiger_cat``."""
    return str(name).replace("_", " ")


def short_name(name: str) -> str:
    """Return a synset's name without its part of speech and sense; a lemma as it is.

    >>> short_name("hunting_dog.n.01"), short_name("St. Bernard")
    ('hunting dog', 'St. Bernard')
    """
    word, sense, _ = name.rpartition(".n.")
    return spoken(word if sense else name)

"""Views of a release: their addresses, and the templates, style and scripts of pages.

All that a page shows stands in its address, so that it can be kept, sent and opened again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from sdwn.errors import UsageError, command
from sdwn.reports.page import shared_text, template_environment
from sdwn.wordnet.imagenet import class_name

# Which images: the word in addresses, and that on pages: a sign and a word, never a colour alone.
KINDS = {
    "all": "all",
    "right": "✓ correct",
    "wrong": "✗ incorrect",
    "black": "■ black",
    "ok": "not black",
    "unjudged": "no ImageNet class",
}
# Orders of concepts: the word in addresses; that on pages, the score (`Library.scores`) that they
# go by, and whether the largest is first. A new order is a row here.
ORDERS: dict[str, tuple[str, str | None, bool]] = {
    "best": ("best match", None, False),
    "name": ("name", "name", False),
    "-rate": ("most correct first", "rate", True),
    "rate": ("least correct first", "rate", False),
    "images": ("most images first", "images", True),
    "shuffled": ("shuffled", "shuffled", False),
}
# In pixels: a thumbnail in a list, and one on the page of its concept.
SMALL, LARGE = 192, 384


def _clean(text: str) -> str:
    # Half of a character, which a hand-made address may hold, cannot be written again; longer texts
    # than any name are cut.
    whole = text[:200].encode("utf-8", "ignore").decode("utf-8")
    return " ".join(whole.replace("\0", " ").split())


Text = Annotated[str, BeforeValidator(_clean)]
Wnid = Annotated[str, Field(pattern="^n[0-9]{8}$")]


class View(BaseModel, frozen=True):
    """A view of a release; its fields are the parameters of an address.

    ``q`` are words to search for, ``show`` says which images (`KINDS`), ``imagenet`` leaves only
    ImageNet-1k classes, ``below`` a synset and everything below it, ``seen`` images that were
    classified as a class; ``order`` is of concepts (`ORDERS`).
    """

    q: Text = ""
    show: Annotated[str, Field(pattern=f"^({'|'.join(KINDS)})$")] = "all"
    group: Text | None = None
    imagenet: bool = False
    below: Wnid | None = None
    seen: Text | None = None
    order: Annotated[str, Field(pattern=f"^({'|'.join(ORDERS)})$")] = "best"
    page: Annotated[int, Field(ge=1, lt=10**9)] = 1

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> View:
        """Read a view from an address's parameters; others, and empty ones, are ignored.

        >>> View.parse({"q": "zebra", "show": "wrong", "page": "2", "group": ""})
        View(q='zebra', show='wrong', group=None, imagenet=False, below=None, seen=None, \
order='best', page=2)
        """
        try:
            return cls.model_validate({name: value for name, value in params.items() if value})
        except ValidationError as error:
            first = error.errors()[0]
            found = repr(str(first["input"])[:40])
            raise UsageError(f"{first['loc'][0]}={found}: {first['msg']}") from None

    def parameters(self, **changes: Any) -> dict[str, Any]:
        """Return the address's parameters, with changes: what is not the default.

        A change of anything but the page goes back to the first page.

        >>> View(q="red fox", page=3).parameters(show="wrong")
        {'q': 'red fox', 'show': 'wrong'}
        """
        view = self.model_copy(update={"page": 1, **changes} if changes else {})
        found = view.model_dump(exclude_defaults=True)
        return {name: 1 if value is True else value for name, value in found.items()}


# A parameter that has its default is left out of an address.
DEFAULTS = {"size": SMALL, **{name: one.default for name, one in View.model_fields.items()}}


def url(*parts: str | int, **parameters: Any) -> str:
    """Return the address of a page or image: parts of its path, and parameters.

    >>> url("concepts", "n02391049", 3, show="wrong"), url("tree", order="best"), url(q="a&b")
    ('/concepts/n02391049/3?show=wrong', '/tree', '/?q=a%26b')
    """
    given = {name: value for name, value in parameters.items() if value != DEFAULTS.get(name)}
    path = "/".join(quote(str(part), safe="") for part in parts)
    return f"/{path}?{urlencode(given)}".removesuffix("?")


@cache
def assets() -> dict[str, bytes]:
    """Read all files that pages load, by name."""
    own = files("sdwn").joinpath("templates/browse")
    names = ("browse.css", "browse.js", "map.js", "icon.svg")
    found = {name: own.joinpath(name).read_bytes() for name in names}
    for name, shared in {"browse.css": "house.css", "map.js": "class_map.js"}.items():
        found[name] = shared_text(shared).encode() + found[name]
    found["htmx.min.js"] = files("js_lib_htmx").joinpath("static/htmx/htmx.min.js").read_bytes()
    return found


@cache
def url_asset(name: str) -> str:
    """Return the address of such a file; a changed one has another, so browsers may keep it."""
    return url("assets", name, v=hashlib.sha256(assets()[name]).hexdigest()[:16])


def short_name(name: str) -> str:
    """Return a synset's name without its part of speech and sense; a lemma as it is.

    >>> short_name("hunting_dog.n.01"), short_name("St. Bernard")
    ('hunting dog', 'St. Bernard')
    """
    word, sense, _ = name.rpartition(".n.")
    return (word if sense else name).replace("_", " ")


_ENVIRONMENT = template_environment("browse", lstrip_blocks=True)
_ENVIRONMENT.globals |= {"url": url, "url_asset": url_asset, "sdwn": command}
_ENVIRONMENT.globals |= {"kinds": KINDS, "orders": ORDERS}
_ENVIRONMENT.filters |= {"short": short_name, "class_name": class_name}


def render_page(template: str, values: dict[str, Any]) -> str:
    """Render a page, or a part of one, as HTML."""
    found = _ENVIRONMENT.get_template(template).render(values)
    # A folder's name may be no text.
    return found.encode("utf-8", "replace").decode()

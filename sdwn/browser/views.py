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
from sdwn.measures.record import SCORES
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
    "duplicates": "≈ duplicates",
}
# Orders of concepts: the word in addresses; that on pages, the values (`Library.values`) that they
# go by, and whether the largest is first. Images of a concept go by the same score.
ORDERS: dict[str, tuple[str, str | None, bool]] = {
    "best": ("best match", None, False),
    "name": ("name", "name", False),
    "-rate": ("most correct first", "correct", True),
    "rate": ("least correct first", "correct", False),
    "images": ("most images first", "images", True),
    "shuffled": ("shuffled", "shuffled", False),
}
ORDERS |= {
    f"{sign}{one.name}": (f"{which} first: {one.label}", one.name, sign == "-")
    for one in SCORES.values()
    for sign, which in (("-", "highest"), ("", "lowest"))
    if one.name != "correct"
}
# In pixels: a thumbnail in a list, and one on the page of its concept.
SMALL, LARGE = 192, 384


def _clean(text: str) -> str:
    # Half of a character, which a hand-made address may hold, cannot be written again; longer texts
    # than any name are cut.
    whole = text[:200].encode("utf-8", "ignore").decode("utf-8")
    return " ".join(whole.replace("\0", " ").split())


Text = Annotated[str, BeforeValidator(_clean)]
_NUMBER = r"-?[0-9]{0,9}\.?[0-9]{1,9}(e[-+]?[0-9]{1,2})?"
# Of a score: yes, no, or from one number to below another; either may be left out.
Span = Annotated[str, Field(pattern=rf"^(yes|no|({_NUMBER})?\.\.({_NUMBER})?)$")]
Wnid = Annotated[str, Field(pattern="^n[0-9]{8}$")]


class View(BaseModel, frozen=True, extra="allow"):
    """A view of a release; its fields are the parameters of an address.

    ``q`` are words to search for, ``show`` says which images (`KINDS`), ``imagenet`` leaves only
    ImageNet-1k classes, ``below`` a synset and everything below it, ``seen`` images that were
    classified as a class; ``order`` is of concepts and their images (`ORDERS`). Each of `SCORES`
    may be one more field, which leaves images in a span of it. ``by`` is the score whose spans are
    offered, ``similar`` the features by which an image's page shows similar ones.
    """

    __pydantic_extra__: dict[str, Span] = Field(init=False)
    q: Text = ""
    show: Annotated[str, Field(pattern=f"^({'|'.join(KINDS)})$")] = "all"
    group: Text | None = None
    imagenet: bool = False
    below: Wnid | None = None
    seen: Text | None = None
    order: Annotated[str, Field(pattern=f"^({'|'.join(ORDERS)})$")] = "best"
    by: Annotated[str, Field(pattern=f"^({'|'.join(SCORES)})$")] | None = None
    similar: Text | None = None
    page: Annotated[int, Field(ge=1, lt=10**9)] = 1

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> View:
        """Read a view from an address's parameters; others, and empty ones, are ignored.

        >>> View.parse({"q": "zebra", "show": "wrong", "page": "2", "group": ""})
        View(q='zebra', show='wrong', group=None, imagenet=False, below=None, seen=None, \
order='best', by=None, similar=None, page=2)
        """
        names = {*cls.model_fields, *SCORES}
        given = {name: value for name, value in params.items() if value and name in names}
        # As the form of a score gives its span.
        least, most = (params.get(name, "") for name in ("least", "most"))
        if given.get("by") in SCORES and (least or most):
            given[given["by"]] = f"{least}..{most}"
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            found = repr(str(first["input"])[:40])
            raise UsageError(f"{first['loc'][0]}={found}: {first['msg'][:100]}") from None

    def parameters(self, **changes: Any) -> dict[str, Any]:
        """Return the address's parameters, with changes: what is not the default.

        A change of anything but the page goes back to the first page.

        >>> View(q="red fox", page=3).parameters(show="wrong")
        {'q': 'red fox', 'show': 'wrong'}
        """
        view = self.model_copy(update={"page": 1, **changes} if changes else {})
        found = view.model_dump(exclude_defaults=True, exclude_none=True)
        return {name: 1 if value is True else value for name, value in found.items()}

    @property
    def of_images(self) -> dict[str, Any]:
        """The parameters that say which images of a concept are shown, and in what order."""
        order = self.order if ORDERS[self.order][1] in SCORES else "best"
        return {"show": self.show, "order": order, **self.__pydantic_extra__}


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
_ENVIRONMENT.globals |= {"kinds": KINDS, "orders": ORDERS, "scores": SCORES}
_ENVIRONMENT.filters |= {"short": short_name, "class_name": class_name}


def render_page(template: str, values: dict[str, Any]) -> str:
    """Render a page, or a part of one, as HTML."""
    found = _ENVIRONMENT.get_template(template).render(values)
    # A folder's name may be no text.
    return found.encode("utf-8", "replace").decode()

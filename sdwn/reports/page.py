"""A self-contained HTML page: templates, style and scripts in one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# Its functions in the order in which they use one another; a page may do without some.
SCRIPTS = ("card.js", "charts.js", "map.js", "tables.js")


def render(template: str, values: dict[str, Any], scripts: tuple[str, ...] = SCRIPTS) -> str:
    """Render a page as HTML that needs nothing but itself.

    ``values["data"]`` is what its scripts read. No script runs but those given here and
    plotly.js: the page's policy names them by their hashes.
    """
    environment = Environment(
        loader=PackageLoader("sdwn", "templates/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["plain"] = plain
    folder = files("sdwn").joinpath("templates/report")
    texts = [
        _plotly(),
        *(folder.joinpath(name).read_text(encoding="utf-8") for name in scripts),
    ]
    return environment.get_template(template).render(
        **values,
        style=Markup(house_style() + folder.joinpath("page.css").read_text(encoding="utf-8")),
        scripts=[Markup(text) for text in texts],
        script_hashes=Markup(" ".join(map(policy_hash, texts))),
    )


def policy_hash(text: str) -> str:
    """Return the hash by which a page's policy allows one script or style, in its quotes."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # A parser of HTML makes one line end of two characters, and the hash would not be its own.
    return str(get_plotlyjs()).replace("\r\n", "\n")


def plain(value: Any) -> str:
    """Return a setting as text for people.

    >>> plain(None), plain(True), plain([3, 224]), plain({"torch": "2.4"})
    ('none', 'yes', '3, 224', 'torch 2.4')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


def house_style() -> str:
    """Return the style that all pages have: colours, type, tables."""
    return files("sdwn").joinpath("templates/house.css").read_text(encoding="utf-8")

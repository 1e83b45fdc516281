"""A self-contained HTML page: templates, style and scripts in one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, values: Mapping[str, Any], scripts: tuple[str, ...]) -> str:
    """Render a page as HTML that needs nothing but itself.

    No script runs but those given here, in their order: the page's policy names them by their
    hashes.
    """
    loader = template_loader("report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["plain"] = plain
    style, *texts = (loader.get_source(environment, name)[0] for name in ("page.css", *scripts))
    return environment.get_template(template).render(
        **values,
        style=Markup(shared_text("house.css") + style),
        scripts=[Markup(text) for text in texts],
        script_hashes=Markup(" ".join(map(policy_hash, texts))),
    )


def template_loader(folder: str) -> ChoiceLoader:
    """Return a loader of a folder's templates, and of those that reports and browser share."""
    return ChoiceLoader([PackageLoader("sdwn", f"templates/{name}") for name in (folder, "shared")])


def policy_hash(text: str) -> str:
    """Return the hash by which a page's policy allows one script or style, in its quotes."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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


def shared_text(name: str) -> str:
    """Return a file of style or script that reports and browser share."""
    return files("sdwn").joinpath("templates/shared", name).read_text(encoding="utf-8")

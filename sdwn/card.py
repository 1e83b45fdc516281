"""The dataset card of a release, filled from its record."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sdwn.config import ModelConfig
from sdwn.shards import COLUMNS


def card(manifest: dict[str, Any]) -> str:
    """Write the card of a release as Markdown with a YAML header."""
    environment = Environment(
        loader=PackageLoader("sdwn"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    settings = manifest["settings"]
    builtin = ModelConfig(**settings["model"]).builtin is not None
    statuses = {name: manifest["statuses"].get(name, 0) for name in ("ok", "nsfw", "nan")}
    return environment.get_template("card.md").render(
        **manifest,
        builtin=builtin,
        status=statuses,
        size=size_category(manifest["images"]),
        columns=COLUMNS,
        lossless=settings["storage"]["codec"] != "jpeg",
    )


def size_category(images: int) -> str:
    """Name a size class as dataset hubs do.

    >>> size_category(262_040)
    '100K<n<1M'
    """
    bounds = [(1_000, "1K"), (10_000, "10K"), (100_000, "100K"), (1_000_000, "1M")]
    if images < bounds[0][0]:
        return "n<1K"
    for (low, low_name), (high, high_name) in pairwise(bounds):
        if low <= images < high:
            return f"{low_name}<n<{high_name}"
    return "1M<n<10M"

"""What is said beside the images of a built-in model, wherever they are shown."""

from __future__ import annotations

from sdwn.config import BUILTIN

MINIATURE = f"{BUILTIN}miniature"


def notice(model: str) -> str | None:
    """Say of a built-in model what its images are worth; None of any other model.

    >>> notice("CompVis/stable-diffusion-v1-4") is None
    True
    >>> notice("builtin:tiny")[:46]
    'These images come from builtin:tiny, which exe'
    """
    if not model.startswith(BUILTIN):
        return None
    if model == MINIATURE:
        return (
            f"These images come from {model}, a pipeline under a hundredth of Stable Diffusion's "
            "size, trained on drawings of a few dozen classes to show how sdwn works. What is "
            "recognised in them says nothing about Stable Diffusion."
        )
    return (
        f"These images come from {model}, which exercises every step and shows noise. What is "
        "recognised in them means nothing, and says nothing about Stable Diffusion."
    )


def terms(model: str) -> str | None:
    """Say under which terms a built-in model's images are; None of any other model."""
    if model == MINIATURE:
        return (
            "The images come from a model trained on drawings of sdwn itself (Apache-2.0), of "
            "Google's Noto Emoji (Apache-2.0) and of Microsoft's Fluent Emoji (MIT)."
        )
    if model.startswith(BUILTIN):
        return "The images come from no trained model; sdwn itself is under Apache-2.0."
    return None

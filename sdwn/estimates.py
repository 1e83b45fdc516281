"""What a run takes: a stand-in, to be replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdwn.files import RunPaths

if TYPE_CHECKING:
    from sdwn.plan import Plan

RATIOS = {"webp": 0.415, "png": 0.529, "jpeg": 0.153, "raw": 1.0}


def stored_bytes(_: RunPaths, plan: Plan, images: int) -> tuple[int, str]:
    """Estimate the bytes that so many of a plan's images take on disk, and say from what."""
    generation, codec = plan.config.generation, plan.config.storage.codec
    raw = 3 * generation.width * generation.height * images
    return round(RATIOS[codec] * raw), f"as photographs: {codec}"

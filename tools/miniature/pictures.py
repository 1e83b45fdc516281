"""Training pictures: of each class as many as asked for, each from its own random stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sdwn.errors import SdwnError

from tools.miniature.backgrounds import SETTINGS, SIDE, Pixels
from tools.miniature.canvas import Random
from tools.miniature.pictograms import PACKAGES, PIXELS, fetch, pictogram, trimmed
from tools.miniature.scenes import scene
from tools.miniature.surfaces import SURFACES
from tools.miniature.table import Subject
from tools.miniature.things import THINGS

DRAWN = "drawn"
# Those that fill their picture, and lie in no setting.
_WHOLE = {f"{DRAWN}:{name}" for name in SURFACES}

Draw = Callable[[Random], Pixels]


class Pictures:
    """Draws pictures of classes, which are known by their place in the table."""

    def __init__(self, subjects: Sequence[Subject], packages: Path) -> None:
        for subject in subjects:
            _require_known(subject)
        self.subjects = tuple(subjects)
        designs = {name.partition(":")[0] for one in subjects for name in one.pictures}
        fetch(designs - {DRAWN}, packages)
        self._draws = [
            [_draw(name, subject.settings, packages) for name in subject.pictures]
            for subject in subjects
        ]

    def __len__(self) -> int:
        return len(self._draws)

    def draw(self, subject: int, random: Random) -> Pixels:
        """Draw a picture of a class, (64, 64, 3) uint8."""
        draws = self._draws[subject]
        return draws[int(random.integers(len(draws)))](random)

    def batch(self, subjects: Sequence[int], random: Random) -> torch.Tensor:
        """Draw pictures as the VAE takes them, (n, 3, 64, 64) float32 of -1 to 1."""
        pixels = np.stack([self.draw(subject, random) for subject in subjects])
        planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return planes.contiguous(memory_format=torch.channels_last)


def is_drawn(name: str) -> bool:
    """Return whether a picture is drawn here, and no pictogram."""
    return name.partition(":")[0] == DRAWN


def _require_known(subject: Subject) -> None:
    """Refuse a row of the table that names what is not there, before hours go into it."""
    known = {*SURFACES, *THINGS}
    for name in subject.pictures:
        design, _, drawing = name.partition(":")
        if design not in (DRAWN, *PACKAGES) or (design == DRAWN and drawing not in known):
            raise SdwnError(f"{subject.synset}: no such picture: {name}")
    if not subject.pictures:
        raise SdwnError(f"{subject.synset}: expected pictures to draw it from, found none")
    if unknown := set(subject.settings) - set(SETTINGS):
        valid = ", ".join(sorted(SETTINGS))
        raise SdwnError(f"{subject.synset}: no such setting: {min(unknown)}; valid: {valid}")
    if not subject.settings and any(name not in _WHOLE for name in subject.pictures):
        raise SdwnError(f"{subject.synset}: expected a setting for it, found none")


def _draw(name: str, settings: Sequence[str], packages: Path) -> Draw:
    kind, _, drawing = name.partition(":")
    if kind == DRAWN and drawing in SURFACES:
        return lambda random: _whole(SURFACES[drawing](random))
    if kind == DRAWN:
        return lambda random: scene(_thing(drawing, random), str(random.choice(settings)), random)
    image = pictogram(name, packages)
    return lambda random: scene(image, str(random.choice(settings)), random)


def _thing(drawing: str, random: Random) -> Image.Image:
    drawn = THINGS[drawing](random)
    return trimmed(
        drawn.convert("RGBa").resize((PIXELS, PIXELS), Image.Resampling.BOX).convert("RGBA")
    )


def _whole(drawn: Image.Image) -> Pixels:
    return np.asarray(drawn.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))

"""A square to draw on, 256 points wide, whose points become pixels by averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

POINTS = 256

Random = np.random.Generator
Colour = tuple[int, ...]
Point = Sequence[float] | NDArray[np.floating[Any]]


def canvas(colour: Colour | None = None) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an image in RGBA, clear or of one colour, and what draws on it."""
    image = Image.new("RGBA", (POINTS, POINTS), colour or (0, 0, 0, 0))
    return image, ImageDraw.Draw(image)


def one_of(random: Random, *colours: Colour) -> Colour:
    """Choose one of some colours."""
    return colours[int(random.integers(len(colours)))]


def any_colour(random: Random, darkest: int = 20, lightest: int = 230) -> Colour:
    """Choose a colour at random."""
    return tuple(int(value) for value in random.integers(darkest, lightest, 3))


def shade(colour: Colour, times: float) -> Colour:
    """Make a colour lighter or darker.

    >>> shade((100, 200, 40), 1.5)
    (150, 255, 60)
    """
    return tuple(min(255, int(value * times)) for value in colour)


def polar(angle: float, length: float, middle: tuple[float, float]) -> tuple[float, float]:
    """Find a point by its angle, clockwise from the top, and its distance from the middle.

    >>> [round(value) for value in polar(math.pi / 2, 50, (128, 128))]
    [178, 128]
    """
    return middle[0] + length * math.sin(angle), middle[1] - length * math.cos(angle)


def disc(draw: ImageDraw.ImageDraw, middle: Point, radius: float, colour: Colour) -> None:
    """Draw a disc."""
    box = [middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius]
    draw.ellipse(box, fill=colour)


_LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def digit(
    draw: ImageDraw.ImageDraw, value: int, box: tuple[float, ...], colour: Colour, width: int
) -> None:
    """Draw a digit of seven segments in a box of left, top, width and height."""
    left, top, across, down = box
    right, middle, bottom = left + across, top + down / 2, top + down
    segments = {
        "a": (left, top, right, top),
        "b": (right, top, right, middle),
        "c": (right, middle, right, bottom),
        "d": (left, bottom, right, bottom),
        "e": (left, middle, left, bottom),
        "f": (left, top, left, middle),
        "g": (left, middle, right, middle),
    }
    for name in _LIT[value]:
        draw.line(segments[name], fill=colour, width=width)

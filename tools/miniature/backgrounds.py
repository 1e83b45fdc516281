"""Backgrounds: simple settings such as sky, grass or a table, drawn from a random stream."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.miniature.canvas import Random

SIDE = 64

Pixels = NDArray[np.uint8]
Plane = NDArray[np.floating[Any]]
# Two ranges each of hue, saturation and value.
Palette = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


def background(setting: str, random: Random) -> Pixels:
    """Draw a background, (64, 64, 3) uint8; ``SETTINGS`` has the names."""
    return SETTINGS[setting](random).clip(0, 255).round().astype(np.uint8)


def _plain(random: Random) -> Plane:
    hue, saturation = random.random(), random.uniform(0, 0.6) * random.random()
    value = 1 - 0.75 * random.random() ** 2
    first = _rgb(hue, saturation, value)
    second = _rgb(
        hue + random.normal(0, 0.06),
        saturation + random.uniform(-0.15, 0.25),
        value + random.choice((-1, 1)) * random.uniform(0.08, 0.35),
    )
    shape = (_slope, _spot, _clouds)[random.integers(3)]
    return _between(first, second, shape(random))


def _studio(random: Random) -> Plane:
    value = random.uniform(0.75, 1)
    near = _rgb(random.random(), random.uniform(0, 0.06), value)
    return _between(near, near * random.uniform(0.75, 0.95), _spot(random))


def _room(random: Random) -> Plane:
    wall = _colour(random, ((0.0, 1.0), (0.02, 0.35), (0.55, 0.98)))
    floor = _colour(random, ((0.03, 0.12), (0.1, 0.5), (0.3, 0.85)))
    return _between(wall, floor, _horizon(random, 0.55, 0.8))


def _sky(random: Random) -> Plane:
    low = _colour(random, ((0.52, 0.6), (0.08, 0.35), (0.85, 1.0)))
    high = _colour(random, ((0.55, 0.62), (0.35, 0.7), (0.65, 0.95)))
    clouds = 0.5 * (2.5 * _clouds(random) - 1).clip(0, 1)
    return _between(_between(high, low, _down()), np.full(3, 250.0), clouds)


def _ground(random: Random, palette: Palette, grain: float) -> Plane:
    sky = _colour(random, ((0.5, 0.62), (0.05, 0.45), (0.8, 1.0)))
    soil = _colour(random, palette)
    noise = 1 + grain * (_noise(random, 12) + _noise(random, 24) - 1)[..., None]
    return _between(sky, soil * noise, _horizon(random, 0.15, 0.7))


def _grass(random: Random) -> Plane:
    return _ground(random, ((0.2, 0.36), (0.35, 0.75), (0.35, 0.75)), 0.3)


def _road(random: Random) -> Plane:
    return _ground(random, ((0.0, 1.0), (0.0, 0.08), (0.35, 0.6)), 0.12)


def _sand(random: Random) -> Plane:
    return _ground(random, ((0.08, 0.13), (0.25, 0.5), (0.7, 0.95)), 0.12)


def _snow(random: Random) -> Plane:
    return _ground(random, ((0.5, 0.65), (0.0, 0.08), (0.88, 1.0)), 0.05)


def _sea(random: Random) -> Plane:
    sky = _colour(random, ((0.5, 0.62), (0.05, 0.4), (0.8, 1.0)))
    water = _colour(random, ((0.5, 0.62), (0.4, 0.75), (0.35, 0.75)))
    waves = 1 + 0.25 * (_noise(random, 10, 40) - 0.5)[..., None]
    return _between(sky, water * waves, _horizon(random, 0.3, 0.7))


def _wood(random: Random) -> Plane:
    plank = _colour(random, ((0.05, 0.1), (0.35, 0.65), (0.35, 0.85)))
    grain = 1 + 0.35 * (_noise(random, 4, 24) - 0.5) + 0.2 * (_noise(random, 6, 60) - 0.5)
    return plank * grain[..., None]


def _night(random: Random) -> Plane:
    far = _colour(random, ((0.55, 0.75), (0.2, 0.7), (0.05, 0.25)))
    return _between(far * random.uniform(1.2, 2), far, _spot(random))


def _between(first: Plane, second: Plane, share: Plane) -> Plane:
    weight = share.clip(0, 1)[..., None]
    return (1 - weight) * first + weight * second


def _colour(random: Random, palette: Palette) -> Plane:
    return _rgb(*(random.uniform(*span) for span in palette))


def _rgb(hue: float, saturation: float, value: float) -> Plane:
    bounded = np.clip((saturation, value), 0, 1)
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, *bounded), dtype=np.float32)


def _down() -> Plane:
    return np.repeat(np.linspace(0, 1, SIDE, dtype=np.float32)[:, None], SIDE, axis=1)


def _slope(random: Random) -> Plane:
    angle = random.uniform(0, 2 * np.pi)
    slope: Plane = np.cos(angle) * (_down().T - 0.5) + np.sin(angle) * (_down() - 0.5)
    return 0.5 + slope


def _spot(random: Random) -> Plane:
    row, column = random.uniform(0.2, 0.8, 2)
    far: Plane = np.hypot(_down() - row, _down().T - column)
    return 1.3 * far


def _clouds(random: Random) -> Plane:
    return _noise(random, int(random.integers(3, 6)))


def _horizon(random: Random, highest: float, lowest: float) -> Plane:
    at = random.uniform(highest, lowest)
    below: Plane = 1 / (1 + np.exp(-(_down() - at) * SIDE / 1.5))
    return below


def _noise(random: Random, columns: int, rows: int | None = None) -> Plane:
    cells = random.random((rows or columns, columns)).astype(np.float32)
    return np.asarray(Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


SETTINGS: dict[str, Callable[[Random], Plane]] = {
    "plain": _plain,
    "studio": _studio,
    "room": _room,
    "sky": _sky,
    "grass": _grass,
    "road": _road,
    "sand": _sand,
    "snow": _snow,
    "sea": _sea,
    "wood": _wood,
    "night": _night,
}

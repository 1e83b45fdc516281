"""Scenes: a pictogram on a background, 64 x 64 pixels, all from one random stream."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from tools.miniature.backgrounds import SIDE, Pixels, background
from tools.miniature.canvas import Random

# Few sizes and turns, and steps as wide as a latent's cell, leave the model few pictures of each
# pictogram to learn. Of the longer side, in pixels; in degrees; steps off the middle.
SIZES = (50, 60)
TURNS = (-6.0, 0.0, 6.0)
STEP, STEPS = 4, 1
SHADOWED = 0.5


def scene(pictogram: Image.Image, setting: str, random: Random) -> Pixels:
    """Compose one picture, (64, 64, 3) uint8, of a pictogram in RGBA whose edges are trimmed."""
    canvas = Image.fromarray(background(setting, random))
    placed = _placed(pictogram, random)
    if random.random() < SHADOWED:
        canvas.paste((0, 0, 0), (0, 0), _shadow(placed, random))
    # Premultiplied: resizing has mixed no colour of transparent pixels into the edges.
    colour = np.asarray(placed, dtype=np.float32)
    alpha = colour[..., 3:] / 255
    mixed = colour[..., :3] + (1 - alpha) * np.asarray(canvas, dtype=np.float32)
    return mixed.clip(0, 255).round().astype(np.uint8)


def _placed(pictogram: Image.Image, random: Random) -> Image.Image:
    """Return the frame with the turned and resized pictogram in it, premultiplied RGBA."""
    turned = pictogram.convert("RGBa").rotate(
        random.choice(TURNS), Image.Resampling.BICUBIC, expand=True
    )
    turned = turned.crop(turned.getbbox())
    scale = random.choice(SIZES) / max(turned.size)
    width, height = (max(4, round(scale * side)) for side in turned.size)
    small = turned.resize((width, height), Image.Resampling.BOX, reducing_gap=None)
    across, down = STEP * random.integers(-STEPS, STEPS + 1, 2)
    frame = Image.new("RGBa", (SIDE, SIDE))
    frame.paste(small, ((SIDE - width) // 2 + int(across), (SIDE - height) // 2 + int(down)))
    return frame


def _shadow(placed: Image.Image, random: Random) -> Image.Image:
    mask = placed.getchannel("a").filter(ImageFilter.GaussianBlur(random.uniform(1.5, 3)))
    strength = random.uniform(0.15, 0.4)
    moved = Image.new("L", (SIDE, SIDE))
    moved.paste(mask.point(lambda value: int(strength * value)), (0, 2))
    return moved

"""Pictures drawn here that fill the frame, each from a random stream: a puzzle, a web, a rug."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from tools.miniature.canvas import (
    POINTS,
    Point,
    Random,
    any_colour,
    canvas,
    digit,
    disc,
    one_of,
    shade,
)

INK, PAPER = (24, 24, 26), (250, 250, 246)


def crossword_puzzle(random: Random) -> Image.Image:
    """Draw a grid of white squares, some of them black."""
    image, draw = canvas(PAPER)
    squares = int(random.integers(7, 10))
    side = POINTS / squares
    for row, column in zip(*np.nonzero(random.random((squares, squares)) < 0.25), strict=True):
        left, top = column * side, row * side
        draw.rectangle([left, top, left + side, top + side], fill=INK)
    for line in range(squares + 1):
        draw.line([line * side, 0, line * side, POINTS], fill=(40, 40, 40), width=3)
        draw.line([0, line * side, POINTS, line * side], fill=(40, 40, 40), width=3)
    return image


def window_screen(random: Random) -> Image.Image:
    """Draw a fine mesh."""
    image, draw = canvas(one_of(random, (150, 160, 165), (165, 160, 150), (130, 150, 140)))
    for line in range(0, POINTS, 8):
        draw.line([line, 0, line, POINTS], fill=(70, 75, 80), width=3)
        draw.line([0, line, POINTS, line], fill=(70, 75, 80), width=3)
    return image


def theater_curtain(random: Random) -> Image.Image:
    """Draw the folds of a red curtain, a valance above."""
    red = np.array(one_of(random, (170, 15, 25), (150, 10, 60), (120, 20, 20)))
    across = np.linspace(0, 1, POINTS)
    folds = 0.55 + 0.45 * np.sin(2 * np.pi * (random.integers(6, 9) * across + random.random()))
    light = folds[None, :] * np.linspace(1.25, 0.95, POINTS)[:, None]
    pixels = (red * light[..., None]).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels).convert("RGBA")
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, POINTS, 34], fill=shade(tuple(red), 0.6))
    for left in range(0, POINTS, 32):
        draw.pieslice([left, 10, left + 32, 58], 0, 180, fill=(200, 160, 50))
    draw.rectangle([0, 222, POINTS, POINTS], fill=(110, 70, 40))
    return image


def window_shade(random: Random) -> Image.Image:
    """Draw the slats of a blind."""
    image, draw = canvas()
    slat = one_of(random, (235, 230, 220), (190, 160, 120), (245, 245, 245), (200, 215, 230))
    height = POINTS // int(random.choice((12, 16, 20)))
    for row in range(POINTS):
        draw.line([0, row, POINTS, row], fill=shade(slat, 0.62 + 0.42 * (row % height) / height))
    for left in (60, 196):
        draw.line([left, 0, left, POINTS], fill=(120, 120, 120), width=3)
    return image


def bookcase(random: Random) -> Image.Image:
    """Draw shelves full of books."""
    image, draw = canvas((90, 55, 30))
    shelves = int(random.integers(3, 5))
    height = POINTS / shelves
    for shelf in range(shelves):
        left, floor = 8, (shelf + 1) * height - 6
        while left < POINTS - 16:
            width = int(random.integers(10, 24))
            top = floor - random.uniform(0.6, 0.88) * height
            draw.rectangle([left, top, left + width, floor], fill=any_colour(random, 30))
            draw.line([left + width / 2, top + 6, left + width / 2, top + 18], (240, 220, 150), 3)
            left += width + 1
        draw.rectangle([0, floor - 2, POINTS, floor + 6], fill=(130, 85, 50))
    return image


def scoreboard(random: Random) -> Image.Image:
    """Draw a board with two rows of lit digits."""
    image, draw = canvas(one_of(random, (20, 50, 35), (20, 20, 24), (20, 30, 60)))
    for row, colour in ((40, (255, 190, 40)), (140, (255, 70, 50))):
        for place in range(4):
            box = (24 + place * 58, row, 34, 70)
            digit(draw, int(random.integers(10)), box, colour, 9)
    for lamp in range(12):
        draw.rectangle([20 + lamp * 18, 10, 32 + lamp * 18, 24], fill=(230, 230, 230))
    return image


def web_site(random: Random) -> Image.Image:
    """Draw a page in a browser's window."""
    image, draw = canvas(PAPER)
    draw.rectangle([0, 0, POINTS, 22], fill=(210, 212, 216))
    disc(draw, (11, 11), 5, (240, 90, 80))
    draw.rounded_rectangle([40, 4, 220, 18], 6, fill=(255, 255, 255))
    draw.rectangle([0, 22, POINTS, 64], fill=any_colour(random, 20, 200))
    draw.rectangle([12, 34, 90, 50], fill=PAPER)
    for left in range(12, 250, 82):
        draw.rectangle([left, 76, left + 70, 130], fill=any_colour(random, 60))
    for line in range(12):
        end = int(random.integers(130, 240))
        draw.rectangle([12, 142 + line * 10, end, 145 + line * 10], fill=(110, 110, 115))
    return image


def spider_web(random: Random) -> Image.Image:
    """Draw a web before something dark."""
    image, draw = canvas(one_of(random, (30, 40, 35), (60, 90, 50), (20, 22, 30), (90, 110, 120)))
    middle = random.uniform(90, 166, 2)
    spokes = int(random.choice((12, 14, 16)))
    angles = np.linspace(0, 2 * np.pi, spokes + 1)
    for angle in angles:
        draw.line([*middle, *_around(middle, angle, 300)], fill=(225, 230, 235), width=4)
    half = math.pi / spokes
    for radius in range(18, 240, 20):
        points = [
            _around(middle, angle + turn, radius * (0.93 if turn else 1))
            for angle in angles
            for turn in (0, half)
        ]
        draw.line(points, fill=(215, 222, 228), width=3)
    return image


def prayer_rug(random: Random) -> Image.Image:
    """Draw a rug with borders and a niche."""
    wool = one_of(random, (150, 20, 30), (120, 30, 60), (40, 60, 110))
    gold = (235, 205, 140)
    image, draw = canvas((90, 20, 25))
    for width, colour in ((14, (215, 180, 110)), (26, wool), (44, (30, 40, 70))):
        draw.rectangle([width, width, POINTS - width, POINTS - width], fill=colour)
    for along in range(50, 215, 22):
        for edge in (36, POINTS - 36):
            for x, y in ((along, edge), (edge, along)):
                draw.polygon([(x, y - 8), (x + 8, y), (x, y + 8), (x - 8, y)], fill=gold)
    niche = [(60, 210), (60, 110), (128, 60), (196, 110), (196, 210)]
    draw.polygon(niche, fill=wool, outline=gold, width=4)
    draw.ellipse([108, 120, 148, 170], fill=(225, 190, 110))
    return image


def shower_curtain(random: Random) -> Image.Image:
    """Draw a dotted curtain on rings."""
    cloth = np.array(one_of(random, (235, 240, 245), (150, 200, 210), (230, 200, 200)))
    wave = np.sin(2 * np.pi * random.choice((6, 8)) * np.linspace(0, 1, POINTS))
    pixels = np.repeat((cloth * (0.85 + 0.15 * wave[:, None]))[None], POINTS, axis=0)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGBA")
    draw, dots = ImageDraw.Draw(image), any_colour(random, 40, 200)
    for row in range(5):
        for column in range(5):
            disc(draw, (column * 54 + 20 + 26 * (row % 2), row * 50 + 40), 10, dots)
    draw.rectangle([0, 8, POINTS, 15], fill=(150, 150, 155))
    for left in range(0, POINTS, 32):
        draw.ellipse([left, 2, left + 16, 24], outline=(190, 190, 195), width=4)
    return image


def jigsaw_puzzle(random: Random) -> Image.Image:
    """Draw a picture of soft colours, cut into pieces."""
    soft = Image.fromarray(random.integers(40, 240, (3, 3, 3)).astype(np.uint8))
    image = soft.resize((POINTS, POINTS), Image.Resampling.BICUBIC).convert("RGBA")
    draw, side = ImageDraw.Draw(image), POINTS / 4
    for line in range(1, 4):
        draw.line([line * side, 0, line * side, POINTS], fill=INK, width=4)
        draw.line([0, line * side, POINTS, line * side], fill=INK, width=4)
    for line in range(1, 4):
        for piece in range(4):
            out = int(random.choice((-10, 10)))
            _tab(image, (line * side + out, (piece + 0.5) * side))
            _tab(image, ((piece + 0.5) * side, line * side + out))
    return image


def _tab(image: Image.Image, middle: tuple[float, float]) -> None:
    colour = image.getpixel((int(middle[0]), int(middle[1])))
    draw = ImageDraw.Draw(image)
    disc(draw, middle, 14, INK)
    disc(draw, middle, 10, colour)  # type: ignore[arg-type]


def _around(middle: Point, angle: float, radius: float) -> tuple[float, float]:
    return middle[0] + radius * math.cos(angle), middle[1] + radius * math.sin(angle)


SURFACES: dict[str, Callable[[Random], Image.Image]] = {
    drawing.__name__.replace("_", "-"): drawing
    for drawing in (
        bookcase,
        crossword_puzzle,
        jigsaw_puzzle,
        prayer_rug,
        scoreboard,
        shower_curtain,
        spider_web,
        theater_curtain,
        web_site,
        window_screen,
        window_shade,
    )
}

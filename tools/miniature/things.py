"""Things drawn here, each from a random stream, on nothing: a clock, a ball, a lamp."""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image, ImageChops

from tools.miniature.canvas import Colour, Random, canvas, digit, disc, one_of, polar, shade

BLACK, WHITE, GREY = (24, 24, 26), (250, 250, 246), (190, 192, 198)


def analog_clock(random: Random) -> Image.Image:
    """Draw a round clock that shows any time."""
    image, draw = canvas()
    middle = (128.0, 128.0)
    disc(draw, middle, 124, one_of(random, BLACK, (150, 95, 50), (190, 40, 40), GREY))
    disc(draw, middle, 106, WHITE)
    for hour in range(12):
        angle = math.pi * hour / 6
        draw.line(
            [polar(angle, 98, middle), polar(angle, 82, middle)],
            fill=BLACK,
            width=10 if hour % 3 == 0 else 6,
        )
    for length, width in ((52, 11), (80, 7)):
        draw.line([middle, polar(random.uniform(0, 2 * math.pi), length, middle)], BLACK, width)
    disc(draw, middle, 8, BLACK)
    return image


def digital_clock(random: Random) -> Image.Image:
    """Draw a clock radio that shows any time."""
    image, draw = canvas()
    case = one_of(random, BLACK, (225, 225, 225), (60, 40, 30))
    draw.rounded_rectangle([8, 66, 248, 190], 18, fill=case)
    draw.rectangle([22, 82, 234, 174], fill=(12, 8, 8))
    lit = one_of(random, (255, 40, 30), (60, 255, 90), (70, 200, 255))
    hour, minute = int(random.integers(24)), int(random.integers(60))
    for place, value in enumerate((*divmod(hour, 10), *divmod(minute, 10))):
        digit(draw, value, (34 + place * 48 + 12 * (place > 1), 96, 30, 64), lit, 9)
    for height in (116, 142):
        disc(draw, (132, height), 4, lit)
    return image


def tennis_ball(random: Random) -> Image.Image:
    """Draw a tennis ball, turned in any way."""
    ball = _ball((220, 245, 60), (150, 180, 30))
    seams, draw = canvas()
    draw.arc([-130, 20, 90, 240], -70, 70, fill=(245, 248, 235), width=13)
    draw.arc([166, 20, 386, 240], 110, 250, fill=(245, 248, 235), width=13)
    seams = seams.rotate(float(random.uniform(-60, 60)), Image.Resampling.BICUBIC)
    ball.paste(seams, (0, 0), ImageChops.darker(seams.getchannel("A"), ball.getchannel("A")))
    return ball


def ping_pong_ball(random: Random) -> Image.Image:
    """Draw a ball of one colour, white or orange."""
    if random.random() < 0.5:
        return _ball((255, 255, 255), (200, 200, 205))
    return _ball((255, 190, 90), (220, 130, 30))


def _ball(light: Colour, dark: Colour) -> Image.Image:
    image, draw = canvas()
    for ring in range(100):
        share = ring / 100
        mixed = tuple(int(d + (one - d) * share) for one, d in zip(light, dark, strict=True))
        disc(draw, (128 - 0.3 * ring, 128 - 0.35 * ring), 120 - 1.2 * ring, mixed)
    return image


def loudspeaker(random: Random) -> Image.Image:
    """Draw a box with two cones."""
    image, draw = canvas()
    box = one_of(random, (36, 36, 40), (110, 70, 40), (205, 205, 205))
    draw.rounded_rectangle([56, 4, 200, 252], 8, fill=box, outline=BLACK, width=3)
    for height, radius in ((66, 40), (178, 62)):
        for share, grey in ((1, 72), (0.85, 22), (0.75, 48), (0.4, 30), (0.3, 97)):
            disc(draw, (128, height), radius * share, (grey, grey, grey + 3))
    return image


def ruler(random: Random) -> Image.Image:
    """Draw a ruler with its marks."""
    image, draw = canvas()
    body = one_of(random, (240, 205, 110), (225, 190, 140), (235, 235, 235))
    draw.rectangle([2, 90, 254, 166], fill=body, outline=(120, 90, 40), width=3)
    for mark in range(25):
        left, long = 8 + mark * 10, mark % 5 == 0
        draw.line([left, 90, left, 124 if long else 108], fill=(40, 30, 20), width=3)
        if long:
            digit(draw, mark // 5, (left + 2, 136, 8, 18), (40, 30, 20), 2)
    return image


def candle(random: Random) -> Image.Image:
    """Draw a burning candle."""
    image, draw = canvas()
    wax = one_of(random, (245, 240, 225), (200, 40, 40), (250, 225, 150))
    draw.rectangle([92, 96, 164, 250], fill=wax)
    draw.rectangle([140, 96, 164, 250], fill=shade(wax, 0.85))
    draw.ellipse([92, 84, 164, 110], fill=shade(wax, 1.05))
    draw.line([128, 98, 128, 72], fill=(40, 30, 20), width=6)
    draw.polygon([(128, 4), (154, 56), (142, 84), (114, 84), (102, 56)], fill=(255, 165, 20))
    draw.polygon([(128, 30), (140, 60), (134, 82), (122, 82), (116, 60)], fill=(255, 245, 170))
    return image


def light_switch(random: Random) -> Image.Image:
    """Draw a switch on its plate."""
    image, draw = canvas()
    plate = one_of(random, (245, 243, 236), (232, 222, 196))
    draw.rounded_rectangle([60, 10, 196, 246], 10, fill=plate, outline=shade(plate, 0.78), width=4)
    draw.rectangle(
        [104, 84, 152, 172], fill=shade(plate, 0.91), outline=shade(plate, 0.65), width=4
    )
    top = 92 if random.random() < 0.5 else 128
    draw.rectangle([108, top, 148, top + 36], fill=shade(plate, 1.1))
    for height in (40, 216):
        disc(draw, (128, height), 8, shade(plate, 0.8))
        draw.line([121, height, 135, height], fill=(120, 118, 110), width=3)
    return image


def chest_of_drawers(random: Random) -> Image.Image:
    """Draw a tall chest of four or five drawers."""
    image, draw = canvas()
    wood = one_of(random, (150, 95, 50), (110, 65, 35), (235, 232, 225), (190, 140, 90))
    draw.rectangle([40, 8, 216, 236], fill=wood, outline=shade(wood, 0.6), width=4)
    draw.rectangle([32, 4, 224, 18], fill=shade(wood, 1.15))
    for left in (44, 196):
        draw.rectangle([left, 236, left + 16, 252], fill=shade(wood, 0.7))
    height = 210 / int(random.integers(4, 6))
    top = 24.0
    while top < 225:
        front = [52, top, 204, top + height - 10]
        draw.rectangle(front, fill=shade(wood, 1.1), outline=shade(wood, 0.55), width=4)
        for across in (92, 164):
            disc(draw, (across, top + height / 2 - 5), 7, (215, 185, 100))
        top += height
    return image


def table_lamp(random: Random) -> Image.Image:
    """Draw a lamp with a shade."""
    image, draw = canvas()
    cloth = one_of(random, (240, 225, 190), (220, 190, 140), (200, 80, 70), (245, 245, 240))
    foot = one_of(random, (120, 80, 40), (60, 70, 90), (190, 170, 120), (70, 120, 110))
    draw.ellipse([92, 130, 164, 240], fill=foot)
    draw.rectangle([122, 100, 134, 140], fill=(180, 150, 80))
    draw.rectangle([84, 236, 172, 250], fill=foot)
    for step in range(60):
        t = step / 60
        sides = [(88 + 40 * t, 8), (168 - 40 * t, 8), (216 - 88 * t, 120), (40 + 88 * t, 120)]
        draw.polygon(sides, fill=shade(cloth, 0.8 + 0.25 * t))
    return image


def barn(random: Random) -> Image.Image:
    """Draw a barn with a crossed door."""
    image, draw = canvas()
    boards = one_of(random, (165, 35, 30), (140, 30, 30), (120, 75, 45))
    gable = [(28, 110), (70, 60), (128, 30), (186, 60), (228, 110)]
    draw.polygon([*gable, (228, 244), (28, 244)], fill=boards)
    draw.line([(20, 116), *gable[1:4], (236, 116)], fill=(90, 90, 95), width=14)
    door = [88, 150, 168, 244]
    draw.rectangle(door, fill=shade(boards, 0.75), outline=WHITE, width=8)
    draw.line([88, 150, 168, 244], fill=WHITE, width=8)
    draw.line([168, 150, 88, 244], fill=WHITE, width=8)
    draw.rectangle([106, 78, 150, 118], fill=(60, 30, 25), outline=WHITE, width=7)
    return image


def cassette(random: Random) -> Image.Image:
    """Draw an audio cassette."""
    image, draw = canvas()
    case = one_of(random, (40, 40, 44), (225, 222, 212), (60, 80, 130), (190, 60, 60))
    stripe = one_of(random, (220, 60, 40), (40, 120, 190), (240, 170, 30))
    draw.rounded_rectangle([4, 48, 252, 208], 10, fill=case, outline=BLACK, width=3)
    draw.rectangle([20, 60, 236, 162], fill=(240, 236, 222))
    draw.rectangle([20, 62, 236, 78], fill=stripe)
    draw.rounded_rectangle([52, 94, 204, 150], 18, fill=BLACK)
    for across in (82, 174):
        disc(draw, (across, 122), 21, WHITE)
        disc(draw, (across, 122), 11, BLACK)
    draw.rectangle([112, 106, 144, 138], fill=(110, 80, 60))
    draw.polygon([(60, 208), (72, 176), (184, 176), (196, 208)], fill=shade(case, 0.75))
    return image


def obelisk(random: Random) -> Image.Image:
    """Draw a pillar of stone with a pointed top."""
    image, draw = canvas()
    stone = one_of(random, (215, 205, 185), (200, 195, 190), (225, 215, 195))
    draw.polygon([(112, 34), (144, 34), (158, 240), (98, 240)], fill=stone)
    draw.polygon([(128, 34), (144, 34), (158, 240), (128, 240)], fill=shade(stone, 0.82))
    draw.polygon([(112, 34), (144, 34), (128, 4)], fill=shade(stone, 0.95))
    draw.rectangle([80, 238, 176, 254], fill=shade(stone, 0.75))
    return image


THINGS: dict[str, Callable[[Random], Image.Image]] = {
    drawing.__name__.replace("_", "-"): drawing
    for drawing in (
        analog_clock,
        barn,
        candle,
        cassette,
        chest_of_drawers,
        digital_clock,
        light_switch,
        loudspeaker,
        obelisk,
        ping_pong_ball,
        ruler,
        table_lamp,
        tennis_ball,
    )
}

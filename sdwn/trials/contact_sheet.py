"""The contact sheet: a small run's images as one picture."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont, ImageOps

from sdwn.config import RunConfig
from sdwn.files import RunPaths, atomic
from sdwn.planning.plan import Plan
from sdwn.storage.columns import names
from sdwn.storage.images import decode
from sdwn.storage.shards import ImageFile

# In pixels: a picture's cell, a line of text, a picture with its line.
COLUMNS = 10
CELL = 160
LINE = 24
TALL = CELL + LINE
GAP = 4


def draw_contact_sheet(pilot: RunPaths, plan: Plan) -> None:
    """Draw the pilot's images, a synset below its prompt, each with its number and status."""
    each = plan.config.images_per_synset
    columns = min(COLUMNS, each)
    size = max(columns, 4) * CELL, len(plan.synsets) * (LINE + math.ceil(each / columns) * TALL)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE * 2 // 3)
    with ImageFile(pilot.shard(0)) as file:
        statuses = names(file.rows()["status"], "status")
        for spec in plan.specs(plan.shards[0]):
            row, place = divmod(spec.index, each)
            below = row * (LINE + math.ceil(each / columns) * TALL)
            if place == 0:
                pen.text((GAP, below), f"{spec.synset}: {spec.prompt}", "black", font)
            left, top = place % columns * CELL, below + LINE + place // columns * TALL
            sheet.paste(_thumbnail(file, spec.index, plan.config), (left + GAP, top))
            note = "" if statuses[spec.index] == "ok" else f", {statuses[spec.index]}"
            pen.text((left + GAP, top + CELL - GAP), f"{spec.number}{note}", "black", font)
    with atomic(pilot.contact_sheet) as temporary:
        sheet.save(temporary, "PNG")


def _thumbnail(file: ImageFile, index: int, config: RunConfig) -> Image.Image:
    generation = config.generation
    payload, codec = file.payload(index), config.storage.codec
    picture = decode(payload, codec, generation.width, generation.height)
    return ImageOps.contain(picture, (CELL - 2 * GAP, CELL - 2 * GAP))

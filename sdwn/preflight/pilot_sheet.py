"""The contact sheet of a pilot."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from sdwn.io import atomic
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan
from sdwn.storage.columns import names
from sdwn.storage.images import Strip, contact_sheet, decode
from sdwn.storage.shards import ImageFile


def draw_contact_sheet(pilot: RunPaths, plan: Plan) -> None:
    """Draw the pilot's images, a synset below its prompt, each with its number and status."""
    each, size = plan.config.images_per_synset, plan.config.generation
    specs = list(plan.specs(plan.shards[0]))
    with ImageFile(pilot.shard(0)) as file:
        statuses = names(file.rows()["status"], "status")

        def cells(start: int) -> Iterator[tuple[Image.Image, str]]:
            for spec in specs[start : start + each]:
                payload, status = file.payload(spec.index), statuses[spec.index]
                image = decode(payload, plan.config.storage.codec, size.width, size.height)
                yield image, f"{spec.number}" if status == "ok" else f"{spec.number}, {status}"

        sheet = contact_sheet(
            [
                Strip(f"{specs[start].synset}: {specs[start].prompt}", each, cells(start))
                for start in range(0, len(specs), each)
            ]
        )
    with atomic(pilot.contact_sheet) as temporary:
        sheet.save(temporary, "PNG")

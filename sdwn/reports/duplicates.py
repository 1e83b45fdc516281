"""The page of a release's duplicates: pairs with their pictures, the most similar first."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from sdwn.io import write_text
from sdwn.measures.duplicates import Duplicates
from sdwn.releases.release import Release, image_name
from sdwn.reports.page import THUMBNAIL_PIXELS, data_url, render

# Each section shows so many pairs; of equal pixels one for each image that is kept.
SHOWN = 48


def write_duplicates_page(release: Release, reference: Release | None, found: Duplicates) -> None:
    """Write the page beside the record: one HTML file that needs nothing but itself."""
    kinds = found.pairs["kind"]
    kept = found.pairs.filter(pc.equal(kinds, "exact")).group_by("row", use_threads=False)
    kept = kept.aggregate([("other", "min"), ("other", "count")])
    kept = kept.rename_columns(["row", "other", "copies"]).sort_by([("copies", "descending")])
    tables = {
        "exact": ("Equal pixels", kept, release),
        "near": ("Near duplicates", found.pairs.filter(pc.equal(kinds, "near")), release),
    }
    if reference is not None:
        others = found.pairs.filter(pc.ends_with(kinds, "reference"))
        tables["reference"] = (f"In {reference.paths.name}", others, reference)
    values = {
        **found.content,
        "release": release,
        "reference": reference,
        "features": found.features,
        "sections": {name: title for name, (title, *_) in tables.items()},
        "counts": {name: len(pairs) for name, (_, pairs, _) in tables.items()},
        "shown": {
            name: [
                (pair, _picture(release, pair["row"]), _picture(side, pair["other"]))
                for pair in pairs.slice(0, SHOWN).to_pylist()
            ]
            for name, (_, pairs, side) in tables.items()
        },
    }
    write_text(found.paths.page, render("duplicates.html", values, ()))


def _picture(release: Release, row: int) -> dict[str, Any]:
    image, record = release.image(row), release.row(row)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return {"name": image_name(record), "source": data_url(image, 80)}

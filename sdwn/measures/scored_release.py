"""A release in Python and in notebooks: images by index, and what was computed of them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import pyarrow as pa
from PIL import Image

from sdwn.errors import IntegrityError, counted
from sdwn.evaluation.record import evaluations, open_evaluation
from sdwn.measures.query import choose
from sdwn.measures.scores import score_table
from sdwn.prediction.table import IMAGE_KEY, Features, feature_names, find_by_key, open_features
from sdwn.releases.release import INNER_COLUMNS, Release, image_name
from sdwn.storage.images import PER_ROW, contact_sheet, encode


class ScoredRelease(Release):
    """A finished release, or some of its images, with what was computed of them.

    An index gives one image as a dict: ``image``, a PIL image, and its record (``prompt``,
    ``label``, ``seed``, ...). A slice, indices, a mask, or a concept's name give a subset.
    """

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, int | np.integer):
            return self._with_image(self.row(int(which)))
        rows = self.find(which) if isinstance(which, str) else np.arange(len(self))[which]
        return self.subset(rows=rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self.metadata.to_batches(max_chunksize=1000):
            yield from map(self._with_image, rows.to_pylist())

    def _with_image(self, row: dict[str, Any]) -> dict[str, Any]:
        record = {name: value for name, value in row.items() if name not in INNER_COLUMNS}
        return {"image": None} | record | {"image": self.image(row)}

    def __repr__(self) -> str:
        found = self.described
        statuses = ", ".join(f"{count:,} {name}" for name, count in found.statuses.items())
        of = f"{counted(found.images, 'image')} of {counted(found.concepts, self.unit)}"
        computed = [f"evaluation {name}" for name in evaluations(self.paths)]
        computed += [f"features {name}" for name in feature_names(self.paths)]
        return f"<Release {self}: {'; '.join([f'{of} ({statuses})', *computed])}>"

    def _repr_html_(self) -> str:
        def cell(row: dict[str, Any]) -> tuple[Image.Image | None, str]:
            try:
                return self.image(row), image_name(row)
            except IntegrityError:
                return None, image_name(row)

        text = f"<p>{html.escape(repr(self)[1:-1])}</p>"
        if not len(self):
            return text
        rows = np.unique(np.linspace(0, len(self) - 1, PER_ROW).astype(int)).tolist()
        sheet = contact_sheet(self.manifest.name, len(rows), map(cell, map(self.row, rows)))
        encoded = base64.b64encode(encode(np.asarray(sheet), "webp", 80)).decode()
        return f'{text}<img alt="{len(rows)} images" src="data:image/webp;base64,{encoded}">'

    def subset(self, *, where: str | None = None, **conditions: Any) -> Self:
        """Select images as :meth:`Release.subset`, of those the ones that fulfil a condition.

        ``where`` is SQL over the metadata and all scores, as ``confidence > 0.9``.
        """
        found = super().subset(**conditions)
        return found if where is None else choose(found, where)[0]

    def predictions(self, evaluation: str | None = None) -> pa.Table:
        """Return an evaluation's predictions of these images, in their order; the latest's."""
        *_, table = open_evaluation(self, evaluation)
        rows = find_by_key(self.metadata, table, IMAGE_KEY)
        return table.take(pa.array(rows[rows >= 0]))

    def scores(self, evaluation: str | None = None) -> pa.Table:
        """Return all scores of these images, a row an image, null where nothing is known."""
        return score_table(self, evaluation)

    def features(self, name: str | None = None) -> Features:
        """Return the features of these images, a row an image; of several encoders, by name."""
        return open_features(self, name)

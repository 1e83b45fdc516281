"""Choice of images by their metadata and scores, and of the best ones of each concept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from sdwn.errors import UsageError
from sdwn.evaluation.record import evaluations
from sdwn.io import csv_text
from sdwn.measures.query import Database, named_scores, uncomputed
from sdwn.measures.scores import SCORES, score_table
from sdwn.planning.concepts import Concept
from sdwn.prediction.table import find_by_key
from sdwn.releases.release import Release


@dataclass(frozen=True, slots=True)
class Choice:
    """The images chosen, and the concepts that have fewer of them than ``wanted``, how many each.

    ``release`` is a subset whose ``selection`` has the rule in words.
    """

    release: Release
    wanted: int | None
    short: list[tuple[Concept, int]]

    def short_csv(self) -> str:
        """Return the concepts that fall short as CSV, a list that ``sdwn extend --only`` takes."""
        head = ("id", "wnid", "synset", "have", "wanted")
        rows = ((one.id, one.wnid, one.synset, have, self.wanted) for one, have in self.short)
        return csv_text(head, rows)


def choose(
    release: Release,
    where: str | None = None,
    per_synset: int | None = None,
    order_by: str | None = None,
    evaluation: str | None = None,
) -> Choice:
    """Choose the images that fulfil a condition, or of each concept the first ones by an order.

    Both are SQL over one table, a row an image, with the columns of the metadata and all scores;
    of a name that both have, the score counts. Images that are equal in the order come by number.
    A condition that is null for an image, as where a score is missing, leaves it out.

    Args:
        release: a release or a subset of one.
        where: the condition, one expression.
        per_synset: the most images of each concept.
        order_by: what stands behind ORDER BY in SQL, as ``confidence DESC``.
        evaluation: whose predictions are scores; the latest unless named.

    Raises:
        UsageError: what is no SQL, names no column, or a score that nothing has computed yet.
    """
    images, scores = release.metadata, score_table(release, evaluation)
    text = f"{where or ''} {order_by or ''}"
    if missing := uncomputed(release, text, scores):
        raise UsageError(missing)
    table = images.select([name for name in images.column_names if name.lower() not in SCORES])
    for name in SCORES:
        table = table.append_column(name, scores[name])
    database, words, parts = Database({"images": table}), list[str](), list[str]()
    if where is not None:
        # Parsed, so that it is one expression.
        parts.append(f"WHERE {database.expression(where)}")
        words.append(f"where {' '.join(where.split())}")
    if per_synset is not None:
        order = f"{order_by}\n, number" if order_by else "number"
        parts.append(
            f"QUALIFY row_number() OVER (PARTITION BY id ORDER BY {order}) <= {per_synset}"
        )
        first = f"by {' '.join(order_by.split())}" if order_by else "by number"
        words.append(f"{per_synset} of each {release.unit} {first}")
    if any(SCORES[name].made_by == "evaluate" for name in named_scores(text)):
        made = evaluations(release.paths)
        words.append(f"evaluation {evaluation or max(made, key=made.__getitem__)}")
    schema, batches = database.answer(f"SELECT id, number FROM images {' '.join(parts)}")
    kept = find_by_key(images, pa.Table.from_batches(batches, schema), ("id", "number")) >= 0
    chosen = release.subset(rows=kept, rows_are=", ".join(words))
    short = list[tuple[Concept, int]]()
    if per_synset is not None:
        have = Counter(chosen.metadata["id"].to_pylist())
        short = [(one, have[one.id]) for one in release.present if have[one.id] < per_synset]
    return Choice(chosen, per_synset, short)

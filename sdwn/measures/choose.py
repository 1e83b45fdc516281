"""Choice of images by their metadata and scores, and of the best ones of each concept."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from sdwn.errors import UsageError
from sdwn.evaluation.record import evaluations
from sdwn.measures.query import Database, uncomputed, words_of
from sdwn.measures.scores import SCORES, score_table
from sdwn.planning.concepts import Concept
from sdwn.releases.release import Release


@dataclass(frozen=True, slots=True)
class Choice:
    """The images chosen, a subset with the rule in its ``selection``; concepts that fall short.

    Of these ``short`` has how many images each has.
    """

    release: Release
    short: list[tuple[Concept, int]]


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

    Args:
        release: a release or a subset of one.
        where: the condition; an image for which it is null is left out.
        per_synset: the most images of each concept.
        order_by: what stands behind ORDER BY in SQL, as ``confidence DESC``.
        evaluation: whose predictions count; the latest unless named.

    Raises:
        UsageError: what is no SQL, names no column, or a score that nothing has computed yet.
    """
    images, scores = release.metadata, score_table(release, evaluation)
    named = words_of(f"{where} {order_by}")
    if missing := uncomputed(release, named, scores):
        raise UsageError(missing)
    table = images.select([name for name in images.column_names if name.lower() not in SCORES])
    for name in SCORES:
        table = table.append_column(name, scores[name])
    database, rules, sql = Database({"images": table}), list[str](), "SELECT id, number FROM images"
    if where is not None:
        sql += f" WHERE {database.expression(where)}"
        rules.append(f"where {' '.join(where.split())}")
    if per_synset is not None:
        # A line of its own: a comment behind the order ends there.
        order = f"{order_by}\n, number" if order_by else "number"
        sql += f" QUALIFY row_number() OVER (PARTITION BY id ORDER BY {order}) <= {per_synset}"
        by = " ".join((order_by or "number").split())
        rules.append(f"{per_synset} of each {release.unit} by {by}")
    if any(one.made_by == "evaluate" for one in SCORES.values() if one.name in named):
        made = evaluations(release.paths)
        rules.append(f"evaluation {evaluation or max(made, key=made.__getitem__)}")
    chosen = {(row["id"], row["number"]) for row in database.answer(sql)[1]}
    every = zip(images["id"].to_pylist(), images["number"].to_pylist(), strict=True)
    mask = np.array([key in chosen for key in every], bool)
    have = Counter(id_ for id_, _ in chosen)
    short = [(one, have[one.id]) for one in release.present if have[one.id] < (per_synset or 0)]
    return Choice(release.subset(rows=mask, rows_are=", ".join(rules)), short)

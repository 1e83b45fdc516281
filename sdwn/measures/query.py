"""Questions to a release and choices of its images, in SQL and in Python.

DuckDB's database is in memory and has these tables alone: no file, network, extension or setting
can be reached from it, whoever's the release is, and whoever's the question.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from itertools import takewhile
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa

from sdwn.errors import UsageError, command, counted, import_extra
from sdwn.evaluation.record import evaluations, open_evaluation
from sdwn.measures.record import SCORES, score_table
from sdwn.planning.plan import Concept
from sdwn.planning.tables import as_table
from sdwn.prediction import table as image_tables
from sdwn.releases.release import INNER_COLUMNS, Release, image_name
from sdwn.storage.images import PER_ROW, contact_sheet, encode

log = logging.getLogger(__name__)

# In this order, for the last two forbid the others.
_SETTINGS = (
    f"threads = {min(4, len(os.sched_getaffinity(0)))}",  # on a login node, others work as well
    "memory_limit = '4GB'",
    "temp_directory = ''",
    "python_enable_replacements = false",
    "enable_external_access = false",
    "lock_configuration = true",
)
_BATCH_ROWS, _ROWS_DRAWN = 10_000, 40

R = TypeVar("R", bound=Release)


def open_database(release: Release, sql: str, evaluation: str | None = None) -> Database:
    """Open a database of the tables that a question names, among those of ``makers``.

    Scores that nothing has computed yet are named in the log.
    """

    def predictions() -> pa.Table:
        _, labelled, _, found = open_evaluation(release, evaluation)
        best = pa.array(labelled.classes, pa.string()).take(pa.array(image_tables.top1(found)))
        return found.append_column("predicted_wnid", best)

    makers: dict[str, Callable[[], pa.Table]] = {
        "images": lambda: release.metadata,
        "predictions": predictions,
        "scores": lambda: score_table(release, evaluation),
        "synsets": lambda: as_table(list(release.concepts.values())),
    }
    named = {*re.findall(r"\w+", sql.lower())}  # what it can name is among its words
    tables = {name: make() for name, make in makers.items() if name in named}
    if "scores" in tables and (missing := uncomputed(release, named, tables["scores"])):
        log.warning("%s", missing)
    return Database(tables)


def uncomputed(release: Release, named: set[str], scores: pa.Table) -> str | None:
    """Return a line for each named score that nothing has computed yet, with the command to."""
    known = {one.made_by for one in SCORES.values() if scores[one.name].null_count < len(scores)}
    lines = []
    for score in SCORES.values():
        if score.name in named and score.made_by not in known:
            first, *rest = score.made_by.split()
            make = command(first, release.paths.root, *rest)
            lines.append(f"{score.name} is not computed yet; compute it with: {make}")
    return "\n".join(lines) or None


class Database:
    """A DuckDB database in memory that has these tables, and reaches nothing else."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self._duckdb: Any = import_extra("duckdb", "measures")
        self._tables, self._connection = tables, self._duckdb.connect()
        with self._plain_errors():
            for setting in _SETTINGS:
                self._connection.execute(f"SET {setting}")
            for name, table in tables.items():
                self._connection.register(name, table)

    def expression(self, text: str) -> str:
        """Parse a text as one expression of SQL, and return it without comments."""
        with self._plain_errors():
            return str(self._duckdb.SQLExpression(text))

    def draw(self, sql: str, width: int) -> str:
        """Run a SELECT; draw its first and last rows as a table, as far as the width allows."""
        text = StringIO()
        with self._plain_errors(), redirect_stdout(text):
            relation = self._select(sql)
            self._run(lambda: relation.show(max_width=width, max_rows=_ROWS_DRAWN))
        return text.getvalue().rstrip()

    def answer(self, sql: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
        """Run a SELECT; return the names of its columns, and rows with values that JSON has."""
        with self._plain_errors():
            relation = self._select(sql)
            # Longer than any column's, for of a column of this name it would be the value.
            row = "row".ljust(1 + max(map(len, relation.columns)), "_")
            texts = relation.query(row, f"SELECT to_json({row}) FROM {row}")
            reader = self._run(lambda: texts.to_arrow_reader(_BATCH_ROWS))

        def rows() -> Iterator[dict[str, Any]]:
            with self._plain_errors():
                while (batch := self._run(lambda: next(reader, None))) is not None:
                    for text in batch.column(0).to_pylist():
                        # What is no number, or infinite, JSON does not have.
                        yield json.loads(text, parse_constant=lambda _: None)

        return relation.columns, rows()

    def _select(self, sql: str) -> Any:
        if (found := len(self._connection.extract_statements(sql))) > 1:
            raise UsageError(f"expected one SELECT, found {found} statements")  # one is shown
        if (relation := self._run(lambda: self._connection.sql(sql))) is None:
            raise UsageError("expected a SELECT, DESCRIBE or SUMMARIZE")
        return relation

    def _run(self, work: Callable[[], Any]) -> Any:
        """Run work in a thread: in this one, DuckDB leaves Ctrl-C until the query has ended."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(work)
            try:
                return running.result()
            except KeyboardInterrupt:
                self._connection.interrupt()
                raise

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turn errors of DuckDB, and those that Arrow passes on, into a line."""
        try:
            yield
        except (self._duckdb.Error, OSError, RuntimeError, pa.ArrowException) as error:
            # Behind an empty line, the SQL and a mark below it.
            said = " ".join(takewhile(str.strip, str(error).splitlines()))
            if isinstance(error, self._duckdb.BinderException | self._duckdb.CatalogException):
                here = [f"{name} ({', '.join(t.column_names)})" for name, t in self._tables.items()]
                # DuckDB's own tables are out of reach.
                said = said.partition(' Did you mean "pg_')[0]
                said += f"; there are {', '.join(here) or 'images, predictions, scores, synsets'}"
            raise UsageError(said) from None


# --- Choice of images --------------------------------------------------------------------------
def choose(
    release: R,
    where: str | None = None,
    per_synset: int | None = None,
    order_by: str | None = None,
    evaluation: str | None = None,
) -> tuple[R, list[tuple[Concept, int]]]:
    """Choose the images that fulfil a condition, or of each concept the first ones by an order.

    Both are SQL over one table, a row an image, with the columns of the metadata and all scores;
    of a name that both have, the score counts. Images equal in ``order_by`` come by number.

    Returns:
        The images chosen, a subset with the rule in its ``selection``; and the concepts that fall
        short of ``per_synset``, with how many images each has.
    """
    images, scores = release.metadata, score_table(release, evaluation)
    named = {*re.findall(r"\w+", f"{where} {order_by}".lower())}
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
        rules.append(f"evaluation {evaluation or evaluations(release.paths)[0]}")
    chosen = {(row["id"], row["number"]) for row in database.answer(sql)[1]}
    every = zip(images["id"].to_pylist(), images["number"].to_pylist(), strict=True)
    mask, have = np.array([key in chosen for key in every], bool), Counter(id_ for id_, _ in chosen)
    short = [(one, have[one.id]) for one in release.present if have[one.id] < (per_synset or 0)]
    return release.subset(rows=mask, rows_are=", ".join(rules)), short


# --- In Python and in notebooks ----------------------------------------------------------------
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
        parts = [f"{of} ({statuses})", *(f"evaluation {one}" for one in evaluations(self.paths))]
        parts += [f"features {name}" for name in image_tables.feature_names(self.paths)]
        return f"<Release {self}: {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        text = f"<p>{html.escape(repr(self)[1:-1])}</p>"
        if not len(self):
            return text
        rows = np.unique(np.linspace(0, len(self) - 1, PER_ROW).astype(int)).tolist()
        cells = ((self.image(row), image_name(row)) for row in map(self.row, rows))
        sheet = contact_sheet(self.manifest.name, len(rows), cells)
        encoded = base64.b64encode(encode(np.asarray(sheet), "webp", 80)).decode()
        return f'{text}<img alt="{len(rows)} images" src="data:image/webp;base64,{encoded}">'

    def subset(self, *, where: str | None = None, **conditions: Any) -> Self:
        """Select images as :meth:`Release.subset`; ``where`` is SQL over all columns and scores."""
        found = super().subset(**conditions)
        return found if where is None else choose(found, where)[0]

    def predictions(self, evaluation: str | None = None) -> pa.Table:
        """Return an evaluation's predictions of these images, in their order; the latest's."""
        *_, table = open_evaluation(self, evaluation)
        rows = image_tables.find_by_key(self.metadata, table, image_tables.IMAGE_KEY)
        return table.take(pa.array(rows[rows >= 0]))

    def scores(self, evaluation: str | None = None) -> pa.Table:
        """Return all scores of these images, a row an image, null where nothing is known."""
        return score_table(self, evaluation)

    def features(self, name: str | None = None) -> image_tables.Features:
        """Return the features of these images, a row an image; of several encoders, by name."""
        return image_tables.open_features(self, name)

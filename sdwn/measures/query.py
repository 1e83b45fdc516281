"""Questions to a release in SQL, by DuckDB, over tables of its images and what is known of them.

The database is in memory and has these tables alone: no file, network, extension or setting can be
reached from it, whoever's the release is, and whoever's the question.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, TypeVar

import pyarrow as pa

from sdwn.errors import UsageError, command, import_extra
from sdwn.evaluation.record import open_evaluation
from sdwn.measures.scores import SCORES, score_table
from sdwn.planning.concept_table import as_table
from sdwn.prediction.table import top1
from sdwn.releases.release import Release

log = logging.getLogger(__name__)

TABLES = ("images", "predictions", "scores", "synsets")
# So many rows of an answer are in memory at the same time.
BATCH_ROWS = 10_000
# In this order: the last two forbid the others.
_SETTINGS = (
    "temp_directory = ''",
    "memory_limit = '4GB'",
    "python_enable_replacements = false",
    "enable_external_access = false",
    "lock_configuration = true",
)
# On a login node, others work as well.
_MOST_THREADS = 4

Found = TypeVar("Found")


def query(
    release: Release, sql: str, evaluation: str | None = None
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Answer a SELECT over the tables of a release; return the columns, and the rows in batches.

    ``TABLES`` are ``images`` (the metadata), ``predictions`` of an evaluation, the latest unless
    named, ``scores``, and ``synsets``, the concepts of the plans.

    Raises:
        UsageError: it is no SELECT, names what is not there, or fails on some row.
    """
    tables = {
        name: _table(release, name, evaluation)
        for name in TABLES
        if re.search(rf"\b{name}\b", sql, re.IGNORECASE)
    }
    if "scores" in tables and (missing := uncomputed(release, sql, tables["scores"])):
        log.warning("%s", missing)
    return Database(tables).answer(sql)


def _table(release: Release, name: str, evaluation: str | None) -> pa.Table:
    if name == "images":
        return release.metadata
    if name == "scores":
        return score_table(release, evaluation)
    if name == "synsets":
        return as_table(list(release.concepts.values()))
    _, labelled, _, predictions = open_evaluation(release, evaluation)
    best = pa.array(labelled.classes, pa.string()).take(pa.array(top1(predictions)))
    return predictions.append_column("predicted_wnid", best)


def named_scores(sql: str) -> list[str]:
    """List the scores that a text of SQL may read, by the words in it."""
    words = {word.lower() for word in re.findall(r"\w+", sql)}
    return [name for name in SCORES if name in words]


def uncomputed(release: Release, sql: str, scores: pa.Table) -> str | None:
    """Name the scores in a text that no command has computed yet, with the commands; else None."""
    known = {one.made_by for one in SCORES.values() if scores[one.name].null_count < len(scores)}
    made_by = {name: SCORES[name].made_by for name in named_scores(sql)}
    missing = [
        f"{name} is not computed yet; compute it with: {command(first, release.paths.root, *rest)}"
        for name, (first, *rest) in (
            (n, by.split()) for n, by in made_by.items() if by not in known
        )
    ]
    return "\n".join(missing) or None


class Database:
    """A DuckDB database in memory that has these tables, and reaches nothing else."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self.duckdb: Any = import_extra("duckdb", "measures")
        self._tables, self._connection = tables, self.duckdb.connect()
        threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        for setting in (f"threads = {threads}", *_SETTINGS):
            self._connection.execute(f"SET {setting}")
        with self._plain_errors():
            for name, table in tables.items():
                self._connection.register(name, table)

    def expression(self, text: str) -> str:
        """Parse a text as one expression of SQL, and return it without comments."""
        with self._plain_errors():
            return str(self.duckdb.SQLExpression(text))

    def answer(self, sql: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Run one SELECT; return the columns of its result, and the rows in batches."""
        with self._plain_errors():
            statements = self._connection.extract_statements(sql)
            if [one.type for one in statements] != [self.duckdb.StatementType.SELECT]:
                raise UsageError("expected one SELECT (or DESCRIBE or SUMMARIZE), and nothing else")
            reader = self._interruptible(
                lambda: self._connection.sql(sql).to_arrow_reader(BATCH_ROWS)
            )

        def batches() -> Iterator[pa.RecordBatch]:
            with self._plain_errors():
                while (batch := self._interruptible(lambda: next(reader, None))) is not None:
                    yield batch

        return reader.schema, batches()

    def _interruptible(self, work: Callable[[], Found]) -> Found:
        """Run work in a thread, for in this one DuckDB leaves Ctrl-C until the query has ended."""
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
        except (self.duckdb.Error, OSError, RuntimeError, pa.ArrowException) as error:
            # Behind an empty line, the SQL and a mark below it.
            said = " ".join(takewhile(str.strip, str(error).splitlines()))
            if isinstance(error, self.duckdb.BinderException | self.duckdb.CatalogException):
                listed = (
                    f"{name} ({', '.join(t.column_names)})" for name, t in self._tables.items()
                )
                said += f"; the tables here: {', '.join(listed) or ', '.join(TABLES)}"
            raise UsageError(said) from None

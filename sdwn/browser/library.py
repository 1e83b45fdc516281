"""A release open for browsing: all that pages are made of."""

from __future__ import annotations

import gc
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.collection import Collection, Entry
from sdwn.browser.judgement import Judgement
from sdwn.browser.search import Found, Index
from sdwn.browser.shot import Shot, Shots
from sdwn.browser.tree import Tree
from sdwn.browser.view import SHOWS, BadViewError, View
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation.problems import not_its_own
from sdwn.evaluation.record import evaluations, read_evaluation
from sdwn.releases.release import Release
from sdwn.wordnet.hypernyms import open_nouns
from sdwn.wordnet.imagenet import class_index

# Synsets on a page, and images of each: an import may have thousands of one.
PAGE = 48
PREVIEW = 4

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Selection:
    """A page of a view: its synsets in order, and the first images of each that the view takes.

    ``images`` counts, by wnid, all that it takes; ``shots`` has up to PREVIEW, by number.
    ``kinds`` counts the images that each ``View.show`` would take, the rest of the view as it is.
    ``page`` is the one shown: the last, if there are fewer than were asked for.
    """

    entries: list[Entry]
    shots: dict[str, list[Shot]]
    images: dict[str, int]
    kinds: dict[str, int]
    total_synsets: int
    total_images: int
    page: int
    pages: int
    corrected: str | None = None


class Library:
    """A release, what a classifier said of it, WordNet's tree over it, and a search; all to read.

    ``judgement`` is of the evaluation that was named, else of the newest that fits, None without
    one; ``refused`` says, by name, why others cannot be shown. ``tree`` is None where there is no
    WordNet: ``tree_missing`` says so. ``groups`` maps the evaluation's groups to their wnids.
    Threads may share it.

    Raises:
        UsageError: there is no evaluation of that name.
        SdwnError: there is no release, it is damaged, or the evaluation that was named is.
    """

    def __init__(self, root: str | Path, evaluation: str | None = None) -> None:
        self.release = Release(root)
        self.collection = Collection(self.release)
        self.refused: dict[str, str] = {}
        self.evaluations = self._sorted_out()
        self.judgement = self._judgement(evaluation)
        self.tree, self.tree_missing = self._tree()
        self.index = Index(self.collection)
        self.groups = self._groups()

    def close(self) -> None:
        """Close files and search."""
        self.index.close()
        self.release.close()

    def warm(self) -> None:
        """Make search and tree in a thread of their own, so that the first to ask need not wait."""
        threading.Thread(target=self._make, name="warm", daemon=True).start()

    def _make(self) -> None:
        with suppress(sqlite3.ProgrammingError):  # closed meanwhile
            self.index.warm()
            if self.tree:
                self.tree.warm()
            # All this stays: to look through it for garbage made one page in fifty wait for 60 ms.
            gc.freeze()

    @property
    def name(self) -> str:
        """What the release is called: its catalog, and what was taken of it."""
        return self.release.manifest.name

    @property
    def root(self) -> str:
        """The folder of the release."""
        return str(self.release.paths.root)

    def sample(self, wnid: str) -> Shot | None:
        """Give an image that stands for a synset: its own, else one of what is below it.

        One that is right is taken before others, and a black one last; None if there is none.
        """
        positions = self._at_or_below(wnid)
        if not len(positions):
            return None
        if self.judgement is not None:
            positions = positions[np.argsort(self.judgement.right[positions] == 0, kind="stable")]
        rows = self.collection.rows_at(int(positions[0]))
        fitness = ~self.collection.black[rows] * 1
        if self.judgement is not None:
            fitness += 2 * (self.judgement.rank[rows] == 0)
        return self._shot(int(rows[np.argmax(fitness)]))

    def _at_or_below(self, wnid: str) -> NDArray[np.int64]:
        if entry := self.collection.entry(wnid):
            return np.array([entry.position])
        return np.flatnonzero(self.tree.below(wnid)) if self.tree else np.arange(0)

    def shot(self, wnid: str, number: int) -> Shot | None:
        """Describe one image, with what was said of it; None if there is none."""
        row = self.collection.row(wnid, number)
        return None if row is None else self._shot(row)

    def shots(self, wnid: str, show: str = "all") -> Shots:
        """Describe a synset's images by number: all, or those that ``View.show`` names."""
        rows = self.collection.rows(wnid)
        return Shots(rows[self._taken(View(show=show))[rows]], self._shot)

    def counts(self, wnid: str) -> dict[str, int]:
        """Count a synset's images by what ``View.show`` may name."""
        rows = self.collection.rows(wnid)
        return {show: int(self._taken(View(show=show))[rows].sum()) for show in SHOWS}

    def select(self, view: View) -> Selection:
        """Take a page of what a view shows.

        Raises:
            BadViewError: it asks for a group, synset or class that there is not.
        """
        matching = self._matching(view)
        found, taken, counts = self._found(view, matching)
        pages = max(1, -(-len(found.positions) // PAGE))
        page = min(view.page, pages)
        shown = found.positions[(page - 1) * PAGE : page * PAGE].tolist()
        entries = [self.collection.synsets[position] for position in shown]
        return Selection(
            entries=entries,
            shots={entry.wnid: self._first(entry, taken) for entry in entries},
            images={entry.wnid: int(counts[entry.position]) for entry in entries},
            kinds=self._kinds(view, matching),
            total_synsets=len(found.positions),
            total_images=int(counts[found.positions].sum()),
            page=page,
            pages=pages,
            corrected=found.corrected,
        )

    def all_rows(self, view: View) -> Iterator[Shot]:
        """Give all images that a view shows, on whichever page, synset by synset in its order.

        Raises:
            BadViewError: as in `select`; at once, before the first is taken.
        """
        found, taken, _ = self._found(view, self._matching(view))
        return (
            self._shot(row)
            for position in found.positions.tolist()
            for row in self.collection.rows_at(position).tolist()
            if taken[row]
        )

    def _first(self, entry: Entry, taken: Mask) -> list[Shot]:
        rows = self.collection.rows_at(entry.position)
        return list(Shots(rows[taken[rows]][:PREVIEW], self._shot))

    def _shot(self, row: int) -> Shot:
        return self.judgement.shot(row) if self.judgement else self.collection.shot(row)

    def _matching(self, view: View) -> Found:
        """Find the synsets that a view takes, whatever images they have."""
        fits, found = self._fits(view), self.index.search(view.q)
        return Found(found.positions[fits[found.positions]], found.corrected)

    def _found(self, view: View, matching: Found) -> tuple[Found, Mask, NDArray[np.int64]]:
        """Find the synsets that have images of a view, in its order; which images, and how many."""
        taken = self._taken(view)
        counts = self.collection.total(taken)
        positions = matching.positions[counts[matching.positions] > 0]
        return Found(self._ordered(view, positions), matching.corrected), taken, counts

    def _kinds(self, view: View, matching: Found) -> dict[str, int]:
        wanted = np.zeros(len(self.collection), dtype=bool)
        wanted[matching.positions] = True
        rows = wanted[self.collection.positions]
        shown = {show: self._taken(replace(view, show=show)) for show in SHOWS}
        return {show: int(np.count_nonzero(rows & taken)) for show, taken in shown.items()}

    def _taken(self, view: View) -> Mask:
        """Tell, row by row of the release, which images a view takes."""
        collection, judgement = self.collection, self.judgement
        everything = np.ones(len(collection.positions), dtype=bool)
        if view.show == "black":
            everything = collection.black
        elif view.show == "ok":
            everything = ~collection.black
        elif judgement is None:
            everything &= view.show in ("all", "unjudged")
        elif view.show != "all":
            rank = judgement.rank
            everything = {"right": rank == 0, "wrong": rank > 0, "unjudged": rank < 0}[view.show]
        return everything & self._seen(view.seen) if view.seen else everything

    def _seen(self, wnid: str) -> Mask:
        if wnid not in class_index():
            raise BadViewError(f"seen={wnid}: expected a class of ImageNet-1k")
        if self.judgement is None:
            raise BadViewError(f"seen={wnid}: nothing is known of it without an evaluation")
        return self.judgement.seen(wnid)

    def _fits(self, view: View) -> Mask:
        """Tell, by position, which synsets a view takes, search apart."""
        fits = np.ones(len(self.collection), dtype=bool)
        if view.imagenet:
            fits &= self.collection.in_imagenet
        if view.group is not None:
            fits &= self._below(self._group(view.group), f"group={view.group}")
        if view.below is not None:
            fits &= self._below(view.below, f"below={view.below}")
        return fits

    def _group(self, name: str) -> str:
        if name not in self.groups:
            there = ", ".join(self.groups) or "none"
            raise BadViewError(f"group={name!r}: no such group; there is {there}")
        return self.groups[name]

    def _below(self, wnid: str, asked: str) -> Mask:
        if self.tree is None:
            raise BadViewError(f"{asked}: {self.tree_missing}")
        return self.tree.below(wnid)

    def _ordered(self, view: View, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if view.order == "name":
            return np.sort(positions)
        if view.order == "images":
            images = np.diff(self.collection.starts)[positions]
            return positions[np.argsort(-images, kind="stable")]
        if view.order == "shuffled":
            places = np.random.default_rng(0).permutation(len(self.collection))[positions]
            return positions[np.argsort(places)]
        if view.order in ("rate", "-rate"):
            rates = self._rates()[positions] * (-1 if view.order == "-rate" else 1)
            # What was not judged, NaN, is last either way.
            return positions[np.argsort(rates, kind="stable")]
        return positions

    def _rates(self) -> NDArray[np.float64]:
        rates = np.full(len(self.collection), np.nan)
        if self.judgement is not None:
            judged = self.judgement.judged
            np.divide(self.judgement.right, judged, out=rates, where=judged > 0)
        return rates

    def _sorted_out(self) -> list[str]:
        """List the evaluations that can be shown, newest first, and refuse the others."""
        made, fit = evaluations(self.release.paths), []
        for name in sorted(made, key=lambda name: (-made[name], name)):
            paths = self.release.paths.evaluation(name)
            try:
                problem = not_its_own(self.release, paths, read_evaluation(paths))
            except IntegrityError as error:
                problem = str(error)
            if problem:
                self.refused[name] = problem
            else:
                fit.append(name)
        return fit

    def _judgement(self, name: str | None) -> Judgement | None:
        if name is not None:
            if name in self.refused:
                raise IntegrityError(self.refused[name])
            if name not in self.evaluations:
                had = ", ".join(self.evaluations) or "none"
                raise UsageError(f"{self.release}: no evaluation {name!r}; there is {had}")
            return Judgement(self.collection, name)
        for newest in list(self.evaluations):
            try:
                return Judgement(self.collection, newest)
            except IntegrityError as error:
                self.refused[newest] = str(error)
                self.evaluations.remove(newest)
        return None

    def _tree(self) -> tuple[Tree | None, str | None]:
        try:
            return Tree(open_nouns(), self.collection, self.judgement), None
        except SdwnError as error:
            return None, str(error)

    def _groups(self) -> dict[str, str]:
        if self.judgement is None or self.tree is None:
            return {}
        return {group["name"]: group["wnid"] for group in self.judgement.record["groups"]}

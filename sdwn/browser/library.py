"""A release open for browsing, and the searches that pages make in it."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdwn.browser.addresses import SHOWS, BadViewError, View
from sdwn.browser.collection import NONE, Collection, Entry, ImagePredictions, ImageView
from sdwn.browser.images import StoredImages
from sdwn.browser.search import Matches, SearchIndex
from sdwn.browser.tree import SynsetTree
from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.evaluation.record import evaluation_mismatch, evaluations, read_evaluation
from sdwn.paths import ReleasePaths
from sdwn.releases.release import Release
from sdwn.storage.columns import STATUSES
from sdwn.wordnet.corpus import require_corpus
from sdwn.wordnet.imagenet import class_index

# Synsets on a page, and images of each: an import may have thousands of one.
PAGE = 48
PREVIEW = 4

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ResultPage:
    """A page of a search: its synsets in order, and the first images of each that match.

    Attributes:
        previews: by wnid, up to PREVIEW matching images, by number.
        images: by wnid, how many images match.
        kinds: how many images each ``View.show`` would match, the rest of the view as it is.
        page: the one shown; the last, if there are fewer than the view asks for.
        corrected: what was searched for instead of the view's words.
    """

    entries: list[Entry]
    previews: dict[str, list[ImageView]]
    images: dict[str, int]
    kinds: dict[str, int]
    total_synsets: int
    total_images: int
    page: int
    pages: int
    corrected: str | None = None


class Library:
    """A release open for browsing; nothing of it is written, and threads may share it.

    Args:
        root: the release.
        evaluation: the one to show; without a name, the newest that is whole and of this release.

    Attributes:
        name: its catalog, and the part of it that this release has.
        predictions: of the evaluation that is shown; None without one.
        evaluations: names of those that can be shown, newest first.
        refused: by name, why other evaluations cannot be shown.
        tree: WordNet above the synsets; None where there is no WordNet, as ``tree_missing`` says.
        groups: the evaluation's groups by name, to their wnids.
        stored: the images' bytes.

    Raises:
        UsageError: there is no evaluation of that name.
        SdwnError: there is no release, it is damaged, or the evaluation that was named is.
    """

    def __init__(self, root: str | Path, evaluation: str | None = None) -> None:
        # Before the release is read: what comes in between is a change.
        self._stamp = _stamp(ReleasePaths(Path(root).absolute()).manifest)
        self.release = Release(root)
        self.name, self.root = self.release.manifest.name, str(self.release.paths.root)
        self.collection = Collection(self.release)
        self.stored = StoredImages(self.release)
        self.index = SearchIndex(self.collection)

        self.predictions: ImagePredictions | None = None
        self.evaluations, self.refused = list[str](), dict[str, str]()
        made = evaluations(self.release.paths)
        for name in sorted(made, key=lambda name: (-made[name], name)):
            paths = self.release.paths.evaluation(name)
            try:
                record = read_evaluation(paths)
                if problem := evaluation_mismatch(self.release, paths, record):
                    raise IntegrityError(problem)
                if self.predictions is None and evaluation in (None, name):
                    self.predictions = ImagePredictions(self.collection, name, record)
            except IntegrityError as error:
                self.refused[name] = str(error)
            else:
                self.evaluations.append(name)
        if evaluation in self.refused:
            raise IntegrityError(self.refused[evaluation])
        if evaluation is not None and evaluation not in self.evaluations:
            known = ", ".join(self.evaluations) or "none"
            raise UsageError(f"{self.release}: no evaluation {evaluation!r}; there is {known}")

        self.tree, self.tree_missing = None, None
        try:
            if not self.release.paths.taxonomy.exists():
                require_corpus()
            self.tree = SynsetTree(self.release.taxonomy, self.collection, self.predictions)
        except SdwnError as error:
            self.tree_missing = str(error)
        self.groups: dict[str, str] = {}
        if self.predictions is not None and self.tree is not None:
            groups = self.predictions.record["groups"]
            self.groups = {group["name"]: group["wnid"] for group in groups}

    def warm(self) -> None:
        """Build search and tree in a thread, so that the first visitor need not wait."""

        def build() -> None:
            self.index.build()
            if self.tree:
                self.tree.build()
            # All this stays: to look through it for garbage made one page in fifty wait for 60 ms.
            gc.freeze()

        threading.Thread(target=build, name="warm", daemon=True).start()

    @property
    def changed(self) -> str | None:
        """A sentence for visitors if the release on disk is no longer the one that was opened."""
        now = _stamp(self.release.paths.manifest)
        if now == self._stamp:
            return None
        what = "was replaced" if now else "is gone or cannot be read"
        return f"{self.root} {what} since it was opened; start sdwn browse again"

    def find(self, name: str) -> Entry:
        """Find a synset by name, wnid, or a lemma that only one has; else UsageError."""
        return self.collection.by_wnid[self.release.find_one(name)]

    def image(self, wnid: str, number: int) -> ImageView | None:
        """Describe one image and what was predicted of it; None if there is none."""
        rows = self.collection.rows(wnid)
        found = rows[self.collection.numbers[rows] == number]
        return self.describe(int(found[0])) if len(found) else None

    def rows(self, wnid: str, show: str = "all") -> list[int]:
        """Return the rows of a synset's images by number: all, or those of ``View.show``."""
        rows = self.collection.rows(wnid)
        found: list[int] = rows[self._kinds[show][rows]].tolist()
        return found

    def images(self, wnid: str, show: str = "all") -> list[ImageView]:
        """Describe a synset's images by number: all, or those of ``View.show``."""
        return [self.describe(row) for row in self.rows(wnid, show)]

    def describe(self, row: int) -> ImageView:
        """Describe the image of a row."""
        collection = self.collection
        entry = collection.entries[collection.positions[row]]
        return ImageView(
            wnid=entry.wnid,
            synset=entry.synset,
            number=int(collection.numbers[row]),
            row=row,
            status=STATUSES[collection.statuses[row]],
            prediction=self.predictions.of_row(row) if self.predictions else None,
        )

    def samples(self, wnids: Iterable[str]) -> dict[str, ImageView]:
        """Choose an image of each synset that has any: its own, else one of a synset below it.

        A correct one before others, and a black one last.
        """
        collection, predictions, found = self.collection, self.predictions, {}
        for wnid in wnids:
            if entry := collection.entry(wnid):
                positions = np.array([entry.position])
            else:
                positions = np.flatnonzero(self.tree.below(wnid)) if self.tree else np.arange(0)
            if not len(positions):
                continue
            if predictions is not None:
                without = predictions.correct[positions] == 0
                positions = positions[np.argsort(without, kind="stable")]
            rows = collection.rows_at(int(positions[0]))
            fitness = ~collection.black[rows] * 1
            if predictions is not None:
                fitness += 2 * (predictions.rank[rows] == 0)
            found[wnid] = self.describe(int(rows[np.argmax(fitness)]))
        return found

    def first_image(self, position: int) -> ImageView:
        """Describe the first image of the synset at a position."""
        return self.describe(int(self.collection.rows_at(position)[0]))

    def tally(self, position: int) -> tuple[int, int]:
        """Count the correct images of the synset at a position, and those that have a label."""
        if self.predictions is None:
            return 0, 0
        return int(self.predictions.correct[position]), int(self.predictions.labelled[position])

    def rates(self) -> NDArray[np.float64]:
        """Return, by position, the share of images that are correct; NaN where none has a label."""
        found = np.full(len(self.collection), np.nan)
        if self.predictions is not None:
            labelled = self.predictions.labelled
            np.divide(self.predictions.correct, labelled, out=found, where=labelled > 0)
        return found

    def regenerate_command(self, synset: str) -> str | None:
        """Return the command that regenerates an image, but for its number; None for an import."""
        if self.release.manifest.settings is None:
            return None
        return command("regenerate", self.root, synset)

    def seeds_and_prompts(self, images: Sequence[ImageView]) -> list[dict[str, Any]]:
        """Return, image by image, ``seed`` and ``prompt``; None where an import has none."""
        table, names = self.release.metadata, ("seed", "prompt")
        columns = {name: table[name] for name in names if name in table.column_names}
        # Arrow's way of taking rows imports pandas where it is: half a second.
        found = ({name: column[i.row].as_py() for name, column in columns.items()} for i in images)
        return [dict.fromkeys(names) | one for one in found]

    def provenance(self, image: ImageView) -> dict[str, Any] | None:
        """Return how an image was made; None where that is not recorded, or its part is damaged."""
        if self.release.manifest.settings is None:
            return None
        try:
            return self.release.provenance(image.row)
        except (SdwnError, OSError):
            return None

    def select(self, view: View) -> ResultPage:
        """Return a page of what a view matches.

        Raises:
            BadViewError: it asks for a group, synset or class that does not exist.
        """
        collection, matches = self.collection, self._matching_synsets(view)
        mask, counts, positions = self._with_images(view, matches.positions)
        pages = max(1, math.ceil(len(positions) / PAGE))
        page = min(view.page, pages)
        shown = positions[(page - 1) * PAGE : page * PAGE].tolist()
        entries = [collection.entries[position] for position in shown]
        previews: dict[str, list[ImageView]] = {}
        for entry in entries:
            rows = collection.rows_at(entry.position)
            first = rows[mask[rows]][:PREVIEW].tolist()
            previews[entry.wnid] = [self.describe(row) for row in first]
        wanted = np.zeros(len(collection), dtype=bool)
        wanted[matches.positions] = True
        of_matches = wanted[collection.positions]
        kinds = {show: self._matching_images(replace(view, show=show)) for show in SHOWS}
        return ResultPage(
            entries=entries,
            previews=previews,
            images={entry.wnid: int(counts[entry.position]) for entry in entries},
            kinds={show: int(np.count_nonzero(of_matches & kind)) for show, kind in kinds.items()},
            total_synsets=len(positions),
            total_images=int(counts[positions].sum()),
            page=page,
            pages=pages,
            corrected=matches.corrected,
        )

    def all_images(self, view: View) -> Iterator[ImageView]:
        """Return all images that a view matches, on whichever page, synset by synset in order.

        Raises:
            BadViewError: as in `select`; at once, before the first is taken.
        """
        mask, _, positions = self._with_images(view, self._matching_synsets(view).positions)
        return (
            self.describe(row)
            for position in positions.tolist()
            for row in self.collection.rows_at(position).tolist()
            if mask[row]
        )

    def _matching_synsets(self, view: View) -> Matches:
        """Find the synsets of a view's words, group and classes, whatever images they have."""
        fits = np.ones(len(self.collection), dtype=bool)
        if view.imagenet:
            fits &= self.collection.in_imagenet
        if view.group is not None and view.group not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise BadViewError(f"group={view.group!r}: no such group; there is {known}")
        if view.group is not None:
            fits &= self._below(self.groups[view.group], f"group={view.group}")
        if view.below is not None:
            fits &= self._below(view.below, f"below={view.below}")
        found = self.index.search(view.q)
        return Matches(found.positions[fits[found.positions]], found.corrected)

    def _below(self, wnid: str, parameter: str) -> Mask:
        if self.tree is None:
            raise BadViewError(f"{parameter}: {self.tree_missing}")
        return self.tree.below(wnid)

    @cached_property
    def _kinds(self) -> dict[str, Mask]:
        """The images of each ``View.show``, by row; a page takes all of them several times."""
        black, predictions = self.collection.black, self.predictions
        rank = np.full(len(black), NONE) if predictions is None else predictions.rank
        return {
            "all": np.ones(len(black), dtype=bool),
            "right": rank == 0,
            "wrong": rank > 0,
            "unjudged": rank == NONE,
            "black": black,
            "ok": ~black,
        }

    def _matching_images(self, view: View) -> Mask:
        """Return, by row, which images a view's kind and predicted class take."""
        mask = self._kinds[view.show]
        if view.seen is None:
            return mask
        if view.seen not in class_index():
            raise BadViewError(f"seen={view.seen}: expected a class of ImageNet-1k")
        if self.predictions is None:
            raise BadViewError(f"seen={view.seen}: not known without an evaluation")
        return mask & self.predictions.classified_as(view.seen)

    def _with_images(
        self, view: View, positions: NDArray[np.int64]
    ) -> tuple[Mask, NDArray[np.int64], NDArray[np.int64]]:
        """Return which rows match a view, how many by position, and synsets with any, in order."""
        mask = self._matching_images(view)
        counts = self.collection.count(mask)
        found = positions[counts[positions] > 0]
        if view.order == "name":
            found = np.sort(found)
        elif view.order == "images":
            found = found[np.argsort(-np.diff(self.collection.starts)[found], kind="stable")]
        elif view.order == "shuffled":
            shuffled = np.random.default_rng(0).permutation(len(self.collection))
            found = found[np.argsort(shuffled[found])]
        elif view.order in ("rate", "-rate"):
            rates = self.rates()[found] * (-1 if view.order == "-rate" else 1)
            # What has no label, NaN, is last either way.
            found = found[np.argsort(rates, kind="stable")]
        return mask, counts, found


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns

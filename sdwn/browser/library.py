"""A release open for browsing, views of it, which are addresses, and two side by side."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from sdwn.browser.collection import (
    NONE,
    Collection,
    Entry,
    ImagePredictions,
    ImageView,
    Mask,
    Node,
    Rows,
    SearchIndex,
    SynsetTree,
)
from sdwn.errors import IntegrityError, SdwnError, UsageError, command, first_line
from sdwn.evaluation.record import as_recorded, evaluations, read_evaluation
from sdwn.measures.distances import NeighbourIndex
from sdwn.measures.record import FLOAT, SCORES, score_table
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import Concept
from sdwn.prediction.table import feature_names, open_features
from sdwn.releases.release import Release
from sdwn.storage.columns import numbers
from sdwn.wordnet.corpus import require_corpus

# Which images: the word in addresses, and that on pages: a sign and a word, never a colour alone.
KINDS = {
    "all": "all",
    "right": "✓ correct",
    "wrong": "✗ incorrect",
    "black": "■ black",
    "ok": "not black",
    "unjudged": "no ImageNet class",
    "duplicates": "≈ duplicates",
}
# Orders of concepts: the word in addresses; that on pages, the values (`Library.values`) that they
# go by, and whether the largest is first. Images of a concept go by the same score.
ORDERS: dict[str, tuple[str, str | None, bool]] = {
    "best": ("best match", None, False),
    "name": ("name", "name", False),
    "-rate": ("most correct first", "correct", True),
    "rate": ("least correct first", "correct", False),
    "images": ("most images first", "images", True),
    "shuffled": ("shuffled", "shuffled", False),
}
ORDERS |= {
    f"{sign}{one.name}": (f"{which} first: {one.label}", one.name, sign == "-")
    for one in SCORES.values()
    for sign, which in (("-", "highest"), ("", "lowest"))
    if one.name != "correct"
}
# Words in a search; longer texts than any name are cut.
Text = Annotated[str, BeforeValidator(lambda text: " ".join(text[:200].split()))]
_NUMBER = r"-?[0-9]{0,9}\.?[0-9]{1,9}(e[-+]?[0-9]{1,2})?"
# Of a score: yes, no, or from one number to below another; either may be left out.
Span = Annotated[str, Field(pattern=rf"^(yes|no|({_NUMBER})?\.\.({_NUMBER})?)$")]


class View(BaseModel, frozen=True, extra="allow"):
    """A view of a release: the parameters of an address; more are spans of each of `SCORES`."""

    __pydantic_extra__: dict[str, Span] = Field(init=False)
    q: Text = ""  # words to search for
    show: Annotated[str, Field(pattern=f"^({'|'.join(KINDS)})$")] = "all"
    group: Text | None = None
    imagenet: bool = False  # ImageNet-1k classes alone
    below: Annotated[str, Field(pattern="^n[0-9]{8}$")] | None = None
    seen: Text | None = None  # the class that images were classified as
    # Of concepts and their images.
    order: Annotated[str, Field(pattern=f"^({'|'.join(ORDERS)})$")] = "best"
    # The score whose spans are offered.
    by: Annotated[str, Field(pattern=f"^({'|'.join(SCORES)})$")] | None = None
    similar: Text | None = None  # the features by which an image's page shows similar ones
    page: Annotated[int, Field(ge=1, lt=10**9)] = 1

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> View:
        """Read a view from an address's parameters; others, and empty ones, are ignored."""
        names = {*cls.model_fields, *SCORES}
        given = {name: value for name, value in params.items() if value and name in names}
        # As the form of a score gives its span.
        least, most = (params.get(name, "") for name in ("least", "most"))
        if given.get("by") in SCORES and (least or most):
            given[given["by"]] = f"{least}..{most}"
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise UsageError(first_line(error)[:150]) from None

    def parameters(self, **changes: Any) -> dict[str, Any]:
        """Return what is not the default, for an address; changes lead to the first page."""
        view = self.model_copy(update={"page": 1, **changes} if changes else {})
        found = view.model_dump(exclude_defaults=True, exclude_none=True)
        return {name: 1 if value is True else value for name, value in found.items()}

    @property
    def of_images(self) -> dict[str, Any]:
        """The parameters that say which images of a concept are shown, and in what order."""
        order = self.order if ORDERS[self.order][1] in SCORES else "best"
        return {"show": self.show, "order": order, **self.__pydantic_extra__}


# --- A release -----------------------------------------------------------------------------------
# Concepts on a page, images of each, and hypernyms that a search offers.
PAGE, PREVIEW, OFFERED = 48, 4, 3
# Images that an image's page shows beside it: similar ones, and duplicates.
BESIDE = 24


@dataclass(frozen=True, slots=True)
class ResultPage:
    """A page of a search, the last if there are fewer than the view asks for."""

    hits: list[tuple[Entry, int, list[ImageView]]]  # how many images match, and the first of them
    kinds: dict[str, int]  # how many each ``View.show`` would match, the rest of the view as it is
    spans: dict[str, int]  # how many each span of the score ``View.by`` would
    total_concepts: int
    total_images: int
    page: int
    pages: int
    corrected: str | None  # what was searched for instead of the view's words
    hypernyms: Sequence[Node]  # what the words name in WordNet that has concepts below it


class Library:
    """A release open for browsing; nothing of it is written, and threads may share it.

    Without a name of an evaluation, the newest is shown; ``refused`` are those that cannot be.
    """

    def __init__(self, root: str | Path, evaluation: str | None = None) -> None:
        self.release = Release(root)
        manifest = self.release.manifest
        self.name, self.root = manifest.name, str(self.release.paths.root)
        self.model = manifest.settings["model"]["name"] if manifest.settings else None
        self.collection = Collection(self.release)
        pa.default_memory_pool().release_unused()  # of reading it

        self.predictions: ImagePredictions | None = None
        self.evaluations, self.refused = list[str](), dict[str, str]()
        for name in evaluations(self.release.paths):
            paths = self.release.paths.evaluation(name)
            try:
                record = read_evaluation(self.release, paths)
                if self.predictions is None and evaluation in (None, name):
                    with as_recorded(paths.evaluation):
                        self.predictions = ImagePredictions(self.collection, name, record)
                self.evaluations.append(name)
            except IntegrityError as error:
                self.refused[name] = str(error)
        if evaluation in self.refused:
            raise IntegrityError(self.refused[evaluation])
        if evaluation is not None and evaluation not in self.evaluations:
            known = ", ".join(self.evaluations) or "none"
            raise UsageError(f"{self.release}: no evaluation {evaluation!r}; there is {known}")
        self.rank = self.predictions.rank if self.predictions else np.full(len(self.release), NONE)

        self.tree_missing: str | None = None
        try:
            if self.release.has_tree and not self.release.paths.taxonomy.exists():
                require_corpus()
            self._taxonomy = self.release.taxonomy
        except SdwnError as error:
            self.tree_missing = str(error)
        self.groups = self.predictions.groups if self.predictions and not self.tree_missing else {}
        # In place of a score that there is not.
        self._unknown = np.broadcast_to(np.float32(np.nan), len(self.collection.numbers))
        self.features = feature_names(self.release.paths)
        # As large as the features: only those of the last search by similarity are kept.
        self._neighbours = lru_cache(1)(
            lambda name: NeighbourIndex(open_features(self.release, name).vectors)
        )
        self._opening = threading.Lock()

    @cached_property
    def index(self) -> SearchIndex:
        """The search, built at the first use in a fraction of a second."""
        return SearchIndex(self.collection)

    @cached_property
    def tree(self) -> SynsetTree | None:
        """WordNet above the synsets, built at the first use; None where there is neither."""
        return None if self.tree_missing else SynsetTree(self._taxonomy, self.collection, self.rank)

    @cached_property
    def scores(self) -> dict[str, NDArray[np.float32]]:
        """The scores that images have here, by row, read at the first use; NaN where unknown."""
        table = score_table(self.release, predicted=False)
        found = {name: numbers(table[name].cast(FLOAT), np.nan) for name in SCORES}
        found |= self.predictions.scores if self.predictions else {}
        return {name: values for name, values in found.items() if not np.isnan(values).all()}

    def warm(self) -> None:
        """Build search and tree in a thread, and read scores: the first visitor need not wait."""
        threading.Thread(target=lambda: (self.index, self.tree, self.scores), daemon=True).start()

    def image(self, id_: str, number: int) -> ImageView | None:
        """Describe one image and what was predicted of it; None if there is none."""
        rows = self.collection.rows(self.collection.by_id[id_])
        found = rows[self.collection.numbers[rows] == number].tolist()
        return self.describe(found[0]) if found else None

    def rows(self, id_: str, view: View | None = None) -> list[int]:
        """Return the rows of a concept's images: all by number, or those of a view in its order."""
        view = view or View()
        mask = self._kinds[view.show] & self._within(view.__pydantic_extra__)
        return self._in_order(self.collection.by_id[id_], mask, view)

    def images(self, id_: str, view: View | None = None) -> list[ImageView]:
        """Describe a concept's images: all by number, or those of a view in its order."""
        return [self.describe(row) for row in self.rows(id_, view)]

    def scores_of(self, row: int) -> dict[str, Any]:
        """Return the scores that the image of a row has, by name; truth values as yes and no."""
        found = dict[str, Any]()
        for name, scores in self.scores.items():
            if not math.isnan(value := round(float(scores[row]), 6)):
                kinds = {pa.bool_(): "yes" if value else "no", pa.int32(): int(value)}
                found[name] = kinds.get(SCORES[name].type, value)
        return found

    def similar(self, row: int, features: str) -> list[tuple[ImageView, float]]:
        """Find the images most like one by these features, with their similarities."""
        with self._opening:
            index = self._neighbours(features)
            pa.default_memory_pool().release_unused()  # of reading them
        rows, similarities = index.search(index.vectors[row : row + 1], BESIDE + 1)
        found = zip(rows[0].tolist(), similarities[0].tolist(), strict=True)
        return [(self.describe(other), similarity) for other, similarity in found if other != row]

    def duplicates(self, row: int) -> list[tuple[ImageView, None]]:
        """Describe the first of the other images of its group of duplicates."""
        groups = self.scores.get("duplicate_group", self._unknown)
        others = (one for one in np.flatnonzero(groups == groups[row]).tolist() if one != row)
        return [(self.describe(one), None) for one in islice(others, BESIDE)]

    def describe(self, row: int) -> ImageView:
        """Describe the image of a row."""
        return ImageView(
            entry=self.collection.entries[self.collection.positions[row]],
            number=int(self.collection.numbers[row]),
            row=int(row),
            status=str(self.collection.statuses[row]),
            **(self.predictions.of_row(row) if self.predictions else {}),
        )

    def samples(self, wnids: Iterable[str]) -> dict[str, ImageView]:
        """Choose an image at or below each synset: a correct one, else one that is not black."""
        found, fitness = {}, 2 * self._kinds["right"] + self._kinds["ok"]
        for wnid in wnids:
            own = self.collection.by_wnid.get(wnid, [])
            if not own and self.tree:
                own = [self.collection.entries[np.argmax(self.tree.below(wnid))]]
            if len(rows := self.collection.rows(*own)):
                found[wnid] = self.describe(int(rows[np.argmax(fitness[rows])]))
        return found

    def path(self, entry: Entry) -> list[Node]:
        """Return the nodes of WordNet's tree from its root down to a concept."""
        wnid = entry.concept.wnid
        return self.tree.path(wnid) if self.tree and wnid else []

    def tally(self, entry: Entry) -> tuple[int, int]:
        """Count the correct images of a concept, and those that have a label."""
        rank = self.rank[self.collection.rows(entry)]
        return int(np.count_nonzero(rank == 0)), int(np.count_nonzero(rank >= 0))

    def values(self, name: str) -> NDArray[np.float64]:
        """Return values of concepts, by position: of a score, their images' mean, or NaN."""
        collection, count = self.collection, len(self.collection)
        drawn = np.random.default_rng(0).permutation(count)
        found = {"name": np.arange(count), "images": np.diff(collection.starts), "shuffled": drawn}
        if name in found:
            return found[name].astype(float)
        known = ~np.isnan(scores := self.scores.get(name, self._unknown))
        sums = np.bincount(collection.positions[known], scores[known], count)
        with np.errstate(invalid="ignore"):  # of a concept without the score
            return sums / collection.count(known)

    def regenerate_command(self, concept: Concept) -> str | None:
        """Return the command that regenerates an image, but for its number; None for an import."""
        name = concept.name if concept.id == concept.wnid else concept.id
        return command("regenerate", self.root, name) if self.model is not None else None

    def seeds_and_prompts(self, images: Sequence[ImageView]) -> list[dict[str, Any]]:
        """Return, image by image, ``seed`` and ``prompt``; None where an import has none."""
        table, known = self.release.metadata, set(self.release.metadata.column_names)
        names = {name: table[name] if name in known else None for name in ("seed", "prompt")}
        # Arrow's way of taking rows imports pandas where it is: half a second.
        return [{n: c and c[one.row].as_py() for n, c in names.items()} for one in images]

    def select(self, view: View) -> ResultPage:
        """Return a page of what a view matches."""
        seen, positions, corrected = self._match(view)
        mask, collection = seen & self._kinds[view.show], self.collection
        counts, pages = collection.count(mask), max(1, math.ceil(len(positions) / PAGE))
        page, words = min(view.page, pages), filter(None, (view.q, corrected))
        hits, named = [], (self.tree.named(one) for one in words if self.tree)
        for position in positions[(page - 1) * PAGE : page * PAGE]:
            first = self._in_order(entry := collection.entries[position], mask, view)[:PREVIEW]
            hits.append((entry, int(counts[position]), list(map(self.describe, first))))
        return ResultPage(
            hits=hits,
            kinds={show: int(np.count_nonzero(seen & kind)) for show, kind in self._kinds.items()},
            spans=self._spans(view),
            total_concepts=len(positions),
            total_images=int(counts.sum()),
            page=page,
            pages=pages,
            corrected=corrected,
            hypernyms=next(filter(None, named), [])[:OFFERED],
        )

    def all_images(self, view: View) -> Iterator[ImageView]:
        """Return all images that a view matches, by concept in order; errors as in `select`."""
        seen, positions, _ = self._match(view)
        mask = seen & self._kinds[view.show]
        entries = (self.collection.entries[position] for position in positions.tolist())
        return (self.describe(row) for one in entries for row in self._in_order(one, mask, view))

    def _in_order(self, entry: Entry, mask: Mask, view: View) -> list[int]:
        """Sort a concept's rows of a mask by the score that a view orders by, then by number."""
        rows = self.collection.rows(entry)
        rows, (_, score, largest_first) = rows[mask[rows]], ORDERS[view.order]
        if score in self.scores:
            values = self.scores[score][rows] * (-1 if largest_first else 1)
            rows = rows[np.argsort(values, kind="stable")]
        found: list[int] = rows.tolist()
        return found

    def _within(self, spans: Mapping[str, str]) -> Mask:
        """Return which images are in all these spans of scores, by row."""
        found = np.ones(len(self.release), dtype=bool)
        for name, span in spans.items():
            if (values := self.scores.get(name)) is None:
                known = ", ".join(self.scores) or "none"
                raise UsageError(f"{name}={span}: no such score of these images; there is {known}")
            least, _, most = {"yes": "1..", "no": "..1"}.get(span, span).partition("..")
            found &= (values >= float(least or "-inf")) & (values < float(most or "inf"))
        return found

    def _spans(self, view: View) -> dict[str, int]:
        """Count images by spans of the score ``View.by``, cut at some of its percentiles."""
        if view.by not in self.scores:
            return {}
        spans = ["yes", "no"] if SCORES[view.by].type == pa.bool_() else [".."]
        if SCORES[view.by].type == FLOAT:
            ends = np.nanpercentile(self.scores[view.by], (1, 10, 25, 50, 75, 90, 99))
            rounded = (f"{end:g}" for end in sorted({float(f"{end:.3g}") for end in ends}))
            spans = ["..".join(pair) for pair in pairwise(["", *rounded, ""])]
        fits = self._match(view.model_copy(update={view.by: ".."}))[0] & self._kinds[view.show]
        return {one: int(np.count_nonzero(fits & self._within({view.by: one}))) for one in spans}

    def _match(self, view: View) -> tuple[Mask, Rows, str | None]:
        """Find the rows of a view but for ``show``; its concepts in order; the correction."""
        collection, fits = self.collection, np.ones(len(self.collection), dtype=bool)
        if view.imagenet:
            fits &= [entry.concept.imagenet_class is not None for entry in collection.entries]
        if view.group is not None and view.group not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise UsageError(f"group={view.group!r}: no such group; there is {known}")
        for wnid in filter(None, (view.group and self.groups[view.group], view.below)):
            if self.tree is None:
                raise UsageError(f"below={wnid}: {self.tree_missing}")
            fits &= self.tree.below(wnid)
        positions, corrected = self.index.search(view.q)
        positions = positions[fits[positions]]
        wanted = np.zeros(len(collection), dtype=bool)
        wanted[positions] = True
        seen: Mask = wanted[collection.positions]
        if view.seen is not None:
            if self.predictions is None or view.seen not in self.predictions.classes:
                raise UsageError(f"seen={view.seen}: expected a class that is evaluated")
            seen &= self.predictions.best == self.predictions.classes.index(view.seen)
        seen &= self._within(view.__pydantic_extra__)
        positions = positions[collection.count(seen & self._kinds[view.show])[positions] > 0]
        _, score, largest_first = ORDERS[view.order]
        if score is not None:
            values = self.values(score)[positions] * (-1 if largest_first else 1)
            positions = positions[np.argsort(values, kind="stable")]
        return seen, positions, corrected

    @cached_property
    def _kinds(self) -> dict[str, Mask]:
        """The images of each of `KINDS`, by row; a page takes all of them several times."""
        black, rank = self.collection.black, self.rank
        every = np.ones(len(black), dtype=bool)
        groups = self.scores.get("duplicate_group", self._unknown)
        masks = (every, rank == 0, rank > 0, black, ~black, rank < 0, ~np.isnan(groups))
        return dict(zip(KINDS, masks, strict=True))


# --- Two releases ------------------------------------------------------------------------------
class SideBySide:
    """The concepts that two releases have; threads may share it."""

    def __init__(self, here: Library, there: Library) -> None:
        self._sides, others = (here, there), there.collection.by_id
        self.entries = [entry for entry in here.collection.entries if entry.id in others]
        self.index = {entry.id: index for index, entry in enumerate(self.entries)}
        both = [(entry.position, others[entry.id].position) for entry in self.entries]
        sides = zip(self._sides, np.array(both, np.int64).reshape(-1, 2).T, strict=True)
        self._rates = np.array([side.values("correct")[positions] for side, positions in sides])
        self._changes = change = self._rates[1] - self._rates[0]
        # As in the report: those that gained, those that lost, the largest change of each first;
        # then equal ones, and NaN, where a side has no rate.
        kind = np.select([change > 0, change < 0, change == 0], [0, 1, 2], 3)
        self.order = np.lexsort((-np.abs(change), kind)).tolist()
        # Better in the second, worse, and equal.
        self.counts = [int(np.count_nonzero(kind == one)) for one in range(3)]
        self.only_here, self.only_there = (len(one.collection) - len(both) for one in self._sides)
        names = [ReleasePaths(Path(side.root).resolve()).name for side in self._sides]
        self.names = names if names[0] != names[1] else [here.root, there.root]

    @cached_property
    def verdict(self) -> tuple[str, str]:
        """Headline and figures, as in a comparison's report; or names, and why there are none."""
        from sdwn.reports.comparison import CLASSIFIER, difference, pair_in_words

        both = " and ".join(self.names)
        records = [one.predictions.record if one.predictions else {} for one in self._sides]
        one, other = (record.get("classifier", {}) for record in records)
        if not one or any(one.get(key) != other.get(key) for key in CLASSIFIER):
            by = " and by ".join(record.get("model", "none") for record in (one, other))
            return both, f"they are classified by {by}; evaluate both by the same model and weights"
        if not sum(self.counts):
            return both, "they have no class in common"
        pair = dict(zip(("first", "second"), self.names, strict=True))
        rates = self._rates[:, ~np.isnan(self._changes)]
        means = rates.mean(axis=1).tolist()
        return pair_in_words({**pair, "rates": means, "rate": difference(*rates)})

    def pair(self, index: int) -> dict[str, Any]:
        """Describe a concept of both: of each side its first image and tally; and the change."""
        id_, change = self.entries[index].id, float(self._changes[index])
        at = [(side, side.collection.by_id[id_]) for side in self._sides]
        return {
            "entry": self.entries[index],
            "images": [side.describe(side.collection.rows(one)[0]) for side, one in at],
            "tallies": [side.tally(one) for side, one in at],
            "change": None if math.isnan(change) else change,
        }

    def images(self, id_: str) -> list[tuple[ImageView | None, ImageView | None]]:
        """Return the images of a concept in both by number; None where a side lacks one."""
        here, there = ({one.number: one for one in side.images(id_)} for side in self._sides)
        return [(here.get(n), there.get(n)) for n in sorted(here.keys() | there.keys())]

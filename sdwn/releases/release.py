"""A release, open for reading: its manifest, images, their records, and subsets of them."""

from __future__ import annotations

import csv
import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pydantic import Field

from sdwn import io
from sdwn.config import Record, RunConfig, validated
from sdwn.errors import IntegrityError, SdwnError, UsageError, command, some
from sdwn.models.builtin import notice
from sdwn.paths import ReleasePaths
from sdwn.planning.plan import Concept, Plan, parse_table
from sdwn.planning.tables import SCHEMA, as_table, concept_rows
from sdwn.storage.columns import COLUMNS, STATUSES, VERSION_1, numbers, read_parquet
from sdwn.storage.images import Pixels, decode
from sdwn.storage.shards import ImageFile
from sdwn.wordnet.corpus import class_wnids
from sdwn.wordnet.taxonomy import Taxonomy, open_taxonomy


def _upgrade_manifest(found: dict[str, Any]) -> dict[str, Any]:
    """Turn a manifest of version 1, of one plan or of an import, into one of version 2."""
    content = {**found, "concepts": found.get("synsets"), "plans": []}
    content["retried_fp32"] = found.get("redone")
    if found.get("plan_digest") is not None:
        plan = {name: found.get(name) for name in ("catalog", "settings", "images")}
        content["plans"] = [{**plan, "digest": found["plan_digest"], "concepts": "synsets.csv"}]
    if isinstance(missing := found.get("missing"), dict):
        content["missing"] = {**missing, "concepts": missing.get("synsets")}
    return content


_REMEDY = "if it is damaged, copy it again; if it is newer, upgrade sdwn"
MANIFEST = io.Format("sdwn-release", 2, _REMEDY, {1: _upgrade_manifest})
_NAME = pa.dictionary(pa.int32(), pa.string())
# The columns of the metadata that every release has, with their types.
METADATA = {
    **dict.fromkeys(("id", "label", "wnid", "synset", "status", "codec", "sha256"), pa.string()),
    **dict.fromkeys(("number", "row", "bytes", "width", "height"), pa.uint32()),
    **dict.fromkeys(("part", "plan"), _NAME),
    "offset": pa.uint64(),
    "imagenet_class": pa.int16(),
}
# Those that are empty for what is no synset, no ImageNet class, or, as an import, of no plan.
_OPTIONAL = ("wnid", "synset", "imagenet_class", "plan")
# The columns that finding and decoding an image needs; the rest of a record is read on demand.
LOCATION = ("part", "offset", "bytes", "codec", "width", "height", "sha256")
# Those that have a meaning only inside a release.
INNER_COLUMNS = {"plan", "part", "row", "offset", "bytes", "codec", "task_run"}

Count = Annotated[int, Field(ge=0, lt=2**63)]
Row = Mapping[str, Any]
# Of a subset: its rows in the release's table, in their order, and which these are, in words; and
# the names of a classifier's own classes.
View = tuple[NDArray[np.int64] | None, tuple[str, ...], tuple[str, ...]]


class FileRecord(Record):
    """A file of a release."""

    file: str
    bytes: Count
    sha256: str


class Missing(Record):
    """The part of the plan that a release lacks; ``missing.csv`` lists its concepts."""

    shards: str
    concepts: Count
    images: Count


class ReleasePlan(Record):
    """A plan that a release's images were made by; ``concepts`` is the file of its table."""

    digest: str
    catalog: str
    settings: dict[str, Any]  # those that decide its images
    concepts: str
    images: Count  # of it, in this release


class Manifest(Record):
    """The content of a release and its origin; entries that a later sdwn adds are ignored."""

    format: str = MANIFEST.name
    format_version: int = MANIFEST.version
    sdwn: str
    created: str
    origin: str  # run or import
    catalog: str
    source: str | None = None  # of an import: where the images are from,
    licence: str | None = None  # and their licence, as its user gave both
    selection: str | None = None  # which part of a larger release this is, in words
    plans: list[ReleasePlan]  # in the order of their parts; none of an import
    images: Count
    concepts: Count  # those that have images
    imagenet_classes: Count
    statuses: dict[str, Count]  # images by status
    truncated: Count | None = None  # images with a prompt that was cut; None where it is not known
    retried_fp32: Count | None = None  # images sampled again so; None where it is not known
    missing: Missing | None  # what the run had not made
    skipped: Count  # files that an import could not take, which skipped.csv lists
    bytes: Count
    evaluation: dict[str, Any] | None = None  # the settings that the run's config has for it
    energy_joules: float | None = None  # what the cards took; None where not every task run told it
    device_seconds: float | None = None  # what they held their devices for; None as above
    made_on: list[dict[str, Any]]  # the number of task runs by model, device and versions
    files: list[FileRecord]

    @property
    def plan_digest(self) -> str | None:
        """The digest of the last plan; None for an import."""
        return self.plans[-1].digest if self.plans else None

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings of the last plan; None for an import."""
        return self.plans[-1].settings if self.plans else None

    @property
    def name(self) -> str:
        """The catalog and the part of it, in words; for all of it, the catalog's name alone."""
        name = f"{self.catalog} ({self.selection})" if self.selection else self.catalog
        return f"{name}, incomplete" if self.missing else name

    @property
    def most_rows(self) -> int:
        """The most rows that a table of the release is read with."""
        # More than images, so that a manifest that counts wrongly is reported as such.
        return 2 * self.images + 1000

    def sums(self, digest: str) -> str:
        """Return all files' checksums, its own ``digest`` too, as ``sha256sum -c`` reads them."""
        sums = {one.file: one.sha256 for one in self.files} | {"manifest.json": digest}
        return "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())

    @property
    def notice(self) -> str | None:
        """The note on images of a built-in model, in a sentence or two."""
        return notice(self.settings["model"]["name"]) if self.settings is not None else None


class Release:
    """A finished release, open for reading; or some of its images, see :meth:`subset`.

    It can be pickled, and each process opens its own files. ``manifest`` is of the whole release;
    ``selection`` says in words which images a subset has.
    """

    def __init__(self, root: str | Path, *, _view: View = (None, (), ())) -> None:
        # Absolute, for the process may change its folder before it reads.
        self.paths = ReleasePaths(Path(root).absolute())
        path = self.paths.manifest
        if not path.is_file():
            inside = ReleasePaths(self.paths.root / "release")
            make = f"make one with: {command('merge', 'RUN', '--release', root)}"
            advice = f"did you mean {inside.root}?" if inside.manifest.exists() else make
            raise SdwnError(f"{root}: no release here; {advice}")
        io.refuse_links(path)
        with MANIFEST.reading(path) as content:
            self.manifest = Manifest.model_validate(content)
        self._chosen, self.selection, self._classes = _view
        self._files: dict[str, BinaryIO] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        view = self._chosen, self.selection, self._classes
        return partial(type(self), _view=view), (str(self.paths.root),)

    def __str__(self) -> str:
        return ", ".join((str(self.paths.root), *self.selection))

    def __len__(self) -> int:
        return len(self.metadata if self._chosen is None else self._chosen)

    @cached_property
    def metadata(self) -> pa.Table:
        """The table with a row an image, in the order of the parts; ``to_pandas()`` turns it."""
        path = self.paths.metadata
        io.refuse_links(path)
        table = read_parquet(path, self.manifest.most_rows)
        with io.reading(path):
            if "id" not in table.column_names and self._first_version:
                table = self._upgrade_metadata(table)
            for name, kind in METADATA.items():
                fits = table.column_names.count(name) == 1 and table[name].type == kind
                if not fits or (table[name].null_count and name not in _OPTIONAL):
                    raise ValueError(f"{name}: expected {kind} of each image")
        table = table if self._chosen is None else table.take(pa.array(self._chosen))
        return label_rows(table, self._classes) if self._classes else table

    @property
    def _first_version(self) -> bool:
        return any(one.file == self.paths.synsets.name for one in self.manifest.files)

    def _upgrade_metadata(self, table: pa.Table) -> pa.Table:
        """Turn metadata of version 1 into that of version 2: the ids are wnids."""
        ids, (known,) = table["wnid"], self.concept_tables
        labels = known["label"].take(pc.index_in(ids, known["id"].combine_chunks()))
        found = {"id": ids, "label": pc.fill_null(labels, "")}
        plans = pa.array([self.manifest.plan_digest] * len(table), pa.string())
        found["plan"] = plans.dictionary_encode()
        if (settings := self.manifest.settings) is not None:  # one prompt a synset
            negative = settings["generation"]["negative_prompt"] or ""
            found["prompt_number"] = pa.array(np.zeros(len(table), "u4"))
            found["negative_prompt"] = pa.array([negative] * len(table))
        now = {old: name for name, old in VERSION_1.items() if name != "id"}
        names = [now.get(name, name) for name in table.column_names]
        return pa.table({**found, **dict(zip(names, table.columns, strict=True))})

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which names every other file's."""
        return io.file_sha256(self.paths.manifest)

    @cached_property
    def concepts(self) -> dict[str, Concept]:
        """All concepts of the plans by id, also those that this release has no images of."""
        found = dict[str, Concept]()
        for one in chain(*map(concept_rows, self.concept_tables)):
            before = found.setdefault(one.id, one)
            if before is not one:  # a later plan makes further images of it
                stop = max(each.first_image + each.images for each in (before, one))
                found[one.id] = replace(before, images=stop - before.first_image)
        return found

    @cached_property
    def concept_tables(self) -> list[pa.Table]:
        """The concepts of each plan, or of an import, with the user's own columns."""
        if self._first_version:
            path, settings = self.part(self.paths.synsets.name), self.manifest.settings or {}
            with io.reading(path):
                text = io.read_whole(path, io.TABLE_BYTES).decode()
                return [as_table(parse_table(text, settings.get("images_per_synset", 0)))]
        found = list[pa.Table]()
        for name in [one.concepts for one in self.manifest.plans] or [self.paths.concepts(0).name]:
            path = self.part(name)
            found.append(read_parquet(path, 10_000_000, io.TABLE_BYTES // 10_000_000))
            if list(found[-1].schema)[: len(SCHEMA)] != list(SCHEMA):
                raise IntegrityError(f"{path}: damaged: expected the columns of a plan's concepts")
        return found

    def plan(self, digest: str) -> Plan:
        """Return a plan of the release exactly as it was, to regenerate its images."""
        for found, table in zip(self.manifest.plans, self.concept_tables, strict=True):
            if found.digest == digest:
                # The catalog is not read again: its concepts are here.
                kind = "name" if found.settings.get("prompt", "") is not None else "table"
                settings = {**found.settings, "catalog": {kind: found.catalog}}
                config = validated(RunConfig, settings, source=str(self.paths.manifest))
                return Plan(found.catalog, config, concept_rows(table), digest)
        raise IntegrityError(f"{self.paths.manifest}: lists no plan {digest[:12]}")

    @property
    def missing(self) -> list[Concept]:
        """The concepts that its runs had not made, with how many of their images are missing."""
        path, found = self.part(self.paths.missing.name), list[Concept]()
        with io.reading(path):
            text = io.read_whole(path, io.TABLE_BYTES).decode() if self.manifest.missing else ""
            for id_, _, *count in list(csv.reader(StringIO(text, newline="")))[1:]:
                # A quote stands before an id that a spreadsheet would work out.
                one = self.concepts.get(id_) or self.concepts[id_[1:]]
                # Version 1 did not count: whole synsets were missing.
                found.append(replace(one, images=int(count[0])) if count else one)
        return found

    @property
    def present(self) -> list[Concept]:
        """The concepts that have images here."""
        return [row for id_, row in self.concepts.items() if id_ in self._ids]

    @property
    def user_columns(self) -> list[str]:
        """The columns of the user's own table, which every image's record has."""
        return user_columns(self.metadata.column_names)

    @cached_property
    def has_tree(self) -> bool:
        """True if some concept is a synset, or of one: then there is WordNet's tree above them."""
        return not self._classes and any(len(t) > t["wnid"].null_count for t in self.concept_tables)

    @property
    def classes(self) -> tuple[str, ...]:
        """The wnids of ImageNet-1k in class order, or what `labelled_by` has in their place."""
        return self._classes or class_wnids()

    @cached_property
    def unit(self) -> str:
        """The word for its concepts: ``synset`` where all are, else ``concept``."""
        synsets = all(table["id"].equals(table["wnid"]) for table in self.concept_tables)
        return "synset" if synsets else "concept"

    @cached_property
    def taxonomy(self) -> Taxonomy:
        """WordNet's records of the synsets, ImageNet's classes, and all that is above both."""
        if not self.has_tree:
            raise UsageError(f"{self.paths.root}: none of its concepts is of a synset")
        io.refuse_links(self.paths.taxonomy)
        return open_taxonomy(self.paths.taxonomy)

    def row(self, index: int) -> dict[str, Any]:
        """Read an image's record."""
        return dict(self.metadata.slice(self._index(index), 1).to_pylist()[0])

    def location(self, index: int) -> dict[str, Any]:
        """Read the part of a record that :meth:`image` needs, ten times faster than all of it."""
        position = self._index(index)
        return {name: values[position].as_py() for name, values in self._locations.items()}

    def find(self, name: str) -> NDArray[np.int64]:
        """Find the indices of the images of each concept of this id, label, synset, wnid or lemma.

        Case does not matter in labels and lemmas, nor whether their words are joined by ``_``.
        """
        ids, by_name = [name], {}
        if name not in self._ids:
            by_name = self._ids_by_name
            ids = by_name.get(io.canonical(name)) or by_name.get(_plain(name), [])
        if not self._ids.isdisjoint(ids):
            return self._find_rows(ids)
        if ids:
            raise UsageError(f"{self}: no image of {name} here")
        close = difflib.get_close_matches(_plain(name), by_name, n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UsageError(f"{self}: {name!r} is no id, label, synset or lemma here{meant}")

    def find_one(self, name: str) -> str:
        """Find the id of the one concept that a name can mean, see :meth:`find`."""
        ids = self.metadata["id"].take(pa.array(self.find(name))).unique().to_pylist()
        if len(ids) > 1:
            rows = [self.concepts[id_] for id_ in ids[:5]]
            names = sorted(str(row.synset) if row.id == row.wnid else row.id for row in rows)
            found = some(names, len(rows), len(ids))
            raise UsageError(f"{name!r} is ambiguous: {found}; give one of these")
        return str(ids[0])

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read the records of a concept's images, found as in :meth:`find`."""
        return list(self.metadata.take(pa.array(self.find(name))).to_pylist())

    def image(self, which: int | Row) -> Image.Image:
        """Decode an image to RGB, by index or by its record."""
        row = which if isinstance(which, Mapping) else self.location(which)
        try:
            return decode(self.payload(row), row["codec"], row["width"], row["height"])
        except IntegrityError as error:
            whole = which if isinstance(which, Mapping) else self.row(which)
            raise IntegrityError(f"{image_name(whole)}: {error}") from None

    def array(self, which: int | Row) -> Pixels:
        """Decode an image to uint8 of shape (height, width, 3)."""
        return np.asarray(self.image(which))

    def payload(self, row: Row) -> bytes:
        """Read an encoded image, by its record, and check its SHA-256."""
        part = row["part"]
        if part not in self._files:
            # Of two threads that open it at once, one's is dropped, and so closed.
            opened = os.fdopen(io.open_plain(self.part(part)), "rb", buffering=0)
            self._files.setdefault(part, opened)
        with io.plain_disk_errors(self.paths.root):
            payload = os.pread(self._files[part].fileno(), row["bytes"], row["offset"])
        if hashlib.sha256(payload).hexdigest() != row["sha256"]:
            check = f"to find all damage: {command('verify', self.paths.root)}"
            raise IntegrityError(f"{part} is damaged at byte {row['offset']}; {check}")
        return payload

    def part(self, name: str) -> Path:
        """Return the path of a part's file, checked to lie in the release and to be no link."""
        if not name or Path(name).name != name:
            raise IntegrityError(f"{self.paths.metadata}: {name!r} is no file of the release")
        io.refuse_links(self.paths.root / name)
        return self.paths.root / name

    def open_part(self, name: str) -> ImageFile:
        """Open a part's file with its own tables."""
        return ImageFile(self.part(name), most=self.manifest.most_rows)

    def provenance(self, which: int | Row) -> dict[str, Any]:
        """Return an image's ``row`` and how it was made: ``settings`` of the run, ``task_run``."""
        row = dict(which) if isinstance(which, Mapping) else self.row(which)
        with self.open_part(row["part"]) as file:
            runs = dict(enumerate(file.task_runs))
        plans = {plan.digest: plan.settings for plan in self.manifest.plans}
        settings = plans.get(str(row.get("plan")))
        return {"row": row, "settings": settings, "task_run": runs.get(row.get("task_run", -1))}

    def subset(
        self,
        *,
        rows: ArrayLike | None = None,
        imagenet: bool = False,
        below: str | None = None,
        status: str | Sequence[str] | None = None,
        rows_are: str = "chosen images",
    ) -> Self:
        """Select the images that fulfil every condition given.

        ``rows`` are indices, in the order wanted, or a mask, and ``rows_are`` which these are, in
        words; ``imagenet`` takes concepts of ImageNet-1k classes, ``below`` a WordNet synset, as
        ``dog.n.01``, and everything below it; ``status`` one status or several.
        """
        table, words = self.metadata, list[str]()
        kept, indices = np.ones(len(table), dtype=bool), np.arange(len(table))
        if rows is not None:
            given = np.atleast_1d(rows)
            indices = indices[given if given.size else given.astype(np.int64)]
            words.append(rows_are)
        if imagenet:
            kept &= pc.is_valid(table["imagenet_class"]).to_numpy()
            words.append("ImageNet-1k classes")
        if status is not None:
            wanted = [status] if isinstance(status, str) else list(status)
            if unknown := [one for one in wanted if one not in STATUSES]:
                raise UsageError(f"no status {unknown[0]!r}; valid: {', '.join(STATUSES)}")
            kept &= pc.is_in(table["status"], pa.array(wanted, pa.string())).to_numpy()
            words.append(f"status {' or '.join(wanted)}")
        if below is not None:
            root = self.taxonomy.synset(below).wnid
            wnids = [w for w in table["wnid"].unique().to_pylist() if w is not None]
            wnids = [wnid for wnid in wnids if self.taxonomy.is_below(wnid, root)]
            kept &= pc.is_in(table["wnid"], pa.array(wnids, pa.string())).to_numpy()
            words.append(f"{below} and below")
        return self._choose(indices[kept[indices]], words)

    def labelled_by(self, names: Sequence[str]) -> Self:
        """Return these images with a classifier's own classes, if any, in place of wnids."""
        view = self._chosen, self.selection, tuple(names)
        return type(self)(self.paths.root, _view=view) if names else self

    def sample(self, fraction: float) -> Self:
        """Select this share of the concepts; the same in every release, and in larger samples."""
        if not 0 < fraction <= 1:
            raise UsageError(f"a sample is more than 0 and at most 1 of all, found {fraction}")
        ids = sorted(self._ids, key=lambda id_: hashlib.sha256(id_.encode()).digest())
        indices = self._find_rows(ids[: max(1, round(fraction * len(ids)))])
        return self._choose(indices, [f"{100 * fraction:.3g}% of the {self.unit}s"])

    def _choose(self, indices: NDArray[np.int64], words: list[str]) -> Self:
        chosen = indices if self._chosen is None else self._chosen[indices]
        view = chosen, (*self.selection, *words), self._classes
        return type(self)(self.paths.root, _view=view)

    @property
    def described(self) -> Manifest:
        """The manifest as it would be of these images alone; its entries of files are unchanged."""
        if self._chosen is None:
            return self.manifest
        selection = ", ".join(filter(None, (self.manifest.selection, *self.selection))) or None
        return self.manifest.model_copy(update={**self.counted, "selection": selection})

    @property
    def counted(self) -> dict[str, Any]:
        """The counts of a manifest, of these images."""
        return count_images([self.metadata], self.concept_tables)[0]

    @cached_property
    def _ids(self) -> set[str]:
        return set(self.metadata["id"].unique().to_pylist())

    def _find_rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        return np.flatnonzero(numbers(pc.is_in(self.metadata["id"], pa.array(ids, pa.string()))))

    @cached_property
    def _ids_by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for id_, row in self.concepts.items():
            words = {_plain(word) for word in (row.label, *row.lemmas.split(", ")) if word}
            for name in {io.canonical(row.name), *words} | ({row.wnid} if row.wnid else set()):
                found.setdefault(name, []).append(id_)
        return found

    @cached_property
    def _locations(self) -> dict[str, pa.Array]:
        # Slicing the whole table takes ten times as long as these few columns.
        return {name: self.metadata[name].combine_chunks() for name in LOCATION}

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.paths.root}: no image {index}; it holds {len(self)}")
        return index % len(self)


# What counts and cards are made of.
COUNTED = [name for name in SCHEMA.names if name not in ("lemmas", "definition", "negative_prompt")]


def count_images(
    tables: Iterable[pa.Table], concepts: Iterable[pa.Table]
) -> tuple[dict[str, Any], pa.Table]:
    """Return the counts of a manifest, and the concepts with images, from tables of metadata."""
    images, ids, statuses, flags = 0, list[pa.Array](), Counter[str](), Counter[str]()
    for table in tables:
        images += table.num_rows
        ids.append(table["id"].unique())
        for one in table["status"].value_counts().to_pylist():
            statuses[one["values"]] += one["counts"]
        for name in ("truncated", "retried_fp32"):
            if name in table.column_names:
                flags[name] += int(pc.sum(table[name]).as_py() or 0)
    # A million rows are a gigabyte as objects: they stay columns, and those that are counted.
    known = pa.concat_tables(one.select(COUNTED) for one in concepts)
    here = pc.is_in(known["id"], pa.chunked_array(ids, pa.string()).unique())
    rows = np.flatnonzero(numbers(here))
    # A concept that several plans make images of counts once, as the last of them has it.
    places = numbers(known["id"].take(pa.array(rows)).combine_chunks().dictionary_encode().indices)
    last = np.empty(places.max(initial=-1) + 1, np.int64)
    last[places] = rows
    present = known.take(pa.array(last))
    return {
        "images": images,
        "concepts": len(present),
        "imagenet_classes": pc.count_distinct(present["imagenet_class"]).as_py(),
        "statuses": dict(sorted(statuses.items())),
        **flags,
    }, present


def label_rows(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Label images or concepts by classes of these names: without case, ``_`` as a space."""
    index = {_plain(name): position for position, name in enumerate(names)}
    labels = rows["label"].combine_chunks().dictionary_encode()
    known = [index.get(_plain(label)) for label in labels.dictionary.to_pylist()]
    classes = pa.array(known, pa.int16()).take(labels.indices)
    wnids = pa.array(names, pa.string()).take(classes)
    rows = rows.drop_columns(["wnid", "imagenet_class"])
    return rows.append_column("wnid", wnids).append_column("imagenet_class", classes)


def wnids_or_labels(images: pa.Table) -> pa.ChunkedArray:
    """Return the class of each image by name: its wnid, else its label, else null."""
    labels = pc.if_else(pc.equal(images["label"], ""), None, images["label"])
    return pc.coalesce(images["wnid"], labels)


def user_columns(names: Iterable[str]) -> list[str]:
    """Return those of the metadata's columns that a user's own table brought."""
    known = {*METADATA, *(column.name for column in COLUMNS)}
    return [name for name in names if name not in known]


def image_name(row: Row) -> str:
    """Return an image's name for people, from its record: its synset, label or id, and number."""
    return f"{row['synset'] or row['label'] or row['id']} {row['number']}"


def _plain(lemma: str) -> str:
    return io.canonical(lemma).replace("_", " ").casefold()

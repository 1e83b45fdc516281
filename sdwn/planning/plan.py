"""The plan of a run: concepts, shards, slices, images and seeds, without torch or pyarrow.

`make_plan` computes it, `write_plan` and `read_plan` keep it in a run folder: ``plan.json`` has the
settings, the digest and how the rows fall into shards; ``concepts.parquet`` a row a concept, of
which a task reads its shards' alone; ``taxonomy.parquet`` what WordNet says of synsets.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from io import StringIO
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from sdwn import io
from sdwn.config import Record, RunConfig, validated
from sdwn.errors import IntegrityError, SdwnError, UsageError, command, first_lines
from sdwn.paths import RunPaths
from sdwn.wordnet.corpus import describe

if TYPE_CHECKING:
    import pyarrow as pa

    from sdwn.wordnet.corpus import Synset, WordNet

# What names a concept in a list.
LISTED_BY = ("id", "wnid", "synset", "label")
# Rows that are read and checked at a time.
BLOCK_ROWS = 4096
# The columns of ``synsets.csv``, the table of version 1, whose bytes are in its plan's digest.
_COLUMNS = ("wnid", "synset", "shard", "imagenet_class", "lemmas", "definition", "prompt")
FORMAT = io.Format(
    "sdwn-plan",
    2,
    "read it with the sdwn that wrote it, or plan into a new folder",
    # Its rows are in synsets.csv.
    {1: lambda content: {**content, "counts": None}},
)


@dataclass(frozen=True, slots=True)
class Concept:
    """A subject of images: a synset, or a row of a table of prompts."""

    id: str  # its key: the wnid of a synset, the id of a row
    label: str = ""
    wnid: str | None = None
    synset: str | None = None
    imagenet_class: int | None = None  # the ILSVRC class index
    lemmas: str = ""
    definition: str = ""
    prompts: tuple[str, ...] = ()  # image n takes prompt n modulo their number
    first_image: int = 0  # of those that are planned
    images: int = 0
    seed: int | None = None  # None: of the run's
    negative_prompt: str | None = None  # None: the config's

    @property
    def name(self) -> str:
        """Its name for people: the synset's, or else the label, or else the id."""
        return self.synset or self.label or self.id

    @property
    def prompt(self) -> str:
        """The first of its prompts; of imported images there may be none."""
        return self.prompts[0] if self.prompts else ""

    def image_seed(self, run_seed: int, number: int) -> int:
        """Return the seed of an image: a row's own unchanged, where it has a single image."""
        if self.seed is not None and self.first_image + self.images == 1:
            return self.seed
        return image_seed(run_seed if self.seed is None else self.seed, self.id, number)


class PlanCounts(Record):
    """The counts of a plan's rows, in plan.json, so that counting images reads no row."""

    unit: Literal["synset", "concept"]  # what all rows are
    concepts: int
    each: int | None  # images of every concept; None where they differ
    starts: list[int]  # then: the rows that shards begin at,
    images: list[int]  # and how many images each shard has


def image_seed(run_seed: int, id_: str, number: int) -> int:
    """Derive an image's seed: the same in every shard, rank, restart and batch.

    >>> image_seed(0, "n02084071", 0)
    5498818010329907003
    """
    text = f"{run_seed}/{id_}/{number}".encode()
    # 63 bits: a seed then fits a signed integer of Parquet and HDF5.
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class ConceptRows(Sequence[Concept]):
    """Concepts that are rows of an Arrow table, read by blocks; slices are of consecutive rows."""

    def __init__(self, rows: int, read_block: Callable[[int], pa.Table]) -> None:
        self._rows = rows
        # A shard's rows may end in the block that the next one's begin in.
        self.block = lru_cache(maxsize=2)(read_block)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, which: Any) -> Any:
        rows, found = range(self._rows)[which], list[Concept]()
        if isinstance(rows, int):
            return self[rows : rows + 1][0]
        while len(found) < len(rows):
            number, skipped = divmod(rows.start + len(found), BLOCK_ROWS)
            block = self.block(number).slice(skipped, len(rows) - len(found))
            columns = {name: block[name].to_pylist() for name in Concept.__slots__}
            columns["prompts"] = map(tuple, columns["prompts"])
            found += map(Concept, *columns.values())
        return tuple(found)

    def __iter__(self) -> Iterator[Concept]:
        for start in range(0, self._rows, BLOCK_ROWS):
            yield from self[start : start + BLOCK_ROWS]


def table_text(concepts: Iterable[Concept]) -> str:
    """Write synsets with one prompt each as the CSV of version 1, all of them in shard 0."""
    rows = (
        (one.wnid, one.synset, 0, one.imagenet_class, one.lemmas, one.definition, one.prompt)
        for one in concepts
    )
    # To the letter: it is read back, and its bytes are in the plan's digest.
    return io.csv_text(_COLUMNS, rows, escaped=False)


def parse_table(table: str, images: int = 0) -> tuple[Concept, ...]:
    """Read the CSV of version 1, with so many images a synset; a ValueError if it is none."""
    rows = csv.reader(StringIO(table))
    if next(rows, None) != list(_COLUMNS):
        raise ValueError(f"expected the columns {', '.join(_COLUMNS)}")
    # By position: thrice as fast as by name, for tables of tens of thousands of rows.
    return tuple(
        Concept(
            id=wnid,
            label=lemmas.partition(", ")[0].replace("_", " "),
            wnid=wnid,
            synset=synset,
            imagenet_class=int(index) if index else None,
            lemmas=lemmas,
            definition=definition,
            prompts=(prompt,) if prompt else (),
            images=images,
        )
        for wnid, synset, _, index, lemmas, definition, prompt in rows
    )


# --- Shards ---------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``start`` up to ``stop``, of a plan's concepts or of images, and the images in them."""

    index: int
    start: int
    stop: int
    images: int


class ShardedWork(Protocol):
    """Work cut into shards that tasks of one stage finish, each by itself and in any order."""

    stage: ClassVar[str]  # whose tasks work on it
    doing: ClassVar[str]  # the same in words

    @property
    def digest(self) -> str:
        """Its digest, which a task compares with the one that it was submitted for."""

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in order."""

    @property
    def assigned_shards(self) -> Sequence[Shard]:
        """The shards that this folder is to have: those of its slice."""

    @property
    def assigned_images(self) -> int:
        """Number of images of these shards."""

    def done(self, paths: RunPaths) -> set[int]:
        """List the shards of a folder that are finished."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The ``number``-th of ``count`` equal shares, counted from 1: every ``count``-th shard."""

    number: int = 1
    count: int = 1

    def __contains__(self, shard: int) -> bool:
        """Return whether a shard, by its index, is in this share."""
        return shard % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Slice()


def parse_slice(text: str) -> Slice:
    """Read a slice, as 2/3."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text.strip(), re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise UsageError(f"slice {text}: expected a share such as 2/3, the second of three")
    return Slice(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image to make."""

    index: int  # within its shard
    concept: Concept
    number: int  # within its concept
    prompt: str
    seed: int
    prompt_number: int = 0  # which of the concept's prompts that is
    negative_prompt: str | None = None

    @property
    def name(self) -> str:
        """Its concept and number, for people."""
        return f"{self.concept.name} {self.number}"


class Extended(Record):
    """The release that a plan makes further images for, and the revision of its weights."""

    release: str  # its folder
    digest: str  # of its manifest
    images: int
    revision: str | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that decides which images come out, and how they fall into shards."""

    stage: ClassVar[str] = "generate"
    doing: ClassVar[str] = "making images"
    catalog: str
    config: RunConfig
    concepts: Sequence[Concept]
    recorded_digest: str | None = None  # this and the counts are of a plan that was read
    slice: Slice = WHOLE  # what the run folder makes; no part of the plan,
    recorded_counts: PlanCounts | None = None
    extends: Extended | None = None  # nor is this, which may be moved

    @cached_property
    def table(self) -> pa.Table:
        """All concepts as an Arrow table, with the user's own columns."""
        from sdwn.planning.tables import as_table  # pyarrow

        return as_table(self.concepts)

    @cached_property
    def counts(self) -> PlanCounts:
        """The counts of its rows, images and shards."""
        if self.recorded_counts is not None:
            return self.recorded_counts
        from sdwn.planning.tables import count_rows  # pyarrow

        return count_rows(self.table, _shard_size(self.config))

    @property
    def prompts(self) -> list[str]:
        """The different prompts, each once, in the order of the rows."""
        import pyarrow.compute as pc

        return list(pc.list_flatten(self.table["prompts"]).unique().to_pylist())

    @property
    def unit(self) -> str:
        """The word for what its rows are: synset, or concept where some are none."""
        return self.counts.unit

    @property
    def images(self) -> int:
        """Number of images in all."""
        return sum(shard.images for shard in self.shards)

    @property
    def grid(self) -> int:
        """Images of each concept, which batches do not tear apart; 1 where counts differ."""
        return self.counts.each or 1

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, in order, of whole concepts."""
        starts, images, rows = self.counts.starts, self.counts.images, self.counts.concepts
        if (each := self.counts.each) is not None:
            size = _rows_per_shard(self.config, each)
            starts = list(range(0, rows, size))
            images = [each * min(size, rows - start) for start in starts]
        return tuple(map(Shard, count(), starts, [*starts[1:], rows], images))

    @cached_property
    def assigned_shards(self) -> tuple[Shard, ...]:
        """The shards of this run folder's slice."""
        return tuple(shard for shard in self.shards if shard.index in self.slice)

    @property
    def assigned_images(self) -> int:
        """Number of images of this run folder's slice."""
        return sum(shard.images for shard in self.assigned_shards)

    def done(self, paths: RunPaths) -> set[int]:
        """List the finished shards of a run folder."""
        return paths.done_shards()

    def specs(self, shard: Shard) -> Iterator[ImageSpec]:
        """Yield a shard's images in order."""
        index, run_seed = 0, self.config.seed
        for concept in self.concepts[shard.start : shard.stop]:
            negative = concept.negative_prompt
            if negative is None:
                negative = self.config.generation.negative_prompt
            for number in range(concept.first_image, concept.first_image + concept.images):
                which = number % len(concept.prompts)
                seed, prompt = concept.image_seed(run_seed, number), concept.prompts[which]
                yield ImageSpec(index, concept, number, prompt, seed, which, negative)
                index += 1

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The entries of plan.json that name it: settings, counts and digests."""
        from sdwn.planning.tables import block_digests  # pyarrow

        identity = {
            "settings": image_settings(self.config),
            "counts": self.counts.model_dump(),
            "concepts_sha256": block_digests(self.table),
        }
        if (text := self._version_1()) is not None:
            identity["synsets_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return identity

    def _version_1(self) -> str | None:
        """Return the rows as version 1 wrote them; None where it cannot hold them."""
        from sdwn.planning.tables import SCHEMA  # pyarrow

        if self.unit != "synset" or self.table.schema.names != SCHEMA.names:
            return None
        columns, images = self.table.to_pydict(), self.config.images_per_synset
        expected = {"first_image": 0, "images": images, "seed": None, "negative_prompt": None}
        labels = [lemmas.partition(", ")[0].replace("_", " ") for lemmas in columns["lemmas"]]
        prompts = [texts[0] for texts in columns["prompts"] if len(texts) == 1 and texts[0]]
        if any({*columns[name]} != {value} for name, value in expected.items()) or (
            columns["label"] != labels or len(prompts) < len(labels) or None in columns["synset"]
        ):
            return None
        size = _rows_per_shard(self.config, self.grid)
        columns |= {"shard": [row // size for row in range(len(labels))], "prompt": prompts}
        rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
        text = io.csv_text(_COLUMNS, rows, escaped=False)
        with suppress(csv.Error):  # a carriage return may not be read back as it was written
            if "\r" not in text or tuple(self.concepts) == parse_table(text, images):
                return text
        return None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over settings and rows; of a plan that was read, as its file has it."""
        return self.recorded_digest or _digest(self.identity)


def _shard_size(config: RunConfig) -> float:
    """Turn the wanted shard size, in images or in hours, into images."""
    storage = config.storage
    in_time = (storage.shard_hours or 0) * 3600 * (storage.images_per_second or 0)
    return in_time if storage.images_per_shard is None else storage.images_per_shard


def _rows_per_shard(config: RunConfig, each: int) -> int:
    return max(1, round(_shard_size(config) / each))


def image_settings(config: RunConfig) -> dict[str, Any]:
    """Pick the settings that decide which images come out, and their shards."""
    return config.model_dump(mode="json", exclude={"catalog", "prompts", "evaluation"})


def make_plan(
    config: RunConfig,
    synsets: Sequence[Synset] = (),
    share: Slice = WHOLE,
    on_message: io.OnMessage = io.ignore,
) -> Plan:
    """Plan a config's catalog, whose synsets are given; all, whatever this folder's share."""
    from sdwn.planning import tables  # pyarrow

    images = config.images_per_synset
    if config.catalog.table:
        rows = tables.read_table(config.catalog.table, config.catalog.only, images)
    else:
        if config.prompts:
            prompts = tables.read_prompts(config.prompts, synsets, on_message)
        else:
            templates = [config.prompt] if isinstance(config.prompt, str) else config.prompt or ()
            prompts = list(tables.fill_prompts(templates, synsets))
        if images < (most := max(map(len, prompts))):
            on_message(f"of {most} prompts a synset, {images} images take only the first {images}")
        columns = tables.synset_columns(synsets)
        columns |= {"id": columns["wnid"], "prompts": prompts, "images": [images] * len(synsets)}
        rows = tables.concept_table(columns)
    plan = Plan(describe(config.catalog), config, tables.concept_rows(rows), slice=share)
    if not plan.assigned_shards:
        raise UsageError(
            f"slice {share}: the plan has only {len(plan.shards)} shards; take fewer slices, "
            "or smaller shards"
        )
    return plan


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Count what a plan holds; ImageNet classes by wnid, and by distinct name (first lemma)."""
    import pyarrow.compute as pc

    classes = plan.table.filter(pc.is_valid(plan.table["imagenet_class"]))
    # The published evaluation counts names without case: Cardigan the dog and the jacket are one.
    lemmas = classes["lemmas"].unique().to_pylist()
    names = {text.split(", ")[0].casefold() for text in lemmas}
    share = f"{plan.slice}: {len(plan.assigned_shards)} shards, {plan.assigned_images} images"
    return {
        "catalog": plan.catalog,
        "synsets": len(plan.concepts),
        "images": plan.images,
        "imagenet_classes": len(classes["imagenet_class"].unique()),
        "imagenet_names": len(names),
        "imagenet_images": pc.sum(classes["images"]).as_py() or 0,
        "shards": len(plan.shards),
        "images_per_shard": plan.shards[0].images,
        **({} if plan.slice == WHOLE else {"slice": share}),
        "digest": plan.digest,
    }


def sample_prompts(plan: Plan) -> list[str]:
    """Return at most five prompts: the shortest, the longest, and others drawn by its digest."""
    prompts = sorted(sorted(plan.prompts), key=len)
    ends, between = prompts[:1] + prompts[1:][-1:], prompts[1:-1]
    return ends + random.Random(plan.digest).sample(between, min(3, len(between)))


def _digest(identity: Mapping[str, Any]) -> str:
    old, now = ("settings", "synsets_sha256"), ("settings", "counts", "concepts_sha256")
    content = {name: identity[name] for name in (old if old[1] in identity else now)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def setting_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], where: tuple[str, str] = ("here", "now")
) -> list[str]:
    """List the settings in which two sections differ, as "seed: 42 here, 43 now"."""
    # A list that an older file lacks is an empty one.
    one, other = (
        {key: value for key, value in flat_settings(section) if value != []}
        for section in (first, second)
    )

    def text(value: Any) -> str:
        return "not set" if value is None else json.dumps(value, ensure_ascii=False)[:80]

    return [
        f"{key}: {text(one.get(key))} {where[0]}, {text(other.get(key))} {where[1]}"
        for key in one | other
        if one.get(key) != other.get(key)
    ]


def flat_settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a section and of those inside it, by dotted name."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write_plan(
    plan: Plan,
    paths: RunPaths,
    on_message: io.OnMessage = io.ignore,
    wordnet: WordNet | None = None,
) -> bool:
    """Write a plan into a run folder; False where the same is there; refuse to replace another.

    Settings of the evaluation are no part of the plan: those that differ are replaced, and
    ``on_message`` gets a line that names them. Nor is ``taxonomy.parquet``, which is written from
    ``wordnet`` unless it is there; a run without one looks in the corpus later.
    """
    from sdwn.planning.tables import read_block, write_concepts  # pyarrow

    if paths.root.exists() and not paths.root.is_dir():
        raise UsageError(f"{paths.root}: expected a folder or nothing, found a file")
    if "%" in str(paths.root.absolute()):
        raise UsageError(
            f"{paths.root}: SLURM and submitit read % in a path as a placeholder; plan into a "
            "folder whose path has none"
        )
    evaluation = plan.config.evaluation.model_dump(mode="json")
    before = read_plan(paths) if paths.plan.exists() else None
    if before is not None:
        _refuse_another_plan(before, plan, paths)
        known = before.config.evaluation.model_dump(mode="json")
        if changed := setting_differences(known, evaluation, ("before", "now")):
            on_message(f"the evaluation's settings are changed: {'; '.join(changed)}")
    content = {
        **FORMAT.head(),
        "digest": plan.digest,
        "summary": plan_summary(plan),
        **plan.identity,
        "catalog": plan.config.catalog.model_dump(mode="json"),
        "evaluation": evaluation,
        **({} if plan.slice == WHOLE else {"slice": str(plan.slice)}),
        **({"extends": plan.extends.model_dump()} if plan.extends else {}),
    }
    # The tables first: plan.json is what says that a plan is there.
    try:
        for number in range(len(content["concepts_sha256"])):
            read_block(paths.concepts, content["concepts_sha256"], number)
    except IntegrityError:  # there is none, or it is damaged
        write_concepts(paths.concepts, plan.table)
    if wordnet is not None:
        from sdwn.storage.columns import write_parquet
        from sdwn.wordnet.taxonomy import read_taxonomy, taxonomy_table

        try:
            read_taxonomy(paths.taxonomy)
        except IntegrityError:  # there is none, or it is damaged
            wnids = plan.table["wnid"].unique().drop_null().to_pylist()
            write_parquet(paths.taxonomy, taxonomy_table(wnids, wordnet))
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if before is None or paths.plan.read_text(encoding="utf-8") != text:
        io.write_text(paths.plan, text)
    return before is None


def _refuse_another_plan(before: Plan, plan: Plan, paths: RunPaths) -> None:
    if before.digest != plan.digest:
        units, left_out = f"{plan.unit}s", {"prompts", "evaluation"}
        here, now = (
            {**one.config.model_dump(mode="json", exclude=left_out), units: len(one.concepts)}
            for one in (before, plan)
        )
        differ = setting_differences(here, now)
        differ = differ or [f"its catalog holds other {units}, or other texts of them"]
        faults = "; ".join(first_lines(differ, 6))
        raise UsageError(f"{paths.root} belongs to another plan: {faults}; plan into a new folder")
    if before.slice != plan.slice:
        raise UsageError(
            f"{paths.root} has the slice {before.slice} of this plan, not {plan.slice}; "
            f"plan with --slice {before.slice}, or into a new folder"
        )


def read_plan(paths: RunPaths) -> Plan:
    """Read a run folder's plan; an IntegrityError if it was altered after it was written."""
    if not paths.plan.exists():
        advice = command("plan", "CONFIG", paths.root)
        raise SdwnError(f"{paths.root}: no plan here; make one with: {advice}")
    with FORMAT.reading(paths.plan) as content:
        catalog, share = str(content["summary"]["catalog"]), str(content.get("slice", WHOLE))
        settings = {name: content[name] for name in ("catalog", "evaluation")}
        config = validated(RunConfig, content["settings"] | settings, source=str(paths.plan))
        extends = Extended.model_validate(old) if (old := content.get("extends")) else None
        rows: Sequence[Concept]
        if content["counts"] is None:  # of version 1
            each = config.images_per_synset
            with io.reading(paths.synsets):
                text = io.decode_text(io.read_whole(paths.synsets, io.TABLE_BYTES))
                text = text.replace("\r\n", "\n")
                rows = parse_table(text, each)
            content["synsets_sha256"] = hashlib.sha256(text.encode()).hexdigest()
            counts = PlanCounts(unit="synset", concepts=len(rows), each=each, starts=[], images=[])
        else:
            counts = PlanCounts.model_validate(content["counts"])
            rows = ConceptRows(counts.concepts, partial(_read_block, paths, content))
        unchanged = _digest(content) == content["digest"]
    if not unchanged:
        raise IntegrityError(
            f"{paths.plan} or its table was changed after planning: its digest no longer fits; "
            "restore the files, or plan into a new folder"
        )
    return Plan(catalog, config, rows, str(content["digest"]), parse_slice(share), counts, extends)


def _read_block(paths: RunPaths, content: Mapping[str, Any], number: int) -> pa.Table:
    from sdwn.planning.tables import read_block  # pyarrow

    return read_block(paths.concepts, content["concepts_sha256"], number)

"""The plan of a run: shards, slices, images and seeds, from a catalog and a config, no torch.

`make_plan` computes it, `write_plan` and `read_plan` keep it in a run folder: ``plan.json`` has the
settings and the digest, ``synsets.csv`` a row a synset, ``taxonomy.parquet`` what WordNet says of
them. A release's images are classified in shards too (`sdwn.prediction.plan.PredictionPlan`).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from sdwn.config import EvaluationConfig, RunConfig, validated
from sdwn.errors import IntegrityError, SdwnError, UsageError, command
from sdwn.io import (
    TABLE_BYTES,
    Format,
    decode_text,
    read_json,
    read_whole,
    uncollected,
    write_text,
)
from sdwn.paths import RunPaths
from sdwn.planning.concepts import Concept, parse_table, table_text
from sdwn.wordnet.imagenet import class_index

if TYPE_CHECKING:
    from sdwn.wordnet.catalog import Catalog
    from sdwn.wordnet.corpus import Synset, WordNet

FORMAT = Format("sdwn-plan", 1, "read it with the sdwn that wrote it, or plan into a new folder")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``start`` up to ``stop``: of a plan's table, in whole synsets; or of images."""

    index: int
    start: int
    stop: int


class ShardedWork(Protocol):
    """Work cut into shards that tasks of one stage finish, each by itself and in any order."""

    @property
    def stage(self) -> str:
        """The stage whose tasks work on it."""

    @property
    def digest(self) -> str:
        """A digest of it, which a task compares with the one that it was submitted for."""

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards, in order."""

    @property
    def assigned_shards(self) -> Sequence[Shard]:
        """The shards that this folder is to have: those of its slice."""

    @property
    def assigned_images(self) -> int:
        """Number of images of these shards."""

    def shard_images(self, shard: Shard) -> int:
        """Count a shard's images."""

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

    @property
    def whole(self) -> bool:
        """True if it is all of the plan."""
        return self.count == 1


WHOLE = Slice()


def parse_slice(text: str) -> Slice:
    """Read a slice.

    >>> [shard for shard in range(7) if shard in parse_slice("2/3")]
    [1, 4]
    """
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text.strip(), re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise UsageError(f"slice {text}: expected a share such as 2/3, the second of three")
    return Slice(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image to make; ``index`` counts within its shard, ``number`` within its concept.

    ``prompt_number`` says which of the concept's prompts it takes.
    """

    index: int
    concept: Concept
    number: int
    prompt: str
    seed: int
    prompt_number: int = 0
    negative_prompt: str | None = None

    @property
    def name(self) -> str:
        """Its concept and number, for people."""
        return f"{self.concept.name} {self.number}"


@dataclass(frozen=True)
class Plan:
    """Everything that decides which images come out, and how they fall into shards.

    ``slice`` is the share of the shards that a run folder makes; it is no part of the plan.
    """

    catalog: str
    config: RunConfig
    concepts: tuple[Concept, ...]
    recorded_digest: str | None = field(default=None, compare=False)
    slice: Slice = field(default=WHOLE, compare=False)

    @property
    def stage(self) -> str:
        """The stage that makes its shards."""
        return "generate"

    @property
    def images(self) -> int:
        """Number of images in all."""
        return sum(one.images for one in self.concepts)

    @cached_property
    def grid(self) -> int:
        """Images of each concept, which batches do not tear apart; 1 where counts differ."""
        counts = {one.images for one in self.concepts}
        return counts.pop() if len(counts) == 1 else 1

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """All shards, in order; the last may be shorter."""
        size, rows = synsets_per_shard(self.config), len(self.concepts)
        starts = range(0, rows, size)
        return tuple(Shard(i, start, min(start + size, rows)) for i, start in enumerate(starts))

    @cached_property
    def assigned_shards(self) -> tuple[Shard, ...]:
        """The shards of this run folder's slice."""
        return tuple(shard for shard in self.shards if shard.index in self.slice)

    @property
    def assigned_images(self) -> int:
        """Number of images of this run folder's slice."""
        return sum(map(self.shard_images, self.assigned_shards))

    def shard_images(self, shard: Shard) -> int:
        """Count a shard's images."""
        return sum(one.images for one in self.concepts[shard.start : shard.stop])

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
    def digest(self) -> str:
        """SHA-256 over the settings that decide the images, and the table of synsets.

        A plan that was read keeps the one in its file: a later sdwn may know more settings.
        """
        return self.recorded_digest or _digest(image_settings(self.config), _table_text(self))


def synsets_per_shard(config: RunConfig) -> int:
    """Turn the wanted shard size, in images or in hours, into whole synsets, at least one."""
    storage = config.storage
    wanted: float | None = storage.images_per_shard
    if wanted is None:
        wanted = (storage.shard_hours or 0) * 3600 * (storage.images_per_second or 0)
    return max(1, round(wanted / config.images_per_synset))


def image_settings(config: RunConfig) -> dict[str, Any]:
    """Pick the settings that decide which images come out, and their shards."""
    return config.model_dump(mode="json", exclude={"catalog", "evaluation"})


def make_plan(config: RunConfig, catalog: Catalog, share: Slice = WHOLE) -> Plan:
    """Plan a catalog's synsets under a config; all of them, whatever this folder's share."""
    if "{" not in config.prompt.replace("{{", ""):
        raise UsageError(
            f'prompt: "{config.prompt}" has no field, so that all synsets would have the same '
            'prompt; write one into it, as in "a photo of a {lemma}, {definition}"'
        )
    classes = class_index()
    rows = (
        Concept(
            id=synset.wnid,
            label=synset.lemmas[0].replace("_", " "),
            wnid=synset.wnid,
            synset=synset.name,
            imagenet_class=classes.get(synset.wnid),
            lemmas=", ".join(synset.lemmas),
            definition=synset.definition,
            prompts=(fill_prompt(config.prompt, synset),),
            images=config.images_per_synset,
        )
        for synset in catalog.synsets
    )
    plan = Plan(catalog.name, config, tuple(rows), slice=share)
    if plan.concepts and not plan.assigned_shards:
        raise UsageError(
            f"slice {share}: the plan has only {len(plan.shards)} shards; take fewer slices, "
            "or smaller shards"
        )
    return plan


def fill_prompt(template: str, synset: Synset) -> str:
    """Fill a prompt template.

    >>> from sdwn.wordnet.corpus import Synset
    >>> dog = Synset("n02084071", "dog.n.01", ("domestic_dog",), "a member of ...")
    >>> fill_prompt("a photo of a {lemma}", dog)
    'a photo of a domestic dog'
    """
    lemmas = [lemma.replace("_", " ") for lemma in synset.lemmas]
    return template.format(
        definition=synset.definition, lemma=lemmas[0], lemmas=", ".join(lemmas), synset=synset.name
    )


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Count what a plan holds; ImageNet classes by wnid, and by distinct name (first lemma)."""
    classes = [row for row in plan.concepts if row.imagenet_class is not None]
    # The published evaluation counts names without case: Cardigan the dog and the jacket are one.
    names = {row.lemmas.split(", ")[0].casefold() for row in classes}
    share = f"{plan.slice}: {len(plan.assigned_shards)} shards, {plan.assigned_images} images"
    return {
        "catalog": plan.catalog,
        "synsets": len(plan.concepts),
        "images": plan.images,
        "imagenet_classes": len(classes),
        "imagenet_names": len(names),
        "imagenet_images": len(classes) * plan.config.images_per_synset,
        "shards": len(plan.shards),
        "images_per_shard": plan.shard_images(plan.shards[0]),
        **({} if plan.slice.whole else {"slice": share}),
        "digest": plan.digest,
    }


def sample_prompts(plan: Plan) -> list[str]:
    """Return at most five prompts to look at: the shortest, the longest, and others at random.

    The same plan gives the same ones.
    """
    every = {prompt for row in plan.concepts for prompt in row.prompts}
    prompts = sorted(every, key=lambda prompt: (len(prompt), prompt))
    ends, between = [prompts[0], prompts[-1]][: len(prompts)], prompts[1:-1]
    return ends + random.Random(plan.digest).sample(between, min(3, len(between)))


def _table_text(plan: Plan) -> str:
    return table_text(plan.concepts, synsets_per_shard(plan.config))


def _digest(settings: dict[str, Any], table: str) -> str:
    content = {"settings": settings, "synsets_sha256": hashlib.sha256(table.encode()).hexdigest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def setting_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], where: tuple[str, str] = ("here", "now")
) -> list[str]:
    """List the settings in which two sections differ, with both values.

    >>> setting_differences({"seed": 42, "model": {"name": "a"}}, {"seed": 43})
    ['seed: 42 here, 43 now', 'model.name: "a" here, not set now']
    """
    # A list that an older file lacks is an empty one.
    one, other = (
        {key: value for key, value in flat_settings(section) if value != []}
        for section in (first, second)
    )

    def value(section: Mapping[str, Any], key: str) -> str:
        found = section.get(key)
        return "not set" if found is None else json.dumps(found, ensure_ascii=False)[:80]

    return [
        f"{key}: {value(one, key)} {where[0]}, {value(other, key)} {where[1]}"
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
    on_message: Callable[[str], None] = lambda _: None,
    wordnet: WordNet | None = None,
) -> bool:
    """Write a plan into a run folder; False where the same plan is there already.

    Settings of the evaluation are no part of the plan: those that differ are replaced, and
    ``on_message`` gets a line that names them. Nor is ``taxonomy.parquet``, which is written from
    ``wordnet`` unless it is there; a run without one looks in the corpus later.

    Raises:
        UsageError: another plan is there, or another slice of this one.
    """
    if paths.root.exists() and not paths.root.is_dir():
        raise UsageError(f"{paths.root}: expected a folder or nothing, found a file")
    if "%" in str(paths.root.absolute()):
        raise UsageError(
            f"{paths.root}: SLURM and submitit read % in a path as a placeholder; plan into a "
            "folder whose path has none"
        )
    table, evaluation = _table_text(plan), plan.config.evaluation.model_dump(mode="json")
    known = paths.plan.exists()
    changed = ["all"]
    if known:
        content = read_json(paths.plan)
        _refuse_another_plan(content, plan, paths)
        before = {**EvaluationConfig().model_dump(mode="json"), **content.get("evaluation", {})}
        changed = setting_differences(before, evaluation, ("before", "now"))
        if changed:
            on_message(f"the evaluation's settings are changed: {'; '.join(changed)}")
        content["evaluation"] = evaluation
    else:
        content = {
            **FORMAT.head(),
            "digest": plan.digest,
            "wordnet": "3.0",
            "summary": plan_summary(plan),
            "settings": image_settings(plan.config),
            "catalog": plan.config.catalog.model_dump(mode="json"),
            "evaluation": evaluation,
            **({} if plan.slice.whole else {"slice": str(plan.slice)}),
            "synsets_sha256": hashlib.sha256(table.encode()).hexdigest(),
        }
    # The tables first: plan.json is what says that a plan is there.
    if not paths.synsets.exists() or paths.synsets.read_bytes() != table.encode():
        write_text(paths.synsets, table)
    if wordnet is not None:
        # pyarrow, which status and other readers of plans need not load.
        from sdwn.wordnet.taxonomy import read_taxonomy, taxonomy_table, write_taxonomy

        try:
            read_taxonomy(paths.taxonomy)
        except IntegrityError:  # there is none, or it is damaged
            above = taxonomy_table((row.wnid for row in plan.concepts if row.wnid), wordnet)
            write_taxonomy(paths.taxonomy, above)
    if changed:
        write_text(paths.plan, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return not known


def _refuse_another_plan(found: dict[str, Any], plan: Plan, paths: RunPaths) -> None:
    for name in ("settings", "catalog", "summary", "evaluation"):
        if not isinstance(found.get(name, {}), dict):
            raise IntegrityError(f"{paths.plan}: damaged: {name}; plan into a new folder")
    if found.get("digest") != plan.digest:
        catalog, synsets = found.get("catalog", {}), found.get("summary", {}).get("synsets")
        now = {
            "catalog": plan.config.catalog.model_dump(mode="json"),
            "synsets": len(plan.concepts),
        }
        differ = setting_differences(
            {**found.get("settings", {}), "catalog": catalog, "synsets": synsets},
            {**image_settings(plan.config), **now},
        ) or ["its catalog holds other synsets, or other texts of them"]
        if len(differ) > 6:
            differ[6:] = [f"and {len(differ) - 6} more"]
        raise UsageError(
            f"{paths.root} belongs to another plan: {'; '.join(differ)}; plan into a new folder"
        )
    if (share := found.get("slice", str(WHOLE))) != str(plan.slice):
        raise UsageError(
            f"{paths.root} has the slice {share} of this plan, not {plan.slice}; "
            f"plan with --slice {share}, or into a new folder"
        )


@uncollected()
def read_plan(paths: RunPaths) -> Plan:
    """Read a run folder's plan, checked against its own digest.

    Raises:
        SdwnError: there is none.
        IntegrityError: it was altered after it was written, or is of a later version.
    """
    if not paths.plan.exists():
        advice = command("plan", "CONFIG", paths.root)
        raise SdwnError(f"{paths.root}: no plan here; make one with: {advice}")
    content = FORMAT.read(paths.plan)
    try:
        table = decode_text(read_whole(paths.synsets, TABLE_BYTES)).replace("\r\n", "\n")
        unchanged = _digest(content["settings"], table) == content["digest"]
        sections = {name: content[name] for name in ("catalog", "evaluation")}
        settings, catalog = {**content["settings"], **sections}, str(content["summary"]["catalog"])
    except (KeyError, TypeError, OSError, UnicodeDecodeError) as error:
        what = f"{paths.plan} or {paths.synsets.name}: damaged: {error!r}"
        raise IntegrityError(f"{what}; plan into a new folder") from None
    if not unchanged:
        raise IntegrityError(
            f"{paths.plan} or {paths.synsets.name} was changed after planning: its digest no "
            "longer fits; restore the files, or plan into a new folder"
        )
    config = validated(RunConfig, settings, source=str(paths.plan))
    share = parse_slice(str(content.get("slice", WHOLE)))
    concepts = parse_table(table, config.images_per_synset)
    return Plan(catalog, config, concepts, str(content["digest"]), share)

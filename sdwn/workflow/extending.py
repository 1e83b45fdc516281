"""Extension of a release: a run that makes only the images that the release lacks.

::

    settings, changed ─▶ concepts wanted ─▶ those that lack images ─▶ plan ─▶ tasks ─▶ merge
                                                    ▲                                    ▲
    release ────────── numbers that are there ──────┴──────── parts as they are ─────────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sdwn.config import RunConfig, with_overrides
from sdwn.errors import IntegrityError, UsageError, command, first_lines
from sdwn.exchange.export import LISTED_BY
from sdwn.io import canonical, read_list
from sdwn.paths import RunPaths
from sdwn.planning.concept_table import SCHEMA, as_table, concept_rows
from sdwn.planning.concepts import Concept
from sdwn.planning.plan import Extended, Plan, image_settings, read_plan, setting_differences
from sdwn.releases.release import Release
from sdwn.workflow.submitting import Display, plan_catalog, store_plan

# Faults that a message names.
_SHOWN = 5


def plan_extension(
    release: Release, run: Path, overrides: Sequence[str], only: Path | None, display: Display
) -> tuple[Plan, RunPaths]:
    """Plan the images that a release lacks, under its last plan's settings with ``overrides``.

    The concepts are the release's, or those of a catalog in ``overrides``; ``only`` lists some of
    them. Of a run that is planned already, without overrides only the release's place is noted.

    Raises:
        UsageError: nothing is missing, or images that are there would have come out otherwise.
    """
    paths, manifest = RunPaths(run), release.manifest
    if not manifest.plans:
        raise UsageError(
            f"{release.paths.root} was imported: how its images were made is not recorded"
        )
    _refuse_unlisted_images(release)
    made_with = (one.get("revision") for one in manifest.made_on)
    extends = Extended(
        release=str(release.paths.root),
        digest=release.digest,
        images=manifest.images,
        revision=next((one for one in made_with if one and isinstance(one, str)), None),
    )
    if paths.plan.exists() and not overrides and only is None:
        plan = read_plan(paths)
        if plan.extends is not None and plan.extends.digest == extends.digest:
            plan = replace(plan, extends=extends)
            return plan, store_plan(plan, run, None, display)

    before = release.plan(manifest.plans[-1].digest).config
    content = {**before.model_dump(mode="json"), "evaluation": manifest.evaluation or {}}
    keys = {override.partition("=")[0].split(".")[0] for override in overrides}
    wordnet, catalog = None, manifest.catalog
    if "catalog" in keys:
        del content["catalog"]
    config = with_overrides(content, overrides, release.paths.manifest, Path.cwd())
    _refuse_other_settings(release, before, config)
    if "catalog" in keys:
        plan, wordnet = plan_catalog(config, display)
        catalog, wanted, table = plan.catalog, list(plan.concepts), plan.table
    else:
        config = config.model_copy(update={"catalog": before.catalog})
        wanted = release.present if manifest.selection else list(release.concepts.values())
        if "images_per_synset" in keys:
            wanted = [replace(one, images=config.images_per_synset) for one in wanted]
        table = pa.concat_tables(release.concept_tables[::-1], promote_options="default")
    concepts = _remaining(release, wanted if only is None else _listed(only, wanted))
    if not concepts:
        raise UsageError(
            f"{release.paths.root} has all these images; ask for more, as with: "
            f"{command('extend', release.paths.root, run, '--set', 'images_per_synset=50')}"
        )
    rows = as_table(concepts)
    at = pc.index_in(rows["id"], table["id"].combine_chunks())
    for name in table.column_names[len(SCHEMA) :]:  # the user's own
        rows = rows.append_column(name, table[name].take(at))
    kinds = {column.name: column.type for one in release.concept_tables for column in one.schema}
    for column in rows.schema:
        if (kind := kinds.get(column.name, column.type)) != column.type:
            what = f"column {column.name!r}: {kind} there, {column.type} now"
            raise UsageError(f"{release.paths.root}: {what}; write its values as they are there")
    plan = Plan(catalog, config, concept_rows(rows), extends=extends)
    return plan, store_plan(plan, run, wordnet, display)


def _refuse_unlisted_images(release: Release) -> None:
    manifest = release.manifest
    listed = {one.digest for one in manifest.plans}, {one.file for one in manifest.files}
    for name, known in zip(("plan", "part"), listed, strict=True):
        if not known.issuperset(release.metadata[name].unique().to_pylist()):
            check = command("verify", release.paths.root)
            fault = f"lacks a {name} of its images; check with: {check}"
            raise IntegrityError(f"{release.paths.manifest}: {fault}")


def _refuse_other_settings(release: Release, before: RunConfig, config: RunConfig) -> None:
    """Refuse settings under which the images that are there would have come out otherwise."""

    def decisive(config: RunConfig) -> dict[str, Any]:
        found = image_settings(config)
        free = ("images_per_synset", "storage")
        kept = {name: value for name, value in found.items() if name not in free}
        return {**kept, "generation": {**kept["generation"], "batch_size": None}}

    if differ := setting_differences(decisive(before), decisive(config), ("there", "now")):
        raise UsageError(
            f"{release.paths.root}: its images would have come out otherwise: {'; '.join(differ)}; "
            "leave these settings as they are, or plan a run of its own"
        )
    if config.prompt is None and not (config.prompts or config.catalog.table):
        raise UsageError("prompt: the release's prompts are written ones; give --set prompts=FILE")


def _listed(only: Path, wanted: Sequence[Concept]) -> list[Concept]:
    """Choose the concepts that a file lists, by what can name them."""
    names = [{canonical(getattr(one, key) or "") for key in LISTED_BY} for one in wanted]
    known, lines = set[str]().union(*names), dict[str, str]()
    for line in read_list(only, LISTED_BY):
        # A table that sdwn wrote for spreadsheets may have an apostrophe before it.
        name = canonical(line.name)
        lines[name if name in known else name.removeprefix("'")] = line.where
    if unknown := sorted(lines.keys() - known):
        faults = [f"{lines[name]}: {name:.80}: not in the catalog" for name in unknown]
        raise UsageError("\n".join(first_lines(faults, _SHOWN)))
    return [one for one, own in zip(wanted, names, strict=True) if own & lines.keys()]


def _remaining(release: Release, wanted: Sequence[Concept]) -> list[Concept]:
    """Return the concepts that need images, and which; refuse those that cannot grow, by name."""
    asked = [("number", "max"), ("number", "count_distinct")]
    table = release.metadata.group_by("id").aggregate(asked).select(["id", *map("_".join, asked)])
    there = {id_: counts for id_, *counts in zip(*table.to_pydict().values(), strict=True)}
    faults, found = list[str](), list[Concept]()
    for one in wanted:
        last, count = there.get(one.id, (-1, 0))
        if one.images <= (stop := last + 1):
            continue
        if count:
            for what in ("prompts", "seed", "negative_prompt"):
                then, now = (getattr(row, what) for row in (release.concepts[one.id], one))
                if then != now:
                    faults.append(f"{one.name}: {what}: {then!r:.80} there, {now!r:.80} now")
            if count < stop:
                faults.append(f"{one.name}: only {count} of the images 0 to {last} are there")
            if one.seed is not None and last == 0:
                faults.append(f"{one.name}: its own seed {one.seed} is that of a single image")
        if not one.prompts:
            faults.append(f"{one.name}: it has no prompt")
        found.append(replace(one, first_image=stop, images=one.images - stop))
    if faults:
        head = f"{release.paths.root}: what cannot be extended; leave it out with --only:"
        raise UsageError("\n".join([head, *first_lines(faults, _SHOWN)]))
    return found

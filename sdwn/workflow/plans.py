"""Planning of runs: from a config, for the cells of a sweep, and of what a release lacks.

An extension is a run that makes only the images that a release lacks::

    settings, changed ─▶ concepts wanted ─▶ those that lack images ─▶ plan ─▶ tasks ─▶ merge
                                                    ▲                                    ▲
    release ────────── numbers that are there ──────┴──────── parts as they are ─────────┘
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from sdwn.config import RunConfig, with_overrides
from sdwn.errors import IntegrityError, UsageError, command, first_lines
from sdwn.io import canonical, read_list, write_text
from sdwn.jobs.scheduler import Live
from sdwn.models.families import require_usable
from sdwn.models.lock import ensure_lock
from sdwn.models.weights import source
from sdwn.paths import ReleasePaths, RunPaths, shipped_file
from sdwn.planning.plan import (
    LISTED_BY,
    WHOLE,
    Concept,
    Extended,
    Plan,
    Slice,
    image_settings,
    make_plan,
    read_plan,
    setting_differences,
    write_plan,
)
from sdwn.planning.sweep import Cell, Sweep, cell_name, read_sweep, read_sweep_file
from sdwn.planning.tables import SCHEMA, as_table, concept_rows
from sdwn.wordnet.corpus import WordNet, open_wordnet, read_catalog

if TYPE_CHECKING:
    from sdwn.releases.release import Release  # h5py, Pillow

# Faults that a message names.
_SHOWN = 5


class ProgressBar(Protocol):
    """Display of one long piece of work."""

    def advance(self, number: int) -> None:
        """Show that so much more is done."""

    def look(self, live: Live) -> None:
        """Show the jobs that wait or run."""


class Display(Protocol):
    """Display of long work; the command line's is the module ``sdwn.cli.console``."""

    def say(self, message: str) -> None:
        """Show a message."""

    def progress(
        self, what: str, total: int | None = None, unit: str = "images", start: int = 0
    ) -> AbstractContextManager[ProgressBar]:
        """Show work under way, and how much of ``total`` is done, if that is known."""


# --- A config ------------------------------------------------------------------------------------
def plan_run(
    config: RunConfig, run: Path, display: Display, share: Slice = WHOLE
) -> tuple[Plan, RunPaths]:
    """Write a run's plan, or a slice of it, unless the same plan is there."""
    begun = RunPaths(run).begun
    require_usable(config, begun=begun)
    shipped_file("groups", config.evaluation.groups or "default")
    plan, wordnet = _plan_catalog(config, display, share)
    if plan.table["negative_prompt"].null_count < len(plan.table):
        require_usable(config, begun=begun, rows_negative=True)
    return plan, _store_plan(plan, run, wordnet, display)


def _plan_catalog(
    config: RunConfig, display: Display, share: Slice = WHOLE
) -> tuple[Plan, WordNet | None]:
    """Plan the concepts of a config's catalog; return WordNet too, where some are its synsets."""
    table = config.catalog.table
    with display.progress(f"reading {table.name if table else 'WordNet'}"):
        synsets = () if table else read_catalog(config.catalog, open_wordnet())
        plan = make_plan(config, synsets, share, display.say)
        of_synsets = plan.table["wnid"].null_count < len(plan.table)
        return plan, open_wordnet() if of_synsets else None


def _store_plan(plan: Plan, run: Path, wordnet: WordNet | None, display: Display) -> RunPaths:
    """Write a plan into its run's folder, and lock the run to the weights that are here."""
    model, paths = plan.config.model, RunPaths(run)
    new = write_plan(plan, paths, display.say, wordnet)
    display.say(f"{'planned' if new else 'planned already'}: {run}")
    with display.progress("looking for the weights"):
        locked = ensure_lock(paths, plan)
    states = {"elsewhere": "no such folder on this machine", "hub": "not downloaded yet"}
    states["file"] = "not converted yet"
    if state := f"revision {locked.revision}" if locked else states.get(source(model)):
        display.say(f"model: {model.name} ({state})")
    return paths


# --- A sweep -------------------------------------------------------------------------------------
def plan_sweep(path: Path, folder: Path, overrides: tuple[str, ...], display: Display) -> Sweep:
    """Plan a sweep's cells; those that are there keep their names, whatever the file adds."""
    paths = RunPaths(folder)
    if paths.plan.exists() or ReleasePaths(folder).manifest.exists():
        raise UsageError(f"{folder} is no sweep; plan the sweep into a folder of its own")
    wanted, config_of = read_sweep_file(path, overrides)
    known = read_sweep(folder).cells if paths.sweep.exists() else []
    # They come first: a changed base is refused before anything is written.
    settings_of = {cell.name: cell.settings for cell in known if (folder / cell.name).exists()}
    configs = {name: config_of(settings) for name, settings in settings_of.items()}
    names = {_images(config): name for name, config in configs.items()}
    named = set[str]()
    for settings in wanted:
        name, config = cell_name(settings), config_of(settings)
        if twin := names.get(_images(config)):
            if twin in named:
                raise UsageError(f"{path}: {name} and {twin} are the same cell; leave one out")
            name = twin
        else:
            # Macs take folders that differ in case for one.
            while name.lower() in map(str.lower, configs):
                name += "-2"
            settings_of[name], configs[name], names[_images(config)] = settings, config, name
        named.add(name)
    cells, locks = [], dict[str, Path]()
    for name, config in configs.items():
        run = RunPaths(folder / name)
        weights = f"{config.model} {config.generation.safety_checker}"
        if weights in locks and not run.lock.exists():
            # A cell that is added later takes the weights of those before it.
            run.root.mkdir(exist_ok=True)
            shutil.copyfile(locks[weights], run.lock)
        plan, _ = plan_run(config, run.root, display)
        if run.lock.exists():
            locks.setdefault(weights, run.lock)
        cells.append(Cell(name=name, settings=settings_of[name], digest=plan.digest))
    sweep = Sweep(cells=cells)
    write_text(paths.sweep, sweep.model_dump_json(indent=2) + "\n")
    return sweep


def _images(config: RunConfig) -> str:
    return config.model_dump_json(exclude={"evaluation"})


# --- More images of a release --------------------------------------------------------------------
def plan_extension(
    release: Release, run: Path, overrides: Sequence[str], only: Path | None, display: Display
) -> tuple[Plan, RunPaths]:
    """Plan the images that a release lacks, under its last plan's settings with ``overrides``.

    The concepts are the release's, or those of a catalog in ``overrides``; ``only`` lists some of
    them. Of a run that is planned already, without overrides only the release's place is noted.
    """
    root, manifest = release.paths.root, release.manifest
    if not manifest.plans:
        raise UsageError(f"{root} was imported: how its images were made is not recorded")
    revisions = (one.get("revision") for one in manifest.made_on)
    extends = Extended(
        release=str(root),
        digest=release.digest,
        images=manifest.images,
        revision=next(filter(None, revisions), None),
    )
    if RunPaths(run).plan.exists() and not overrides and only is None:
        plan = read_plan(RunPaths(run))
        if plan.extends is not None and plan.extends.digest == extends.digest:
            plan = replace(plan, extends=extends)
            return plan, _store_plan(plan, run, None, display)

    _refuse_unlisted_images(release)
    before = release.plan(manifest.plans[-1].digest).config
    content = {**before.model_dump(mode="json"), "evaluation": manifest.evaluation or {}}
    keys = {override.partition("=")[0].split(".")[0] for override in overrides}
    wordnet, catalog = None, manifest.catalog
    if "catalog" in keys:
        del content["catalog"]
    config = with_overrides(content, overrides, release.paths.manifest, Path.cwd())
    _refuse_other_settings(root, before, config)
    if "catalog" in keys:
        plan, wordnet = _plan_catalog(config, display)
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
            f"{root} has all these images; ask for more, as with: "
            f"{command('extend', root, run, '--set', 'images_per_synset=50')}"
        )
    rows = as_table(concepts)
    at = pc.index_in(rows["id"], table["id"].combine_chunks())
    for name in table.column_names[len(SCHEMA) :]:  # the user's own
        rows = rows.append_column(name, table[name].take(at))
    kinds = {column.name: column.type for one in release.concept_tables for column in one.schema}
    for column in rows.schema:
        if (kind := kinds.get(column.name, column.type)) != column.type:
            what = f"column {column.name!r}: {kind} there, {column.type} now"
            raise UsageError(f"{root}: {what}; write its values as they are there")
    plan = Plan(catalog, config, concept_rows(rows), extends=extends)
    return plan, _store_plan(plan, run, wordnet, display)


def _refuse_unlisted_images(release: Release) -> None:
    """Refuse a manifest without a part of the images: a merge would not copy it."""
    manifest = release.manifest
    listed = {one.digest for one in manifest.plans}, {one.file for one in manifest.files}
    for name, known in zip(("plan", "part"), listed, strict=True):
        if not known.issuperset(release.metadata[name].unique().to_pylist()):
            check = command("verify", release.paths.root)
            fault = f"lacks a {name} of its images; check with: {check}"
            raise IntegrityError(f"{release.paths.manifest}: {fault}")


def _refuse_other_settings(release: Path, before: RunConfig, config: RunConfig) -> None:
    """Refuse settings under which the images that are there would have come out otherwise."""

    def decisive(config: RunConfig) -> dict[str, Any]:
        found = image_settings(config)
        del found["images_per_synset"], found["storage"], found["generation"]["batch_size"]
        return found

    if differ := setting_differences(decisive(before), decisive(config), ("there", "now")):
        raise UsageError(
            f"{release}: its images would have come out otherwise: {'; '.join(differ)}; "
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
        found.append(replace(one, first_image=stop, images=one.images - stop))
    if faults:
        head = f"{release.paths.root}: what cannot be extended; leave it out with --only:"
        raise UsageError("\n".join([head, *first_lines(faults, _SHOWN)]))
    return found

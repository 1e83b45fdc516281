"""Merge of shards into a release: each shard checked, images copied as they are.

::

    run folders --> locate shards --> parts of whole shards --> write_release --> Release
                    (each one once,   (bytes copied, SHA-256          ^
                     of this plan)     of each image checked)         |
    the release that the plan extends, if any --> its parts as they are, first
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from sdwn.errors import IntegrityError, MisplacedError, UsageError, command, shell
from sdwn.io import PART_BYTES, Advance, file_sha256
from sdwn.jobs.task import read_records
from sdwn.models.lock import common_revision
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Extended, Plan, read_plan
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import StagedFolder, build, require_free
from sdwn.releases.writer import Attributes, Origin, Part, cut_parts, release_origin, write_release
from sdwn.storage.columns import texts
from sdwn.storage.shards import Expected, ImageFile, join
from sdwn.wordnet.taxonomy import join_taxonomies, read_taxonomy

# While a part is written its rows are in memory: small images end it by their number, about that
# of images of usual size.
PART_IMAGES = 20_000


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options of a merge: least bytes of a part; accept partial runs; decode every image."""

    part_bytes: int = PART_BYTES
    allow_missing: bool = False
    decode: bool = False


def merge(
    runs: Sequence[RunPaths],
    release: ReleasePaths,
    options: MergeOptions = MergeOptions(),
    advance: Advance = lambda _: None,
    carry: Callable[[Release, ReleasePaths], None] = lambda _old, _new: None,
) -> Release:
    """Write the release of one or several run folders of the same plan.

    Where the plan extends a release, the new one has that one's images too, and ``carry`` brings
    along what was computed of them. A release of this plan that is there already is kept; one that
    a kill left unfinished is resumed. ``advance`` is called with how many more images are done.
    """
    folders = [paths.root.resolve() for paths in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UsageError(f"{twice[0]} is given twice; name each run folder once")
    plan, *others = [read_plan(paths) for paths in runs]
    for paths, other in zip(runs[1:], others, strict=True):
        if other.digest != plan.digest:
            theirs = f"has plan {other.digest[:12]}, {runs[0].root} has {plan.digest[:12]}"
            raise UsageError(f"{paths.root} {theirs}; only runs of the same plan make a release")
    revision = common_revision(runs, plan.config.model)
    revision = revision or (plan.extends.revision if plan.extends else None)
    old = _extended_release(runs[0], plan.extends) if plan.extends else None
    if old is not None and release.root.resolve() == old.paths.root.resolve():
        raise UsageError(f"{release.root} is extended, and stays as it is; choose a new folder")
    done = {paths: paths.done_shards() for paths in runs}
    absent = sorted({*range(len(plan.shards))}.difference(*done.values()))
    needed = not options.allow_missing or len(absent) == len(plan.shards)
    missing = [*_missing_problems(runs, absent)] if needed else []
    origin = _origin(runs, plan, absent, old)
    if release.manifest.exists():
        found = Release(release.root)
        _check_existing(found, plan, origin, missing)
        advance(found.manifest.images)
        return found
    require_free(release.root)
    shards = _locate_shards(done, plan, missing, revision)
    parts: Iterable[Part] = _parts(plan, shards, options, advance)
    if old is not None:
        parts = chain(_old_parts(old, advance), parts)

    def fill(staged: StagedFolder) -> None:
        write_release(staged, origin, parts, advance)
        if old is not None:
            carry(old, ReleasePaths(staged.root))

    build(release.root, {"merge": plan.digest, **({"extends": old.digest} if old else {})}, fill)
    return Release(release.root)


def merged_summary(release: Release) -> dict[str, Any]:
    """Return what a release holds, for the terminal and ``--json``."""
    manifest = release.manifest
    found = manifest.model_dump(include={"images", "bytes", "statuses"})
    found |= {"synsets": manifest.concepts, "unit": release.unit}
    if manifest.missing:
        found["missing_images"] = manifest.missing.images
    return {**found, "release": str(release.paths.root)}


def _extended_release(run: RunPaths, extends: Extended) -> Release:
    """Open the release that a run's plan extends, checked to be as it was."""
    there = ReleasePaths(Path(extends.release))
    if there.manifest.is_file() and file_sha256(there.manifest) == extends.digest:
        return Release(there.root)
    found = "another release" if there.manifest.is_file() else "none"
    expected = f"{there.root}: expected the release {extends.digest[:12]} that {run.root} extends"
    advice = f"if it was moved, say where with: {command('extend', 'RELEASE', run.root)}"
    raise UsageError(f"{expected}, found {found}; {advice}")


def _old_parts(old: Release, advance: Advance) -> Iterator[Part]:
    """Yield the parts of a release, to be copied as they are."""
    for record in (one for one in old.manifest.files if one.file.endswith(".h5")):
        with old.open_part(record.file) as file:
            plan = str(file.attributes.get("plan_digest"))
            copy = partial(_copy_part, part=file, sha256=record.sha256, advance=advance)
        yield {"copy": record.sha256}, copy, plan


def _copy_part(path: Path, _: Attributes, part: ImageFile, sha256: str, advance: Advance) -> str:
    shutil.copyfile(part.path, path)
    if file_sha256(path) != sha256:
        changed = f"{part.path}: its SHA-256 is not the recorded one"
        raise IntegrityError(f"{changed}; check with: {command('verify', part.path.parent)}")
    advance(len(part))
    return sha256


def _check_existing(release: Release, plan: Plan, origin: Origin, missing: list[str]) -> None:
    """Refuse a release that is there, unless it is of this plan and no shard can be added to it."""
    manifest, found = release.manifest, ""
    if manifest.plan_digest != plan.digest:
        theirs = str(manifest.plan_digest)[:12]
        found = f"the release of another plan ({theirs}, this is {plan.digest[:12]})"
    elif manifest.selection and not plan.extends:
        found = f"a part of the plan ({manifest.selection})"
    elif manifest.missing and missing:
        raise IntegrityError("\n".join(missing))
    elif manifest.missing and manifest.missing.shards != origin.missing_shards:
        found = "an incomplete release, and other shards are made by now"
    if found:
        where = release.paths.root
        raise UsageError(f"{where} holds {found}; choose another folder, or remove it first")


def _locate_shards(
    done: Mapping[RunPaths, set[int]], plan: Plan, missing: list[str], revision: str | None
) -> dict[int, Path]:
    """Find each shard's one file, checked; an error names every problem, a line each."""
    files, problems = defaultdict[int, list[Path]](list), list[str]()
    _ = plan.table  # read first: where it is damaged, no shard is to be made again
    for paths, indices in done.items():
        foreign = defaultdict[str, list[int]](list)
        for index in sorted(indices):
            path = paths.shard(index)
            try:
                _check_shard(path, plan, index, revision)
            except MisplacedError as error:
                if error.plan_digest == plan.digest:
                    problems.append(f"{error}; move it away, and make it with: {_make(paths)}")
                else:
                    foreign[error.plan_digest].append(index)
            except IntegrityError as error:
                problems.append(f"{error}; {_remedy(path)}")
            files[index].append(path)
        for digest, others in foreign.items():
            # They may be whole: nothing is to be deleted.
            problems.append(
                f"{paths.shards}: foreign: {_shards(others)} of "
                f"{f'plan {digest[:12]}' if digest else 'no plan'}, not {plan.digest[:12]}; if "
                f"{paths.plan.name} was replaced, bring back theirs with the table beside it; "
                f"otherwise move them away, and make this plan's with: {_make(paths)}"
            )
    problems += missing
    problems += [
        f"shard {index}: duplicate: {', '.join(map(str, found))}; remove all but one"
        for index, found in sorted(files.items())
        if len(found) > 1
    ]
    if problems:
        raise IntegrityError("\n".join(problems))
    return {index: found[0] for index, found in sorted(files.items())}


def _check_shard(path: Path, plan: Plan, index: int, revision: str | None) -> None:
    """Compare a shard's record and its rows with the plan, and its weights with the lock."""
    images = plan.shards[index].images if index < len(plan.shards) else 0
    size = plan.config.generation.width, plan.config.generation.height
    with ImageFile(path, Expected(plan.digest, index, images)) as file:
        rows = file.rows()
        names = ("id", "number", "seed", "prompt", "negative_prompt", "width", "height")
        found = [rows[name] for name in names if name in rows]
        columns = [texts(one) if one.dtype.kind == "S" else one.tolist() for one in found]
        planned = [
            (one.concept.id, one.number, one.seed, one.prompt, one.negative_prompt or "", *size)
            for one in plan.specs(plan.shards[index])
        ]
        if list(zip(*columns, strict=True)) != planned:
            raise IntegrityError(f"{path}: its rows are not those of the plan")
        made_with = {task_run.get("revision") for task_run in file.task_runs}
        if revision is not None and (others := made_with - {revision}):
            weights = ", ".join(map(str, others))
            raise IntegrityError(f"{path}: made with the weights {weights}, locked are {revision}")


def _missing_problems(runs: Sequence[RunPaths], indices: list[int]) -> Iterator[str]:
    instead = "or leave them out with: --allow-missing"
    for paths in runs:
        part = read_plan(paths).slice
        if own := [index for index in indices if index in part]:
            yield f"{_shards(own)} missing; make them with: {_make(paths)}; {instead}"
        indices = [index for index in indices if index not in part]
    if indices:
        others = "of other slices of the plan; name their folders too"
        yield f"{_shards(indices)} missing: {others}, {instead}"


def _shards(indices: list[int]) -> str:
    one = len(indices) == 1
    return f"shard {indices[0]}" if one else f"{len(indices)} shards ({_ranges(indices)})"


def _ranges(indices: Sequence[int]) -> str:
    """Write ascending indices briefly, as in ``1-3, 7, 9-10``."""
    # Along a row of consecutive numbers, the distance to their position is the same.
    runs = groupby(enumerate(indices), lambda one: one[1] - one[0])
    rows = ([index for _, index in run] for _, run in runs)
    return ", ".join(str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows)


def _remedy(path: Path) -> str:
    return f"make it again with: {shell('rm', path)} && {_make(RunPaths(path.parent.parent))}"


def _make(paths: RunPaths) -> str:
    # The profile of the last submission, where there was one.
    return command("retry" if paths.submissions.exists() else "submit", paths.root, "--wait")


def _origin(runs: Sequence[RunPaths], plan: Plan, absent: list[int], old: Release | None) -> Origin:
    earlier = Origin({"catalog": plan.catalog}) if old is None else release_origin(old)
    shards = (plan.shards[index] for index in absent)
    missing = [row for shard in shards for row in plan.concepts[shard.start : shard.stop]]
    if earlier.missing:
        planned = {row.id for row in plan.concepts}
        missing += [row for row in earlier.missing if row.id not in planned]
    # Runs of one plan have the same concepts: any taxonomy has all. Old runs have none.
    own = [paths.taxonomy for paths in runs if paths.taxonomy.exists()][:1]
    taxonomies = [*map(read_taxonomy, own)] + [earlier.taxonomy] * (earlier.taxonomy is not None)
    record = {
        **earlier.record,
        "origin": "run",
        "catalog": " + ".join(dict.fromkeys([earlier.record["catalog"], plan.catalog])),
        "evaluation": plan.config.evaluation.model_dump(mode="json"),
    }
    return Origin(
        {**record, **_used(runs, old)},
        plans=(*earlier.plans, plan),
        missing=missing,
        missing_shards=_ranges(absent) or earlier.missing_shards,
        taxonomy=join_taxonomies(taxonomies) if taxonomies else None,
    )


def _used(runs: Sequence[RunPaths], old: Release | None) -> dict[str, float | None]:
    """Add up what task runs that made images took of devices; None unless each told it."""
    used: dict[str, float | None] = dict.fromkeys(("energy_joules", "device_seconds"))
    records = [one for paths in runs for one in read_records(paths)]
    if None not in records:
        made = [one for one in records if one and one.first_images]
        found = [*([old.manifest] if old else []), *made]
        for name in used:
            values = [getattr(one, name) for one in found]
            used[name] = sum(values) if values and None not in values else None
    return used


def _parts(
    plan: Plan, shards: Mapping[int, Path], options: MergeOptions, advance: Advance
) -> Iterator[Part]:
    """Yield the parts, of whole shards and at least ``part_bytes`` or ``PART_IMAGES`` each."""
    files = [(path, path.stat()) for path in shards.values()]
    least = [options.part_bytes * plan.shards[index].images // PART_IMAGES for index in shards]
    weights = [max(stat.st_size, one) for (_, stat), one in zip(files, least, strict=True)]
    for first, last in cut_parts(weights, options.part_bytes):
        group = files[first:last]
        # After a kill, it decides whether these are the same files as before.
        state = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in group]
        paths = [path for path, _ in group]
        write = partial(_write_part, shards=paths, decode=options.decode, advance=advance)
        yield {"shards": state, "decoded": options.decode}, write, plan.digest


def _write_part(
    path: Path, attributes: Attributes, shards: list[Path], decode: bool, advance: Advance
) -> str:
    with ExitStack() as stack:
        files = [stack.enter_context(ImageFile(shard)) for shard in shards]
        try:
            return join(path, attributes, [(f, 0, len(f)) for f in files], advance, decode)
        except IntegrityError as error:
            problems = list[str]()
            for file in files:  # all that are damaged, not the first alone
                try:
                    file.check(decode)
                except IntegrityError as damage:
                    problems.append(f"{damage}; {_remedy(file.path)}")
            raise IntegrityError("\n".join(problems) or str(error)) from None

"""Shards become a release: checked, copied without decoding, and recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdwn.errors import IntegrityError, MisplacedError, UsageError, command, shell
from sdwn.io import PART_BYTES, Advance
from sdwn.jobs.journal import read_journal
from sdwn.models.lock import common_revision
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import ImageSpec, Plan, Shard, image_settings, read_plan
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import StagedFolder, build, require_free
from sdwn.releases.writer import Origin, ReleaseWriter, cut
from sdwn.storage.columns import COLUMNS, Table, texts
from sdwn.storage.shards import Expected, ImageFile, RowRange, join
from sdwn.wordnet.taxonomy import read_taxonomy


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How to merge: parts of at least so many bytes; partial runs too; decode every image."""

    part_bytes: int = PART_BYTES
    allow_missing: bool = False
    decode: bool = False


def merge(
    runs: Sequence[RunPaths],
    release: ReleasePaths,
    options: MergeOptions = MergeOptions(),
    advance: Advance = lambda _: None,
) -> Release:
    """Write the release of one or several run folders of the same plan.

    A release of this plan that stands there already is kept; one that a kill left unfinished
    is gone on with. ``advance`` is told how many images are done.

    Raises:
        UsageError: the folders hold different plans, or another release stands there.
        IntegrityError: a shard is missing, duplicate, damaged or foreign; each is named.
    """
    plan = _common_plan(runs)
    revision = common_revision(runs, plan.config.model)
    if _is_new(release):
        shards = _locate(runs, plan, options.allow_missing, revision)
        origin = _origin(plan, shards, _taxonomy(runs))

        def fill(staged: StagedFolder) -> None:
            _fill(staged, origin, shards, options, advance)

        if build(release.root, {"merge": plan.digest}, fill):
            return Release(release.root)
    found = _existing(release, runs, plan, options.allow_missing)
    advance(len(found))
    return found


def _is_new(release: ReleasePaths) -> bool:
    if release.manifest.exists():
        return False
    try:
        require_free(release.root)
    except UsageError:
        if release.manifest.exists():
            return False  # another merge finished it just now
        raise
    return True


def _common_plan(runs: Sequence[RunPaths]) -> Plan:
    folders = [paths.root.resolve() for paths in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"{folder} is given twice; name each run folder once")
    plans = [read_plan(paths) for paths in runs]
    for paths, plan in zip(runs, plans, strict=True):
        if plan.digest != plans[0].digest:
            raise UsageError(
                f"{paths.root} has plan {plan.digest[:12]}, {runs[0].root} has "
                f"{plans[0].digest[:12]}; only runs of the same plan make one release"
            )
    return plans[0]


def _existing(
    paths: ReleasePaths, runs: Sequence[RunPaths], plan: Plan, allow_missing: bool
) -> Release:
    release = Release(paths.root)
    found = release.manifest
    if found.plan_digest != plan.digest:
        raise UsageError(
            f"{paths.root} holds the release of another plan "
            f"({str(found.plan_digest)[:12]}, this is {plan.digest[:12]}); choose another folder"
        )
    if found.selection:
        raise UsageError(f"{paths.root} holds a part of the plan ({found.selection}); {_INSTEAD}")
    if found.missing:
        made = set[int]().union(*(run.done_shards() for run in runs))
        absent = {row.shard for row in plan.synsets} - set(_shards_of(release, plan))
        if absent & made:
            raise UsageError(
                f"{paths.root} holds an incomplete release, and {len(absent & made)} of the "
                f"shards that it lacks are made by now; {_INSTEAD}"
            )
        if absent and not allow_missing:
            raise IntegrityError("\n".join(_missing(runs, sorted(absent))))
    return release


def _shards_of(release: Release, plan: Plan) -> Iterator[int]:
    present = set(release.metadata["wnid"].unique().to_pylist())
    return (row.shard for row in plan.synsets if row.wnid in present)


_INSTEAD = "choose another folder, or remove that one first"


def _locate(
    runs: Sequence[RunPaths], plan: Plan, allow_missing: bool, revision: str | None
) -> dict[int, Path]:
    """Find each shard's one file, structure and origin checked; ``revision`` is the locked one.

    Raises:
        IntegrityError: with every problem, a line each.
    """
    places: dict[int, list[Path]] = {shard.index: [] for shard in plan.shards}
    problems: list[str] = []
    for paths in runs:
        foreign: dict[str, list[int]] = {}
        for index in sorted(paths.done_shards()):
            path = paths.shard(index)
            try:
                _check_shard(path, plan, index, revision)
            except MisplacedError as error:
                if error.plan_digest == plan.digest:
                    problems.append(f"{error}; move it away, and make it with: {_make(paths)}")
                else:
                    foreign.setdefault(error.plan_digest, []).append(index)
            except IntegrityError as error:
                problems.append(f"{error}; {_cure(path)}")
            places.setdefault(index, []).append(path)
        problems += [_foreign(paths, plan, *found) for found in foreign.items()]
    if not allow_missing or not any(places.values()):
        problems += _missing(runs, [index for index, found in places.items() if not found])
    for index, found in places.items():
        if len(found) > 1:
            copies = ", ".join(map(str, found))
            problems.append(f"shard {index}: duplicate: {copies}; remove all but one")
    if problems:
        raise IntegrityError("\n".join(problems))
    return {index: found[0] for index, found in places.items() if found}


def _foreign(paths: RunPaths, plan: Plan, digest: str, indices: list[int]) -> str:
    """Return what to do about shards of another plan; they may be whole, so nothing is deleted."""
    theirs = f"plan {digest[:12]}" if digest else "no plan"
    found = f"{paths.shards}: foreign: {_shards(indices)} of {theirs}"
    submitted = any(submission.plan == digest for submission in read_journal(paths))
    if submitted or len(indices) == len(paths.done_shards()):
        return (
            f"{found}: {paths.plan.name} was replaced, and is of plan {plan.digest[:12]} now; "
            f"bring back the {paths.plan.name} and {paths.synsets.name} that they were made for, "
            "and plan the other config into a new folder"
        )
    return (
        f"{found}, not {plan.digest[:12]}; move them to a run folder of their own plan, and make "
        f"this plan's with: {_make(paths)}"
    )


def _missing(runs: Sequence[RunPaths], indices: list[int]) -> Iterator[str]:
    slices = {paths: read_plan(paths).slice for paths in runs}
    owners = {index: next((p for p in runs if index in slices[p]), None) for index in indices}
    instead = "or leave them out with: --allow-missing"
    for paths in runs:
        if own := [index for index, owner in owners.items() if owner == paths]:
            yield f"{_shards(own)} missing; make them with: {_make(paths)}; {instead}"
    if rest := [index for index, owner in owners.items() if owner is None]:
        shares = ", ".join(f"{paths.root} has the slice {slices[paths]}" for paths in runs)
        yield (
            f"{_shards(rest)} missing: {shares} of the plan; name the other slices' folders "
            f"too, {instead}"
        )


def _shards(indices: list[int]) -> str:
    if len(indices) == 1:
        return f"shard {indices[0]}"
    return f"{len(indices)} shards ({ranges(indices)})"


def ranges(indices: Iterable[int]) -> str:
    """Write indices briefly.

    >>> ranges([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _check_shard(path: Path, plan: Plan, index: int, revision: str | None) -> None:
    """Check a shard's record and its rows against the plan, and who made it.

    Raises:
        MisplacedError: it is of another plan, or another shard.
        IntegrityError: it is damaged, or has other rows or weights.
    """
    images = plan.shard_images(plan.shards[index]) if index < len(plan.shards) else 0
    with ImageFile(path, Expected(plan.digest, index, images)) as file:
        _check_rows(file, plan, plan.shards[index])
        _check_weights(file, revision)


def _cure(path: Path) -> str:
    return f"make it again with: {shell('rm', path)} && {_make(RunPaths(path.parent.parent))}"


def _make(paths: RunPaths) -> str:
    # The profile of the last submission, where there was one.
    return command("retry" if paths.submissions.exists() else "submit", paths.root, "--wait")


def _check_rows(file: ImageFile, plan: Plan, shard: Shard) -> None:
    rows = file.rows()
    absent = [column.name for column in COLUMNS if column.of_run and column.name not in rows]
    if absent:
        raise IntegrityError(f"{file.path}: expected the column {absent[0]}, found none")
    if list(_identities(rows)) != [planned_values(spec, plan) for spec in plan.specs(shard)]:
        raise IntegrityError(f"{file.path}: its rows are not those that the plan asks for")


def _check_weights(file: ImageFile, revision: str | None) -> None:
    made_with = {session.get("revision") for session in file.sessions}
    if revision is not None and (others := made_with - {revision}):
        raise IntegrityError(
            f"{file.path}: made with the weights {', '.join(map(str, others))}, and the run is "
            f"locked to {revision}"
        )


def planned_values(spec: ImageSpec, plan: Plan) -> tuple[Any, ...]:
    """Give what the plan says of an image."""
    size = plan.config.generation.width, plan.config.generation.height
    return (spec.wnid, spec.synset, spec.number, spec.seed, spec.prompt, *size)


def _identities(rows: Table) -> Iterator[tuple[Any, ...]]:
    columns = ("wnid", "synset", "number", "seed", "prompt", "width", "height")
    values = (texts(rows[c]) if rows[c].dtype.kind == "S" else rows[c].tolist() for c in columns)
    return zip(*values, strict=True)


def _fill(
    staged: StagedFolder,
    origin: Origin,
    shards: Mapping[int, Path],
    options: MergeOptions,
    advance: Advance,
) -> None:
    with ReleaseWriter(staged, origin) as writer:
        for group in _groups(list(shards.values()), options.part_bytes):

            def write(path: Path, attributes: Mapping[str, Any], group: list[Path] = group) -> str:
                return _write_part(path, attributes, group, options.decode, advance)

            if not writer.add_part({**_state(group), "decoded": options.decode}, write):
                advance(_images(group))


def _taxonomy(runs: Sequence[RunPaths]) -> pa.Table | None:
    # Runs of one plan have the same synsets: any one's has all. Old runs have none.
    found = next((paths.taxonomy for paths in runs if paths.taxonomy.exists()), None)
    return None if found is None else read_taxonomy(found)


def _origin(plan: Plan, shards: Mapping[int, Path], taxonomy: pa.Table | None) -> Origin:
    missing = [shard for shard in plan.shards if shard.index not in shards]
    return Origin(
        kind="run",
        catalog=plan.catalog,
        synsets=plan.synsets,
        plan_digest=plan.digest,
        settings=image_settings(plan.config),
        evaluation=plan.config.evaluation.model_dump(mode="json"),
        missing=tuple(row for shard in missing for row in plan.synsets[shard.start : shard.stop]),
        missing_shards=ranges(shard.index for shard in missing),
        taxonomy=taxonomy,
    )


def _groups(paths: list[Path], size: int) -> list[list[Path]]:
    """Put whole shards together to parts of at least ``size`` bytes."""
    return [paths[a:b] for a, b in cut([path.stat().st_size for path in paths], size)]


def _state(group: list[Path]) -> dict[str, Any]:
    """Tell whether these are the same files as before."""
    stats = [(path, path.stat()) for path in group]
    return {"shards": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]}


def _images(group: list[Path]) -> int:
    total = 0
    for path in group:
        with ImageFile(path) as file:
            total += len(file)
    return total


def _write_part(
    path: Path,
    attributes: Mapping[str, Any],
    shards: list[Path],
    decode: bool,
    advance: Advance,
) -> str:
    with ExitStack() as stack:
        files = [stack.enter_context(ImageFile(shard)) for shard in shards]
        selections = [RowRange(file, 0, len(file)) for file in files]
        problems: list[str] | None = [] if decode else None
        try:
            digest = join(path, attributes, selections, advance, problems)
        except IntegrityError as error:
            raise IntegrityError("\n".join(_damaged(files)) or str(error)) from None
        if problems:
            raise IntegrityError("\n".join((*problems, *_cures(files, problems))))
        return digest


def _cures(files: list[ImageFile], problems: list[str]) -> Iterator[str]:
    for file in files:
        if any(problem.startswith(f"{file.path}: ") for problem in problems):
            yield f"{file.path}: {_cure(file.path)}"


def _damaged(files: list[ImageFile]) -> Iterator[str]:
    for file in files:
        try:
            file.check()
        except IntegrityError as error:
            yield f"{error}; {_cure(file.path)}"


def merged_summary(release: Release) -> dict[str, Any]:
    """Say what a release holds."""
    manifest = release.manifest
    found = manifest.model_dump(include={"images", "synsets", "bytes", "statuses"})
    if manifest.missing:
        found["missing_images"] = manifest.missing.images
    return {**found, "release": str(release.paths.root)}

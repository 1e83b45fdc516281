"""Shards of predictions become one table, held row for row against the release."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from sdwn.errors import IntegrityError, MisplacedError, shell
from sdwn.paths import EvaluationPaths, RunPaths
from sdwn.planning.plan import Shard
from sdwn.prediction.plan import Judging, judged_images
from sdwn.prediction.predictions import Predictions, Source, disagreements, read_predictions
from sdwn.releases.release import Release

# What may differ between the tasks of one judging: the rest of a classifier's record does not.
OF_A_TASK = ("device", "dtype", "versions")
NAMED = 20


def sound_predictions(release: Release, paths: EvaluationPaths, judging: Judging) -> Predictions:
    """Read an evaluation's predictions, held against the judging and the release.

    Raises:
        IntegrityError: they are missing, damaged, or of something else.
    """
    found = read_predictions(paths.predictions, judging.images)
    if found.source.judging != judging.digest:
        raise IntegrityError(
            f"{paths.predictions}: of release {found.source.release[:12]}, judging "
            f"{found.source.judging[:12]}; expected {judging.release[:12]}, {judging.digest[:12]}"
        )
    if problems := disagreements(found.table, judged_images(release, judging).metadata):
        raise IntegrityError(f"{paths.predictions}: {'; '.join(problems)}")
    return found


def drop_damaged(release: Release, work: RunPaths, judging: Judging) -> Iterator[str]:
    """Remove finished shards that are damaged, to be judged again; yield what is wrong with each.

    What is whole and only in the wrong place is left there.
    """
    images = judged_images(release, judging).metadata
    done = work.done_shards()
    for shard in judging.shards:
        if shard.index in done:
            try:
                _checked(work, judging, shard, images, ())
            except MisplacedError:
                continue
            except IntegrityError as error:
                work.shard(shard.index).unlink(missing_ok=True)
                yield str(error)


def merged(release: Release, work: RunPaths, judging: Judging) -> Predictions:
    """Put a judging's finished shards together.

    Raises:
        IntegrityError: with every problem, a line each: shards that are missing, damaged or
            foreign; images that are missing, foreign, there twice, or in another order.
    """
    problems = [*_missing(work, judging), *_foreign(work, judging)]
    images = judged_images(release, judging).metadata
    found: list[Predictions] = []
    for shard in judging.shards:
        path = work.shard(shard.index)
        if path.exists():
            try:
                found.append(_checked(work, judging, shard, images, found[:1]))
            except MisplacedError as error:
                problems.append(f"{error}; move it away, then: {judging.command(work)}")
            except IntegrityError as error:
                problems.append(
                    f"{error}; judge it again: {shell('rm', path)} && {judging.command(work)}"
                )
    if problems:
        raise IntegrityError("\n".join(problems))
    return Predictions(pa.concat_tables(one.table for one in found), _joined(judging, found))


def _missing(work: RunPaths, judging: Judging) -> Iterator[str]:
    done = work.done_shards()
    if absent := [shard.index for shard in judging.shards if shard.index not in done]:
        names = ", ".join(map(str, absent[:NAMED])) + ", ..." * (len(absent) > NAMED)
        yield (
            f"{work.root}: {len(absent)} of {len(judging.shards)} shards of predictions missing "
            f"({names}); judge them with: {judging.command(work)}"
        )


def _foreign(work: RunPaths, judging: Judging) -> Iterator[str]:
    for index in sorted(work.done_shards() - {shard.index for shard in judging.shards}):
        path = work.shard(index)
        yield f"{path}: the judging has no such shard; move it away"


def _checked(
    work: RunPaths, judging: Judging, shard: Shard, images: pa.Table, first: Sequence[Predictions]
) -> Predictions:
    path = work.shard(shard.index)
    found = read_predictions(path, judging.images)
    source = found.source
    if source.judging != judging.digest:
        raise MisplacedError(
            f"{path}: foreign: of judging {source.judging[:12]}, expected {judging.digest[:12]}",
            source.judging,
        )
    if (source.start, source.stop) != (shard.start, shard.stop):
        raise MisplacedError(
            f"{path}: expected images {shard.start} to {shard.stop - 1} of this judging, found "
            f"{source.start} to {source.stop - 1}",
            source.judging,
        )
    if problems := disagreements(found.table, images.slice(shard.start, len(found.table))):
        raise IntegrityError(f"{path}: {'; '.join(problems)}")
    for other in first:
        expected, classifier = other.source.classifier, source.classifier
        for name in sorted({*expected, *classifier} - set(OF_A_TASK)):
            if expected.get(name) != classifier.get(name):
                raise IntegrityError(
                    f"{path}: judged with another {name} than the shards before it"
                )
    return found


def _joined(judging: Judging, found: Sequence[Predictions]) -> Source:
    """Describe all shards as one: the first one's classifier, and every device."""
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in (one for shard in found for one in shard.source.judged_on):
        key = one["device"], one["dtype"], one["batch_size"]
        kind = kinds.setdefault(key, {**one, "images": 0})
        kind["images"] += one["images"]
    return Source(
        release=judging.release,
        judging=judging.digest,
        start=0,
        stop=judging.images,
        classifier=found[0].source.classifier,
        judged_on=list(kinds.values()),
    )

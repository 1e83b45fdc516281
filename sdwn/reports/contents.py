"""The contents of a release, and what was computed of it, from its own records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import pyarrow as pa

from sdwn.evaluation.record import evaluations
from sdwn.measures.record import all_records
from sdwn.models.builtin import terms
from sdwn.paths import Measured
from sdwn.planning.plan import Plan
from sdwn.prediction.table import feature_names
from sdwn.releases.merge import merged_summary
from sdwn.releases.release import Release
from sdwn.releases.writer import LICENCES

# Of a manifest as it is.
RECORDED = "name origin source created sdwn imagenet_classes energy_joules device_seconds".split()
# Of a task run's record, what differs from one to the next.
OF_A_TASK_RUN = ("job", "started", "batch")


def release_contents(release: Release) -> dict[str, Any]:
    """List what a release is made of; what no record tells is None or empty."""
    manifest, paths, runs = release.manifest, release.paths, list[dict[str, Any]]()
    plans = [release.plan(one.digest) for one in manifest.plans]
    for part in (one.file for one in manifest.files if one.file.endswith(".h5")):
        with release.open_part(part) as file:
            runs += file.task_runs
    keys = dict.fromkeys(key for run in runs for key in run)
    values = {key: sorted({str(run[key]) for run in runs if run.get(key)}) for key in keys}
    models = dict.fromkeys(plan.config.model.name for plan in plans)
    records = all_records(release)
    licences = [LICENCES.get(model) or terms(model) for model in models]
    return {
        **merged_summary(release),
        **{name: getattr(manifest, name) for name in RECORDED},
        "sha256": release.digest,
        "plans": [
            {
                **one.model_dump(include={"digest", "catalog", "images"}),
                **plan.config.model_dump(mode="json", include={"prompt", "seed", "generation"}),
            }
            for one, plan in zip(manifest.plans, plans, strict=True)
        ],
        "licence": manifest.licence or ", ".join(filter(None, licences)) or None,
        "started": min(values.get("started", []), default=None),
        "made_with": {key: values[key] for key in keys if key not in OF_A_TASK_RUN},
        "resumed": _count_resumed(release.metadata, plans),
        "evaluations": sorted(evaluations(paths)),
        "features": feature_names(paths),
        **{kind: [name for of, name in records if of == kind] for kind in get_args(Measured)},
    }


def _count_resumed(images: pa.Table, plans: Sequence[Plan]) -> int | None:
    """Count the attempts at shards, beyond each one's first, that made some image."""
    if "attempt" not in images.column_names:
        return None
    texts = [images[name].cast(pa.string()) for name in ("plan", "id")]
    table = pa.table([*texts, images["attempt"]], ["plan", "id", "attempt"])
    found = table.group_by(["plan", "id"]).aggregate([("attempt", "max")]).to_pylist()
    last: dict[tuple[str, str], int] = {(r["plan"], r["id"]): r["attempt_max"] for r in found}
    return sum(
        max(last.get((plan.digest, one.id), 1) for one in plan.concepts[shard.start : shard.stop])
        - 1
        for plan in plans
        for shard in plan.shards
    )

"""Features of a release, made in this process, or merged once tasks have made them."""

from __future__ import annotations

from typing import Any

from sdwn.io import Advance, OnMessage, ignore
from sdwn.jobs.submit import submission_lock
from sdwn.paths import RunPaths
from sdwn.prediction.features import VECTOR
from sdwn.prediction.plan import FeaturePlan, open_feature_plan
from sdwn.prediction.task import complete_shards, conclude_table
from sdwn.releases.release import Release


def encode_release(
    release: Release,
    model: str,
    advance: Advance = lambda _: None,
    on_message: OnMessage = ignore,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Encode a release's images in this process; return what `conclude_features` returns.

    Shards that are finished are kept, and so are undamaged features of this release and encoder.
    """
    work, plan = open_feature_plan(release, model)
    complete_shards(work, release, plan, advance, on_message, batch_size)
    return conclude_features(release, work, plan, on_message)


def conclude_features(
    release: Release, work: RunPaths, plan: FeaturePlan, on_message: OnMessage
) -> dict[str, Any]:
    """Merge the shards of features, unless they are merged already; return what there is."""
    with submission_lock(work, on_message):
        found = conclude_table(release, work, plan)
    path = plan.table_file(work)
    return {
        "features": plan.name,
        "model": plan.model,
        "images": len(found.table),
        "dimensions": found.table.schema.field(VECTOR).type.list_size,
        "bytes": path.stat().st_size,
        "path": str(path),
    }

"""Regenerate an image of a release from its record, and compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from PIL import Image

from sdwn.errors import IntegrityError, UsageError, command
from sdwn.generation.batching import load_sampler
from sdwn.models.weights import hub_commit, obtain_weights
from sdwn.releases.release import Release, image_name
from sdwn.storage.images import decode, encode, pixel_difference

# Root mean square of the difference, in steps of 8-bit colour. Half precision on another
# device rounds differently and stays below; another seed or prompt is off by ten times as much.
TOLERANCE = 4.0

# What in the record of a task run may change pixels; the rest says where and when.
_DECISIVE = (
    *("model", "revision", "added", "pipeline", "scheduler", "precision", "device"),
    *("torch", "diffusers", "transformers", "accelerate", "numpy", "python"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """An image compared with the same one regenerated; differences in steps of 8-bit colour."""

    synset: str
    number: int
    verdict: str  # equal, within tolerance or different
    rms: float  # root mean square of the difference
    largest: int
    tolerance: float
    batch_size: int
    place: int
    status: str
    reasons: list[str]  # what has changed since the image was made


def regenerate(
    release: Release,
    synset: str,
    number: int,
    model: str | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Comparison, Image.Image]:
    """Sample an image's batch again, on this process's device, and compare.

    ``synset`` may be an id, or a label, synset, wnid or lemma that only one concept has;
    ``number`` counts its images from 0; ``model`` is where the pipeline is now, if it has moved.
    """
    if not release.manifest.plans:
        raise UsageError(
            f"{release.paths.root} was imported: how its images were made is not recorded"
        )
    id_ = release.find_one(synset)
    rows = {row["number"]: row for row in release.rows(id_)}
    if number not in rows:
        name = release.concepts[id_].name
        raise UsageError(f"{name} has no image {number}; it has {min(rows)} to {max(rows)}")
    row = rows[number]
    then = release.provenance(row)["task_run"] or {}

    # The config of the image's plan, with the model where it is now, or at the image's commit.
    plan = release.plan(row["plan"])
    commit = hub_commit(then.get("revision"))
    changed: dict[str, Any] = {"revision": commit} if commit else {}
    if model is not None:
        # A revision is the hub's; a folder has none.
        changed = {"name": model, "revision": None}
    named = plan.config.model.model_copy(update=changed)
    config = plan.config.model_copy(update={"model": named})

    # The specs of its batch, by its row and the plan's table.
    place = row["place"]
    position = pc.index(plan.table["id"], id_).as_py()
    shard = next(one for one in plan.shards if position < one.stop)
    specs = list(plan.specs(shard))[row["batch"] : row["batch"] + row["batch_size"]]
    planned = [(s.concept.id, s.number, s.seed, s.prompt) for s in specs][place : place + 1]
    if planned != [(row["id"], row["number"], row["seed"], row["prompt"])]:
        raise IntegrityError(
            f"{image_name(row)}: its record does not fit the release's table of concepts; see "
            f"what else is wrong: {command('verify', release.paths.root)}"
        )

    weights = None if config.model.builtin == "noise" else obtain_weights(config)
    sampler = load_sampler(config, weights, specs)
    if row.get("vae_slicing"):
        sampler.slice_vae()
    made = sampler.in_float32(specs) if row.get("retried_fp32") else sampler.sample(specs)
    sample = sampler.check(made)[place]

    height, width, _ = sample.pixels.shape
    payload = encode(sample.pixels, config.storage.codec, config.storage.quality)
    image = decode(payload, row["codec"], width, height)
    rms, largest = pixel_difference(release.image(row), image)
    if sample.status != row["status"] or rms > tolerance:
        verdict = "different"
    else:
        verdict = "within tolerance" if largest else "equal"

    now = sampler.provenance
    pairs = [("status", row["status"], sample.status)] + [
        (key, then.get(key, "unknown"), now.get(key, "unknown")) for key in _DECISIVE
    ]
    compared = Comparison(
        synset=release.concepts[id_].name,
        **{key: row[key] for key in ("number", "batch_size", "place", "status")},
        verdict=verdict,
        rms=round(rms, 4),
        largest=largest,
        tolerance=tolerance,
        reasons=[f"{key}: {old} then, {new} now" for key, old, new in pairs if old != new],
    )
    return compared, image

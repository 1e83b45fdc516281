"""Make an image of a release again from its record, and say whether it came out the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdwn.config import CatalogConfig, RunConfig, validated
from sdwn.errors import IntegrityError, UsageError, command
from sdwn.generation.batching import ImageSampler, Sample, load_sampler
from sdwn.models.weights import is_commit
from sdwn.planning.plan import ImageSpec, Plan
from sdwn.releases.release import Release
from sdwn.storage.images import decode, encode

# Root mean square of the difference, in steps of 8-bit colour. Half precision on another
# device rounds otherwise and stays below; another seed or prompt is off by ten times as much.
TOLERANCE = 4.0

# What of a session may change pixels; the rest says where and when.
_DECISIVE = (
    *("model", "revision", "pipeline", "scheduler", "precision", "device"),
    *("torch", "diffusers", "transformers", "accelerate", "numpy", "python"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """An image beside the same one made again.

    ``verdict`` is ``equal``, ``within tolerance`` or ``different``; ``rms`` the root mean
    square and ``largest`` the largest difference, in steps of 8-bit colour. ``reasons`` say
    what is not as it was when the image was made.
    """

    synset: str
    number: int
    verdict: str
    rms: float
    largest: int
    tolerance: float
    batch_size: int
    place: int
    status: str
    reasons: list[str]

    @property
    def same(self) -> bool:
        """Whether it is the same image but for rounding."""
        return self.verdict != "different"

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which image to make again, and how close it must come.

    ``synset`` is a name or wnid, or a lemma that only one synset has; ``number`` counts its
    images from 0. ``model`` is where the pipeline lies now, if not where it was. Up to
    ``tolerance``, a root mean square in steps of 8-bit colour, images are the same.
    """

    synset: str
    number: int
    model: str | None = None
    tolerance: float = TOLERANCE


def regenerate(release: Release, wanted: Wanted) -> tuple[Comparison, Image.Image]:
    """Sample an image's batch again, on this process's device, and compare.

    Returns:
        The comparison, and the new image as it was encoded.

    Raises:
        UsageError: there is no such image, or it was imported.
        SdwnError: the pipeline cannot be loaded here.
    """
    row = _record(release, wanted.synset, wanted.number)
    recorded = release.provenance(row)["session"] or {}
    plan = _plan(release, wanted.model, recorded.get("revision"))
    specs = _batch(release, plan, row)
    sampler = load_sampler(plan.config)
    sample = _sample(sampler, specs, row)
    height, width, _ = sample.pixels.shape
    storage = plan.config.storage
    payload = encode(sample.pixels, storage.codec, storage.quality)
    image = decode(payload, row["codec"], width, height)
    reasons = [*_status(row, sample), *_differences(recorded, sampler.provenance)]
    difference = np.abs(release.array(row).astype(np.int16) - np.asarray(image))
    return _compared(row, difference, reasons, wanted.tolerance), image


def _record(release: Release, synset: str, number: int) -> dict[str, Any]:
    if release.manifest.settings is None:
        raise UsageError(
            f"{release.paths.root} was imported: how its images were made is not recorded"
        )
    rows = release.rows(release.find_one(synset))
    for row in rows:
        if row["number"] == number:
            return row
    numbers, name = sorted(row["number"] for row in rows), rows[0]["synset"]
    raise UsageError(f"{name} has no image {number}; it has {numbers[0]} to {numbers[-1]}")


def _plan(release: Release, model: str | None, revision: Any) -> Plan:
    """Give the release's plan, with the model where it is now, or the commit that made an image."""
    manifest = release.manifest
    assert manifest.settings is not None
    catalog = CatalogConfig(name=manifest.catalog)
    settings = {**manifest.settings, "catalog": catalog.model_dump()}
    config = validated(RunConfig, settings, source=str(release.paths.manifest))
    changed: dict[str, Any] = {"revision": revision} if is_commit(revision) else {}
    if model is not None:
        # A revision is the hub's; a folder has none.
        changed = {"name": model, "revision": None}
    if changed:
        config = config.model_copy(update={"model": config.model.model_copy(update=changed)})
    return Plan(manifest.catalog, config, tuple(release.synsets.values()), manifest.plan_digest)


def _batch(release: Release, plan: Plan, row: dict[str, Any]) -> list[ImageSpec]:
    """Give the batch's images, whose places the row and the plan's table tell."""
    shard = plan.shards[next(s.shard for s in plan.synsets if s.wnid == row["wnid"])]
    batch = list(plan.specs(shard))[row["batch"] : row["batch"] + row["batch_size"]]
    spec = batch[row["place"]] if row["place"] < len(batch) else None
    if spec is None or (spec.wnid, spec.number, spec.seed, spec.prompt) != (
        *(row["wnid"], row["number"], row["seed"], row["prompt"]),
    ):
        raise IntegrityError(
            f"{row['synset']} {row['number']}: its record and the release's table of synsets do "
            f"not fit one another; see what else is wrong: {command('verify', release.paths.root)}"
        )
    return batch


def _sample(sampler: ImageSampler, specs: list[ImageSpec], row: dict[str, Any]) -> Sample:
    if row.get("vae_slicing"):
        sampler.slice_vae()
    if row.get("redone"):
        return sampler.check([sampler.in_float32(specs[0])])[0]
    place: int = row["place"]
    return sampler.check(sampler.sample(specs))[place]


def _compared(
    row: dict[str, Any], difference: NDArray[np.int16], reasons: list[str], tolerance: float
) -> Comparison:
    rms = float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
    if any(reason.startswith("status") for reason in reasons) or rms > tolerance:
        verdict = "different"
    else:
        verdict = "within tolerance" if difference.any() else "equal"
    return Comparison(
        **{key: row[key] for key in ("synset", "number", "batch_size", "place", "status")},
        verdict=verdict,
        rms=round(rms, 4),
        largest=int(difference.max()),
        tolerance=tolerance,
        reasons=reasons,
    )


def _status(row: dict[str, Any], sample: Sample) -> list[str]:
    if sample.status == row["status"]:
        return []
    return [f"status: {row['status']} then, {sample.status} now"]


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key}: {then.get(key, 'unknown')} then, {now.get(key, 'unknown')} now"
        for key in _DECISIVE
        if (key in then or key in now) and then.get(key) != now.get(key)
    ]

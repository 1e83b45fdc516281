"""Evaluations side by side: the same classes under several conditions, paired with the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn import __version__
from sdwn.errors import UsageError
from sdwn.evaluation.metrics import measure_predictions
from sdwn.io import now
from sdwn.releases.release import Release
from sdwn.reports.pairing import Difference, difference, holm, images_differ, rates_differ
from sdwn.wordnet.taxonomy import Taxonomy

FORMAT = "sdwn-comparison"
FORMAT_VERSION = 1
# A class whose adjusted p is at most this is said to differ.
LEVEL = 0.05
# What tells one judge from another; the rest of its record says where and with what it ran.
JUDGE = ("model", "checkpoint_sha256", "weights", "input_size", "crop_pct", "interpolation")

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Side:
    """One evaluation of a comparison, under the name that the comparison calls it."""

    name: str
    release: Release
    record: Mapping[str, Any]
    predictions: pa.Table

    @property
    def judge(self) -> dict[str, Any]:
        """What identifies its classifier."""
        return {key: self.record["classifier"].get(key) for key in JUDGE}

    @cached_property
    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Images, and those right by top-1 and top-5, of each ImageNet class by wnid."""
        return {
            row["wnid"]: (row["images"], row["correct"], row["correct_top5"])
            for row in self.record["classes"]
        }

    @cached_property
    def subtree(self) -> dict[str, float]:
        """The mean probability inside each synset's scope, by wnid."""
        means = self.predictions.group_by("wnid").aggregate([("subtree_probability", "mean")])
        values = means["subtree_probability_mean"].to_pylist()
        return dict(zip(means["wnid"].to_pylist(), values, strict=True))

    def taken(self, wnids: Sequence[str]) -> tuple[Counts, Counts, Counts]:
        """Give images, right by top-1 and by top-5, in the order of these classes."""
        rows = np.array([self.counts[wnid] for wnid in wnids], dtype=np.int64)
        return rows[:, 0], rows[:, 1], rows[:, 2]

    def figures(self, wnids: Sequence[str]) -> dict[str, Any]:
        """Compute the figures over these classes alone."""
        inside = pc.is_in(self.predictions["wnid"], pa.array(wnids, pa.string()))
        return measure_predictions(self.predictions.filter(inside)).figures


def compare(sides: Sequence[Side], taxonomy: Taxonomy) -> dict[str, Any]:
    """Compare each evaluation with the first, over the classes that all of them have.

    Raises:
        UsageError: fewer than two, other judges of other images, or no class in common.
    """
    _require_comparable(sides)
    wnids = _common(sides)
    first, others = sides[0], sides[1:]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": now(),
        "sdwn": __version__,
        "sides": [_described(side, wnids) for side in sides],
        "settings": differing_settings([side.release.manifest.settings for side in sides]),
        "classes_in_common": len(wnids),
        "pairs": [_pair(first, other, wnids, taxonomy) for other in others],
        "classes": _classes(sides, wnids),
    }


def _require_comparable(sides: Sequence[Side]) -> None:
    if len(sides) < 2:
        raise UsageError("nothing to compare: give two releases or evaluations, or more")
    first = sides[0]
    for side in sides[1:]:
        same_images = side.release.digest == first.release.digest
        if side.judge != first.judge and not same_images:
            raise UsageError(
                f"{first.name} was judged by {first.judge['model']} and {side.name} by "
                f"{side.judge['model']}: of other images by another judge nothing follows; "
                "evaluate both by the same model"
                + ("" if first.judge["model"] != side.judge["model"] else " and weights")
            )
        if same_images and side.judge == first.judge:
            raise UsageError(
                f"{first.name} and {side.name} are the same images judged by the same model"
            )


def _common(sides: Sequence[Side]) -> list[str]:
    wnids = set.intersection(*(set(side.counts) for side in sides))
    if not wnids:
        names = " and ".join(side.name for side in sides)
        raise UsageError(f"{names} have no ImageNet-1k class in common")
    return sorted(wnids)


def _described(side: Side, wnids: Sequence[str]) -> dict[str, Any]:
    manifest = side.release.manifest
    return {
        "name": side.name,
        "release": side.release.digest,
        "catalog": manifest.name,
        "images": manifest.images,
        "synthetic": manifest.settings is not None,
        "classes_left_out": len(side.counts) - len(wnids),
        "classifier": side.record["classifier"],
        "figures": side.figures(wnids),
    }


def differing_settings(settings: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """List the settings of generation that are not the same everywhere, by dotted name.

    Those of imported pictures, which have none, are left out of the question.

    >>> plain, guided = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}
    >>> differing_settings([plain, None, guided])
    [{'setting': 'a.c', 'values': [2, None, 3]}]
    """
    flat = [None if one is None else dict(_flat(one)) for one in settings]
    known = [one for one in flat if one is not None]
    names = sorted({name for one in known for name in one})
    differ = [name for name in names if any(one.get(name) != known[0].get(name) for one in known)]
    return [
        {"setting": name, "values": [None if one is None else one.get(name) for one in flat]}
        for name in differ
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        inside = isinstance(value, Mapping)
        pairs += _flat(value, f"{prefix}{name}.") if inside else [(prefix + name, value)]
    return pairs


def _pair(first: Side, other: Side, wnids: Sequence[str], taxonomy: Taxonomy) -> dict[str, Any]:
    images, right, right5 = first.taken(wnids)
    other_images, other_right, other_right5 = other.taken(wnids)
    before, after = right / images, other_right / other_images
    q = rates_differ(right, images, other_right, other_images)
    return {
        "first": first.name,
        "second": other.name,
        "rate": asdict(difference(before, after)),
        "rate_top5": asdict(difference(right5 / images, other_right5 / other_images)),
        "subtree_probability": _subtree(first, other),
        "same_images": _same_images(first, other),
        "classes_better": int(((q <= LEVEL) & (after > before)).sum()),
        "classes_worse": int(((q <= LEVEL) & (after < before)).sum()),
        "groups": _groups(first, wnids, (before, after), taxonomy),
    }


def _subtree(first: Side, other: Side) -> dict[str, Any] | None:
    """Compare all synsets that both have images of, ImageNet classes or not.

    None of judges with other lists of classes: a synset's subtree is not the same for them, nor
    its share by chance.
    """
    lists = [side.record["classifier"].get("classes") for side in (first, other)]
    if lists[0] != lists[1]:
        return None
    wnids = sorted(first.subtree.keys() & other.subtree.keys())
    return asdict(difference([first.subtree[w] for w in wnids], [other.subtree[w] for w in wnids]))


def _same_images(first: Side, other: Side) -> dict[str, float] | None:
    """Compare two judges image by image; None where the images are not the same."""
    if first.release.digest != other.release.digest:
        return None
    key = ["wnid", "number"]
    columns = [*key, "label_rank"]
    left = first.predictions.select(columns).filter(pc.field("label_rank").is_valid())
    both = left.join(
        other.predictions.select(columns), keys=key, join_type="inner", right_suffix="_other"
    )
    ranks = (both[name].to_numpy() for name in ("label_rank", "label_rank_other"))
    one, two = (rank == 0 for rank in ranks)
    return images_differ(one, two)


def _groups(
    first: Side,
    wnids: Sequence[str],
    rates: tuple[NDArray[np.float64], NDArray[np.float64]],
    taxonomy: Taxonomy,
) -> list[dict[str, Any]]:
    """Compare within each group of the first evaluation; p is adjusted over the groups."""
    found: list[tuple[dict[str, Any], Difference | None]] = []
    for group in first.record["groups"]:
        inside = np.array([taxonomy.is_below(wnid, group["wnid"]) for wnid in wnids])
        values = [rate[inside] for rate in rates]
        row = {"name": group["name"], "wnid": group["wnid"], "classes": int(inside.sum())}
        found.append((row, difference(*values) if inside.any() else None))
        row["rates"] = [float(rate.mean()) if inside.any() else None for rate in values]
    adjusted = holm([one.p_value if one else None for _, one in found])
    return [
        {**row, **(asdict(one) if one else {}), "adjusted_p_value": p}
        for (row, one), p in zip(found, adjusted, strict=True)
    ]


def _classes(sides: Sequence[Side], wnids: Sequence[str]) -> list[dict[str, Any]]:
    """Give a row a class: images and right ones of each side, and p against the first."""
    counts = [side.taken(wnids) for side in sides]
    images, right, _ = counts[0]
    q = [rates_differ(right, images, other[1], other[0]) for other in counts[1:]]
    groups = {row["wnid"]: row.get("group") for row in sides[0].record["classes"]}
    return [
        {
            "wnid": wnid,
            "synset": sides[0].release.synsets[wnid].synset,
            "group": groups.get(wnid),
            "images": [int(count[0][place]) for count in counts],
            "correct": [int(count[1][place]) for count in counts],
            "adjusted_p_values": [float(p[place]) for p in q],
        }
        for place, wnid in enumerate(wnids)
    ]

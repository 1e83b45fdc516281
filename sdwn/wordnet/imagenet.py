"""The 1000 classes of ImageNet-1k: WordNet number to class index, in timm's order."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sdwn.errors import SdwnError

CLASSES = 1000
TABLE = Path("data", "_info", "imagenet_synsets.txt")
LEMMAS = Path("data", "_info", "imagenet_synset_to_lemma.txt")
# timm's other lists, by their number of classes: parts of ImageNet-21k.
LARGER = {
    11221: "imagenet21k_miil",
    11821: "imagenet12k",
    21841: "imagenet22k",
    21842: "imagenet22k_ms",
    21843: "imagenet21k_goog",
}


@cache
def class_wnids() -> tuple[str, ...]:
    """List the wnids in class order, from timm's own table; timm itself is not imported.

    Raises:
        SdwnError: timm or its table is missing, or the table is not 1000 distinct wnids.
    """
    path = _timm_folder() / TABLE
    try:
        wnids = tuple(path.read_text(encoding="ascii").split())
    except OSError as error:
        raise SdwnError(
            f"{path}: expected timm's table of ImageNet classes, found {error.strerror}; "
            "install timm again: pip install --force-reinstall timm"
        ) from None
    if len(set(wnids)) != CLASSES or len(wnids) != CLASSES:
        raise SdwnError(
            f"{path}: expected {CLASSES} distinct wnids, found {len(set(wnids))} "
            f"in {len(wnids)} lines; install timm again: pip install --force-reinstall timm"
        )
    return wnids


@cache
def classifier_wnids(classes: int) -> tuple[str, ...]:
    """List the wnids of a classifier's classes in order, known by their number.

    Raises:
        SdwnError: timm has no such list.
    """
    if classes == CLASSES:
        return class_wnids()
    if classes not in LARGER:
        known = ", ".join(map(str, (CLASSES, *LARGER)))
        raise SdwnError(f"no list of {classes} ImageNet classes; known are those of {known}")
    path = _timm_folder() / TABLE.with_name(f"{LARGER[classes]}_synsets.txt")
    try:
        return tuple(path.read_text(encoding="ascii").split())
    except OSError as error:
        raise SdwnError(f"{path}: cannot be read: {error.strerror}; install timm again") from None


@cache
def class_index() -> dict[str, int]:
    """Map each wnid to its class index, 0 to 999; errors as in `class_wnids`."""
    return {wnid: index for index, wnid in enumerate(class_wnids())}


@cache
def class_lemmas() -> dict[str, str]:
    """Map wnids to lemmas, joined by commas, from timm's own table; none where it is missing."""
    try:
        lines = (_timm_folder() / LEMMAS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {wnid: lemmas for wnid, _, lemmas in (line.partition("\t") for line in lines)}


def _timm_folder() -> Path:
    # Importing timm would import torch: seconds, which planning must not pay.
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        raise SdwnError("the ImageNet classes come from timm, which is missing: pip install timm")
    return Path(spec.origin).parent

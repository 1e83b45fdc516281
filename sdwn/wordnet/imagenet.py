"""The 1000 classes of ImageNet-1k: wnid to class index, in timm's order; and larger lists.

timm's own tables are read and timm is not imported, which would import torch.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sdwn.errors import SdwnError

CLASSES = 1000
# timm's other lists, by their number of classes: parts of ImageNet-21k.
LARGER = {
    11221: "imagenet21k_miil",
    11821: "imagenet12k",
    21841: "imagenet22k",
    21842: "imagenet22k_ms",
    21843: "imagenet21k_goog",
}


def class_wnids() -> tuple[str, ...]:
    """List the wnids of ImageNet-1k in class order; errors as in `classifier_wnids`."""
    return classifier_wnids(CLASSES)


@cache
def classifier_wnids(classes: int) -> tuple[str, ...]:
    """List the wnids of a classifier's classes in order; their number identifies the list."""
    if classes not in (CLASSES, *LARGER):
        known = ", ".join(map(str, (CLASSES, *LARGER)))
        raise SdwnError(f"no list of {classes} ImageNet classes; known are those of {known}")
    return tuple(_timm_table(f"{LARGER.get(classes, 'imagenet')}_synsets.txt"))


@cache
def class_index() -> dict[str, int]:
    """Map each wnid to its class index, 0 to 999; errors as in `class_wnids`."""
    return {wnid: index for index, wnid in enumerate(class_wnids())}


@cache
def _class_lemmas() -> dict[str, list[str]]:
    rows = (line.partition("\t") for line in _timm_table("imagenet_synset_to_lemma.txt"))
    return {wnid: lemmas.split(", ") for wnid, _, lemmas in rows}


def class_lemmas(wnid: str) -> list[str]:
    """List an ImageNet class's lemmas as people write them; the wnid where timm knows none."""
    return _class_lemmas().get(wnid, [wnid])


def class_name(wnid: str) -> str:
    """Return the first lemma of an ImageNet class; the wnid itself where timm's table has none."""
    return class_lemmas(wnid)[0]


@cache
def classes_by_name() -> dict[str, list[str]]:
    """Map the names of ImageNet-1k's classes, in lower case, to the wnids that have them."""
    found: dict[str, list[str]] = {}
    for wnid in class_wnids():
        lemmas = ", ".join(class_lemmas(wnid)).lower()
        for name in {lemmas, *lemmas.split(", ")}:
            found.setdefault(name, []).append(wnid)
    return found


def _timm_table(name: str) -> list[str]:
    """Return the lines of a file of timm's."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        raise SdwnError("the ImageNet classes come from timm, which is missing: pip install timm")
    path = Path(spec.origin).parent / "data/_info" / name
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SdwnError(
            f"{path}: expected timm's table of ImageNet classes, found {error.strerror}; "
            "install timm again: pip install --force-reinstall timm"
        ) from None

"""Use for training: probes on clusters whose answer is known, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sdwn.errors import UsageError
from sdwn.io import ignore
from sdwn.measures.record import read_records
from sdwn.measures.transfer import NAMES, ProbeImages, measure_transfer
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from conftest import Sdwn
from drawn import draw_features, noise_release

# Six ImageNet classes, of which four are animals, and one that only the first release has.
CLASSES = ["n02391049", "n02510455", "n02129165", "n02123045", "n04146614", "n03792782"]
DIMENSIONS = 16


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> dict[str, Release]:
    """Clusters of features around the same centres: near in training sets, apart in the test."""
    folder, found = tmp_path_factory.mktemp("transfer"), dict[str, Release]()
    sizes = {"synthetic": 12, "test": 20, "real": 7}
    for seed, (name, images) in enumerate(sizes.items()):
        wnids = [*CLASSES, *["n02084071"] * (name == "synthetic")]
        found[name] = noise_release(
            folder / name,
            wordnet,
            wnids,
            images_per_synset=images,
            seed=seed,
            catalog={"name": "closure+imagenet-1k", "only": wnids},
        )
        centres = np.random.default_rng(9).normal(size=(len(CLASSES) + 1, DIMENSIONS))
        noise = np.random.default_rng(seed).normal(size=(len(found[name]), DIMENSIONS))
        order = {wnid: at for at, wnid in enumerate(wnids)}
        at = [order[wnid] for wnid in found[name].metadata["wnid"].to_pylist()]
        draw_features(found[name], 5 + centres[at] + (1.5 if name == "synthetic" else 1) * noise)
    return found


def test_it(releases: Any) -> None:
    paths, found = measure_transfer(releases, None, 0, print)
    import json

    print(json.dumps(found, indent=1)[:6000])

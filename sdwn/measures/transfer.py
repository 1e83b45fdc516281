"""Use for training: a linear probe learns from a release's images and is tested on real ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdwn.errors import UsageError, counted
from sdwn.io import OnMessage
from sdwn.measures import record
from sdwn.measures.record import Figure, open_reference
from sdwn.paths import MeasurePaths
from sdwn.prediction.table import TOP, Features, open_features
from sdwn.releases.release import Release

# Images a class of the learning curve; then all that there are.
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# A probe of few images depends on which: so many draws, of so many images a class in all.
MOST_DRAWS, IMAGES_OF_DRAWS = 5, 10
# C is chosen with so many images a class, a fifth of them held out.
CHOSEN_BY, HELD_OUT = 10, 5
# Candidates for C, times the number of dimensions: then features of any size mean the same.
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
# With the solver's default, 1e-4, it stops at once where there are hundreds of classes.
TOLERANCE, MOST_STEPS = 1e-6, 1000
# Images scored at once, a number for each class.
SCORED = 10_000
RULE = (
    "logistic regression on features with mean 0 and variance 1 over the training images; C is "
    f"{', '.join(f'{one:g}' for one in STRENGTHS)} by the number of dimensions, whichever is best "
    f"on a fifth, held out, of {CHOSEN_BY} training images a class"
)
# How the measures of accuracy, and of that by top-5, begin, by what the probe learns from.
NAMES = {"synthetic": "transfer", "real": "real"}


class ProbeImages(NamedTuple):
    """Features of images, and each image's class by its index."""

    vectors: NDArray[np.float16]
    label: NDArray[np.int64]

    @property
    def most(self) -> int:
        """The most images that a class has."""
        return int(np.bincount(self.label).max())

    def take(self, rows: Any) -> ProbeImages:
        """Return some of the images."""
        return ProbeImages(self.vectors[rows], self.label[rows])

    def draw(self, most: int, *seed: int) -> ProbeImages:
        """Draw at most so many images of each class; a seed's smaller draws lie in larger ones."""
        return self.take(order_in_class(self.label, *seed) < most)


def order_in_class(label: NDArray[np.int64], *seed: int) -> NDArray[np.int64]:
    """Number the images of each class from 0, in random order."""
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    found = np.empty_like(label)
    found[order] = np.arange(len(order)) - np.searchsorted(label[order], label[order])
    return found


def measure_transfer(
    releases: Mapping[str, Release], name: str | None, seed: int, on_message: OnMessage
) -> tuple[MeasurePaths, dict[str, Any]]:
    """Train probes on a release's images, test them on real ones, and write the record.

    The releases are ``synthetic``, whose images are tried as training images; ``test``, real ones
    to test on; and, where there are some, ``real``, others to train on for comparison.
    """
    release, train = releases["synthetic"], releases.get("real")
    features = open_features(release, name)
    classes, images, left_out = open_images(releases, features)
    tested = np.bincount(images["test"].label)
    curve, strengths, last = dict[int, Any](), dict[str, float](), dict[str, Any]()
    for origin in (one for one in NAMES if one in images):
        on_message(f"choosing C by {origin} images")
        strengths[origin] = choose_strength(images[origin], seed)
        every = images[origin].most
        for size in [*(size for size in SIZES if size < every), every]:
            on_message(f"training on {size} {origin} images a class, of {every}")
            times = 1 if size == every else max(1, min(MOST_DRAWS, IMAGES_OF_DRAWS // size))
            draws = [images[origin].draw(size, seed, number) for number in range(times)]
            correct = [count_correct(one, images["test"], strengths[origin]) for one in draws]
            last[origin] = np.bincount(draws[0].label), np.mean(correct, axis=0)
            point = curve.setdefault(size, {"name": size, "draws": {}, "figures": {}})
            point["draws"][origin] = times
            point["figures"] |= accuracy_figures({origin: last[origin]}, tested, np.s_[:])
    absent = {} if train else {"real_accuracy": "no real images to train on: add --train"}
    if len(classes) <= TOP:
        absent["transfer_top5"] = f"needs more than {TOP} classes, found {len(classes)}"
    chance = record.make_figure(100 / len(classes), None, 0, int(tested.sum()))
    figures_of = partial(accuracy_figures, last, tested)
    content = {
        "figures": {**figures_of(np.s_[:]), "chance": chance},
        "absent": absent,
        **record.figures_of_parts(release, classes, figures_of, on_message),
        "curve": [curve[size] for size in sorted(curve)],
        "train": train and {"name": train.paths.name, "release": train.digest},
        "classes_left_out": left_out,
        "settings": {"seed": seed, "rule": RULE, "strength": strengths},
    }
    return record.write_record("transfer", release, features, releases["test"], content), content


def open_images(
    releases: Mapping[str, Release], features: Features
) -> tuple[list[str], dict[str, ProbeImages], dict[str, list[str]]]:
    """Open the images of the classes that all releases have; return also which each has alone."""
    test = releases["test"]
    for other in (one for which, one in releases.items() if which != "test"):
        same = pc.is_in(test.metadata["sha256"], pa.array(other.metadata["sha256"]))
        if count := pc.sum(same).as_py():
            raise UsageError(
                f"{test}: {counted(count, 'image')} also in {other} (equal by SHA-256); give "
                "--test a release without training images"
            )
    named = {which: record.class_of_images(one.metadata) for which, one in releases.items()}
    classes = sorted(set.intersection(*(set(names) for names, _ in named.values())))
    if len(classes) < 2:
        common = counted(len(classes), "class", "es")
        every = " and ".join(map(str, releases.values()))
        raise UsageError(f"{every} have {common} in common; a probe needs two or more")
    images, left_out = dict[str, ProbeImages](), dict[str, list[str]]()
    for which, (names, of_image) in named.items():
        found = features if which == "synthetic" else open_reference(features, releases[which])
        label = np.searchsorted(classes, names)
        label = np.where(np.isin(names, classes), label, -1)[of_image]
        images[which] = ProbeImages(found.vectors, label).take(label >= 0)
        left_out[which] = sorted({*names} - {*classes})
    if "real" in images:
        # As many a class: more would be no comparison, and a million of them take hours.
        images["real"] = images["real"].draw(images["synthetic"].most)
    return classes, images, left_out


def choose_strength(images: ProbeImages, seed: int) -> float:
    """Choose C, times the dimensions, on images held out of some of these; 1 where none can be."""
    drawn = images.draw(CHOSEN_BY, seed)
    has = np.bincount(drawn.label)[drawn.label]
    held = (order_in_class(drawn.label, seed) < np.maximum(1, has // HELD_OUT)) & (has > 1)
    if not held.any():
        return 1.0
    learnt, rest = drawn.take(~held), drawn.take(held)
    correct = [count_correct(learnt, rest, one)[0].sum() for one in STRENGTHS]
    return STRENGTHS[int(np.argmax(correct))]


def count_correct(training: ProbeImages, test: ProbeImages, strength: float) -> NDArray[np.float64]:
    """Train a probe; count the test images of each class that are correct, and so by top-5."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    c = strength / training.vectors.shape[1]
    regression = LogisticRegression(C=c, tol=TOLERANCE, max_iter=MOST_STEPS)
    probe = make_pipeline(StandardScaler(), regression)
    probe.fit(training.vectors.astype(np.float32), training.label)
    correct = np.zeros((2, int(test.label.max()) + 1))
    for start in range(0, len(test.label), SCORED):
        vectors, label = test.take(np.s_[start : start + SCORED])
        scores = probe.decision_function(vectors.astype(np.float32))
        if scores.ndim == 1:  # of two classes
            scores = np.stack([-scores, scores], axis=1)
        # Equal ones by their order, so that a probe that has learnt nothing is as good as chance.
        hits = np.argsort(-scores, axis=1, kind="stable")[:, :TOP] == label[:, None]
        for at, within in enumerate((1, TOP)):
            right = hits[:, :within].any(axis=1)
            correct[at] += np.bincount(label[right], minlength=correct.shape[1])
    return correct


def accuracy_figures(
    counts: Mapping[str, Any], tested: NDArray[np.int64], which: Any
) -> dict[str, Figure]:
    """Compute the accuracies over some classes.

    ``counts`` has, by what a probe learnt from, the images of each class and the correct of tested.
    """
    found = dict[str, Figure]()
    for origin, (learnt, correct) in counts.items():
        images = int(learnt[which].sum()), int(tested[which].sum())
        for kind, right in zip(("accuracy", "top5"), 100 * correct[:, which], strict=True):
            if kind == "accuracy" or len(tested) > TOP:
                figure = record.mean_figure(right.sum() / images[1], right, tested[which], *images)
                found[f"{NAMES[origin]}_{kind}"] = figure
    return found

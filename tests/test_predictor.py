"""Classifying a release: its images in order, batches that fit, damage that is named."""

import logging
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from sdwn.batches import BatchSize
from sdwn.devices.tuning import read_profile
from sdwn.errors import IntegrityError, SdwnError
from sdwn.prediction.network import (
    Classifier,
    network_batch_size,
    prepared_images,
    run_batches,
    tune_network,
)
from sdwn.prediction.table import SCHEMA
from sdwn.releases.release import Release
from sdwn.wordnet.taxonomy import Taxonomy, nearest_subtrees

from conftest import FEW
from drawn import noise_release

torch.manual_seed(0)

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def release(tmp_path_factory, wordnet):
    """Noise of corgis and spaniels; most are ImageNet classes, some are not."""
    folder = tmp_path_factory.mktemp("predictor")
    return noise_release(folder, wordnet, (), catalog=FEW, images_per_synset=3)


@pytest.fixture
def own(release, tmp_path):
    """A copy that a test may damage."""
    return Release(shutil.copytree(release.paths.root, tmp_path / "release"))


def classifier_of(classes, wrap=lambda network: network):
    """Build timm's smallest residual network, in random weights that tell images apart."""
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=classes)
    with torch.no_grad():
        network.fc.weight.normal_(std=3)
    preprocessing = timm.data.resolve_model_data_config(network) | {"input_size": SIZE}
    return Classifier("test_resnet", wrap(network), preprocessing, {}, torch.float32)


@pytest.fixture
def classifier():
    return classifier_of(1000)


@pytest.fixture(scope="module")
def taxonomy(wordnet):
    return Taxonomy()


@pytest.fixture(scope="module")
def near(taxonomy, release):
    classifier = classifier_of(1000)
    return nearest_subtrees(taxonomy, set(release.metadata["wnid"].to_pylist()), classifier.classes)


def with_batch(classifier, subtrees, batch):
    classifier.subtrees, classifier.batch = subtrees, BatchSize(batch, "a test")
    return classifier


def whole(tables):
    return pa.concat_tables(tables)


class Small(torch.nn.Module):
    """A network on a device that has room for a few images at a time, as allocators say it."""

    def __init__(self, network, room):
        super().__init__()
        self.network, self.room, self.num_classes = network, room, network.num_classes

    def forward(self, images):
        if len(images) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        return self.network(images)


# What is classified


@pytest.mark.parametrize(("classes", "batch"), [(1000, 500), (21841, 7)])
def test_each_image_is_classified_once_in_order_whatever_the_batch(
    taxonomy, release, classes, batch
):
    classifier = classifier_of(classes)
    wnids = release.metadata["wnid"].to_pylist()
    near = nearest_subtrees(taxonomy, set(wnids), classifier.classes)
    found = whole(run_batches(with_batch(classifier, near, batch), release))
    assert found.schema == SCHEMA
    for name in ("wnid", "synset", "number", "status", "imagenet_class"):
        assert found[name].to_pylist() == release.metadata[name].to_pylist()

    pixels = np.stack([classifier.prepare(release.image(i)) for i in range(len(release))])
    with torch.inference_mode():
        logits = classifier.network(classifier.normalise(torch.from_numpy(pixels)))
        mass = logits.double().softmax(1)
    expected = [mass[i, list(near[wnid].classes)].sum().item() for i, wnid in enumerate(wnids)]
    np.testing.assert_allclose(found["subtree_probability"].to_numpy(), expected, rtol=1e-3)

    none = found["imagenet_class"].is_null()
    assert 0 < found["imagenet_class"].null_count < len(found)
    for name in ("label_rank", "label_probability"):
        assert found[name].is_null() == none
    # What `test_classify` holds to timm, image by image.
    alone = whole(run_batches(with_batch(classifier, near, 1), release.subset(rows=range(9))))
    some = found.slice(0, 9)
    assert alone["label_rank"] == some["label_rank"]
    probability = np.stack(some["top5_probability"].to_numpy())
    np.testing.assert_allclose(np.stack(alone["top5_probability"].to_numpy()), probability, 1e-3)


def test_a_subset_is_classified_in_its_own_order(release, classifier, near):
    rows = [20, 3, 4, 0]
    found = whole(run_batches(with_batch(classifier, near, 3), release.subset(rows=rows)))
    every = whole(run_batches(with_batch(classifier, near, 64), release)).take(rows)
    assert found.select(["wnid", "number", "top5"]) == every.select(["wnid", "number", "top5"])


def test_an_image_without_a_scope_has_no_mass(release, classifier):
    found = whole(run_batches(with_batch(classifier, {}, 64), release))
    assert found["subtree_probability"].null_count == len(release)


def test_nothing_to_classify_is_no_table(release, classifier, near):
    assert list(run_batches(with_batch(classifier, near, 8), release.subset(rows=[]))) == []


# Memory


def test_batches_are_halved_until_they_fit_and_no_image_is_lost(release, near, caplog):
    room = 3
    caplog.set_level(logging.INFO, "sdwn")
    small = classifier_of(1000, lambda network: Small(network, room))
    of_twelve = with_batch(small, near, 12)
    tables = list(run_batches(of_twelve, release))
    assert {len(table) for table in tables[:-1]} == {room}
    assert of_twelve.batch.images == room
    expected = whole(run_batches(with_batch(classifier_of(1000), near, 12), release))
    assert whole(tables)["number"] == expected["number"]
    np.testing.assert_allclose(
        whole(tables)["subtree_probability"], expected["subtree_probability"], rtol=1e-3
    )
    assert "12 images a batch (a test)" in caplog.text
    assert f"can't allocate memory: you tried to; {room} images a batch" in caplog.text
    # What was learnt holds for the next shard.
    assert all(len(table) <= room for table in run_batches(of_twelve, release))
    assert caplog.text.count("; 6 images a batch from now on") == 1


def test_no_room_for_a_single_image_is_one_line(release, near):
    small = classifier_of(1000, lambda network: Small(network, 0))
    with pytest.raises(SdwnError, match="test_resnet: no room for a single image") as caught:
        list(run_batches(with_batch(small, near, 4), release))
    assert "\n" not in str(caught.value)


def test_a_tuned_batch_is_kept_and_taken_by_later_tasks(classifier):
    assert network_batch_size(classifier, 17) == BatchSize(17, "from the command line")
    assert network_batch_size(classifier).images == 32
    kept = tune_network(classifier, most=8)
    try:
        assert read_profile(kept.path).workload.model == "classifier test_resnet"
        chosen = network_batch_size(classifier)
        assert (chosen.images, kept.measured in chosen.source) == (kept.tuning.batch_size, True)
        # Another size of images, or list of classes, is another workload.
        assert network_batch_size(classifier_of(21841)).images == 32
    finally:
        kept.path.unlink()
        kept.curve.unlink()


# Damage


def damage(release, index, payload):
    """Overwrite an image's bytes in its part, which no other release shares."""
    row = release.row(index)
    with (release.paths.root / row["part"]).open("r+b") as part:
        part.seek(row["offset"])
        part.write(payload[: row["bytes"]])
    return row


def test_a_damaged_image_is_named_and_not_classified(own, classifier, near):
    row = damage(own, 13, b"\0" * 10_000)
    name = f"{row['synset']} {row['number']}: "
    with pytest.raises(IntegrityError, match=f"^{name}.*sdwn verify") as caught:
        list(run_batches(with_batch(classifier, near, 8), own))
    assert "\n" not in str(caught.value)


def test_a_release_that_is_gone_is_said_in_one_line(own, classifier, near):
    own.metadata  # noqa: B018 - read before its images are gone
    for part in own.paths.root.glob("*.h5"):
        part.unlink()
    with pytest.raises(IntegrityError, match=r"images-0000\d\.h5: missing") as caught:
        list(run_batches(with_batch(classifier, near, 8), own))
    assert "\n" not in str(caught.value)


# Threads


def test_a_reader_who_stops_leaves_no_thread_behind(release, classifier):
    before = threading.active_count()
    images = prepared_images(release, classifier, ahead=16)
    next(images)
    assert threading.active_count() > before
    images.close()
    assert threading.active_count() == before

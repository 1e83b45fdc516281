"""A classifier over a release's images: read ahead, run in batches, scored by ImageNet class.

threads                this process                      GPU
read, check, decode,  ->   batch n+1: start   ->   runs n+1 while batch n
resize and crop            batch n: wait, score    is scored and yielded
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from timm.data import infer_imagenet_subset
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms import CenterCrop, Resize

from sdwn.batches import BatchSize
from sdwn.devices.device import GB, Device, plain_out_of_memory
from sdwn.devices.tuning import GpuProfile, Workload, find_profile, store_profile, tune
from sdwn.errors import OutOfMemoryError, SdwnError
from sdwn.io import in_threads, now
from sdwn.prediction.table import IMAGE, SCHEMA, TOP
from sdwn.releases.release import LOCATION, Release
from sdwn.storage.images import Pixels
from sdwn.wordnet.imagenet import class_wnids, classifier_wnids
from sdwn.wordnet.taxonomy import NearestSubtree

log = logging.getLogger(__name__)

# Images that each thread may have ready beside those of the next batches.
WAITING = 4
# Records are taken out of the table by so many: all at once would be a gigabyte.
AT_ONCE = 256
# On a CPU larger batches gain nothing.
CPU_BATCH = 32
# The grid of batch sizes that are tried: 1, 2, 4, 8, 16, 24 ...
STEP, MOST_IMAGES = 8, 512

Row = dict[str, Any]
# Logits, float32 of shape (n, classes), on their way from a GPU, and what waits for them there.
Logits = tuple[torch.Tensor, torch.cuda.Event | None]


# --- The network -------------------------------------------------------------------------------
class Classifier:
    """A timm network with its preprocessing, on this process's device.

    ``classes`` is the wnid of each output, or its name where the classes are its own; ``record``
    is the model, weights and versions in plain values for a JSON file.
    """

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        preprocessing: Mapping[str, Any],
        weights: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.device: torch.device = Device().torch
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        self.preprocessing = dict(preprocessing)
        own = weights.get("class_names", ())
        self.classes = own or classifier_wnids(int(network.num_classes))  # type: ignore[arg-type]
        output_of = {wnid: output for output, wnid in enumerate(self.classes)}
        # The output of each ImageNet-1k class, -1 where the classifier lacks it, or of its own.
        self._outputs = torch.tensor([output_of.get(wnid, -1) for wnid in own or class_wnids()])
        network = network.to(self.device, self.dtype).eval()
        # In this layout EfficientNet-Lite0 takes half the CPU time for a batch of 32.
        self.network = network.to(memory_format=torch.channels_last)
        self._transform = timm.data.create_transform(
            **preprocessing, is_training=False, use_prefetcher=True
        )
        # The side that images are resized to, the side that is kept of it, and how.
        self._crop: tuple[int, int, Any] | None = None
        resize, crop = self._transform.transforms[:2]
        if isinstance(resize, Resize) and isinstance(crop, CenterCrop) and len(set(crop.size)) == 1:
            self._crop = resize.size, crop.size[0], str_to_pil_interp(resize.interpolation.value)
        # A row of pixels of each: on a CPU, operations on three channels at a time crawl.
        width = preprocessing["input_size"][2]
        self._mean, self._std = (
            (255 * torch.tensor(preprocessing[name], device=self.device)).repeat(width)
            for name in ("mean", "std")
        )
        gpu = self.device.type == "cuda"
        self.record = {
            "model": name,
            **weights,
            **{
                setting: list(value) if isinstance(value, tuple) else value
                for setting, value in preprocessing.items()
            },
            "classes": len(self.classes),
            "class_list": infer_imagenet_subset({"num_classes": len(self.classes)}),
            "unknown_imagenet_classes": int((self._outputs < 0).sum()),
            "device": torch.cuda.get_device_name(self.device) if gpu else str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {
                library.__name__: str(library.__version__) for library in (timm, torch, torchvision)
            },
        }

    def prepare(self, image: Image.Image) -> Pixels:
        """Turn an RGB image into uint8 (height, width, 3), as timm does; safe in threads."""
        if self._crop is not None and image.width == image.height:
            side, kept, how = self._crop
            times, rest = divmod(image.width, side)
            if times > 1 and not rest:
                # What the crop keeps, resized alone: the same pixels from less work.
                edge = times * round((side - kept) / 2)
                box = (edge, edge, edge + times * kept, edge + times * kept)
                return np.asarray(image.resize((kept, kept), how, box))
        pixels: Pixels = np.asarray(self._transform(image))
        return pixels.transpose(1, 2, 0)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 (n, height, width, 3) into what the network takes, on its device."""
        images = pixels.to(self.device, non_blocking=True).float()
        images.flatten(2).sub_(self._mean).div_(self._std)
        # In memory it stays as it is, which is channels_last.
        return images.permute(0, 3, 1, 2).to(self.dtype)

    @torch.inference_mode()
    def start(self, pixels: Pixels) -> Logits:
        """Begin with a batch of prepared images, (n, height, width, 3), without waiting for it."""
        batch = torch.from_numpy(pixels)
        if self.device.type != "cuda":
            return self.network(self.normalise(batch)).float(), None
        logits = self.network(self.normalise(batch.pin_memory())).float()
        values = logits.to("cpu", non_blocking=True)
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record()
        return values, ready

    def finish(
        self,
        logits: Logits,
        labels: Sequence[int | None],
        subtrees: Sequence[tuple[int, ...] | None],
    ) -> dict[str, NDArray[Any]]:
        """Wait for a batch and score it.

        Args:
            logits: as :meth:`start` returned them.
            labels: index of each image's ImageNet-1k class, None without one.
            subtrees: for each image, the classifier's own classes whose probabilities are summed.

        Returns:
            ``top5`` (n, 5) int16, indices of ImageNet-1k classes, best first;
            ``top5_probability`` (n, 5), their softmax over the 1000 classes; ``label_rank`` (n,)
            int16, the label's rank among these, 0 the best, -1 without a label;
            ``label_probability`` (n,), NaN without a label; ``subtree_probability`` (n,), the
            softmax over all classes that the classifier knows, summed over a subtree, NaN without
            one. Of equal classes the lower index is the better, so ``label_rank`` is below 5
            exactly when the label is in ``top5``. A class that the classifier does not know has
            probability 0 and a rank after all others.
        """
        values, ready = logits
        if ready is not None:
            ready.synchronize()
        if wrong := int((~values.isfinite().all(dim=1)).sum()):
            raise SdwnError(
                f"{self.name} gave infinite or NaN logits for {wrong} of {len(labels)} images in "
                f"{self.record['dtype']}; check the checkpoint, or load it in float32"
            )
        # Sorting logits, not probabilities: those of unlikely classes are all 0.
        known = values[:, self._outputs.clamp(min=0)].masked_fill(self._outputs < 0, -torch.inf)
        ordered, order = known.sort(dim=1, descending=True, stable=True)
        probability = ordered.softmax(dim=1)
        target = torch.tensor([-1 if label is None else label for label in labels])
        rank = (order == target[:, None]).int().argmax(dim=1)
        of_label = probability.gather(1, rank[:, None])[:, 0]
        # Images of one synset follow one another: a sum for each subtree, not for each image.
        every, mass = values.softmax(dim=1), torch.full((len(values),), torch.nan)
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, subtree in enumerate(subtrees):
            if subtree is not None:
                rows.setdefault(subtree, []).append(row)
        for subtree, chosen in rows.items():
            mass[chosen] = every[chosen][:, list(subtree)].sum(dim=1)
        return {
            "top5": order[:, :TOP].short().numpy(),
            "top5_probability": probability[:, :TOP].numpy(),
            "label_rank": rank.masked_fill(target < 0, -1).short().numpy(),
            "label_probability": of_label.masked_fill(target < 0, torch.nan).numpy(),
            "subtree_probability": mass.numpy(),
        }


# --- Over a release ----------------------------------------------------------------------------
@dataclass
class Predictor:
    """A loaded classifier, the nearest subtree of each synset, its batch size, its readers.

    ``batch`` becomes smaller once memory has run out; ``workers`` threads read the images. A
    synset without a subtree has no ``subtree_probability``.
    """

    classifier: Classifier
    subtrees: Mapping[str, NearestSubtree]
    batch: BatchSize
    workers: int


def predict_images(predictor: Predictor, release: Release) -> Iterator[pa.Table]:
    """Classify all images of a release, or of a subset of one; a table a batch, in their order."""
    log.info("%s", predictor.batch)
    classifier, ahead = predictor.classifier, 2 * predictor.batch.images
    images = prepared_images(release, classifier.prepare, predictor.workers, ahead)
    running: tuple[list[Row], Logits] | None = None
    while chunk := list(itertools.islice(images, predictor.batch.images)):
        # Where there is no room for the chunk, its parts are tried.
        while chunk:
            part = chunk[: predictor.batch.images]
            try:
                with plain_out_of_memory():
                    logits = classifier.start(np.stack([pixels for _, pixels in part]))
            except OutOfMemoryError as error:
                reason = str(error)
            else:
                chunk = chunk[len(part) :]
                if running is not None:
                    yield _finish(predictor, *running)
                running = [row for row, _ in part], logits
                continue
            # Only here is the failed batch's memory free: an exception keeps what its frames hold.
            Device().release()
            if len(part) == 1:
                raise SdwnError(
                    f"{classifier.name}: no room for a single image: {reason}; "
                    "take a larger card or a smaller model"
                )
            predictor.batch = replace(predictor.batch, images=len(part) // 2)
            log.warning("%s; %d images a batch from now on", reason, predictor.batch.images)
    if running is not None:
        yield _finish(predictor, *running)


def prepared_images(
    release: Release, prepare: Callable[[Image.Image], Pixels], workers: int, ahead: int
) -> Iterator[tuple[Row, Pixels]]:
    """Yield each image's record and its pixels as ``prepare`` makes them, in order.

    ``workers`` threads make so many ready ``ahead`` of the one that is taken.
    """
    # Threads, not processes: reading, checking, decoding and resizing all leave Python's lock to
    # others, so that they scale as processes do; but nothing is imported again, copied between
    # processes, forked beside torch's own threads, or left behind by a signal.
    chosen = release.metadata.select(dict.fromkeys((*IMAGE, *LOCATION)))
    rows = (row for batch in chosen.to_batches(max_chunksize=AT_ONCE) for row in batch.to_pylist())
    return in_threads(
        lambda row: (row, prepare(release.image(row))), rows, workers, ahead + WAITING * workers
    )


def _finish(predictor: Predictor, rows: list[Row], logits: Logits) -> pa.Table:
    around = [predictor.subtrees.get(row["wnid"]) for row in rows]
    scores = predictor.classifier.finish(
        logits,
        [row["imagenet_class"] for row in rows],
        [None if subtree is None else subtree.classes for subtree in around],
    )
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in IMAGE}
    for name in ("top5", "top5_probability"):
        columns[name] = pa.array(list(scores[name]), SCHEMA.field(name).type)
    for name in ("label_rank", "label_probability", "subtree_probability"):
        none = (scores[name] < 0) | np.isnan(scores[name])
        columns[name] = pa.array(scores[name], SCHEMA.field(name).type, mask=none)
    return pa.table(columns, schema=SCHEMA)


# --- The batch size ----------------------------------------------------------------------------
def classifier_batch_size(classifier: Classifier, requested: int | None = None) -> BatchSize:
    """Return the batch size that is requested, or one tuned on this card, now if never before."""
    if requested is not None:
        return BatchSize(requested, "from the command line")
    if (profile := find_profile(classifier_workload(classifier))) is not None:
        return BatchSize(profile.tuning.batch_size, f"tuned {profile.measured}")
    if not Device().is_gpu:
        return BatchSize(CPU_BATCH, "the default on a CPU")
    return BatchSize(tune_classifier(classifier).tuning.batch_size, "tuned just now")


def classifier_workload(classifier: Classifier) -> Workload:
    """Describe a classifier's work on this process's device; it holds for any weights."""
    device, (_, height, width) = Device(), classifier.preprocessing["input_size"]
    return Workload(
        device=device.name,
        memory_gb=round(device.total_bytes / GB),
        model=f"classifier {classifier.name}",
        revision=classifier.record["class_list"],
        precision=classifier.record["dtype"],
        height=height,
        width=width,
        guidance=False,
        channels_last=True,
        compile=False,
        torch=str(torch.__version__),
    )


def tune_classifier(classifier: Classifier, most: int = MOST_IMAGES) -> GpuProfile:
    """Find this device's batch size for a classifier, and keep it for later tasks if possible."""
    device, work = Device(), classifier_workload(classifier)

    def seconds(size: int) -> float:
        pixels = np.zeros((size, work.height, work.width, 3), dtype=np.uint8)
        with plain_out_of_memory():
            began = time.perf_counter()
            classifier.start(pixels)
            device.synchronize()
            return time.perf_counter() - began

    try:
        tuning = tune(seconds, device, STEP, most)
    finally:
        device.release()
    profile = GpuProfile(work, vae_slicing=False, tuning=tuning, measured=now())
    try:
        return store_profile(profile)
    except OSError as error:
        log.warning("%s: the batch size is not kept for later tasks: %s", profile.path, error)
        return profile

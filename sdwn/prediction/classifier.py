"""A classifier: images to ranks and probabilities of ImageNet classes, by a timm network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from timm.data import infer_imagenet_subset
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms.functional import InterpolationMode

from sdwn.devices.device import Device
from sdwn.errors import SdwnError
from sdwn.prediction.table import TOP
from sdwn.storage.images import Pixels
from sdwn.wordnet.imagenet import CLASSES, LARGER, class_wnids, classifier_wnids

# The lists of classes that ImageNet classifiers know; their length alone tells them apart.
SIZES = (CLASSES, *LARGER)
EXPECTED = (
    f"the {CLASSES} ImageNet-1k classes, or one of timm's lists of all ImageNet "
    f"({', '.join(map(str, SIZES[1:-1]))} or {SIZES[-1]} classes)"
)


def imagenet_outputs(wnids: Sequence[str]) -> NDArray[np.int64]:
    """Return the output of each of the 1000 ImageNet-1k classes, -1 where a list lacks it."""
    outputs = {wnid: output for output, wnid in enumerate(wnids)}
    return np.array([outputs.get(wnid, -1) for wnid in class_wnids()], dtype=np.int64)


# --- Images to what a network takes ------------------------------------------------------------


def make_resizer(transform: Any) -> Callable[[Image.Image], Pixels]:
    """Turn timm's transform for evaluation into a faster one with the same pixels.

    Where an image is a whole number of times as large as it becomes, as 512 becomes 256, the
    crop is taken first: each pixel is computed from the same others by the same factors.

    Returns:
        A function from an RGB image to uint8 of shape (height, width, 3), safe in threads.
    """

    def by_timm(image: Image.Image) -> Pixels:
        pixels: Pixels = np.asarray(transform(image))
        return pixels.transpose(1, 2, 0)

    resize, crop = transform.transforms[:2]
    crops = isinstance(resize, Resize) and isinstance(crop, CenterCrop)
    if not crops or not isinstance(resize.size, int):
        return by_timm
    side, kept = resize.size, tuple(crop.size)
    filter_ = str_to_pil_interp(InterpolationMode(resize.interpolation).value)

    def crop_first(image: Image.Image) -> Pixels:
        box = kept_box(image.size, side, kept)
        return np.asarray(image.resize(kept[::-1], filter_, box)) if box else by_timm(image)

    return crop_first


def kept_box(
    size: tuple[int, int], side: int, kept: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Find what a centre crop keeps of an image resized to a shorter side, in its own pixels.

    None where that is all of it, or no box of whole pixels. ``size`` is (width, height), ``kept``
    (height, width); the box is (left, top, right, bottom).

    >>> kept_box((512, 1024), 256, (224, 224))
    (32, 288, 480, 736)
    >>> kept_box((500, 500), 256, (224, 224)), kept_box((512, 512), 256, (256, 256))
    (None, None)
    """
    times, rest = divmod(min(size), side)
    height, width = kept
    if rest or times < 2 or max(size) % times or max(kept) > side or kept == (side, side):
        return None
    left = times * round((size[0] // times - width) / 2)
    top = times * round((size[1] // times - height) / 2)
    return left, top, left + times * width, top + times * height


# --- What a network gives, to scores -----------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Logits:
    """A batch's logits, float32 of shape (n, classes), on their way from the device.

    ``ready`` is what waits for them; None where they are there already.
    """

    values: torch.Tensor
    ready: torch.cuda.Event | None


@dataclass(frozen=True, eq=False, slots=True)
class Scores:
    """The predictions for n images.

    ``top5`` (n, 5) int16, indices of ImageNet-1k classes, best first; ``top5_probability``
    (n, 5) float32, their softmax over the 1000 classes; ``label_rank`` (n,) int16, the label's
    rank among these, 0 the best, -1 without a label; ``label_probability`` (n,) float32, NaN
    without a label; ``subtree_probability`` (n,) float32, the softmax over all classes that the
    classifier knows, summed over a subtree, NaN without one. Of equal classes the lower index is
    the better, so ``label_rank`` is below 5 exactly when the label is in ``top5``.
    """

    top5: NDArray[np.int16]
    top5_probability: NDArray[np.float32]
    label_rank: NDArray[np.int16]
    label_probability: NDArray[np.float32]
    subtree_probability: NDArray[np.float32]


def score_logits(
    logits: torch.Tensor,
    outputs: torch.Tensor,
    labels: Sequence[int | None],
    subtrees: Sequence[tuple[int, ...] | None],
) -> Scores:
    """Score a batch's logits, float32 of shape (n, classes), on the CPU.

    Args:
        logits: as the classifier gives them.
        outputs: the output of each of the 1000 ImageNet-1k classes; -1 for one that the
            classifier does not know, whose probability is 0 and whose rank is after all others.
        labels: index of each image's ImageNet-1k class, None without one.
        subtrees: for each image, the classifier's own classes whose probabilities are summed.
    """
    # Sorting logits, not probabilities: those of unlikely classes are all 0.
    known = logits[:, outputs.clamp(min=0)].masked_fill(outputs < 0, -torch.inf)
    ordered, order = known.sort(dim=1, descending=True, stable=True)
    probability = ordered.softmax(dim=1)
    target = torch.tensor([-1 if label is None else label for label in labels])
    rank = (order == target[:, None]).int().argmax(dim=1)
    of_label = probability.gather(1, rank[:, None])[:, 0]
    # Images of one synset follow one another: a sum for each subtree, not for each image.
    every, mass = logits.softmax(dim=1), torch.full((len(logits),), torch.nan)
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, subtree in enumerate(subtrees):
        if subtree is not None:
            rows.setdefault(subtree, []).append(row)
    for subtree, chosen in rows.items():
        mass[chosen] = every[chosen][:, list(subtree)].sum(dim=1)
    return Scores(
        top5=order[:, :TOP].short().numpy(),
        top5_probability=probability[:, :TOP].numpy(),
        label_rank=rank.masked_fill(target < 0, -1).short().numpy(),
        label_probability=of_label.masked_fill(target < 0, torch.nan).numpy(),
        subtree_probability=mass.numpy(),
    )


# --- The classifier ----------------------------------------------------------------------------


class Classifier:
    """A timm network with its preprocessing, on this process's device.

    ``prepare`` turns an RGB image into what :meth:`start` takes, as timm does for this model; it
    is safe in threads. ``classes`` is the wnid of each output; ``record`` is the model, weights
    and versions in plain values for a JSON file. ``most_images`` is how many images memory has
    room for; None until it had too little.

    Raises:
        SdwnError: the model knows another number of classes than any list of ImageNet's.
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
        self.most_images: int | None = None
        size = int(network.num_classes)  # type: ignore[arg-type]
        if size not in SIZES:
            raise SdwnError(f"{name}: expected {EXPECTED}, found {size}")
        self.classes = classifier_wnids(size)
        outputs = imagenet_outputs(self.classes)
        self._outputs = torch.from_numpy(outputs)
        network = network.to(self.device, self.dtype).eval()
        # In this layout EfficientNet-Lite0 takes half the CPU time for a batch of 32.
        self.network = network.to(memory_format=torch.channels_last)
        self.prepare = make_resizer(
            timm.data.create_transform(**preprocessing, is_training=False, use_prefetcher=True)
        )
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
            "classes": size,
            "class_list": infer_imagenet_subset({"num_classes": size}),
            "unknown_imagenet_classes": int((outputs < 0).sum()),
            "device": torch.cuda.get_device_name(self.device) if gpu else str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {
                library.__name__: str(library.__version__) for library in (timm, torch, torchvision)
            },
        }

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 (n, height, width, 3) into what the network takes, on its device."""
        images = pixels.to(self.device, non_blocking=True).float()
        images.flatten(2).sub_(self._mean).div_(self._std)
        # In memory it stays as it is, which is channels_last.
        return images.permute(0, 3, 1, 2).to(self.dtype)

    @torch.inference_mode()
    def start(self, pixels: Pixels) -> Logits:
        """Begin with a batch of prepared images, (n, height, width, 3); a GPU works asynchronously.

        Raises:
            RuntimeError, MemoryError: no room for so many, among others.
        """
        batch = torch.from_numpy(pixels)
        if self.device.type != "cuda":
            return Logits(self.network(self.normalise(batch)).float(), None)
        logits = self.network(self.normalise(batch.pin_memory())).float()
        values = logits.to("cpu", non_blocking=True)
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record()
        return Logits(values, ready)

    def finish(
        self,
        logits: Logits,
        labels: Sequence[int | None],
        subtrees: Sequence[tuple[int, ...] | None],
    ) -> Scores:
        """Wait for a batch and score it; ``labels`` and ``subtrees`` as in `score_logits`.

        Raises:
            SdwnError: the model gave numbers that are not finite.
        """
        if logits.ready is not None:
            logits.ready.synchronize()
        wrong = int((~logits.values.isfinite().all(dim=1)).sum())
        if wrong:
            raise SdwnError(
                f"{self.name} gave infinite or NaN logits for {wrong} of {len(labels)} images in "
                f"{self.record['dtype']}; check the checkpoint, or load it in float32"
            )
        return score_logits(logits.values, self._outputs, labels, subtrees)

    def predict(
        self, images: Sequence[Image.Image], labels: Sequence[int] | NDArray[Any]
    ) -> Scores:
        """Classify images of any size and mode as one batch.

        Args:
            images: at least one.
            labels: class index of each.

        Raises:
            SdwnError: the model gave numbers that are not finite.
            ValueError: not one label an image, or a label that is no class index.
        """
        target = np.asarray(labels, dtype=np.int64)
        if not images or target.shape != (len(images),):
            found = f"{target.shape} for {len(images)} images"
            raise ValueError(f"expected one label an image, found {found}")
        if target.min() < 0 or target.max() >= CLASSES:
            raise ValueError(f"labels are class indices 0 to {CLASSES - 1}, found {labels!r}")
        pixels = np.stack([self.prepare(image.convert("RGB")) for image in images])
        return self.finish(self.start(pixels), target.tolist(), [None] * len(images))

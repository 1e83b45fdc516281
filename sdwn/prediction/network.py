"""Networks over a release's images: read ahead, run in batches, each batch a table.

threads                this process                      GPU
read, check, decode,  ->   batch n+1: start   ->   runs n+1 while batch n
resize and crop            batch n: wait, rows     becomes rows and is yielded
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
import torchvision
from PIL import Image
from timm.data import infer_imagenet_subset
from timm.data.transforms import str_to_pil_interp
from torchvision.transforms import CenterCrop, Resize

from sdwn.batches import BatchSize
from sdwn.devices.device import GB, Device, plain_out_of_memory
from sdwn.devices.tuning import GpuProfile, Workload, find_profile, store_profile, tune
from sdwn.errors import OutOfMemoryError, SdwnError, import_extra
from sdwn.io import in_threads, now
from sdwn.prediction.table import COLUMNS, IMAGE, SCHEMA, TOP, with_vectors
from sdwn.releases.release import LOCATION, Release
from sdwn.storage.images import Pixels
from sdwn.wordnet.corpus import class_wnids
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

# What torch calls Pillow's ways to resize, and how far they look beside a pixel, in such pixels.
RESIZES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
RIM = 2
# How many times smaller an image becomes where all weights are sums of powers of two.
SCALES = (2, 4, 8)

Row = dict[str, Any]
# Float32 of shape (n, outputs), on their way from a GPU, and what waits for them there.
Outputs = tuple[torch.Tensor, torch.cuda.Event | None]


class ImageNetwork:
    """A network with its preprocessing, as timm describes it, on this process's device.

    ``record`` has the model, weights and versions for a JSON file; ``batch`` becomes smaller once
    memory has run out.
    """

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        preprocessing: Mapping[str, Any],
        weights: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        device = Device()
        self.name, self.device, self.preprocessing = name, device.torch, dict(preprocessing)
        self.dtype = dtype or (torch.float16 if device.is_gpu else torch.float32)
        self.batch = BatchSize(CPU_BATCH, "the default on a CPU")
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
            # Of a square image, where timm squashes others, both sides become the first.
            side = resize.size if isinstance(resize.size, int) else resize.size[0]
            self._crop = side, crop.size[0], str_to_pil_interp(resize.interpolation.value)
        # A row of pixels of each: on a CPU, operations on three channels at a time crawl.
        levels = (torch.tensor(preprocessing[n], device=self.device) for n in ("mean", "std"))
        width = preprocessing["input_size"][2]
        self._mean, self._std = ((255 * level).repeat(width) for level in levels)
        plain = {n: list(x) if isinstance(x, tuple) else x for n, x in preprocessing.items()}
        self.record: dict[str, Any] = {
            "model": name,
            **weights,
            **plain,
            "device": device.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {one.__name__: str(one.__version__) for one in (timm, torch, torchvision)},
        }

    def prepare(self, image: Image.Image) -> Pixels:
        """Turn an RGB image into uint8 (height, width, 3), as timm does; safe in threads."""
        if self._crop is not None and image.width == image.height:
            side, kept, how = self._crop
            times, rest = divmod(image.width, side)
            start = round((side - kept) / 2)
            # Of a whole number of times the size, what is kept can be resized alone, to the very
            # pixels of all: elsewhere the box would be rounded.
            if not rest and start >= 0:
                whole_rim = min(start, side - kept - start) >= RIM
                if self.device.type == "cpu" and times in SCALES and whole_rim and how in RESIZES:
                    return torch_resized(image, RESIZES[how], kept, start, times)
                box = (times * start,) * 2 + (times * (start + kept),) * 2
                return np.asarray(image.resize((kept, kept), how, box))
        pixels: Pixels = np.asarray(self._transform(image))
        return pixels.transpose(1, 2, 0)

    def describe(self, image: Image.Image) -> Row:
        """Return what else its rows say of the image itself; in the threads that prepare it."""
        return {}

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 (n, height, width, 3) into what the network takes, on its device."""
        images = pixels.to(self.device, non_blocking=True).float()
        images.flatten(2).sub_(self._mean).div_(self._std)
        # In memory it stays as it is, which is channels_last.
        return images.permute(0, 3, 1, 2).to(self.dtype)

    @torch.inference_mode()
    def start(self, pixels: Pixels) -> Outputs:
        """Begin with a batch of prepared images, (n, height, width, 3), without waiting for it."""
        batch = torch.from_numpy(pixels)
        if self.device.type != "cuda":
            return self.network(self.normalise(batch)).float(), None
        outputs = self.network(self.normalise(batch.pin_memory())).float()
        values = outputs.to("cpu", non_blocking=True)
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record()
        return values, ready

    def wait(self, outputs: Outputs, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Wait for a batch; return its outputs, none of them infinite or NaN, in ``dtype``."""
        values, ready = outputs
        if ready is not None:
            ready.synchronize()
        values = values.to(dtype)
        if wrong := int((~values.isfinite().all(dim=1)).sum()):
            raise SdwnError(
                f"{self.name} gave infinite or NaN outputs for {wrong} of {len(values)} images in "
                f"{self.record['dtype']}; check the checkpoint, or load it in float32"
            )
        return values

    def rows(self, records: Sequence[Row], outputs: Outputs) -> pa.Table:
        """Wait for what :meth:`start` returned; return a row for each image's record."""
        raise NotImplementedError


def torch_resized(image: Image.Image, how: str, side: int, start: int, times: int) -> Pixels:
    """Resize a square of an image, away from its edges: Pillow's very pixels at SCALES.

    It takes a quarter of Pillow's time. But each of torch's calls takes Python's lock: where 16
    threads feed a GPU, that makes it a third slower than Pillow.
    """
    part = slice(times * (start - RIM), times * (start + side + RIM))
    small = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(image)[part, part].copy()).permute(2, 0, 1)[None],
        size=side + 2 * RIM,
        mode=how,
        antialias=True,
    )[0].permute(1, 2, 0)
    return small[RIM:-RIM, RIM:-RIM].numpy()


# --- Classifiers and encoders -------------------------------------------------------------------
class Classifier(ImageNetwork):
    """A timm network that classifies images.

    ``classes`` is the wnid of each output, or its name where the classes are its own. Of a synset
    in ``subtrees``, the probability of its nearest subtree is summed.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        own = self.record.get("class_names", ())
        self.classes = own or class_wnids(int(self.network.num_classes))  # type: ignore[arg-type]
        self.subtrees: Mapping[str, NearestSubtree] = {}
        output_of = {wnid: output for output, wnid in enumerate(self.classes)}
        # The output of each ImageNet-1k class, -1 where the classifier lacks it, or of its own.
        self._outputs = torch.tensor([output_of.get(wnid, -1) for wnid in own or class_wnids()])
        count, unknown = len(self.classes), int((self._outputs < 0).sum())
        subset = infer_imagenet_subset({"num_classes": count})
        self.record |= {"classes": count, "class_list": subset, "unknown_imagenet_classes": unknown}

    def rows(self, records: Sequence[Row], outputs: Outputs) -> pa.Table:
        """Wait for a batch and return its predictions; of equal classes the first is the better."""
        values = self.wait(outputs)
        # Sorting logits, not probabilities: those of unlikely classes are all 0.
        known = values[:, self._outputs.clamp(min=0)].masked_fill(self._outputs < 0, -torch.inf)
        ordered, order = known.sort(dim=1, descending=True, stable=True)
        probability = ordered.softmax(dim=1)
        labels = [row["imagenet_class"] for row in records]
        target = torch.tensor([-1 if label is None else label for label in labels])
        rank = (order == target[:, None]).int().argmax(dim=1)
        of_label = probability.gather(1, rank[:, None])[:, 0]
        every, mass = values.softmax(dim=1), torch.full((len(values),), torch.nan)
        for wnid in {row["wnid"] for row in records} & self.subtrees.keys():
            chosen = [place for place, row in enumerate(records) if row["wnid"] == wnid]
            mass[chosen] = every[chosen][:, list(self.subtrees[wnid].classes)].sum(dim=1)
        columns: dict[str, Any] = {name: [row[name] for row in records] for name in IMAGE}
        for name, one, absent in (
            ("label_rank", rank.short(), target < 0),
            ("label_probability", of_label, target < 0),
            ("subtree_probability", mass, mass.isnan()),
        ):
            columns[name] = pa.array(one.numpy(), mask=absent.numpy())
        columns["top5"] = list(order[:, :TOP].short().numpy())
        columns["top5_probability"] = list(probability[:, :TOP].numpy())
        return pa.table(columns, schema=SCHEMA)


class ClipTowers(torch.nn.Module):
    """A CLIP of transformers with its tokenizer: projected embeddings of images and of prompts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self._tokenizer = model, tokenizer

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of images, (n, dimensions)."""
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        projected: torch.Tensor = self.model.visual_projection(pooled)
        return projected

    @plain_out_of_memory()
    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of prompts, float32 (n, dimensions); long ones are cut."""
        limit = self.model.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        # Images of a concept often share their prompt.
        texts = [*dict.fromkeys(prompts)]
        tokens = self._tokenizer(texts, **how).to(self.model.device)
        given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        projected: torch.Tensor
        projected = self.model.text_projection(self.model.text_model(**given).pooler_output)
        return projected.float().cpu()[[texts.index(one) for one in prompts]]


class Encoder(ImageNetwork):
    """A network whose outputs are features, beside hashes of the images.

    A CLIP also says how near each image is to its prompt: 100 times their cosine, at least 0.
    """

    def describe(self, image: Image.Image) -> Row:
        """Return hashes of an image: of its pixels, and of what it looks like."""
        pixels = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=8)
        looks = import_extra("imagehash", "measures").phash(image)
        return {"pixels_hash": int(pixels.hexdigest(), 16), "phash": int(str(looks), 16)}

    def rows(self, records: Sequence[Row], outputs: Outputs) -> pa.Table:
        """Wait for a batch and return its features."""
        vectors = self.wait(outputs, torch.float16)
        names = (*IMAGE, "pixels_hash", "phash")
        columns: dict[str, Any] = {name: [row[name] for row in records] for name in names}
        columns["clip_score"] = pa.nulls(len(records))
        if isinstance(self.network, ClipTowers):
            prompts = [row.get("prompt") or "" for row in records]
            cosines = torch.cosine_similarity(outputs[0], self.network.encode_prompts(prompts))
            scores = (100 * cosines.double()).clamp(min=0).float().numpy()
            columns["clip_score"] = pa.array(scores, mask=np.array([not one for one in prompts]))
        return with_vectors(pa.table(columns, schema=COLUMNS), vectors.numpy())


# --- Over a release ----------------------------------------------------------------------------
def run_batches(network: ImageNetwork, release: Release) -> Iterator[pa.Table]:
    """Run all images of a release, or of a subset of one; a table a batch, in their order."""
    log.info("%s", network.batch)
    images = prepared_images(release, network, ahead=2 * network.batch.images)
    running: tuple[list[Row], Outputs] | None = None
    threads = torch.get_num_threads()
    if network.device.type == "cuda":
        # Little is left for the CPU, and after it OpenMP's threads would spin for a while, in the
        # way of those that decode and of the one that launches the network's kernels.
        torch.set_num_threads(1)
    try:
        while part := list(itertools.islice(images, network.batch.images)):
            try:
                with plain_out_of_memory():
                    outputs = network.start(np.stack([pixels for _, pixels in part]))
            except OutOfMemoryError as error:
                reason = str(error)
            else:
                if running is not None:
                    yield network.rows(*running)
                running = [row for row, _ in part], outputs
                continue
            # Only here is the failed batch's memory free: an exception keeps what its frames hold.
            Device().release()
            if len(part) == 1:
                advice = "take a larger card or a smaller model"
                raise SdwnError(f"{network.name}: no room for a single image: {reason}; {advice}")
            network.batch = replace(network.batch, images=len(part) // 2)
            log.warning("%s; %d images a batch from now on", reason, network.batch.images)
            images = itertools.chain(part, images)
        if running is not None:
            yield network.rows(*running)
    finally:
        torch.set_num_threads(threads)


def prepared_images(
    release: Release, network: ImageNetwork, ahead: int
) -> Iterator[tuple[Row, Pixels]]:
    """Yield each image's record and its pixels as the network takes them, in order."""
    # Threads, not processes: reading, checking, decoding and resizing all leave Python's lock to
    # others; and nothing is imported again, copied, or forked beside torch's own threads.
    names = dict.fromkeys((*IMAGE, *LOCATION, "prompt"))
    chosen = release.metadata.select([one for one in names if one in release.metadata.column_names])
    rows = (row for batch in chosen.to_batches(max_chunksize=AT_ONCE) for row in batch.to_pylist())

    def prepared(row: Row) -> tuple[Row, Pixels]:
        image = release.image(row)
        return {**row, **network.describe(image)}, network.prepare(image)

    threads = len(os.sched_getaffinity(0))
    return in_threads(prepared, rows, threads, ahead + WAITING * threads)


# --- The batch size ----------------------------------------------------------------------------
def network_batch_size(network: ImageNetwork, requested: int | None = None) -> BatchSize:
    """Return the batch size that is requested, or one tuned on this card, now if never before."""
    if requested is not None:
        return BatchSize(requested, "from the command line")
    if (profile := find_profile(network_workload(network))) is not None:
        return BatchSize(profile.tuning.batch_size, f"tuned {profile.measured}")
    if not Device().is_gpu:
        return network.batch
    return BatchSize(tune_network(network).tuning.batch_size, "tuned just now")


def network_workload(network: ImageNetwork) -> Workload:
    """Describe a network's work on this process's device; it holds for any weights."""
    device, (_, height, width) = Device(), network.preprocessing["input_size"]
    return Workload(
        device=device.name,
        memory_gb=round(device.total_bytes / GB),
        model=f"{type(network).__name__.lower()} {network.name}",
        revision=str(network.record.get("class_list", "")),
        precision=network.record["dtype"],
        height=height,
        width=width,
        guidance=False,
        channels_last=True,
        compile=False,
        torch=str(torch.__version__),
    )


def tune_network(network: ImageNetwork, most: int = MOST_IMAGES) -> GpuProfile:
    """Find this device's batch size for a network, and keep it for later tasks if possible."""
    device, work = Device(), network_workload(network)

    def seconds(size: int) -> float:
        pixels = np.zeros((size, work.height, work.width, 3), dtype=np.uint8)
        with plain_out_of_memory():
            began = time.perf_counter()
            network.start(pixels)
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

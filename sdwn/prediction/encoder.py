"""Encoders of images: timm networks without their classifier, and CLIP by transformers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import snapshot_download
from PIL import Image

from sdwn.errors import SdwnError, UsageError, import_extra
from sdwn.io import read_json
from sdwn.prediction.features import COLUMNS, with_vectors
from sdwn.prediction.network import ImageNetwork, Outputs, Row
from sdwn.prediction.pretrained import (
    fetch_network,
    load_body,
    require_known,
    unavailable,
    weights_file,
    weights_record,
)
from sdwn.prediction.table import IMAGE

# The timm model of each preset, its arguments, and its own preprocessing: images of DINOv2 as Stein
# et al. (2023) take them, in dgm-eval.
ENCODERS = {
    "dinov2": (
        "vit_large_patch14_dinov2.lvd142m",
        {"img_size": 224},
        {"input_size": (3, 224, 224), "crop_mode": "squash"},
    ),
}
CLIP = "clip:"
# What loading a CLIP reads.
CLIP_FILES = ["model.safetensors", "*.json", "*.txt"]
# Prompts that are encoded at a time: they take little memory beside images.
PROMPTS = 64


class Encoder(ImageNetwork):
    """A network whose outputs are features; its rows are those of `FeatureTable`."""

    kind = "encoder"

    def describe(self, image: Image.Image) -> Row:
        """Return hashes of an image: of its pixels, and of what it looks like."""
        pixels = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
        pixels.update(image.tobytes())
        # As imagehash writes its bits, row by row.
        bits = np.packbits(import_extra("imagehash", "measures").phash(image).hash).tobytes()
        return {
            "pixels_hash": int.from_bytes(pixels.digest(), "big"),
            "phash": int.from_bytes(bits, "big"),
        }

    def rows(self, records: Sequence[Row], outputs: Outputs) -> pa.Table:
        """Wait for a batch and return its features."""
        vectors = self.wait(outputs, torch.float16)
        names = (*IMAGE, "pixels_hash", "phash")
        columns: dict[str, Any] = {name: [row[name] for row in records] for name in names}
        columns["clip_score"] = self.clip_scores(records, outputs[0])
        return with_vectors(pa.table(columns, schema=COLUMNS), vectors.numpy())

    def clip_scores(self, records: Sequence[Row], vectors: torch.Tensor) -> list[float | None]:
        """Return how near each image is to its prompt; None where there is no saying."""
        return [None] * len(records)


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

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of prompts, float32 (n, dimensions); long ones are cut."""
        limit = self.model.config.text_config.max_position_embeddings
        how = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        tokens = self._tokenizer(list(prompts), **how).to(self.model.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        projected: torch.Tensor = self.model.text_projection(pooled)
        return projected.float().cpu()


class ClipEncoder(Encoder):
    """A CLIP, whose rows also say how near each image is to its prompt."""

    inputs = ("prompt",)

    def __init__(
        self,
        name: str,
        towers: ClipTowers,
        preprocessing: Mapping[str, Any],
        weights: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name, towers, preprocessing, weights, dtype)
        self._towers = towers
        # Each prompt is encoded once.
        self._prompts = dict[str, torch.Tensor]()

    def clip_scores(self, records: Sequence[Row], vectors: torch.Tensor) -> list[float | None]:
        """Return 100 times the cosine between image and prompt, at least 0; None without one."""
        prompts = [row.get("prompt") for row in records]
        new = [one for one in dict.fromkeys(prompts) if one and one not in self._prompts]
        for start in range(0, len(new), PROMPTS):
            some = new[start : start + PROMPTS]
            self._prompts |= dict(zip(some, self._towers.encode_prompts(some), strict=True))
        found: list[float | None] = [None] * len(records)
        if with_prompt := [row for row, prompt in enumerate(prompts) if prompt]:
            texts = torch.stack([self._prompts[str(prompts[row])] for row in with_prompt])
            cosines = torch.cosine_similarity(vectors[with_prompt], texts)
            for row, score in zip(with_prompt, (100 * cosines).clamp(min=0).tolist(), strict=True):
                found[row] = score
        return found


# --- By name -----------------------------------------------------------------------------------
def load_encoder(model: str, dtype: torch.dtype | None = None) -> Encoder:
    """Load a preset (`ENCODERS`), any timm model, or ``clip:`` and a folder or a hub's name."""
    if model.startswith(CLIP):
        return _load_clip(model, dtype)
    require_encoder(model)
    name, arguments, changes = ENCODERS.get(model, (model, {}, {}))
    network, preprocessing, weights = load_body(name, **arguments)
    return Encoder(model, network, preprocessing | changes, weights, dtype)


def _load_clip(model: str, dtype: torch.dtype | None) -> ClipEncoder:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    file = fetch_encoder(model)
    folder = file.parent
    network, found = CLIPModel.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    if lacking := sorted(found["missing_keys"]):
        raise SdwnError(
            f"{file}: expected all weights of a CLIP, found none of {lacking[0]}; copy or "
            "download it again"
        )
    images = CLIPImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
    height, width = (images["crop_size"][side] for side in ("height", "width"))
    preprocessing = {
        "input_size": (3, height, width),
        "interpolation": Image.Resampling(images["resample"]).name.lower(),
        "mean": tuple(images["image_mean"]),
        "std": tuple(images["image_std"]),
        "crop_pct": height / images["size"]["shortest_edge"],
        "crop_mode": "center",
    }
    origin = "a folder" if own_folder(model) else f"Hugging Face's hub, at {folder.name}"
    weights = weights_record(origin, file)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ClipEncoder(model, ClipTowers(network, tokenizer), preprocessing, weights, dtype)


def require_encoder(model: str) -> None:
    """Refuse a name that is no encoder's, and a folder that holds none."""
    import_extra("imagehash", "measures")
    if not model.startswith(CLIP):
        require_known(model, ENCODERS)
        return
    where = model.removeprefix(CLIP)
    if not Path(where).is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
            raise UsageError(f"model {model}: expected {CLIP}FOLDER, or {CLIP}ORG/NAME on the hub")
        return
    found = read_json(Path(where, "config.json")).get("model_type")
    if found != "clip" or not Path(where, CLIP_FILES[0]).is_file():
        raise UsageError(
            f"{where}: expected a CLIPModel as transformers saves it in a "
            f"{CLIP_FILES[0]}, found a model of type {found}"
        )


def own_folder(model: str) -> Path | None:
    """Return the folder of an encoder's weights, where it is a user's own."""
    kind, _, where = model.partition(":")
    is_own = kind == "local-dir" or (kind == "clip" and Path(where).is_dir())
    return Path(where).absolute() if is_own else None


def find_encoder(model: str) -> Path | None:
    """Return the file of an encoder's weights; None where it is not on this machine."""
    require_encoder(model)
    if not model.startswith(CLIP):
        return weights_file(ENCODERS.get(model, (model,))[0])
    folder = model.removeprefix(CLIP)
    if not Path(folder).is_dir():
        try:
            folder = snapshot_download(folder, local_files_only=True)
        except FileNotFoundError:  # not in the hub's cache
            return None
    file = Path(folder, CLIP_FILES[0])
    return file if file.is_file() else None


def fetch_encoder(model: str) -> Path:
    """Download an encoder, unless it is here; return the file of its weights."""
    require_encoder(model)
    if not model.startswith(CLIP):
        return fetch_network(ENCODERS.get(model, (model,))[0], encoder=True)
    if found := find_encoder(model):
        return found
    try:
        folder = snapshot_download(model.removeprefix(CLIP), allow_patterns=CLIP_FILES)
        return Path(folder, CLIP_FILES[0]).resolve(strict=True)
    except Exception as error:  # the hub's, of either of its HTTP libraries
        raise unavailable(model, error, encoder=True) from None

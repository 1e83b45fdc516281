"""Encoders of images: timm networks without their classifier, and CLIP by transformers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import snapshot_download
from PIL import Image

from sdwn.errors import SdwnError, UsageError, import_extra
from sdwn.io import read_json
from sdwn.prediction.network import ImageNetwork, Outputs, Row
from sdwn.prediction.pretrained import (
    fetch_network,
    load_body,
    require_known,
    unavailable,
    weights_file,
    weights_record,
)
from sdwn.prediction.table import COLUMNS, IMAGE, with_vectors

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


class ClipTowers(torch.nn.Module):
    """A CLIP of transformers with its tokenizer: projected embeddings of images and of prompts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self._tokenizer = model, tokenizer
        # Each prompt is encoded once.
        self._prompts = dict[str, torch.Tensor]()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of images, (n, dimensions)."""
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        projected: torch.Tensor = self.model.visual_projection(pooled)
        return projected

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of prompts, float32 (n, dimensions); long ones are cut."""
        limit = self.model.config.text_config.max_position_embeddings
        new = [one for one in dict.fromkeys(prompts) if one not in self._prompts]
        for start in range(0, len(new), PROMPTS):
            some = new[start : start + PROMPTS]
            how = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
            tokens = self._tokenizer(some, **how).to(self.model.device)
            given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            projected = self.model.text_projection(self.model.text_model(**given).pooler_output)
            self._prompts |= dict(zip(some, projected.float().cpu(), strict=True))
        return torch.stack([self._prompts[one] for one in prompts])


class Encoder(ImageNetwork):
    """A network whose outputs are features, beside hashes of the images.

    A CLIP also says how near each image is to its prompt: 100 times their cosine, at least 0.
    """

    kind, inputs = "encoder", ("prompt",)

    def describe(self, image: Image.Image) -> Row:
        """Return hashes of an image: of its pixels, and of what it looks like."""
        pixels = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
        pixels.update(image.tobytes())
        # As imagehash writes its bits, row by row.
        bits = np.packbits(import_extra("imagehash", "measures").phash(image).hash)
        digests = {"pixels_hash": pixels.digest(), "phash": bits.tobytes()}
        return {name: int.from_bytes(digest, "big") for name, digest in digests.items()}

    def rows(self, records: Sequence[Row], outputs: Outputs) -> pa.Table:
        """Wait for a batch and return its features."""
        vectors = self.wait(outputs, torch.float16)
        names = (*IMAGE, "pixels_hash", "phash")
        columns: dict[str, Any] = {name: [row[name] for row in records] for name in names}
        scores: list[float | None] = [None] * len(records)
        with_prompt = [place for place, row in enumerate(records) if row.get("prompt")]
        if isinstance(self.network, ClipTowers) and with_prompt:
            texts = self.network.encode_prompts([records[place]["prompt"] for place in with_prompt])
            cosines = torch.cosine_similarity(outputs[0][with_prompt], texts)
            for place, cosine in zip(with_prompt, cosines.tolist(), strict=True):
                scores[place] = max(0.0, 100 * cosine)
        return with_vectors(
            pa.table({**columns, "clip_score": scores}, schema=COLUMNS), vectors.numpy()
        )


# --- By name -----------------------------------------------------------------------------------
def load_encoder(model: str, dtype: torch.dtype | None = None) -> Encoder:
    """Load a preset (`ENCODERS`), any timm model, or ``clip:`` and a folder or a hub's name."""
    file = encoder_file(model, download=True)
    if model.startswith(CLIP):
        return Encoder(model, *_load_clip(model, Path(str(file))), dtype)
    name, arguments, changes = ENCODERS.get(model, (model, {}, {}))
    network, preprocessing, weights = load_body(name, **arguments)
    return Encoder(model, network, preprocessing | changes, weights, dtype)


def _load_clip(model: str, file: Path) -> tuple[ClipTowers, dict[str, Any], dict[str, Any]]:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    network, found = CLIPModel.from_pretrained(file.parent, output_loading_info=True)
    if lacking := sorted(found["missing_keys"]):
        raise SdwnError(
            f"{file}: expected all weights of a CLIP, found none of {lacking[0]}; copy or "
            "download it again"
        )
    images = CLIPImageProcessor.from_pretrained(file.parent).to_dict()
    height, width = (images["crop_size"][side] for side in ("height", "width"))
    preprocessing = {
        "input_size": (3, height, width),
        "interpolation": Image.Resampling(images["resample"]).name.lower(),
        "mean": tuple(images["image_mean"]),
        "std": tuple(images["image_std"]),
        "crop_pct": height / images["size"]["shortest_edge"],
        "crop_mode": "center",
    }
    origin = "a folder" if own_folder(model) else f"the hub, at {file.parent.name}"
    towers = ClipTowers(network, AutoTokenizer.from_pretrained(file.parent))
    return towers, preprocessing, weights_record(origin, file)


def own_folder(model: str) -> Path | None:
    """Return the folder of an encoder's weights, where it is a user's own."""
    kind, _, where = model.partition(":")
    is_own = kind == "local-dir" or (kind == "clip" and Path(where).is_dir())
    return Path(where).absolute() if is_own else None


def encoder_file(model: str, download: bool = False) -> Path | None:
    """Return the file of an encoder's weights; None where it is not here and not to be fetched.

    Raises:
        UsageError: this is no encoder's name, or no folder of one.
    """
    import_extra("imagehash", "measures")
    if not model.startswith(CLIP):
        require_known(model, ENCODERS)
        name = ENCODERS.get(model, (model,))[0]
        return fetch_network(name, encoder=True) if download else weights_file(name)
    if folder := own_folder(model):
        file = folder / CLIP_FILES[0]
        if not file.is_file() or read_json(folder / "config.json").get("model_type") != "clip":
            raise UsageError(
                f"{folder}: expected a CLIPModel of transformers, its config.json and {file.name}"
            )
        return file
    name = model.removeprefix(CLIP)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"model {model}: expected {CLIP}FOLDER, or {CLIP}ORG/NAME on the hub")
    # The hub is not asked for what its cache has.
    for local in (True, False)[: 1 + download]:
        try:
            there = snapshot_download(name, allow_patterns=CLIP_FILES, local_files_only=local)
            file = Path(there, CLIP_FILES[0])
            file.stat()  # a repository may have no such file
            return file
        except Exception as error:  # the hub's, of either of its HTTP libraries
            if not local:
                raise unavailable(model, error, encoder=True) from None
    return None

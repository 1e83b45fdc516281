"""The full-size model of sdwn/models/full_size.py, without memory for its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from sdwn.models import full_size
from sdwn.models.builtin import builtin_folder
from sdwn.models.full_size import NETWORKS, save_full_size


def empty_part(component: str) -> Any:
    """Build a network without memory for its weights."""
    with torch.device("meta"):
        return NETWORKS[component]().half()


@pytest.mark.parametrize(
    ("component", "parameters"),
    [
        ("unet", 859_520_964),
        ("vae", 83_653_863),
        ("text_encoder", 123_060_480),
        ("safety_checker", 303_981_588),
    ],
)
def test_the_parameters_are_as_many_as_published(component: str, parameters: int) -> None:
    network = empty_part(component)
    assert sum(weights.numel() for weights in network.parameters()) == parameters
    assert {weights.device.type for weights in network.parameters()} == {"meta"}


def test_an_image_of_512_has_latents_of_64() -> None:
    half = {"device": "meta", "dtype": torch.float16}
    latents = empty_part("vae").encode(torch.empty(1, 3, 512, 512, **half)).latent_dist.mean
    assert latents.shape == (1, 4, 64, 64)
    text = empty_part("text_encoder")(torch.empty(1, 77, device="meta", dtype=torch.long))
    noise = empty_part("unet")(latents, torch.ones(1, device="meta"), text[0]).sample
    assert noise.shape == latents.shape
    assert empty_part("vae").decode(noise).sample.shape == (1, 3, 512, 512)


def test_a_folder_that_is_whole_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"))
    parts = {name: lambda name=name: getattr(small, name) for name in NETWORKS}
    monkeypatch.setattr(full_size, "NETWORKS", parts)
    assert save_full_size(tmp_path, torch.device("cpu"))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.tokenizer.model_max_length == 77
    for name in NETWORKS:
        assert all(weights.isfinite().all() for weights in getattr(loaded, name).parameters())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not save_full_size(tmp_path, torch.device("cpu"))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

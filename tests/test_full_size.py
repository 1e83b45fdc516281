"""The full-size model of sdwn/models/full_size.py, without memory for its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from sdwn.models import full_size
from sdwn.models.full_size import NETWORKS, save_full_size, save_tokenizer
from tools.tiny import build_pipeline
from transformers import CLIPTokenizer

GLOSS = "a member of the genus Canis that has been domesticated by man since prehistoric times"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model") / "tokenizer"
    save_tokenizer(folder).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


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


def test_the_tokenizer_has_the_published_size_and_ends(tokenizer: Any) -> None:
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == 49_408
    short = tokenizer(GLOSS).input_ids
    assert (short[0], short[-1], len(short) < 77) == (49_406, 49_407, True)
    assert tokenizer.decode(short, skip_special_tokens=True).strip() == GLOSS.lower()


def test_the_tokenizer_truncates_and_pads_to_77(tokenizer: Any) -> None:
    for text in (GLOSS, GLOSS * 9):
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert (len(ids), ids[0], ids[-1]) == (77, 49_406, 49_407)


def test_an_image_of_512_has_latents_of_64() -> None:
    half = {"device": "meta", "dtype": torch.float16}
    latents = empty_part("vae").encode(torch.empty(1, 3, 512, 512, **half)).latent_dist.mean
    assert latents.shape == (1, 4, 64, 64)
    text = empty_part("text_encoder")(torch.empty(1, 77, device="meta", dtype=torch.long))
    noise = empty_part("unet")(latents, torch.ones(1, device="meta"), text[0]).sample
    assert noise.shape == latents.shape
    assert empty_part("vae").decode(noise).sample.shape == (1, 3, 512, 512)


def test_a_folder_that_is_whole_is_not_built_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = build_pipeline(tokenizer)
    parts = {name: lambda name=name: getattr(small, name) for name in NETWORKS}
    monkeypatch.setattr(full_size, "NETWORKS", parts)
    assert save_full_size(tmp_path, torch.device("cpu"))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert len(loaded.tokenizer) == 49_408
    for name in NETWORKS:
        assert all(weights.isfinite().all() for weights in getattr(loaded, name).parameters())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not save_full_size(tmp_path, torch.device("cpu"))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

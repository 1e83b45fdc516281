"""Weights as people have them: a single file, LoRAs, textual inversions, another VAE."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file, save_file
from sdwn.config import ModelConfig
from sdwn.models.added import obtain_weights
from sdwn.models.builtin import builtin_folder

from conftest import noise_config

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_layout(folder: Path, file: Path) -> None:
    """Write builtin:tiny as one file, as Stable Diffusion 1 was published."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    blocks = len(pipeline.unet.config.block_out_channels)
    layers = pipeline.unet.config.layers_per_block
    attends = {"down": pipeline.unet.down_blocks, "up": pipeline.unet.up_blocks}
    known = {new: old for new, old in DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"].items()}
    state = {}
    for name, weight in pipeline.unet.state_dict().items():
        if name in known:
            state[f"model.diffusion_model.{known[name]}"] = weight
            continue
        way, *rest = name.split(".")
        if way == "mid_block":
            kind, number, *inner = rest
            place = f"middle_block.{2 * int(number) + (kind == 'attentions')}"
        else:
            block, kind, number, *inner = rest
            first = int(block) * (layers + 1)
            has_attention = hasattr(attends[way.split("_")[0]][int(block)], "attentions")
            if kind == "downsamplers":
                place, inner = f"input_blocks.{first + layers + 1}.0", ["op", inner[-1]]
            elif kind == "upsamplers":
                place = f"output_blocks.{first + layers}.{1 + has_attention}"
            elif way == "down_blocks":
                place = f"input_blocks.{first + int(number) + 1}.{int(kind == 'attentions')}"
            else:
                place = f"output_blocks.{first + int(number)}.{int(kind == 'attentions')}"
        if kind == "resnets":
            inner[0] = RESNET[inner[0]]
        state[f"model.diffusion_model.{'.'.join([place, *inner])}"] = weight
    known = DIFFUSERS_TO_LDM_MAPPING["vae"]
    last = len(pipeline.vae.config.block_out_channels) - 1
    for name, weight in pipeline.vae.state_dict().items():
        old = known.get(name, name)
        old = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", old)
        old = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", old)
        old = re.sub(
            r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", old
        )
        old = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", old
        )
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", old)
        if "mid_block.attentions.0" in old:
            old = old.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            old = old.replace("to_out.0", "proj_out").replace("to_", "")
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        old = old.replace("conv_shortcut", "nin_shortcut")
        state[f"first_stage_model.{old}"] = weight
    for name, weight in pipeline.text_encoder.state_dict().items():
        plain = name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{plain}"] = weight
    save_file({name: weight.contiguous() for name, weight in state.items()}, file)


@pytest.fixture(scope="session")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("single") / "Tiny v1.safetensors"
    original_layout(builtin_folder("tiny"), file)
    return file


def test_a_single_file_is_converted_to_the_same_weights(single_file: Path) -> None:
    tiny = builtin_folder("tiny")
    model = {"name": str(single_file), "config": str(tiny)}
    found = obtain_weights(noise_config(model=model, generation={"safety_checker": False}))
    for part in ("unet", "vae", "text_encoder"):
        (own,) = (tiny / part).glob("*.safetensors")
        before, after = load_file(own), load_file(found.folder / part / own.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

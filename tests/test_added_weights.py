"""Weights as people have them: a single file, LoRAs, textual inversions, another VAE."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import constants
from packaging.version import Version
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sdwn.config import ModelConfig, RunConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.generation.sampler import Sampler
from sdwn.generation.task import generate
from sdwn.io import file_sha256
from sdwn.models import weights as weights_module
from sdwn.models.builtin import builtin_folder
from sdwn.models.families import PromptLengths, prompt_lengths, require_usable
from sdwn.models.lock import ensure_lock, locked_weights, read_lock
from sdwn.models.weights import fingerprint, found_weights, obtain_weights
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Concept, ImageSpec, read_plan, write_plan
from sdwn.preflight.trials import make_pilot, pilot_plan
from sdwn.releases.merge import MergeOptions, merge
from transformers.integrations import peft as transformers_peft

import families
import families_dit
from conftest import OwnProcess, PlanRun, SavedModel, Sdwn, noise_config
from hub import serving

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_layout(folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a pipeline as one file, as Stable Diffusion 1 and XL were published."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    layers = pipeline.unet.config.layers_per_block
    attends = {"down": pipeline.unet.down_blocks, "up": pipeline.unet.up_blocks}
    known = DIFFUSERS_TO_LDM_MAPPING["unet"]
    known = known["layers"] | known["addition_embed_type"]
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
        old = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", old)
        old = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", old
        )
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", old)
        if "mid_block.attentions.0" in old:
            old = old.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            old = old.replace("to_out.0", "proj_out").replace("to_", "")
        old = old.replace("conv_shortcut", "nin_shortcut")
        linear = weight.ndim == 2
        state[f"first_stage_model.{old}"] = weight[:, :, None, None] if linear else weight
    state |= original_text_encoders(pipeline)
    save_file({name: weight.contiguous() for name, weight in state.items()}, file)


def original_text_encoders(pipeline: Any) -> dict[str, torch.Tensor]:
    state = dict[str, torch.Tensor]()
    second = getattr(pipeline, "text_encoder_2", None)
    top = "conditioner.embedders.0" if second else "cond_stage_model"
    for name, weight in pipeline.text_encoder.state_dict().items():
        state[f"{top}.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    for name, weight in open_clip(second.state_dict() if second else {}).items():
        state[f"conditioner.embedders.1.model.{name}"] = weight
    return state


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of XL's second text encoder, as OpenCLIP has them."""
    known, made = DIFFUSERS_TO_LDM_MAPPING["openclip"], dict[str, torch.Tensor]()
    for name, weight in state.items():
        if name in known["layers"]:
            made[known["layers"][name]] = weight.T if "projection" in name else weight
            continue
        old = name
        for new, before in known["transformer"].items():
            old = old.replace(new, before)
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            made[f"transformer.{old.replace('q_proj.', 'in_proj_')}"] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            made[f"transformer.{old}"] = weight
    return made


@pytest.fixture(scope="session")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("single") / "Tiny v1.safetensors"
    original_layout(builtin_folder("tiny"), file)
    return file


@pytest.mark.parametrize(("name", "dtype"), [("tiny", torch.float32), ("xl", torch.float16)])
def test_a_single_file_is_converted_to_the_same_weights(
    name: str, dtype: torch.dtype, xl: Path, tmp_path: Path
) -> None:
    folder, file = xl if name == "xl" else builtin_folder("tiny"), tmp_path / "one.safetensors"
    original_layout(folder, file, dtype)
    model = {"name": str(file), "config": str(folder)}
    found = obtain_weights(noise_config(model=model, generation={"safety_checker": False}))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2")[: 4 if name == "xl" else 3]:
        (own,) = (folder / part).glob("*.safetensors")
        before, after = load_file(own), load_file(found.folder / part / own.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].to(dtype), after[key]) for key in before)


@pytest.fixture
def unconverted(single_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A single file, and an empty cache."""
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path))
    model = {"name": str(single_file), "config": str(builtin_folder("tiny"))}
    return noise_config(model=model, generation={"safety_checker": False})


def test_of_two_that_start_at_once_one_converts(
    unconverted: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_start, converted = threading.Barrier(2, timeout=60), list[Path]()
    convert = weights_module.convert

    def convert_slowly(model: ModelConfig, folder: Path) -> None:
        converted.append(folder)
        time.sleep(0.2)
        convert(model, folder)

    def start(config: RunConfig) -> Path:
        both_start.wait()
        return obtain_weights(config).folder

    monkeypatch.setattr(weights_module, "convert", convert_slowly)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(start, [unconverted, unconverted])
    assert one == other
    assert len(converted) == 1
    assert list((tmp_path / "models").iterdir()) == [one]


def test_a_conversion_that_failed_leaves_nothing(
    unconverted: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: ModelConfig, folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights_module, "convert", fail)
    with pytest.raises(OSError, match="No space left"):
        obtain_weights(unconverted)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.fixture
def text_encoder_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers put LoRAs into text encoders with the newest peft that there is here.

    It asks for one that package registries may not have yet.
    """
    wanted, found = transformers_peft.MIN_PEFT_VERSION, importlib.metadata.version("peft")
    if Version(found) < Version(wanted):
        monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", found)


def lora(pipeline: Any, file: Path, seed: int, parts: tuple[str, ...]) -> Path:
    """Write a LoRA of random weights for the attention of these parts, as diffusers' trainers."""
    layers = {"text_encoder": ["q_proj", "v_proj"], "text_encoder_2": ["q_proj", "v_proj"]}
    torch.manual_seed(seed)
    states = {}
    for part in parts:
        model = getattr(pipeline, part)
        targets = layers.get(part, ["to_q", "to_v"])
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        state = {k: torch.randn_like(v) / 4 for k, v in get_peft_model_state_dict(model).items()}
        if part.startswith("text"):
            state = convert_state_dict_to_diffusers(state)
        states[f"{part}_lora_layers"] = state
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **states)
    return file


SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "safety_checker": False}


def made(model: dict[str, Any], prompt: str = "a dog", **generation: Any) -> Any:
    config = noise_config(model=model, generation={**SMALL, "scheduler": None, **generation})
    sampler = Sampler(config)
    return sampler.sample([ImageSpec(0, Concept("n0"), 0, prompt, 7)])[0]


def plain(pipeline: Any, prompt: str = "a dog", scale: float = 7.5) -> Any:
    """Make the same image by diffusers alone."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    return (image * 255).round().astype("uint8")


@pytest.fixture(scope="session")
def xl(saved: SavedModel) -> Path:
    return saved(families.stable_diffusion_xl)


@pytest.mark.model
@pytest.mark.usefixtures("text_encoder_loras")
@pytest.mark.parametrize("name", ["tiny", "xl"])
def test_loras_are_those_of_diffusers(name: str, xl: Path, tmp_path: Path) -> None:
    folder = builtin_folder("tiny") if name == "tiny" else xl
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    first = lora(pipeline, tmp_path / "a.safetensors", 1, ("unet", "text_encoder"))
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    second = lora(pipeline, tmp_path / "b.safetensors", 2, ("unet",))
    without = made({"name": str(folder)}).pixels
    found = made(
        {
            "name": str(folder),
            "lora": [{"name": str(first), "scale": 0.8}, {"name": str(second), "scale": 0.3}],
        }
    ).pixels
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name=first.name, adapter_name="a")
    pipeline.load_lora_weights(tmp_path, weight_name=second.name, adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.8, 0.3])
    expected = plain(pipeline)
    # Fused, a sum of weights is rounded where else a sum of activations is.
    assert np.abs(expected.astype(int) - found).max() <= 1
    assert np.abs(without.astype(int) - found).mean() > 2


@pytest.mark.model
@pytest.mark.parametrize("make", [families_dit.z_image, families.qwen_image])
def test_a_lora_of_the_denoiser_alone_is_that_of_diffusers(
    make: Any, saved: SavedModel, tmp_path: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(saved(make))
    file = lora(pipeline, tmp_path / "a.safetensors", 1, ("transformer",))
    model = {"name": str(saved(make))}
    found, without = (
        made({**model, **added}, guidance_scale=0).pixels
        for added in ({"lora": [{"name": str(file)}]}, {})
    )
    pipeline = DiffusionPipeline.from_pretrained(saved(make))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    expected = plain(pipeline, scale=0.0)
    assert np.abs(expected.astype(int) - found).max() <= 1
    assert np.abs(without.astype(int) - found).mean() > 2


@pytest.mark.model
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_textual_inversion_is_that_of_diffusers(vectors: int, tmp_path: Path) -> None:
    tiny, file = builtin_folder("tiny"), tmp_path / "style.safetensors"
    values = torch.randn(vectors, 32, generator=torch.Generator().manual_seed(3))
    save_file({"<style>": values if vectors > 1 else values[0]}, file)
    prompt = "a <style> dog"
    model = {"name": str(tiny), "textual_inversion": [{"name": str(file)}]}
    found = made(model, prompt)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    before = plain(pipeline, prompt)
    pipeline.load_textual_inversion(str(file))
    assert np.array_equal(found.pixels, plain(pipeline, prompt))
    assert not np.array_equal(found.pixels, before)
    # Start, end, the four letters of "a" and "dog", and a token for each vector.
    assert found.tokens == 6 + vectors
    config = noise_config(model=model, generation=SMALL)
    prompts = ["x" * (75 - vectors) + " <style>", "x" * (76 - vectors) + " <style>"]
    found = prompt_lengths(tiny, config, prompts)
    assert found == [PromptLengths("text_encoder", counted=2, cut=1, limit=77)]
    twice = {**model, "textual_inversion": [{"name": str(file)}, {"name": str(file)}]}
    with pytest.raises(UsageError, match="has <style> in its vocabulary already"):
        prompt_lengths(tiny, noise_config(model=twice, generation=SMALL), prompts)


def test_another_vae_decodes(xl: Path, tmp_path: Path) -> None:
    tiny = builtin_folder("tiny")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.neg_()
    pipeline.vae.save_pretrained(tmp_path / "vae")
    found = made({"name": str(tiny), "vae": str(tmp_path / "vae")}).pixels
    assert np.array_equal(found, plain(pipeline))
    assert not np.array_equal(found, made({"name": str(tiny)}).pixels)
    settings = tmp_path / "vae/config.json"
    other = {**json.loads(settings.read_text()), "block_out_channels": [16, 32, 64]}
    settings.write_text(json.dumps(other))
    with pytest.raises(SdwnError, match=f"the VAE {tmp_path}/vae; check .* shape"):
        made({"name": str(tiny), "vae": str(tmp_path / "vae")})
    # Of a whole pipeline, its own.
    wanted = noise_config(model={"name": str(tiny), "vae": str(xl)}, generation=SMALL)
    with pytest.raises(UsageError, match=f"model.vae {xl}: .* 4 levels, .* 3 levels"):
        require_usable(wanted)


@pytest.fixture
def locked(planned: PlanRun, tmp_path: Path) -> RunPaths:
    """A run with a LoRA, locked."""
    tiny = builtin_folder("tiny")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    file = lora(pipeline, tmp_path / "style.safetensors", 1, ("unet",))
    model = {"name": str(tiny), "lora": [{"name": str(file), "scale": 0.5}]}
    paths, plan = planned(model=model, generation=SMALL)
    assert ensure_lock(paths, plan) is not None
    return paths


def test_a_lora_that_changed_is_refused_with_both_checksums(locked: RunPaths) -> None:
    model = read_plan(locked).config.model
    file = Path(model.lora[0].name)
    weights = locked_weights(locked, model)
    assert weights is not None
    assert weights.revision.partition("+")[0] == fingerprint(weights.folder)
    before, content = file_sha256(file), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = f"style.safetensors: changed .*expected SHA-256 {before}, found {file_sha256(file)}"
    with pytest.raises(IntegrityError, match=told):
        generate(locked.root, [0])
    file.write_bytes(content)
    # Of another place, but the same content.
    moved = file.rename(file.with_name("moved.safetensors"))
    other = {"name": model.name, "lora": [{"name": str(moved), "scale": 0.5}]}
    assert obtain_weights(noise_config(model=other)).revision == weights.revision


def test_a_release_says_what_changed_its_model(locked: RunPaths) -> None:
    plan = read_plan(locked)
    generate(locked.root, [0])
    merge([locked], ReleasePaths(locked.release), MergeOptions(allow_missing=True))
    name = plan.config.model.lora[0].name
    card = (locked.release / "README.md").read_text()
    assert f"| LoRA | `{name}`, scale 0.5 |" in card
    assert f" added lora {name}," in card


def test_what_cannot_change_the_model_is_refused_at_plan(xl: Path, tmp_path: Path) -> None:
    tiny = str(builtin_folder("tiny"))
    save_file({"<style>": torch.zeros(32)}, tmp_path / "style.safetensors")
    style = {"name": str(tmp_path / "style.safetensors")}
    wide = {"name": str(tmp_path / "wide" / "wide.safetensors")}
    Path(wide["name"]).parent.mkdir()
    save_file({"<wide>": torch.zeros(1, 768)}, wide["name"])
    (tmp_path / "old.pt").write_bytes(b"")
    two = [{"name": str(tmp_path)}]
    save_file({"<other>": torch.zeros(32)}, tmp_path / "other.safetensors")
    for model, told in (
        ({"name": tiny, "lora": two}, "expected one safetensors file, found other.*; name one"),
        ({"name": tiny, "textual_inversion": [{"name": "old.pt"}]}, "weights_only=True"),
        (
            {"name": tiny, "textual_inversion": [wide]},
            r"its vectors have the shape \[1, 768\], and the model's a width of 32",
        ),
        ({"name": str(xl), "textual_inversion": [style]}, "for 1 text encoders .* model has 2"),
        (
            {"name": tiny, "vae": str(tmp_path)},
            "expected vae.config.json and vae.diffusion_pytorch_model",
        ),
    ):
        with pytest.raises(SdwnError, match=told):
            require_usable(noise_config(model=model, generation=SMALL))


@pytest.mark.parametrize(
    ("make", "setting"),
    [(families.pixart, "lora"), (families.stable_diffusion_3, "textual_inversion")],
)
def test_a_pipeline_that_takes_no_such_weights_is_refused_at_plan(
    saved: SavedModel, tmp_path: Path, make: Any, setting: str
) -> None:
    save_file({"<style>": torch.zeros(32)}, tmp_path / "style.safetensors")
    model = {"name": str(saved(make)), setting: [{"name": str(tmp_path / "style.safetensors")}]}
    generation = {**SMALL, "scheduler": None}
    with pytest.raises(UsageError, match=f"no {setting} into .*; leave model.{setting} out"):
        require_usable(noise_config(model=model, generation=generation))


def test_a_pipeline_that_diffusers_alone_does_not_run_is_refused_at_plan(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(builtin_folder("tiny"), tmp_path / "model"))
    index, unet = folder / "model_index.json", folder / "unet/config.json"
    whole, settings = json.loads(index.read_text()), json.loads(unet.read_text())
    wanted = noise_config(model={"name": str(folder)}, generation=SMALL)
    for change, told in (
        ({"_class_name": ["my_pipeline", "MyPipeline"]}, "comes with code of its own"),
        ({"_class_name": "FutureDreamsPipeline"}, "has no FutureDreamsPipeline; upgrade diffusers"),
        ({"_class_name": "DDPMPipeline"}, "DDPMPipeline takes no text prompt"),
        ({"_class_name": "AnimateDiffPipeline"}, "makes videos or sounds"),
        ({"unet": [None, None]}, "has neither a UNet nor a transformer"),
    ):
        index.write_text(json.dumps(whole | change))
        with pytest.raises(UsageError, match=told):
            require_usable(wanted)
    index.write_text(json.dumps(whole))
    unet.write_text(json.dumps(settings | {"auto_map": {"AutoModel": "own.MyUNet"}}))
    with pytest.raises(UsageError, match="its unet comes with code of its own"):
        require_usable(wanted)


def test_a_single_file_goes_through_the_command_line(
    single_file: Path, sdwn: Sdwn, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"name": str(single_file), "config": str(builtin_folder("tiny"))}
    monkeypatch.setenv("SDWN_CACHE", str(sdwn.folder / "cache"))
    config = noise_config(model=model, generation={**SMALL, "num_inference_steps": 1})
    whole = config.model_dump(mode="json", exclude_defaults=True)
    (sdwn.folder / "c.yaml").write_text(json.dumps(whole))
    with_checker = ("--set", "generation.safety_checker=true")
    assert "plan with --set generation.safety_checker=false" in (
        sdwn("plan", "c.yaml", "run", *with_checker, code=2).stderr.replace("\n", " ")
    )
    assert sdwn("plan", "c.yaml", "run").stdout.endswith("next: sdwn prefetch run\n")
    found = sdwn.json("prefetch", "run", "--no-classifier")
    digest = file_sha256(single_file)
    assert found["revision"] == digest[:16]
    lock = read_lock(RunPaths(sdwn.folder / "run"), config.model)
    assert lock is not None
    assert lock.single_file is not None
    assert (lock.single_file.sha256, lock.folder) == (digest, found["folder"])
    # Weights are those of the folder from now on.
    content = single_file.read_bytes()
    single_file.write_bytes(b"")
    generate(sdwn.folder / "run", [0])
    shutil.rmtree(found["folder"])
    with pytest.raises(IntegrityError, match=f"bring .* back \\(expected SHA-256 {digest}, found"):
        generate(sdwn.folder / "run", [1])
    single_file.write_bytes(content)


def test_without_network_a_single_file_says_where_its_settings_come_from(
    single_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    wanted = noise_config(model={"name": str(single_file), "config": "lab/none"}, generation=SMALL)
    told = "with the settings of lab/none: .*sdwn prefetch.*model.config to a folder"
    with pytest.raises(SdwnError, match=told):
        obtain_weights(wanted)


def test_an_attention_backend_is_one_that_acts(tmp_path: Path) -> None:
    families.flux_schnell(tmp_path)
    flux = {"name": str(tmp_path)}
    with pytest.raises(SdwnError, match=r"generation\.attention flsh: .*native"):
        made(flux, guidance_scale=0, attention="flsh")
    with pytest.raises(UsageError, match="no effect on UNet2DConditionModel; leave it out"):
        made({"name": str(builtin_folder("tiny"))}, attention="native")
    with pytest.raises(SdwnError, match=r"generation\.attention sage: .*sageattention"):
        made(flux, guidance_scale=0, attention="sage")
    one, other = (made(flux, guidance_scale=0, attention=name) for name in (None, "_native_math"))
    assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


@pytest.mark.model
def test_a_pilot_says_what_speed_options_cost(planned: PlanRun) -> None:
    model = {"name": str(builtin_folder("tiny"))}
    small = {**SMALL, "height": 16, "width": 16, "num_inference_steps": 1}
    paths, plan = planned(model=model, generation={**small, "channels_last": True})
    write_plan(pilot_plan(plan), paths.pilot)
    make_pilot(paths.pilot.root, [0])
    plain = json.loads(paths.pilot.speed.read_text())["plain"]
    assert plain["plain_images_per_second"] > 0
    # The same images: others differ by tens.
    assert 0 <= plain["difference_rms"] <= plain["difference_largest"] <= 1


@pytest.mark.process
def test_what_is_on_the_hub_is_fetched_at_one_commit(
    planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = builtin_folder("tiny")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    (tmp_path / "style").mkdir()
    lora(pipeline, tmp_path / "style/ink.safetensors", 1, ("unet",))
    (tmp_path / "style/other.safetensors").write_bytes(b"not wanted")
    model = {"name": str(tiny), "lora": [{"name": "lab/style", "file": "ink.safetensors"}]}
    paths, plan = planned(model=model, generation={**SMALL, "num_inference_steps": 1})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    assert ensure_lock(paths, plan) is None
    with pytest.raises(SdwnError, match=r"model\.lora lab/style is not in the hub's cache"):
        found_weights(plan.config)
    with serving() as hub:
        commit = hub.commit("lab/style", tmp_path / "style")
        # The hub's address is read at its library's import.
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        found = OwnProcess(tmp_path).json("prefetch", paths.root, "--no-classifier")
        assert not [one for one in hub.requests if "other.safetensors" in one]
    assert Path(found["added"][0]).parent.name == commit
    weights = locked_weights(paths, plan.config.model)
    assert weights is not None
    assert [str(one) for one in weights.added] == [f"lora lab/style at {commit}"]
    generate(paths.root, [0])

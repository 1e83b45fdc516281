"""The sampler on the built-in pipeline, beside plain calls of diffusers."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from sdwn.config import RunConfig
from sdwn.devices.device import Device
from sdwn.devices.tuning import GB, estimated_fit
from sdwn.errors import OutOfMemoryError, UsageError
from sdwn.generation import sampler as sampler_module
from sdwn.generation.batching import Sample
from sdwn.generation.memory import run_empty
from sdwn.generation.sampler import PromptEncoder, Sampler
from sdwn.generation.task import generate, retry_nan
from sdwn.jobs.task import read_record
from sdwn.models.builtin import builtin_folder
from sdwn.models.families import FAMILIES as FAMILY_TABLE
from sdwn.models.families import (
    PipelineInfo,
    PromptLengths,
    check_settings,
    denoiser,
    prompt_lengths,
    text_readers,
)
from sdwn.models.pipeline import load_text_encoders, weights_bytes
from sdwn.models.weights import Weights, fingerprint, staged_if_wanted
from sdwn.planning.plan import Concept, ImageSpec
from tools.tiny import save_tiny
from torch.profiler import profile
from transformers import CLIPTextConfig, CLIPTextModel

import families
import families_dit
from conftest import PlanRun, SavedModel

GLOSSES = (
    "a member of the genus Canis that has been domesticated by man since prehistoric times",
    "a building with glass walls and roof; for the cultivation of plants",
    "feline mammal usually having thick soft fur and no ability to roar",
    "a motor vehicle with four wheels",
    "a large body of water constituting a principal part of the hydrosphere",
    "small leaping insect that sucks the juices of plants",
    "a tall perennial woody plant having a main trunk and branches",
    "a seat for one person, with a support for the back",
    "any of various small toothed whales with a beaklike snout",
    "a stringed instrument played with a bow",
)
LATENTS = (1, 4, 8, 8)


def config(name: str = "builtin:tiny", **generation: Any) -> RunConfig:
    small = {"height": 32, "width": 32, "num_inference_steps": 2, "precision": "fp32"}
    return RunConfig.model_validate(
        {
            "catalog": {"name": "closure"},
            "model": {"name": name},
            "generation": {**small, **generation},
            "storage": {"images_per_shard": 10},
        }
    )


def specs(count: int, first: int = 0, negative: str | None = None) -> list[ImageSpec]:
    numbers = range(first, first + count)
    return [spec(GLOSSES[number % 10], number, negative) for number in numbers]


def spec(prompt: str, seed: int = 0, negative: str | None = None) -> ImageSpec:
    return ImageSpec(0, Concept("n02084071"), 0, prompt, seed, negative_prompt=negative)


def pixels(samples: list[Sample]) -> np.ndarray:
    return np.stack([sample.pixels for sample in samples])


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


def first_latents(sampler: Sampler, batch: list[ImageSpec]) -> torch.Tensor:
    """What the UNet is given first, without the half for classifier-free guidance."""
    seen: list[torch.Tensor] = []
    unet = sampler.pipeline.unet
    hook = unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    sampler.sample(batch)
    hook.remove()
    return seen[0][: len(batch)]


def checked(sampler: Sampler, batch: list[ImageSpec]) -> list[Sample]:
    return sampler.check(sampler.sample(batch))


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(config())


@pytest.fixture(scope="module")
def half() -> Sampler:
    return Sampler(config(precision="fp16"))


@pytest.fixture(scope="module")
def plain() -> Any:
    return StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"))


@pytest.fixture(scope="module")
def flagging() -> list[Sample]:
    """Enough images that some are flagged."""
    return checked(Sampler(config(height=16, width=16, num_inference_steps=1)), specs(200))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(builtin_folder("tiny"), tmp_path / "model")


def diffusers_image(plain: Any, wanted: ImageSpec) -> np.ndarray:
    noise = torch.randn(LATENTS, generator=torch.Generator().manual_seed(wanted.seed))
    image = plain(wanted.prompt, latents=noise, height=32, width=32, num_inference_steps=2)
    return np.asarray(image.images[0])


class TestImages:
    def test_one_alone_is_what_diffusers_makes(self, sampler: Sampler, plain: Any) -> None:
        for wanted in specs(3):
            np.testing.assert_array_equal(
                sampler.sample([wanted])[0].pixels, diffusers_image(plain, wanted)
            )

    def test_a_batch_is_what_diffusers_makes_one_by_one(self, sampler: Sampler, plain: Any) -> None:
        batch = specs(4)
        single = np.stack([diffusers_image(plain, wanted) for wanted in batch])
        apart = distance(pixels(sampler.sample(batch)), single)
        assert apart.max() <= 1
        assert (apart == 0).mean() > 0.99

    def test_the_same_batch_gives_the_same_bytes(self, sampler: Sampler) -> None:
        batch = specs(5)
        first, second = sampler.sample(batch), sampler.sample(batch)
        np.testing.assert_array_equal(pixels(first), pixels(second))

    def test_they_are_rgb_of_the_size_asked_for(self) -> None:
        wide = Sampler(config(height=16, width=32, num_inference_steps=1)).sample(specs(2))
        assert [(sample.pixels.shape, sample.pixels.dtype) for sample in wide] == [
            ((16, 32, 3), np.uint8)
        ] * 2

    def test_they_differ_by_prompt_and_by_seed_and_are_not_grey(self, sampler: Sampler) -> None:
        batch = [spec(prompt, seed) for prompt in GLOSSES[:3] for seed in (1, 2, 3)]
        made = [s.pixels for s in sampler.sample(batch) if s.status == "ok"]
        assert len(made) > 5
        for number, one in enumerate(made):
            assert one.astype(float).std(axis=(0, 1)).mean() > 10
            assert np.ptp(one.astype(int), axis=2).mean() > 20
            assert all(distance(one, other).mean() > 10 for other in made[:number])

    def test_a_negative_prompt_counts(self, sampler: Sampler) -> None:
        refusing = sampler.sample(specs(2, negative="blue"))
        apart = distance(pixels(refusing), pixels(sampler.sample(specs(2))))
        assert apart.mean() > 1


class TestNoise:
    def test_it_is_one_generator_of_the_seed(self, sampler: Sampler) -> None:
        expected = torch.randn(LATENTS, generator=torch.Generator("cpu").manual_seed(7))
        assert torch.equal(first_latents(sampler, specs(1, first=7)), expected)

    def test_it_ignores_the_batch(self, sampler: Sampler) -> None:
        together = first_latents(sampler, specs(3))
        alone = torch.cat([first_latents(sampler, [wanted]) for wanted in specs(3)])
        assert torch.equal(together, alone)

    def test_it_ignores_the_precision(self, sampler: Sampler, half: Sampler) -> None:
        rounded = first_latents(half, specs(2))
        assert rounded.dtype == torch.float16
        assert torch.equal(rounded, first_latents(sampler, specs(2)).half())

    def test_a_scheduler_that_adds_some_ignores_the_batch(self) -> None:
        ancestral = Sampler(
            config(scheduler="EulerAncestralDiscreteScheduler", num_inference_steps=3)
        )
        together = pixels(ancestral.sample(specs(4)))
        alone = pixels([ancestral.sample([wanted])[0] for wanted in specs(4)])
        assert ancestral.provenance["scheduler"] == "EulerAncestralDiscreteScheduler"
        assert distance(together, alone).max() <= 1


class TestPrecision:
    def test_half_mostly_agrees_with_single(self, sampler: Sampler, half: Sampler) -> None:
        pairs = list(zip(sampler.sample(specs(4)), half.sample(specs(4)), strict=True))
        # An image may lie so close to the checker's threshold that rounding decides.
        unflagged = [pair for pair in pairs if {sample.status for sample in pair} == {"ok"}]
        assert half.provenance["precision"] == "fp16"
        assert len(unflagged) >= 3
        apart = distance(*(pixels(list(samples)) for samples in zip(*unflagged, strict=True)))
        assert apart.max() > 0
        assert (apart <= 2).mean() > 0.99

    def test_half_on_a_cpu_is_refused(self, copy: Path) -> None:
        with pytest.raises(UsageError, match=r"--set generation\.precision=fp32"):
            Sampler(config(str(copy), precision="fp16"))


class TestStatus:
    def test_about_one_image_in_twenty_is_flagged(self, flagging: list[Sample]) -> None:
        statuses = [sample.status for sample in flagging]
        assert set(statuses) == {"ok", "nsfw"}
        assert 0.02 <= statuses.count("nsfw") / len(statuses) <= 0.1

    def test_flagged_images_are_black_and_others_are_not(self, flagging: list[Sample]) -> None:
        assert all((sample.status == "nsfw") == (not sample.pixels.any()) for sample in flagging)

    def test_without_the_checker_only_flagged_images_change(self, flagging: list[Sample]) -> None:
        unchecked = Sampler(
            config(height=16, width=16, num_inference_steps=1, safety_checker=False)
        ).sample(specs(200))
        assert {sample.status for sample in unchecked} == {"ok"}
        for before, after in zip(flagging, unchecked, strict=True):
            same = np.array_equal(before.pixels, after.pixels)
            assert same == (before.status == "ok")

    @pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
    @pytest.mark.parametrize("part", ["unet", "vae.decoder"])
    def test_nan_is_told_from_a_flag(self, part: str) -> None:
        broken = Sampler(config(height=16, width=16, num_inference_steps=1))
        with torch.no_grad():
            attrgetter(part)(broken.pipeline).conv_out.bias[0] = torch.nan
        samples = checked(broken, specs(4))
        assert [sample.status for sample in samples] == ["nan"] * 4
        assert not pixels(samples).any()

    def test_flags_are_those_of_diffusers_own_pipeline(self, flagging: list[Sample]) -> None:
        whole = StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"))
        whole.set_progress_bar_config(disable=True)
        for number in range(0, 200, 10):
            noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(number))
            made = whole(GLOSSES[0], latents=noise, height=16, width=16, num_inference_steps=1)
            flagged = made.nsfw_content_detected[0]
            assert flagged == (flagging[number].status == "nsfw")


def overflowing(sampler: Sampler, seeds: set[int]) -> None:
    """Let the VAE give NaN in half precision for the noise of some seeds, as fp16 does."""
    noises = [torch.randn(LATENTS, generator=torch.Generator().manual_seed(s)) for s in seeds]
    starts = torch.cat(noises)[:, 0, 0, 0]
    chosen: list[torch.Tensor] = []

    def mark(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        first = given[0][:, 0, 0, 0].float()
        chosen[:] = [torch.isclose(first[:, None], starts, atol=1e-2).any(dim=1)]

    def overflow(module: Any, _: Any, made: torch.Tensor) -> torch.Tensor:
        if made.dtype == torch.float32:
            return made
        made = made.clone()
        made[marked[0][: len(made)]] = torch.nan
        return made

    marked: list[torch.Tensor] = []

    def first_call(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        if not marked:
            mark(module, given)
            marked[:] = chosen

    sampler.pipeline.unet.register_forward_pre_hook(first_call)
    sampler.pipeline.vae.decoder.register_forward_hook(overflow)


def retried(sampler: Sampler, batch: list[ImageSpec]) -> list[Sample]:
    """As a task does at the end of a shard."""
    made = sampler.sample(batch)
    retry_nan(sampler, batch, [(range(len(batch)), made)])
    return made


class TestNan:
    def test_an_image_is_sampled_again_in_float32(self, sampler: Sampler) -> None:
        half = Sampler(config(precision="fp16"))
        whole = half.sample(specs(3))
        overflowing(half, {1})
        made = retried(half, specs(3))
        assert [sample.retried_fp32 for sample in made] == [False, True, False]
        assert [sample.status for sample in made] == ["ok"] * 3
        alone = sampler.sample(specs(1, first=1))[0]
        apart = distance(made[1].pixels, alone.pixels)
        assert (apart <= 3).mean() > 0.99, "as in float32, but for weights of half precision"
        for number in (0, 2):
            np.testing.assert_array_equal(made[number].pixels, whole[number].pixels)

    def test_afterwards_the_model_is_what_it_was(self) -> None:
        half = Sampler(config(precision="fp16"))
        before = half.sample(specs(1))
        half.in_float32(specs(1))
        assert half.pipeline.unet.dtype == torch.float16
        np.testing.assert_array_equal(pixels(half.sample(specs(1))), pixels(before))

    def test_what_is_nan_in_float32_too_stays_so(self) -> None:
        broken = Sampler(config(precision="fp16"))
        with torch.no_grad():
            broken.pipeline.vae.decoder.conv_out.bias[0] = torch.nan
        made = retried(broken, specs(2))
        assert [(sample.status, sample.retried_fp32) for sample in made] == [("nan", True)] * 2

    def test_it_is_what_one_pipeline_in_float32_makes(self) -> None:
        """Of half weights, upcast, with the text encoder beside the UNet."""
        whole = StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"), dtype=torch.float16)
        whole.to(torch.float32)
        whole.safety_checker = None
        (again,) = Sampler(config(precision="fp16")).in_float32(specs(1, first=3))
        np.testing.assert_array_equal(again.pixels, diffusers_image(whole, specs(1, first=3)[0]))


class TestParts:
    @pytest.mark.parametrize(
        ("make", "vae"), [(families_dit.sana, "bfloat16"), (families.flux_schnell, "float16")]
    )
    def test_what_overflows_in_fp16_has_another_precision(
        self, make: Any, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(RunConfig, "needs_gpu", False)
        make(tmp_path)
        settings = {**OWN, **FAMILIES[make]}
        own = Sampler(config(str(tmp_path), precision="fp16", **settings), specs=specs(2))
        before = pixels(own.sample(specs(2)))
        own.in_float32(specs(1))
        assert str(own.pipeline.vae.dtype) == f"torch.{vae}"
        assert own.pipeline.transformer.dtype == torch.float16
        np.testing.assert_array_equal(pixels(own.sample(specs(2))), before)
        whole = Sampler(config(str(tmp_path), **settings)).sample(specs(2))
        assert distance(before, pixels(whole)).mean() < 5

    def test_quantized_weights_make_nearly_the_same_images(self, tmp_path: Path) -> None:
        families.flux_schnell(tmp_path)
        settings = {**OWN, **FAMILIES[families.flux_schnell]}
        chosen = config(str(tmp_path), quantization="torchao-int8", **settings)
        own, plain = Sampler(chosen, specs=specs(2)), Sampler(config(str(tmp_path), **settings))
        weight = own.pipeline.transformer.transformer_blocks[0].attn.to_q.weight
        assert type(weight).__name__ == "Int8Tensor"
        made, expected = pixels(own.sample(specs(2))), pixels(plain.sample(specs(2)))
        assert 0 < distance(made, expected).mean() < 5
        assert own.workload != plain.workload

    def test_quantization_without_its_library_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        families.flux_schnell(tmp_path)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        settings = {**OWN, **FAMILIES[families.flux_schnell]}
        with pytest.raises(UsageError, match="pip install bitsandbytes"):
            Sampler(config(str(tmp_path), quantization="bitsandbytes-4bit", **settings))


class TestMemory:
    def test_slicing_changes_last_bits_at_most(self, sampler: Sampler) -> None:
        sliced = Sampler(config())
        assert sliced.slice_vae()
        assert not sliced.slice_vae(), "nothing left to do"
        made = sliced.sample(specs(4))
        assert all(sample.vae_slicing for sample in made)
        assert distance(pixels(made), pixels(sampler.sample(specs(4)))).max() <= 1

    def test_live_tensors_of_stable_diffusion_give_batch_sizes_as_measured(self) -> None:
        """Without its weights: on an H200 2.73 GB and 1.09 GB an image are reserved."""
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768).half()
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ).half()
            latents, text = torch.empty(2, 4, 64, 64).half(), torch.empty(2, 77, 768).half()
            made, denoising = run_empty(unet, "forward", (latents, torch.tensor(1), text), {})
            image, decoding = run_empty(vae, "decode", (latents[:1],), {})
        assert (made.sample.shape, image.sample.shape) == ((2, 4, 64, 64), (1, 3, 512, 512))
        cards = (8, 11, 16, 24, 40, 80)
        fits = [
            estimated_fit((denoising, decoding), (gb - 2.49) * GB, gb * GB, sliced=False)
            for gb in cards
        ]
        assert fits == [4, 6, 10, 17, 30, 63]

    def test_a_prediction_changes_no_image(self, sampler: Sampler) -> None:
        before = pixels(sampler.sample(specs(1)))
        one, two = sampler.predicted_bytes(1), sampler.predicted_bytes(2)
        assert two - one > 32 * 32 * 3 * 4, "at least the image itself"
        np.testing.assert_array_equal(pixels(sampler.sample(specs(1))), before)

    def test_live_tensors_are_what_the_cpu_allocates(self, sampler: Sampler) -> None:
        vae, latents = sampler.pipeline.vae, torch.zeros(4, 4, 16, 16)
        _, predicted = run_empty(vae, "decode", (latents,), {})
        with torch.no_grad(), profile(profile_memory=True) as profiled:
            vae.decode(latents)
        events = profiled.profiler.kineto_results.events()
        events = [one for one in events if one.name() == "[memory]"]
        events.sort(key=lambda one: one.start_ns())
        held = np.cumsum([one.nbytes() for one in events])
        assert 0.9 * held.max() <= predicted <= 1.1 * held.max()

    def test_there_is_no_card_to_ask(self, sampler: Sampler) -> None:
        assert sampler.fits(sliced=False) is None
        assert 0 < sampler.device.limit_bytes < sampler.device.total_bytes

    def test_peaks_are_seen_and_forgotten(self, sampler: Sampler) -> None:
        sampler.device.forget_peak()
        before = sampler.device.peak_bytes
        held = torch.ones(50_000_000)
        assert sampler.device.peak_bytes - before > 150_000_000
        del held
        sampler.device.forget_peak()
        assert sampler.device.peak_bytes - before < 100_000_000

    @pytest.mark.model
    def test_checking_that_finds_no_room_checks_one_at_a_time(
        self, flagging: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crowded = Sampler(config(height=16, width=16, num_inference_steps=1))
        whole = crowded._flags
        counts: list[int] = []

        def flags(samples: list[Sample]) -> list[bool]:
            counts.append(len(samples))
            if len(samples) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(samples)

        monkeypatch.setattr(crowded, "_flags", flags)
        made = crowded.check(crowded.sample(specs(40)))
        assert [s.status for s in made] == [s.status for s in flagging[:40]]
        assert counts[:2] == [16, 1]

    def test_checking_that_finds_no_room_for_one_says_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        crowded = Sampler(config(height=16, width=16, num_inference_steps=1))

        def flags(samples: list[Sample]) -> list[bool]:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(crowded, "_flags", flags)
        with pytest.raises(OutOfMemoryError, match="out of memory"):
            crowded.check(crowded.sample(specs(2)))


class TestSpeed:
    def test_channels_last_changes_last_bits_at_most(self, sampler: Sampler) -> None:
        arranged = Sampler(config(channels_last=True))
        weights = arranged.pipeline.unet.conv_in.weight
        assert weights.is_contiguous(memory_format=torch.channels_last)
        apart = distance(pixels(arranged.sample(specs(4))), pixels(sampler.sample(specs(4))))
        assert apart.max() <= 1

    @pytest.mark.process
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    def test_compiled_blocks_change_last_bits_at_most(self, cache: Path, tmp_path: Path) -> None:
        """In a process of its own, as a task has it."""
        families.one_block(tmp_path / "model")
        settings = {"name": str(tmp_path / "model"), **OWN}
        given, made = tmp_path / "given", tmp_path / "made"
        given.write_bytes(pickle.dumps((config(**settings, compile=True), specs(4))))
        code = (
            "import pickle, sys; from sdwn.generation.batching import load_sampler; "
            "config, specs = pickle.load(open(sys.argv[1], 'rb')); "
            "pickle.dump(load_sampler(config).sample(specs), open(sys.argv[2], 'wb'))"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
        # Precompiled headers go there, a hundred megabytes.
        environment["TMPDIR"] = str(tmp_path)
        command = [sys.executable, "-c", code, given, made]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        compiled = pixels(pickle.loads(made.read_bytes()))
        plain = Sampler(config(**settings)).sample(specs(4))
        assert distance(compiled, pixels(plain)).max() <= 1
        assert any((cache / "inductor").glob("*/*")), "what one task compiled, the next one reads"

    @pytest.mark.process
    def test_it_loads_where_no_cache_can_be_written(self, tmp_path: Path) -> None:
        """As in a home that cannot be written to: diffusers makes a folder on import."""
        families.one_block(tmp_path / "model")
        given = tmp_path / "given"
        given.write_bytes(pickle.dumps(config(name=str(tmp_path / "model"), **OWN)))
        code = (
            "import pickle, sys; from sdwn.generation.batching import load_sampler; "
            "load_sampler(pickle.load(open(sys.argv[1], 'rb')))"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH")}
        environment |= {"SDWN_CACHE": str(given / "below-a-file"), "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", code, given]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of CLIP's text encoder gets."""
    counts, forward = list[int](), CLIPTextModel.forward

    def counted(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        counts.append(len(input_ids))
        return forward(self, input_ids, **options)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    return counts


class TestTwoPhases:
    def test_a_prompt_is_encoded_once_and_the_empty_one_once(self, texts: list[int]) -> None:
        batch = [spec(GLOSSES[number // 5], seed=number) for number in range(10)]
        ahead = Sampler(config(), specs=batch)
        assert texts == [1, 1, 1], "two glosses and nothing"
        made = [*ahead.sample(batch), *ahead.sample(batch[5:])]
        met = Sampler(config())
        np.testing.assert_array_equal(pixels(made), pixels([*met.sample(batch), *made[10:]]))
        met.sample(batch[5:])
        assert texts == [1] * 6

    def test_without_guidance_the_empty_prompt_is_not_needed(self, texts: list[int]) -> None:
        Sampler(config(guidance_scale=1.0)).sample(specs(1))
        assert texts == [1]

    def test_no_text_encoder_is_alive_while_images_are_sampled(self) -> None:
        before = {id(one) for one in gc.get_objects() if isinstance(one, torch.nn.Module)}
        alive = set[str]()

        def look(*_: Any) -> None:
            modules = (one for one in gc.get_objects() if isinstance(one, torch.nn.Module))
            alive.update(type(one).__name__ for one in modules if id(one) not in before)

        batch = [spec("a cat that nobody encoded before")]
        own = Sampler(config(precision="fp16"), specs=batch)
        own.pipeline.unet.register_forward_pre_hook(look)
        own.sample(batch)
        own.in_float32(batch)
        assert "UNet2DConditionModel" in alive
        assert "CLIPTextModel" not in alive

    @pytest.mark.process
    def test_peak_memory_is_that_of_the_larger_phase(self, copy: Path) -> None:
        """In a process of its own, with a heavy text encoder and a heavy denoiser."""
        text = CLIPTextConfig.from_pretrained(copy / "text_encoder").to_dict()
        unet = UNet2DConditionModel.load_config(copy / "unet")
        with torch.device("meta"):
            heavy: dict[str, Any] = {
                "text_encoder/model": CLIPTextModel(
                    CLIPTextConfig(**text | {"vocab_size": 3_000_000})
                ),
                "unet/diffusion_pytorch_model": UNet2DConditionModel.from_config(
                    {**unet, "block_out_channels": (256, 448)}
                ),
            }
        for name, part in heavy.items():
            zeros = {key: torch.zeros(value.shape) for key, value in part.state_dict().items()}
            save_file(zeros, copy / f"{name}.safetensors", {"format": "pt"})
            if "text" in name:
                part.config.save_pretrained((copy / name).parent)
            else:
                part.save_config((copy / name).parent)
        code = (
            "import re, sys, threading, time\n"
            "from pathlib import Path\n"
            "from sdwn.generation.sampler import Sampler\n"
            "import pickle\n"
            "def held():\n"
            "    status = Path('/proc/self/status').read_text()\n"
            "    return 1024 * int(re.search(r'RssAnon:\\s+(\\d+)', status)[1])\n"
            "def look():\n"
            "    while True: seen.append(held()); time.sleep(0.002)\n"
            "small, config, specs = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
            "Sampler(small, specs=specs).sample(specs)\n"
            "seen = [held()]\n"
            "threading.Thread(target=look, daemon=True).start()\n"
            "Sampler(config, specs=specs).sample(specs)\n"
            "print(max(seen) - seen[0])\n"
        )
        wanted = config(str(copy), precision="bf16", safety_checker=False)
        given = copy / "given"
        given.write_bytes(pickle.dumps((config(precision="bf16"), wanted, specs(1))))
        done = subprocess.run(
            [sys.executable, "-c", code, given], capture_output=True, text=True, check=True
        )
        phases = weights_bytes(copy, wanted)
        encoder = phases.pop("text_encoder")
        assert sum(phases.values()) > 0.4 * encoder
        assert 0.9 * encoder < int(done.stdout) < 1.1 * encoder

    @pytest.mark.parametrize("in_memory", [0, 2, 4])
    def test_what_has_no_room_in_memory_is_encoded_in_blocks(
        self, sampler: Sampler, in_memory: int, monkeypatch: pytest.MonkeyPatch, texts: list[int]
    ) -> None:
        """Of six prompts, beside the negative one: a batch of two fits in any case."""
        expected = [pixels(sampler.sample(specs(2, first))) for first in (0, 2, 4)]
        texts.clear()
        monkeypatch.setattr(sampler_module, "MOST_BYTES", in_memory * 77 * 32 * 4)
        small = Sampler(config(), specs=specs(6))
        assert small._room <= 0
        made = [pixels(small.sample(specs(2, first))) for first in (0, 2, 4)]
        np.testing.assert_array_equal(made, expected)
        assert 7 < len(texts) < 12, "some twice, the negative one in each block"


# Settings beside the model's own scheduler, by the small model that they are for.
FAMILIES: dict[Any, dict[str, Any]] = {
    families.stable_diffusion_2: {"options": {"guidance_rescale": 0.7}},
    families.stable_diffusion_xl: {"options": {"clip_skip": 1, "original_size": [64, 48]}},
    families.sdxl_turbo: {"guidance_scale": 0.0, "num_inference_steps": 1},
    families.sd_turbo: {"guidance_scale": 0.0, "num_inference_steps": 1},
    families.pixart: {},
    families.stable_diffusion_3: {"options": {"sigmas": [1.0, 0.4]}},
    families.flux_dev: {"guidance_scale": 3.5},
    families.flux_schnell: {"guidance_scale": 0.0, "options": {"max_sequence_length": 256}},
    families.chroma: {},
    families.flux_2: {"guidance_scale": 4.0},
    families.flux_2_klein: {"guidance_scale": 1.0},
    families.flux_2_klein_base: {},
    families.qwen_image: {"guidance_scale": 0.0},
    families.qwen_image_2: {"guidance_scale": 0.0},
    families_dit.pixart_alpha: {},
    families_dit.sana: {},
    families_dit.sana_sprint: {},
    families_dit.lumina_2: {},
    families_dit.z_image: {"guidance_scale": 1.0},
    families_dit.latent_consistency: {},
    families_dit.few_steps: {},
}
OWN = {"scheduler": None, "safety_checker": False, "height": 32, "width": 64}
# Guided by another setting than guidance_scale.
TRUE_CFG = {name for name, row in FAMILY_TABLE.items() if row.scale == "true_cfg_scale"}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def family(request: pytest.FixtureRequest, saved: SavedModel) -> Any:
    return saved(request.param), {**OWN, **FAMILIES[request.param]}


@pytest.fixture(scope="module")
def plain_family(family: Any) -> Any:
    return plain_pipeline(family[0])


@pytest.fixture(scope="module")
def sampler_of_family(family: Any) -> Sampler:
    folder, settings = family
    return Sampler(config(str(folder), **settings))


def documented(plain: Any, wanted: ImageSpec, settings: dict[str, Any]) -> np.ndarray:
    """The image of the call that diffusers documents, with a generator of the image's own."""
    taken = inspect.signature(plain.__call__).parameters
    given = {
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "use_resolution_binning": False,
        **settings,
        **{
            key: tuple(value) if key == "original_size" else value
            for key, value in settings.get("options", {}).items()
        },
    }
    if given.get("negative_prompt") is None:
        given.pop("negative_prompt", None)
    image = plain(
        prompt=wanted.prompt,
        generator=[torch.Generator().manual_seed(wanted.seed)],
        **{key: value for key, value in given.items() if key in taken},
    ).images[0]
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image)


def plain_pipeline(folder: Path) -> Any:
    plain = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    plain.set_progress_bar_config(disable=True)
    return plain


@pytest.mark.model
class TestFamilies:
    def test_images_are_what_diffusers_makes_in_a_batch_too(
        self, family: Any, plain_family: Any, sampler_of_family: Sampler
    ) -> None:
        batch, rounds_twice = specs(3), type(plain_family).__name__ == "QwenImage21Pipeline"
        alone = pixels([sampler_of_family.sample([wanted])[0] for wanted in batch])
        for wanted, made in zip(batch[:2], alone, strict=False):
            apart = distance(made, documented(plain_family, wanted, family[1]))
            # PIL does where it removes transparency.
            assert apart.max() <= rounds_twice
        together = pixels(sampler_of_family.sample(batch))
        assert distance(together, alone).max() <= 1
        assert all(distance(alone[0], other).mean() > 5 for other in alone[1:])

    def test_a_negative_prompt_acts_as_in_diffusers(self, family: Any, plain_family: Any) -> None:
        folder, settings = family
        kind = type(plain_family).__name__
        settings = {**settings, "negative_prompt": "blue"}
        if not FAMILY_TABLE[kind].negative:
            with pytest.raises(UsageError, match=r"negative_prompt: .* takes none"):
                check_settings(config(str(folder), **settings), folder)
            return
        if kind in TRUE_CFG:
            options = {**settings.get("options", {}), "true_cfg_scale": 4.0}
            settings = {**settings, "options": options}
        else:
            settings = {**settings, "guidance_scale": 7.5}
        wanted = spec(GLOSSES[0], negative="blue")
        made = Sampler(config(str(folder), **settings)).sample([wanted])[0].pixels
        apart = distance(made, documented(plain_family, wanted, settings))
        assert apart.max() <= (kind == "QwenImage21Pipeline")

    def test_each_encoder_runs_once_a_prompt_and_is_not_needed_again(
        self, family: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, settings = family
        info = PipelineInfo(folder)
        guided = info.guided(config(**settings).generation)
        negative = "blue" if guided and info.family.negative else None
        runs, load = Counter[str](), sampler_module.load_text_encoders

        def load_counted(*arguments: Any) -> Any:
            pipeline = load(*arguments)
            for name, part in pipeline.components.items():
                if isinstance(part, torch.nn.Module):
                    part.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
            return pipeline

        monkeypatch.setattr(sampler_module, "load_text_encoders", load_counted)
        batch = [spec(prompt, seed, negative) for prompt in GLOSSES[:2] for seed in (1, 2)]
        ours = Sampler(config(str(folder), **settings), specs=batch)
        assert ours.workload.guidance == guided
        encoders = {name for name in info.parts if name.startswith("text_encoder")}
        once = dict.fromkeys(encoders, 2 + guided)
        assert runs == once, "two prompts, and one negative prompt; no other network"
        assert not any(getattr(ours.pipeline, name) for name in encoders)
        ours.sample(batch)
        assert runs == once

    def test_prompts_are_encoded_without_the_other_networks(
        self, family: Any, plain_family: Any
    ) -> None:
        folder, settings = family
        wanted = config(str(folder), **settings)
        info = PipelineInfo(folder)
        alone = load_text_encoders(wanted, Weights(folder, ""), info, Device(), "auto")
        assert not isinstance(denoiser(alone), torch.nn.Module)
        one, other = (
            PromptEncoder(pipeline, wanted.generation, info).encode(GLOSSES[0])
            for pipeline in (alone, plain_family)
        )
        assert one.arguments.keys() == other.arguments.keys()
        for name, value in one.arguments.items():
            assert all(map(torch.equal, value, other.arguments[name]))

    def test_tokens_and_cuts_are_what_each_encoder_is_given(
        self, family: Any, plain_family: Any
    ) -> None:
        folder, settings = family
        wanted = config(str(folder), **{**settings, "guidance_scale": 0.0, "options": {}})
        plain, info, hooks = plain_family, PipelineInfo(folder), list[Any]()
        encoder = PromptEncoder(plain, wanted.generation, info)
        readers = text_readers(info.family, plain.components, wanted.generation)
        given: dict[str, int] = {}

        def note(name: str, end: int) -> Callable[..., None]:
            def hook(_: Any, values: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
                ids = [*values, named.get("input_ids")][0][0].tolist()
                mask = named.get("attention_mask")
                given[name] = ids.index(end) + 1 if mask is None else int(mask.sum())

            return hook

        for reader in readers:
            hook = note(reader.name, reader.tokenizer.eos_token_id)
            part = getattr(plain, reader.name)
            hooks.append(part.register_forward_pre_hook(hook, with_kwargs=True))
        limits = {min(reader.limit, 600) for reader in readers}
        around = [limit + more for limit in sorted(limits) for more in (-1, 0, 1)]
        beside = readers[0].tokens(["x"])[0] - 1
        prompts = ["x" * (tokens - beside) for tokens in around]
        for tokens, prompt in zip(around, prompts, strict=True):
            one = encoder.encode(prompt)
            assert one.tokens == tokens
            assert one.truncated == (tokens > readers[0].limit)
            assert one.cut == tuple(r.name for r in readers if tokens > r.limit)
            if "Sana" in info.kind:
                # Of its instruction, it drops most behind its encoder.
                given = {"text_encoder": int(one.arguments["prompt_attention_mask"].sum())}
            if "Qwen" in info.kind:
                # What it drops in front, and cuts, it does behind its encoder.
                given = {"text_encoder": one.arguments["prompt_embeds"].shape[1]}
            assert given == {r.name: min(tokens, r.limit) for r in readers}
        for hook in hooks:
            hook.remove()
        lengths = prompt_lengths(folder, wanted, prompts)
        assert lengths == [
            PromptLengths(r.name, len(prompts), sum(n > r.limit for n in around), r.limit)
            for r in readers
        ]


@pytest.mark.parametrize("make", [families.stable_diffusion_xl, families.flux_dev])
def test_an_interrupted_batch_leaves_the_model_whole(
    saved: SavedModel, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = saved(make), {**OWN, **FAMILIES[make]}
    monkeypatch.setattr(RunConfig, "needs_gpu", False)
    ours = Sampler(config(str(folder), precision="fp16", **settings))
    before = pixels(ours.sample(specs(2)))

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = ours.pipeline.vae.decoder.register_forward_pre_hook(out_of_memory)
    with pytest.raises(OutOfMemoryError, match=r"20\.00 GiB"):
        ours.sample(specs(2))
    hook.remove()
    np.testing.assert_array_equal(pixels(ours.sample(specs(2))), before)


def test_prompts_that_any_encoder_cut_are_counted_in_the_record_of_the_task_run(
    saved: SavedModel, planned: PlanRun
) -> None:
    folder = saved(families.stable_diffusion_3)
    generation = {**OWN, "height": 16, "width": 16, "num_inference_steps": 1, "precision": "fp32"}
    paths, plan = planned(
        catalog={"synsets": ["zebra", "harp.n.01"]},
        prompt="{lemma} {definition}",
        images_per_synset=1,
        model={"name": str(folder)},
        generation=generation,
    )
    lengths = [len(row.prompt) + 2 for row in plan.concepts]
    assert sorted(length > 77 for length in lengths) == [False, True]
    assert max(lengths) < 256, "T5 reads them whole"
    generate(paths.root, range(len(plan.shards)))
    record = read_record(paths.task("none", 0))
    assert record.cut_prompts == {"text_encoder": 1, "text_encoder_2": 1}


def test_steps_that_are_given_one_by_one_are_all_timed(saved: SavedModel) -> None:
    options = {"sigmas": [1 - step / 12 for step in range(12)]}
    settings = {**OWN, "num_inference_steps": 12, "options": options}
    ours = Sampler(config(str(saved(families.stable_diffusion_3)), **settings))
    began = time.perf_counter()
    taken = ours.time_batch(specs(2))
    assert taken <= time.perf_counter() - began, "nothing is added for steps that were not made"


def test_a_pipeline_of_no_family_gets_texts(saved: SavedModel) -> None:
    folder = saved(families.aura_flow)
    settings = {**OWN, "negative_prompt": "blue", "options": {"max_sequence_length": 128}}
    ours = Sampler(config(str(folder), **settings))
    wanted = spec("a small red house " * 8, seed=4, negative="blue")
    made = ours.sample([wanted])[0]
    np.testing.assert_array_equal(made.pixels, documented(plain_pipeline(folder), wanted, settings))
    assert (made.tokens, made.truncated) == (145, True)


def test_prompts_without_a_tokenizer_are_not_counted(saved: SavedModel) -> None:
    folder = saved(families.aura_flow)
    plain = plain_pipeline(folder)
    plain.tokenizer = None
    encoder = PromptEncoder(plain, config(**OWN).generation, PipelineInfo(folder))
    encoded = encoder.encode("a cat", "blue")
    assert encoded.arguments == {"prompt": "a cat", "negative_prompt": "blue"}
    assert (encoded.tokens, encoded.truncated, encoded.cut) == (0, False, ())


SDXL, SD3, FLUX = families.stable_diffusion_xl, families.stable_diffusion_3, families.flux_dev
NO_EFFECT = "has no effect"


class TestSettings:
    @pytest.mark.parametrize(
        ("make", "generation", "expected"),
        [
            # Guidance that is ignored, and what guides instead.
            (
                families.flux_schnell,
                {},
                "generation.guidance_scale: 7.5 has no effect on FluxPipeline with these "
                "weights; write generation.guidance_scale: 0, and generation.options."
                "true_cfg_scale and generation.negative_prompt to guide",
            ),
            (families.qwen_image, {}, "7.5 has no effect on QwenImagePipeline with these"),
            (families.qwen_image_2, {}, "7.5 has no effect on QwenImage21Pipeline with these"),
            (families.flux_2_klein, {}, "these weights; write generation.guidance_scale: 0"),
            (SDXL, {"guidance_scale": 0.5}, "0.5 has no effect on StableDiffusionXLPipeline; wri"),
            # A negative prompt that is ignored, or no argument at all.
            (
                FLUX,
                {"negative_prompt": "blue"},
                "generation.negative_prompt has no effect on FluxPipeline without a second "
                "prediction; leave it out, or write generation.options.true_cfg_scale above 1",
            ),
            (
                families.sdxl_turbo,
                {"guidance_scale": 0.0, "negative_prompt": "blue"},
                "second prediction; leave it out, or write generation.guidance_scale above 1",
            ),
            (families.flux_2, {"negative_prompt": "blue"}, "Flux2Pipeline takes none; leave it"),
            (families.flux_2_klein_base, {"negative_prompt": "blue"}, "KleinPipeline takes none"),
            (
                families.qwen_image,
                {"guidance_scale": 0.0, "options": {"true_cfg_scale": 4.0}},
                "true_cfg_scale has no effect without generation.negative_prompt; ' ' is an empty",
            ),
            # Options.
            (SDXL, {"options": {"true_cfg_scale": 4}}, "takes no such option; valid: clip_skip, c"),
            (SD3, {"options": {"prompt_2": "a"}}, "generation.options.prompt_2: sdwn sets this i"),
            (SD3, {"options": {"height": 64}}, "options.height: write generation.height"),
            (FLUX, {"options": {"true_cfg_scale": "4"}}, 'expected a valid number, found "4"'),
            (SD3, {"options": {"sigmas": [1.0]}}, "num_inference_steps: 2 has no effect, for sigm"),
            (
                SD3,
                {"options": {"max_sequence_length": True}},
                "expected a valid integer, found true",
            ),
            (
                families.pixart,
                {"options": {"clean_caption": 1}},
                "expected a valid boolean, found 1",
            ),
            (
                families_dit.lumina_2,
                {"options": {"system_prompt": 3}},
                "expected a valid string, fo",
            ),
            (
                families_dit.sana,
                {"options": {"complex_human_instruction": "Draw."}},
                'expected a valid array, found "Draw."',
            ),
            (
                SDXL,
                {"options": {"clip_skip": "1"}},
                'clip_skip: expected a valid integer, found "1"',
            ),
            (
                SDXL,
                {"options": {"target_size": [64, "a"]}},
                "expected a valid integer, found [64, ",
            ),
            (families.aura_flow, {"options": {"clip_skip": 1}}, "AuraFlowPipeline takes no such o"),
            # Sizes that would be rounded.
            (
                FLUX,
                {"height": 40},
                "FluxPipeline with these weights makes multiples of 16 pixels",
            ),
            (SD3, {"width": 72}, "generation.width: StableDiffusion3Pipeline with these weights m"),
            (families.pixart, {"width": 72}, "found 72; write 64 or 80"),
            (families.qwen_image_2, {"height": 16, "guidance_scale": 0.0}, "found 16; write 32"),
            # A scheduler of another kind of model, as it is by default.
            (SD3, {"scheduler": "PNDMScheduler"}, "FlowMatchEulerDiscreteScheduler; null is the"),
        ],
    )
    def test_what_has_no_effect_is_refused_with_what_to_write(
        self, saved: SavedModel, make: Any, generation: dict[str, Any], expected: str
    ) -> None:
        folder = saved(make)
        with pytest.raises(UsageError, match=re.escape(expected)):
            check_settings(config(str(folder), **{**OWN, **generation}), folder)

    def test_a_value_that_a_pipeline_does_not_take_ends_the_task_in_one_line(self) -> None:
        for name, value in (("clip_skip", 99), ("timesteps", [10, 5])):
            expected = f"StableDiffusionPipeline fails with generation.options {name}"
            with pytest.raises(UsageError, match=expected):
                Sampler(config(options={name: value})).sample(specs(1))

    def test_a_text_encoder_may_be_left_out_of_the_model(
        self, saved: Callable[[Any], Path], tmp_path: Path
    ) -> None:
        folder = tmp_path / "two-encoders"
        absent: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
        plain = DiffusionPipeline.from_pretrained(saved(SD3), **absent)
        plain.save_pretrained(folder)
        made = Sampler(config(str(folder), **OWN)).sample([spec("a dog")])
        np.testing.assert_array_equal(made[0].pixels, documented(plain, spec("a dog"), OWN))

    def test_clip_skip_takes_an_earlier_layer(self) -> None:
        encoder = Sampler(config(options={"clip_skip": 1}))
        plain = StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"))
        ids = plain.tokenizer("a dog", padding="max_length", return_tensors="pt").input_ids
        layers = plain.text_encoder(ids, output_hidden_states=True).hidden_states
        top = getattr(plain.text_encoder, "text_model", plain.text_encoder)
        expected = top.final_layer_norm(layers[-2])
        assert torch.equal(
            encoder._encoded([spec("a dog")])[0].arguments["prompt_embeds"], expected
        )

    def test_all_that_is_wrong_is_said_at_once(self, saved: Callable[[Any], Path]) -> None:
        folder = saved(families.flux_schnell)
        with pytest.raises(UsageError) as error:
            check_settings(config(str(folder), height=40), folder)
        for name in ("safety_checker", "guidance_scale", "height", "scheduler"):
            assert f"generation.{name}" in str(error.value)

    @pytest.mark.parametrize("kind", ["Ideogram4Pipeline", "GlmImagePipeline"])
    def test_a_call_of_no_family_says_what_it_does_not_take(
        self, kind: str, tmp_path: Path
    ) -> None:
        index = {"_class_name": kind, "transformer": ["diffusers", "ModelMixin"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        wanted = config(str(tmp_path), **OWN, negative_prompt="blue")
        with pytest.raises(UsageError, match=f"negative_prompt: {kind} takes none"):
            check_settings(wanted, tmp_path)


@pytest.mark.parametrize("name", FAMILY_TABLE)
def test_the_table_of_families_says_what_diffusers_takes(name: str) -> None:
    row, pipeline = FAMILY_TABLE[name], getattr(diffusers, name)
    call = inspect.signature(pipeline.__call__).parameters
    embeddings = {name for name in row.embeddings if name is not None}
    assert {*embeddings, "latents", "num_inference_steps"} <= set(call)
    assert row.negative == ("negative_prompt" in call)
    limits = {taken.limit for taken in row.encoders.values() if taken.limit is not None}
    if "max_sequence_length" in call:
        assert limits == {call["max_sequence_length"].default}
    else:
        assert not limits


class TestStaging:
    @pytest.fixture
    def staged(self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A model's copy on the node's own disk."""
        (copy / "unet" / "weights.ckpt").write_bytes(b"another format")
        monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
        monkeypatch.setenv("SDWN_STAGE_WEIGHTS", "$NODE_DISK/weights")
        found = staged_if_wanted(copy)
        assert found.is_relative_to(tmp_path / "disk")
        return found

    @pytest.mark.parametrize("where", ["$NO_SUCH_VARIABLE/weights", "relative", "/proc/weights"])
    def test_a_disk_that_takes_nothing_is_no_reason_to_stop(
        self, copy: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        monkeypatch.setenv("SDWN_STAGE_WEIGHTS", where)
        assert staged_if_wanted(copy) == copy
        assert "weights are not staged" in caplog.text

    def test_a_copy_that_lost_a_file_is_made_again(self, copy: Path, staged: Path) -> None:
        (staged / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (staged / "model_index.json").write_text("{")
        assert fingerprint(staged_if_wanted(copy)) == fingerprint(copy)

    def test_weights_are_copied_once_and_loaded_from_there(self, copy: Path, staged: Path) -> None:
        assert not list(staged.rglob("*.ckpt"))
        made = staged.stat().st_mtime_ns
        sampler = Sampler(config(str(copy)))
        assert staged.stat().st_mtime_ns == made
        assert sampler.provenance["model"] == str(copy), "where it came from"

    def test_changed_weights_are_copied_anew(self, copy: Path, staged: Path) -> None:
        with (copy / "vae" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        second = staged_if_wanted(copy)
        assert second != staged
        assert fingerprint(second) == fingerprint(copy)


class TestTokens:
    def test_start_and_end_count(self, sampler: Sampler) -> None:
        sample = sampler.sample([spec("cat")])[0]
        assert (sample.tokens, sample.truncated) == (5, False)

    def test_only_what_does_not_fit_is_truncated(self, sampler: Sampler) -> None:
        full, over = sampler.sample([spec("x" * 75), spec("x" * 76)])
        assert (full.tokens, full.truncated) == (77, False)
        assert (over.tokens, over.truncated) == (78, True)

    def test_planning_counts_the_same_ones_without_torch(self, sampler: Sampler) -> None:
        found = prompt_lengths(
            builtin_folder("tiny"), config(), ["x" * 75, "x" * 76, "x" * 80, "x" * 76]
        )
        assert found == [PromptLengths("text_encoder", counted=3, cut=2, limit=77)]

    def test_neither_truncation_nor_flags_fill_the_log(self) -> None:
        small = Sampler(config(height=16, width=16, num_inference_steps=1))
        with Records() as seen:
            samples = checked(small, [spec("x" * 200, seed) for seed in range(60)])
        assert any(sample.status == "nsfw" for sample in samples)
        assert seen == []


class Records:
    """Collects what diffusers and transformers log."""

    def __enter__(self) -> list[logging.LogRecord]:
        seen: list[logging.LogRecord] = []
        self.handler = logging.Handler()
        self.handler.emit = seen.append  # type: ignore[method-assign]
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).addHandler(self.handler)
        return seen

    def __exit__(self, *_: object) -> None:
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).removeHandler(self.handler)


class TestLoading:
    def test_provenance_says_what_ran(self, sampler: Sampler) -> None:
        expected = {
            "model": "builtin:tiny",
            "revision": fingerprint(builtin_folder("tiny")),
            "pipeline": "StableDiffusionPipeline",
            "scheduler": "PNDMScheduler",
            "precision": "fp32",
            "torch": torch.__version__,
        }
        assert expected.items() <= sampler.provenance.items()
        assert {"device", "diffusers", "transformers", "accelerate", "python"} <= set(
            sampler.provenance
        )

    def test_a_folder_loads_as_the_built_in_does(self, sampler: Sampler, copy: Path) -> None:
        copied = Sampler(config(str(copy)))
        assert copied.provenance["revision"] == sampler.provenance["revision"]
        np.testing.assert_array_equal(
            pixels(copied.sample(specs(2))), pixels(sampler.sample(specs(2)))
        )

    def test_an_unknown_scheduler_names_those_that_fit(self) -> None:
        with pytest.raises(UsageError, match=r"EulerScheduler .*EulerDiscreteScheduler"):
            Sampler(config(scheduler="EulerScheduler"))

    def test_a_scheduler_that_cannot_be_repeated_is_refused(self) -> None:
        with pytest.raises(UsageError, match="DPMSolverSDEScheduler does not fit"):
            Sampler(config(scheduler="DPMSolverSDEScheduler"))

    @pytest.mark.parametrize("name", ["/no/such/folder", "./relative"])
    def test_a_missing_folder_is_no_hub_name(self, name: str) -> None:
        with pytest.raises(UsageError, match="no such folder"):
            Sampler(config(name))

    def test_a_folder_without_a_pipeline_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"model_index\.json is missing"):
            Sampler(config(str(tmp_path)))

    def test_a_pipeline_without_a_checker_needs_it_off(self, copy: Path) -> None:
        index = json.loads((copy / "model_index.json").read_text())
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
        (copy / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UsageError, match=r"generation\.safety_checker=false"):
            Sampler(config(str(copy)))
        assert Sampler(config(str(copy), safety_checker=False)).sample(specs(1))


class TestBuiltin:
    def test_it_is_small(self) -> None:
        files = builtin_folder("tiny").rglob("*.safetensors")
        assert 0 < sum(file.stat().st_size for file in files) < 5e6

    def test_whoever_reads_its_index_reads_its_weights(self) -> None:
        files = [path for path in builtin_folder("tiny").rglob("*") if path.is_file()]
        assert len({path.stat().st_mode for path in files}) == 1

    def test_its_weights_can_be_made_again(self, tmp_path: Path) -> None:
        """Without torch's random state, which each version draws from otherwise."""
        torch.manual_seed(123)
        save_tiny(tmp_path)
        assert fingerprint(tmp_path) == fingerprint(builtin_folder("tiny"))

    def test_the_fingerprint_sees_one_changed_byte(self, copy: Path) -> None:
        before = fingerprint(copy)
        with (copy / "vae" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        assert fingerprint(copy) != before

"""The sampler on the built-in pipeline, beside plain calls of diffusers."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from sdwn import builtin
from sdwn.builtin import builtin_folder, fingerprint
from sdwn.config import RunConfig
from sdwn.errors import SdwnError, UsageError
from sdwn.plan import ImageSpec
from sdwn.sampler import Sample, Sampler, require_device

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


def specs(count: int, first: int = 0) -> list[ImageSpec]:
    return [spec(GLOSSES[number % 10], seed=number) for number in range(first, first + count)]


def spec(prompt: str, seed: int = 0) -> ImageSpec:
    return ImageSpec(0, "n02084071", "dog.n.01", 0, prompt, seed)


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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch that wait for each other crawl where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return Sampler(config(height=16, width=16, num_inference_steps=1)).sample(specs(200))


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
        batch = specs(8)
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
        refusing = Sampler(config(negative_prompt="blue"))
        batch = specs(2)
        apart = distance(pixels(refusing.sample(batch)), pixels(sampler.sample(batch)))
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
        pairs = list(zip(sampler.sample(specs(8)), half.sample(specs(8)), strict=True))
        # An image may lie so close to the checker's threshold that rounding decides.
        unflagged = [pair for pair in pairs if {sample.status for sample in pair} == {"ok"}]
        assert half.provenance["precision"] == "fp16"
        assert len(unflagged) >= 6
        apart = distance(*(pixels(list(samples)) for samples in zip(*unflagged, strict=True)))
        assert apart.max() > 0
        assert (apart <= 2).mean() > 0.99

    @pytest.mark.parametrize(
        ("name", "precision", "device"),
        [
            ("CompVis/stable-diffusion-v1-4", "fp16", "cuda"),
            ("CompVis/stable-diffusion-v1-4", "fp32", "cpu"),
            ("builtin:tiny", "fp16", "cpu"),
        ],
    )
    def test_what_can_run_is_let_through(self, name: str, precision: str, device: str) -> None:
        require_device(config(name, precision=precision), device)

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

    def test_a_flag_depends_on_the_seed(self, flagging: list[Sample]) -> None:
        flagged = {number % 10 for number, s in enumerate(flagging) if s.status == "nsfw"}
        passed = {number % 10 for number, s in enumerate(flagging) if s.status == "ok"}
        assert len(flagged) > 1
        assert flagged <= passed

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
        samples = broken.sample(specs(4))
        assert [sample.status for sample in samples] == ["nan"] * 4
        assert not pixels(samples).any()


class TestTokens:
    def test_start_and_end_count(self, sampler: Sampler) -> None:
        sample = sampler.sample([spec("cat")])[0]
        assert (sample.tokens, sample.truncated) == (5, False)

    def test_only_what_does_not_fit_is_truncated(self, sampler: Sampler) -> None:
        full, over = sampler.sample([spec("x" * 75), spec("x" * 76)])
        assert (full.tokens, full.truncated) == (77, False)
        assert (over.tokens, over.truncated) == (78, True)

    def test_neither_truncation_nor_flags_fill_the_log(self) -> None:
        small = Sampler(config(height=16, width=16, num_inference_steps=1))
        with Records() as seen:
            samples = small.sample([spec("x" * 200, seed) for seed in range(60)])
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

    @pytest.mark.parametrize("name", ["/no/such/folder", "./relative", "a/b/c", "~/models"])
    def test_a_missing_folder_is_no_hub_name(self, name: str) -> None:
        with pytest.raises(UsageError, match="no such folder, and no hub name"):
            Sampler(config(name))

    def test_an_unknown_built_in_names_the_valid_ones(self) -> None:
        with pytest.raises(UsageError, match=r"builtin:huge.*builtin:tiny"):
            builtin_folder("huge")

    def test_a_folder_without_a_pipeline_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"model_index\.json is missing"):
            Sampler(config(str(tmp_path)))

    @pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
    def test_weights_cut_short_are_told_in_one_line(self, copy: Path, part: str) -> None:
        with (copy / f"{part}.safetensors").open("r+b") as file:
            file.truncate(50_000)
        with pytest.raises(SdwnError, match="cannot be loaded") as caught:
            Sampler(config(str(copy)))
        assert "\n" not in str(caught.value)

    def test_a_pipeline_without_a_checker_needs_it_off(self, copy: Path) -> None:
        index = json.loads((copy / "model_index.json").read_text())
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
        (copy / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UsageError, match=r"generation\.safety_checker=false"):
            Sampler(config(str(copy)))
        assert Sampler(config(str(copy), safety_checker=False)).sample(specs(1))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path))
    return tmp_path


def models(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir()]


class TestBuiltin:
    def test_it_is_made_once(self, empty_cache: Path) -> None:
        folder = builtin_folder("tiny")
        made = (folder / "model_index.json").stat().st_mtime_ns
        assert folder.is_relative_to(empty_cache / "models")
        assert builtin_folder("tiny") == folder
        assert (folder / "model_index.json").stat().st_mtime_ns == made
        assert models(empty_cache) == [folder.name]

    def test_it_is_small(self) -> None:
        files = builtin_folder("tiny").rglob("*.safetensors")
        assert 0 < sum(file.stat().st_size for file in files) < 5e6

    def test_whoever_reads_its_index_reads_its_weights(self) -> None:
        files = [path for path in builtin_folder("tiny").rglob("*") if path.is_file()]
        assert len({path.stat().st_mode for path in files}) == 1

    def test_global_random_state_does_not_enter(self, empty_cache: Path, cache: Path) -> None:
        before = fingerprint(cache / builtin_folder("tiny").relative_to(empty_cache))
        shutil.rmtree(empty_cache / "models")
        torch.manual_seed(123)
        assert fingerprint(builtin_folder("tiny")) == before

    def test_the_fingerprint_sees_one_changed_byte(self, copy: Path) -> None:
        before = fingerprint(copy)
        with (copy / "vae" / "diffusion_pytorch_model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        assert fingerprint(copy) != before

    def test_processes_that_start_at_once_share_one(self, empty_cache: Path) -> None:
        code = "from sdwn.builtin import *; print(fingerprint(builtin_folder('tiny')))"
        started = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        printed = [process.communicate(timeout=120)[0].strip() for process in started]
        assert printed == [fingerprint(builtin_folder("tiny"))] * 2
        assert len(models(empty_cache)) == 1

    def test_the_loser_of_a_race_takes_the_winners(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both_built, build = threading.Barrier(2, timeout=60), builtin._pipeline

        def build_and_wait(tokenizer: Any) -> Any:
            pipeline = build(tokenizer)
            both_built.wait()
            return pipeline

        monkeypatch.setattr(builtin, "_pipeline", build_and_wait)
        with ThreadPoolExecutor(2) as pool:
            one, other = pool.map(builtin_folder, ["tiny", "tiny"])
        assert one == other
        assert models(empty_cache) == [one.name]
        assert StableDiffusionPipeline.from_pretrained(one)

    def test_a_failed_build_leaves_nothing(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: Any) -> Any:
            raise OSError("No space left on device")

        monkeypatch.setattr(builtin, "_pipeline", fail)
        with pytest.raises(OSError, match="No space left"):
            builtin_folder("tiny")
        assert models(empty_cache) == []

"""The self-test: what a machine's images, memory, tasks and speed should be, and what they are.

::

    self_test ──> SELF_CHECKS, one after another ──> selftest.json, a page
                  one that fails stops no other  └─> CACHE/gpus: speeds for estimates

Where there is no GPU, small models show what is not the card's, and the other checks say what
stays unproven.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from sdwn import checkout
from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.config import RunConfig, load_config
from sdwn.devices.device import Device, local_gpus
from sdwn.devices.tuning import GB
from sdwn.errors import OutOfMemoryError, SdwnError, counted, duration, first_line
from sdwn.generation.batching import ImageSampler, Sample, choose_batch, load_sampler
from sdwn.generation.regenerate import TOLERANCE
from sdwn.generation.task import GENERATE, make_shards
from sdwn.io import OnMessage, ignore, now, read_json, writable_cache, write_text
from sdwn.jobs.logs import failure
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.submit import submission_lock
from sdwn.jobs.task import ArrayTask, Stage, TaskRecord, read_record, see_one_device, this_process
from sdwn.models.added import obtain_weights
from sdwn.models.families import denoiser, read_pipeline_info
from sdwn.models.weights import find_folder
from sdwn.paths import ReleasePaths, RunPaths, shipped_file
from sdwn.planning.plan import ImageSpec, Plan, make_plan, write_plan
from sdwn.preflight.speeds import SELFTEST, SELFTEST_FILES, is_published_model
from sdwn.preflight.trials import (
    PROMPT,
    TrialCallbacks,
    clear_trial,
    finish_trial,
    is_left,
    step_note,
    submit_trial,
    tune_device,
)
from sdwn.storage.columns import names
from sdwn.storage.images import Pixels, decode
from sdwn.storage.shards import ImageFile
from sdwn.wordnet.catalog import Catalog
from sdwn.wordnet.corpus import Synset

ANSWER = "selftest.json"
EACH = 10  # images a synset
BUSY = 0.98  # the share of time that a task's GPU should sample
PREDICTED = 0.15  # how far from reserved memory a prediction may be
CLASSIFIED = 2000
# A process that has not ended by then never will.
PATIENCE_S = 600.0
# A fork's child could not use CUDA; without a GPU, one that has torch imported starts in no time.
PROCESSES: Any = multiprocessing.get_context("spawn" if local_gpus(os.environ) else "forkserver")


class NotProvenError(Exception):
    """What this machine or a quick test does not show; the text says why."""


class Found(NamedTuple):
    """What a check found, whether that is as expected, and its figures."""

    text: str
    fits: bool = True
    figures: Mapping[str, Any] = {}


class SelfCheck(NamedTuple):
    """A check: its group and name, what is expected, its function, and whether it takes long."""

    group: str
    name: str
    expected: str
    run: Callable[[Bench], Found]
    long: bool


class Bench:
    """A folder, a device, a model and settings for the checks, and what earlier ones measured."""

    def __init__(self, folder: Path, model: str | None, quick: bool, on_step: OnMessage) -> None:
        self.folder, self.quick, self.on_step, self.device = folder, quick, on_step, Device()
        self.gpu = self.device.is_gpu
        self.random = model is None
        self.model = model or self._any_model()
        self.settings: dict[str, Any] = {
            **dict.fromkeys(("height", "width"), 512 if self.gpu else 32),
            "num_inference_steps": (8 if quick else 50) if self.gpu else 2,
            "precision": "fp16" if self.gpu else "fp32",
            "scheduler": None,
            "safety_checker": False,
        }
        self.weights = obtain_weights(self.config())
        info = read_pipeline_info(self.weights.folder)
        self.settings["safety_checker"] = "safety_checker" in info.parts
        if not (info.embeds_guidance or info.guided(self.config().generation)):
            self.settings["guidance_scale"] = 0
        # Of the task that is timed: where there are small models alone, one that draws something.
        self.task_settings: dict[str, Any] = {}
        if not (self.gpu or quick or model):
            self.task_settings = {"model": "builtin:miniature", "safety_checker": False}
            self.task_settings |= {"height": 64, "width": 64, "num_inference_steps": 6}
        self.batch, self.peaks = EACH, dict[int, int]()
        self.speeds: dict[str, dict[int, float]] = {"plain": {}, "blocks": {}, "whole": {}}
        self.task: TaskRecord | None = None
        self.task_speed = 0.0
        self._loaded: tuple[RunConfig, ImageSampler] | None = None

    def _any_model(self) -> str:
        """Choose Stable Diffusion 1.4 if it is here, else its architecture, else a small model."""
        if not self.gpu:
            return "builtin:tiny"
        paper = load_config(shipped_file("config", "paper"))
        if find_folder(paper) is not None:
            self.random = False
            return paper.model.name
        from sdwn.models.full_size import save_full_size  # torch and diffusers

        save_full_size(self.folder / "model", self.device.torch)
        return str(self.folder / "model")

    def config(self, **changes: Any) -> RunConfig:
        """Return the config of a run, with another model or settings of ``generation``."""
        generation = {**self.settings, **changes}
        return RunConfig.model_validate(
            {
                "catalog": {"name": "closure"},
                "images_per_synset": EACH,
                "model": {"name": generation.pop("model", self.model)},
                "generation": generation,
                "storage": {"images_per_shard": 10_000},
            }
        )

    def plan(self, images: int, **changes: Any) -> Plan:
        """Plan so many images of synsets that no WordNet has, in one shard."""
        rows = (
            Synset(f"n{row:08d}", f"thing.n.{row}", ("thing",), f"{PROMPT} {row}")
            for row in range(images // EACH)
        )
        return make_plan(self.config(**changes), Catalog("self-test", tuple(rows)))

    def specs(self, images: int) -> list[ImageSpec]:
        """Return so many images to make."""
        plan = self.plan(-(-images // EACH) * EACH)
        return list(plan.specs(plan.shards[0]))[:images]

    def sampler(self, **changes: Any) -> ImageSampler:
        """Load a model with these settings; the one that was loaded before is let go."""
        config = self.config(**changes)
        if config.needs_gpu and not self.gpu:
            raise NotProvenError(f"{config.generation.precision} needs a GPU")
        if self._loaded is None or self._loaded[0] != config:
            self.let_go()
            weights = None if "model" in changes else self.weights
            # Of all checks' prompts these are the first, so that none loads encoders again.
            self._loaded = config, load_sampler(config, weights, self.specs(12 * EACH))
        return self._loaded[1]

    def let_go(self) -> None:
        """Let the loaded model go, and its memory."""
        self._loaded = None
        self.device.forget_peak()

    def run(self, name: str, plan: Plan) -> RunPaths:
        """Write a plan into a run folder of this name."""
        paths = RunPaths(self.folder / name)
        write_plan(plan, paths)
        return paths

    def make(self, name: str, plan: Plan, sampler: ImageSampler, batch: int) -> Made:
        """Make a run's images as a task does."""
        paths = self.run(name, plan)
        make_shards(paths, plan, plan.shards, sampler, batch)
        return Made(paths)


class Made:
    """A finished run of one shard: each image's row and pixels, and the record of its task."""

    def __init__(self, paths: RunPaths) -> None:
        with ImageFile(paths.shard(0)) as file:
            self.rows = rows = file.rows()
            sizes = zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)
            self.pixels = [
                np.asarray(decode(file.payload(index), "webp", *size))
                for index, size in enumerate(sizes)
            ]
        self.record = read_record(next(paths.tasks.glob("*.json")))


def _apart(one: Sequence[Pixels], other: Sequence[Pixels]) -> float:
    """Return the largest root mean square by which an image differs, in steps of 8-bit colour."""
    pairs = (np.subtract(a, b, dtype=np.float64) for a, b in zip(one, other, strict=True))
    return max(float(np.sqrt(np.square(pair).mean())) for pair in pairs)


def _pixels(samples: Sequence[Sample]) -> list[Pixels]:
    return [sample.pixels for sample in samples]


SELF_CHECKS = list[SelfCheck]()
Function = Callable[..., Found]


def _check(
    group: str, name: str, expected: str = "", long: bool = False, **given: Any
) -> Callable[[Function], Function]:
    """Add a function to the checks, by a name and with the arguments that are ``given``."""

    def add(function: Function) -> Function:
        SELF_CHECKS.append(SelfCheck(group, name, expected, partial(function, **given), long))
        return function

    return add


# The machine


@_check("machine", "card", "a GPU that torch finds")
def _card(bench: Bench) -> Found:
    import torch

    if not bench.gpu:
        raise NotProvenError(f"no GPU here; torch {torch.__version__} on the CPU")
    memory, (major, minor) = bench.device.total_bytes / GB, torch.cuda.get_device_capability()
    text = f"{bench.device.name}, {memory:.1f} GB, sm_{major}{minor}; driver "
    text += f"{bench.device.driver or 'not known'}; torch {torch.__version__}, CUDA "
    return Found(f"{text}{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]


@_check("machine", "attention kernels")
def _attention(bench: Bench) -> Found:
    """Time one attention, on a GPU that of Stable Diffusion's largest blocks, by each kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape, kind = ((20, 8, 4096, 40), torch.float16) if bench.gpu else ((2, 8, 64, 40), None)
    query, key, value = (torch.randn(shape, device=bench.device.torch, dtype=kind) for _ in "qkv")

    def milliseconds() -> float:
        runs = []
        for _ in range(6):
            began = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(query, key, value)
            bench.device.synchronize()
            runs.append(1000 * (time.perf_counter() - began))
        return median(runs[1:])

    found = {"torch's choice": milliseconds()}
    for kernel in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        # Those that this device does not have raise one.
        with contextlib.suppress(RuntimeError), sdpa_kernel(getattr(SDPBackend, kernel)):
            found[kernel.removesuffix("_ATTENTION").lower()] = milliseconds()
    text = ", ".join(f"{name} {taken:.2f} ms" for name, taken in found.items())
    return Found(text, figures={"milliseconds": found})


# Images

FASTER = "as fast or faster"
SAME = f"rms of at most {TOLERANCE:g} of 255"


@_check("images", "first noise", "that of the seeds, drawn on the CPU")
def _noise(bench: Bench) -> Found:
    import torch

    sampler, specs, seen = bench.sampler(), bench.specs(4), list[Any]()
    network = denoiser(sampler.pipeline)  # type: ignore[attr-defined]
    hook = network.register_forward_pre_hook(
        lambda _, given, named: seen.append((*given, named.get("hidden_states"))[0].cpu()),
        with_kwargs=True,
    )
    sampler.sample(specs)
    hook.remove()
    first = seen[0][: len(specs)]
    if first.dim() != 4:
        raise NotProvenError(f"{type(network).__name__} takes its noise in another form")
    seeds = [torch.Generator().manual_seed(spec.seed) for spec in specs]
    noise = torch.cat([torch.randn((1, *first.shape[1:]), generator=one) for one in seeds])
    if torch.equal(first, noise.to(first.dtype)):
        return Found(f"equal to the bit, in {first.dtype}")
    # Some schedulers begin with noise of another size.
    scale = (first.float() * noise).sum() / noise.square().sum()
    same = torch.allclose(first.float(), scale * noise, rtol=0.01, atol=0.01)
    return Found(f"equal but for a factor of {scale:.4g}" if same else "another", same)


@_check("images", "a batch twice", "equal to the byte")
def _twice(bench: Bench) -> Found:
    sampler, specs = bench.sampler(), bench.specs(EACH)
    apart = _apart(*(_pixels(sampler.sample(specs)) for _ in range(2)))
    return Found(f"{EACH} images, {f'rms {apart:.3g}' if apart else 'equal'}", not apart)


@_check("images", "alone and in a batch, bf16", SAME, precision="bf16")
@_check("images", "alone and in a batch, fp16", SAME, precision="fp16")
def _alone(bench: Bench, precision: str) -> Found:
    sampler, specs = bench.sampler(precision=precision), bench.specs(EACH)
    together, count = sampler.sample(specs), 2 if bench.quick else EACH
    alone = [sampler.sample([spec])[0] for spec in specs[:count]]
    apart = _apart(_pixels(alone), _pixels(together[:count]))
    nan = sum(sample.status == "nan" or sample.redone for sample in (*alone, *together))
    text = f"rms {apart:.3g} in {count} images" + f", {nan} times NaN" * bool(nan)
    return Found(text, apart <= TOLERANCE, {"rms": apart, "nan": nan})


@_check("images", "NaN in half precision", "sampled again, none black")
def _nan(bench: Bench) -> Found:
    """Let the VAE's decoder give NaN for an image of every batch in half precision."""
    import torch

    sampler, struck = bench.sampler(precision="fp16"), list[Any]()

    def overflow(_: Any, __: Any, made: Any) -> Any:
        if made.dtype != torch.float32:
            made = made.clone()
            made[0] = torch.nan
            struck.append(made)
        return made

    decoder = sampler.pipeline.vae.decoder  # type: ignore[attr-defined]
    hook = decoder.register_forward_hook(overflow)
    try:
        made = bench.make("nan", bench.plan(EACH, precision="fp16"), sampler, EACH)
    finally:
        hook.remove()
    if not struck:
        raise NotProvenError("its VAE decodes in fp32")
    redone = int(made.rows["redone"].sum())
    black = names(made.rows["status"], "status").count("nan")
    text = f"{len(struck)} made NaN, {redone} sampled again in fp32, {black} black"
    return Found(text, redone == len(struck) and not black)


@_check("images", "safety checker's flags", "as diffusers' own: 0 differ")
def _flags(bench: Bench) -> Found:
    """Compare flags at a threshold that about half of the images pass."""
    import torch

    sampler: Any = bench.sampler()
    if (checker := sampler._checker) is None:
        raise NotProvenError("this model has no safety checker")
    samples, seen = sampler.sample(bench.specs(EACH)), list[Any]()
    hook = checker.visual_projection.register_forward_hook(lambda *given: seen.append(given[2]))
    sampler.check(samples)
    hook.remove()
    alike = torch.cosine_similarity(torch.cat(seen)[:, None], checker.concept_embeds[None], dim=-1)
    before = checker.concept_embeds_weights.detach().clone()
    checker.concept_embeds_weights.data.fill_(alike.amax(dim=1).median())
    ours = [sample.status == "nsfw" for sample in sampler.check(samples)]
    pipeline, given = sampler.pipeline, np.stack(_pixels(samples)) / 255
    pipeline.safety_checker = checker
    _, theirs = pipeline.run_safety_checker(given, bench.device.torch, checker.dtype)
    pipeline.safety_checker = None
    checker.concept_embeds_weights.data.copy_(before)
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return Found(f"{differ} differ; {sum(ours)} of {EACH} flagged", not differ)


# Memory


@_check("memory", "a batch's, predicted", f"within {100 * PREDICTED:g} % of what is reserved")
def _prediction(bench: Bench) -> Found:
    if not bench.gpu:
        raise NotProvenError("no GPU here, and the CPU's memory has no such count")
    sampler, found, worst = bench.sampler(), list[str](), 0.0
    for size in (1, EACH, 2 * EACH):
        bench.device.forget_peak()
        sampler.time_batch(bench.specs(size))
        bench.peaks[size] = bench.device.peak_bytes
        told, real = sampler.predicted_bytes(size) / GB, bench.peaks[size] / GB
        found.append(f"{told:.1f} and {real:.1f} GB for {size}")
        worst = max(worst, abs(told / real - 1))
    return Found(f"{', '.join(found)}: off by {100 * worst:.0f} %", worst <= PREDICTED)


@contextlib.contextmanager
def _little_room(bench: Bench, sampler: ImageSampler) -> Iterator[None]:
    """Leave room for an image, and for less than a synset's in one batch."""
    if bench.gpu:
        import torch

        one, many = bench.peaks[1], bench.peaks[EACH]
        total = torch.cuda.get_device_properties(0).total_memory
        bench.device.release()
        torch.cuda.set_per_process_memory_fraction((one + (many - one) / 4) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    sample = sampler.sample

    def crowded(specs: Sequence[ImageSpec]) -> list[Sample]:
        if len(specs) > EACH // 2:
            raise OutOfMemoryError("made up: this device has room")
        return sample(specs)

    sampler.sample = crowded  # type: ignore[method-assign]
    try:
        yield
    finally:
        sampler.sample = sample  # type: ignore[method-assign]


@_check("memory", "out of memory", f"smaller batches, no image lost, {SAME}")
def _out_of_memory(bench: Bench) -> Found:
    sampler, plan = bench.sampler(), bench.plan(2 * EACH)
    roomy = bench.make("roomy", plan, sampler, EACH)
    with _little_room(bench, sampler):
        crowded = bench.make("crowded", plan, sampler, EACH)
    sampler.slice_vae(on=False)
    record, apart = crowded.record, _apart(crowded.pixels, roomy.pixels)
    text = "by a made-up error: " * (not bench.gpu)
    text += f"{record.lowered_from} a batch lowered to {record.batch_size}"
    text += f"{', decoded one by one' * record.vae_slicing}, {plan.images} images, rms {apart:.3g}"
    return Found(text, record.lowered_from is not None and apart <= TOLERANCE)


@_check("memory", "tuning", "a size that a later task takes")
def _tuned(bench: Bench) -> Found:
    # On a CPU a short work: its batch size says nothing.
    short = {} if bench.gpu else {"height": 16, "width": 16, "num_inference_steps": 1}
    bench.let_go()
    found = tune_device(bench.config(**short), bench.on_step)
    batch, tuning = choose_batch(bench.config(**short), bench.sampler(**short)), found.tuning
    if bench.gpu:
        bench.batch = min(tuning.batch_size, 2 * EACH)
        speeds = ((probe.batch_size, probe.images_per_second) for probe in tuning.probes)
        bench.speeds["plain"] = {size: speed for size, speed in speeds if speed}
    else:
        found.path.unlink()
        found.curve.unlink()
    tried = ", ".join(str(probe.batch_size) for probe in tuning.probes)
    text = f"of {tried} a batch {tuning.batch_size}, {tuning.images_per_second:.3g} images/s"
    return Found(f"{text}; a task takes {batch.images}", batch.images == tuning.batch_size)


# Tasks


def _run_task(root: str) -> None:
    """Be a task's process, which leaves its log in its run folder."""
    # With another, what is killed leaves a semaphore of a library behind.
    multiprocessing.set_start_method("fork", force=True)
    with Path(root, "log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["SDWN_FLUSH_SECONDS"] = "0"
    ArrayTask(GENERATE, root, (0,))()


@_check("tasks", "USR2 and SIGKILL in a batch", "after both, equal to the byte")
def _killed(bench: Bench) -> Found:
    few = {"num_inference_steps": 8, "batch_size": EACH}
    plan, codes = bench.plan(4 * EACH, **few), list[int]()
    whole = bench.make("undisturbed", plan, bench.sampler(**few), EACH)
    paths = bench.run("disturbed", plan)
    for number in (signal.SIGUSR2, signal.SIGKILL, None):
        process = PROCESSES.Process(target=_run_task, args=(str(paths.root),))
        process.start()
        before = len(paths.piece_ranges(0))
        while number and process.is_alive() and len(paths.piece_ranges(0)) <= before:
            time.sleep(0.001)
        if number and process.is_alive():
            time.sleep(0.02)  # into the next batch
            os.kill(process.pid, number)
        process.join(PATIENCE_S)
        codes.append(process.exitcode)
    ended = f"exit codes {', '.join(map(str, codes))}"
    if not paths.shard(0).is_file():
        log = (paths.root / "log.txt").read_text(encoding="utf-8").strip()
        return Found(f"{ended}: not finished", False, {"log": log})
    equal = int((Made(paths).rows["sha256"] == whole.rows["sha256"]).all(axis=-1).sum())
    fits = equal == plan.images and codes == [128 + signal.SIGUSR2, -signal.SIGKILL, 0]
    return Found(f"{ended}; {equal} of {plan.images} images equal", fits)


def _see_device(rank: int, answer: str) -> None:
    """Be one of a task's two processes, and write which GPU it was left."""
    gpus = local_gpus(os.environ)
    os.environ.update(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID="1", SLURM_NTASKS="2")
    given = ",".join(gpus[:2]) if len(gpus) > 1 else "0,1"
    os.environ.update(SLURM_PROCID=str(rank), CUDA_VISIBLE_DEVICES=given)
    see_one_device(this_process())
    Path(answer).write_text(os.environ["CUDA_VISIBLE_DEVICES"], encoding="utf-8")


@_check("tasks", "two processes of a task", "a GPU each")
def _own_devices(bench: Bench) -> Found:
    answers = [bench.folder / f"device-{rank}.txt" for rank in range(2)]
    tasks = [PROCESSES.Process(target=_see_device, args=(i, str(a))) for i, a in enumerate(answers)]
    for process in tasks:
        process.start()
    for process in tasks:
        process.join(PATIENCE_S)
    first, second = (answer.read_text(encoding="utf-8") for answer in answers)
    text = f"GPU {first} and GPU {second}"
    if (gpus := len(local_gpus(os.environ))) < 2 and first != second:
        raise NotProvenError(f"{counted(gpus, 'GPU')} here; by made-up variables {text}")
    return Found(text, first != second)


# Speed


@_check("speed", "a whole task", f"sampling {100 * BUSY:g} % of the time or more")
def _whole_task(bench: Bench) -> Found:
    """Time a task, its model loaded, from the plan to the finished shard."""
    settings = bench.task_settings
    sampler, plan = bench.sampler(**settings), bench.plan(6 * bench.batch, **settings)
    sampler.time_batch(list(plan.specs(plan.shards[0]))[: bench.batch])
    began = time.perf_counter()
    made = bench.make("task", plan, sampler, bench.batch)
    bench.task_speed, bench.task = plan.images / (time.perf_counter() - began), made.record
    text = f"{bench.task_speed:.3g} images/s with {bench.batch} a batch, sampling "
    text += f"{100 * made.record.busy:.1f} % of the time"
    if not bench.gpu:
        raise NotProvenError(f"{text}; on a CPU, sampling and encoding share the cores")
    figures = {"images_per_second": bench.task_speed, "busy": made.record.busy}
    return Found(text, made.record.busy >= BUSY, figures)


@_check("speed", "beside accelerate's loop", FASTER)
def _loop(bench: Bench) -> Found:
    """Time the loop of accelerate's guide to distributed inference: same seeds, same batches."""
    import torch
    from accelerate import PartialState
    from diffusers import DiffusionPipeline

    config = bench.config(**bench.task_settings)
    plan, generation = bench.plan(6 * bench.batch, **bench.task_settings), config.generation
    weights, state = obtain_weights(config), PartialState()
    bench.let_go()
    dtype = torch.float16 if bench.gpu else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(weights.folder, dtype=dtype).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    shared = {"height": generation.height, "width": generation.width}
    shared |= {"num_inference_steps": generation.num_inference_steps}

    def save(batch: Sequence[ImageSpec]) -> None:
        images = pipeline(
            [spec.prompt for spec in batch],
            generator=[torch.Generator().manual_seed(spec.seed) for spec in batch],
            guidance_scale=generation.guidance_scale,
            **shared,
        ).images
        for spec, image in zip(batch, images, strict=True):
            image.save(bench.folder / f"{spec.synset}-{spec.number}.png")

    specs = list(plan.specs(plan.shards[0]))
    save(specs[: bench.batch])
    began = time.perf_counter()
    with state.split_between_processes(specs) as own:
        for start in range(0, len(own), bench.batch):
            save(own[start : start + bench.batch])
    speed = plan.images / (time.perf_counter() - began)
    return _beside(bench, bench.task_speed, speed, "the loop")


def _beside(bench: Bench, ours: float, theirs: float, peer: str, more: str = "") -> Found:
    text = f"{ours:.4g} images/s, {peer} {theirs:.4g}: {ours / theirs:.2f} of it{more}"
    if not bench.gpu:
        raise NotProvenError(f"{text}; on a CPU")
    figures = {"images_per_second": ours, "peer_images_per_second": theirs}
    return Found(text, ours >= theirs, figures)


@_check("speed", "energy while sampling")
def _energy(bench: Bench) -> Found:
    if bench.task is None or (joules := bench.task.energy_joules) is None:
        raise NotProvenError("NVML says nothing of it here")
    images = bench.task.first_images + bench.task.images
    text = f"{joules / 1000:.1f} kJ for {images} images, {joules / images:.0f} J each"
    return Found(text, figures={"joules": joules, "images": images})


@_check("speed", "compile: whole", long=True, compile="whole")
@_check("speed", "compile: blocks", long=True, compile="blocks")
@_check("speed", "channels_last", long=True, channels_last=True)
@_check("speed", "plain", long=True)
def _variant(bench: Bench, **generation: Any) -> Found:
    """Time the first batch under settings, compiling included, and later ones."""
    if generation.get("compile") and shutil.which("g++") is None:
        raise NotProvenError("torch.compile needs a C++ compiler, g++")
    specs, sampler, began = bench.specs(bench.batch), bench.sampler(**generation), time.monotonic()
    sampler.time_batch(specs)
    first = time.monotonic() - began
    speed = len(specs) / median([sampler.time_batch(specs) for _ in range(3)])
    if compiled := generation.get("compile"):
        bench.speeds[compiled][bench.batch] = speed
    text = f"first batch of {len(specs)}: {duration(first)}, then {speed:.3g} images/s"
    return Found(text, figures={"first_seconds": first, "images_per_second": speed})


# Evaluation


@_check("evaluation", "ViT-H/14 at 518 pixels", "as fast as timm or faster", preset="paper")
@_check(
    "evaluation", "EfficientNet-Lite0", "as fast as timm or faster", preset="efficientnet-lite0"
)
def _evaluation(bench: Bench, preset: str) -> Found:
    """Time a classifier over the task's images, and the loop of timm's validate.py over PNGs."""
    if preset == "paper" and not bench.gpu:
        raise NotProvenError("2 TFLOP an image: minutes on a CPU")
    import timm
    import torch

    from sdwn.prediction.classifier import (
        Classifier,
        Predictor,
        classifier_batch_size,
        predict_images,
    )
    from sdwn.prediction.pretrained import PRESETS, find_classifier, load_classifier
    from sdwn.releases.merge import merge

    bench.let_go()
    few, kind = (
        merge([RunPaths(bench.folder / "task")], ReleasePaths(bench.folder / "release")),
        PRESETS[preset],
    )
    total = CLASSIFIED if bench.gpu else min(len(few), 2 * EACH)
    chosen, weights = few.subset(rows=np.arange(total) % len(few)), None
    with contextlib.suppress(SdwnError):
        weights = find_classifier(preset, None)
    if weights is not None:
        classifier = load_classifier(preset)
    else:
        with bench.device.torch:
            network = timm.create_model(kind.architecture, num_classes=1000, **kind.arguments)
        classifier = Classifier(preset, network, kind.preprocessing, {})
    workers = len(os.sched_getaffinity(0))
    predictor = Predictor(classifier, {}, classifier_batch_size(classifier), workers)
    pictures = bench.folder / "validate" / "all"
    if not pictures.exists():
        pictures.mkdir(parents=True)
        for index in range(total):
            chosen.image(index).save(pictures / f"{index:05d}.png")
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(pictures.parent)),
        **kind.preprocessing,
        batch_size=predictor.batch.images,
        num_workers=workers,
        img_dtype=classifier.dtype,
        device=classifier.device,
    )
    loss_of = torch.nn.CrossEntropyLoss()

    @torch.inference_mode()
    def validate() -> None:
        for images, target in loader:
            output = classifier.network(images.contiguous(memory_format=torch.channels_last))
            loss_of(output, target).item()
            timm.utils.accuracy(output, target, topk=(1, 5))

    def speed(action: Callable[[], Any]) -> float:
        action()  # starts what reads, and fills caches
        began = time.perf_counter()
        action()
        return total / (time.perf_counter() - began)

    ours, theirs = speed(lambda: list(predict_images(predictor, chosen))), speed(validate)
    return _beside(bench, ours, theirs, "timm", "" if weights else ", with random weights")


# All of it


def self_test(
    folder: Path, model: str | None, quick: bool, on_step: OnMessage = ignore
) -> dict[str, Any]:
    """Make all checks on this machine, keep its speeds, and write what was found into a folder.

    Returns:
        The content of ``selftest.json``, which is written after each check.
    """
    # Beside what this process imports.
    PROCESSES.set_forkserver_preload(
        ["sdwn.generation.sampler", "diffusers.pipelines.auto_pipeline"]
    )
    if PROCESSES.get_start_method() == "forkserver":
        forkserver.ensure_running()
    work, tried = folder / "work", list[dict[str, Any]]()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    on_step("loading the model")
    bench = Bench(work, model, quick, on_step)
    content = {
        **SELFTEST.head(),
        "sdwn": checkout.code(),
        "measured": now(),
        "device": bench.device.name,
        "memory_gb": round(bench.device.total_bytes / GB),
        "model": bench.model,
        "random_weights": bench.random,
        "quick": quick,
        "generation": bench.settings,
    }
    for number, check in enumerate(SELF_CHECKS, start=1):
        on_step(f"{check.group}: {check.name}, {number} of {len(SELF_CHECKS)}")
        began, outcome = time.monotonic(), "ok"
        try:
            if check.long and quick:
                raise NotProvenError("only without --quick")
            found = check.run(bench)
            outcome = "ok" if found.fits else "failed"
        except NotProvenError as reason:
            outcome, found = "not proven", Found(str(reason))
        except Exception as error:  # whatever it is, the others are still to be made
            outcome, found = (
                "failed",
                Found(first_line(error), False, {"traceback": traceback.format_exc()}),
            )
            bench.let_go()
        tried.append(
            {
                **dict(zip(("group", "check", "expected"), check[:3], strict=True)),
                "outcome": outcome,
                "found": found.text,
                "seconds": round(time.monotonic() - began, 1),
                "figures": found.figures,
            }
        )
        # Estimates take the speeds of Stable Diffusion 1's architecture.
        reference = bench.gpu and not quick and is_published_model(str(bench.weights.folder))
        content["speeds"] = bench.speeds if reference else {}
        content["ok"] = all(one["outcome"] != "failed" for one in tried)
        content["checks"] = tried
        write_text(folder / ANSWER, json.dumps(content, indent=2) + "\n")
    shutil.rmtree(work)
    keep_speeds(content)
    return content


def card_name(content: Mapping[str, Any]) -> str:
    """Return what files of a self-test's card are called."""
    return re.sub(r"[^a-z0-9]+", "-", content["device"].lower())


def keep_speeds(content: Mapping[str, Any]) -> None:
    """Keep a card's own speeds, where they were measured, for this user's estimates."""
    if content["speeds"]:
        card = f"{card_name(content)}-{content['memory_gb']}"
        path = writable_cache() / "gpus" / SELFTEST_FILES.replace("*", card)
        write_text(path, json.dumps(content, indent=2) + "\n")


def self_test_task(folder: Path, indices: Iterable[int], _: TaskOptions = NO_OPTIONS) -> None:
    """Make all checks on this task's device, as the question in a folder says."""
    asked = read_json(RunPaths(folder).question)
    for index in indices:
        self_test(folder, asked["model"], asked["quick"], step_note(RunPaths(folder), index))


SELF_TEST = Stage("selftest", self_test_task)


def self_test_by_job(
    model: str | None, quick: bool, profile: ClusterProfile, callbacks: TrialCallbacks
) -> dict[str, Any]:
    """Make all checks by a short job under a profile; see :func:`self_test`.

    Raises:
        SdwnError: the job ended before all were made, or another one runs.
    """
    folder = writable_cache() / "selftest"
    folder.mkdir(exist_ok=True)
    trial = RunPaths(folder / "job")
    question = {"model": model, "quick": quick, "profile": profile.record()}
    # The same command beside this one joins its job.
    with submission_lock(RunPaths(folder), callbacks.on_step):
        if not is_left(trial, question):
            clear_trial(trial, "self-test")
        callbacks.on_start(trial.root)
        submit_trial(trial, SELF_TEST, [profile], question)
    finish_trial(trial, [profile], callbacks)
    answer = trial.root / ANSWER
    content = SELFTEST.read(answer) if answer.exists() else {"checks": []}
    if (done := len(content["checks"])) < len(SELF_CHECKS):
        text = f"the self-test ended after {done} of {len(SELF_CHECKS)} checks"
        raise SdwnError(f"{text}, see {answer}: {failure(trial, 0)}")
    keep_speeds(content)
    return content


def self_test_page(content: Mapping[str, Any]) -> str:
    """Write a self-test as a Markdown page."""
    settings, columns = content["generation"], ("check", "expected", "found", "outcome")
    weights = "random weights" if content["random_weights"] else "its own weights"
    parts = [
        f"# `sdwn selftest` on {content['device']}",
        f"{content['measured'][:10]}, sdwn {content['sdwn']}; {Path(content['model']).name} with "
        f"{weights}, {settings['width']}x{settings['height']}, "
        f"{settings['num_inference_steps']} steps, {settings['precision']}.",
    ]
    for group, checks in itertools.groupby(content["checks"], key=itemgetter("group")):
        cells = [columns, ["---"] * 4, *([one[name] for name in columns] for one in checks)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        parts += [f"## {group.capitalize()}", table]
    parts.append("*Not proven*: this machine, or a quick test, does not show it; it says why.")
    return "\n\n".join(parts) + "\n"

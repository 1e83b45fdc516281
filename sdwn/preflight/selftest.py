"""The self-test: what a machine's images, memory, tasks and speed should be, and what they are.

Each row of SELF_CHECKS is made in turn, and one that fails stops no other; the answers are in
selftest.json, and a card's speeds in CACHE/gpus, for estimates. Without a GPU, small models show
what is not the card's, and the other checks say what stays unproven.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from sdwn.batches import NO_OPTIONS, TaskOptions
from sdwn.config import RunConfig, load_config
from sdwn.devices.device import GB, Device, local_gpus
from sdwn.errors import OutOfMemoryError, SdwnError, counted, duration, first_line
from sdwn.generation.batching import ImageSampler, Sample, choose_batch, load_sampler
from sdwn.generation.regenerate import TOLERANCE
from sdwn.generation.task import GENERATE, make_shards
from sdwn.io import OnMessage, code_version, ignore, now, read_json, writable_cache, write_text
from sdwn.jobs.journal import failure
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.scheduler import output_lines
from sdwn.jobs.task import ArrayTask, Stage, read_record, see_one_device, this_process
from sdwn.models.families import PipelineInfo, denoiser
from sdwn.models.weights import find_folder, obtain_weights
from sdwn.paths import ReleasePaths, RunPaths, shipped_file
from sdwn.planning.plan import ImageSpec, Plan, make_plan, read_plan, write_plan
from sdwn.preflight import trials
from sdwn.preflight.estimate import SELFTEST, SELFTEST_FILES, is_published_model
from sdwn.storage.columns import names
from sdwn.storage.images import decode, pixel_difference
from sdwn.storage.shards import ImageFile
from sdwn.wordnet.corpus import Synset

ANSWER = "selftest.json"
EACH = 10  # images a synset
TIMED = 4  # batches of the task that is timed
BUSY = 0.98  # the share of time that a task's GPU should sample
OFF = 0.15  # how far from reserved memory a prediction may be
NOISE = 0.03  # by which two runs of one loop differ on a card at its limit of power
CLASSIFIED = 1000
LITE, REFERENCE = "efficientnet-lite0", "stable-diffusion-v1-4"
# Of the task that is timed on a CPU: a model that draws something.
MINIATURE = {"model": "builtin:miniature", "safety_checker": False, "height": 64, "width": 64}
# A process that has not ended by then never will.
PATIENCE_S = 600.0
# A fork's child could not use CUDA; without a GPU, one that has torch imported starts in no time.
PROCESSES: Any = multiprocessing.get_context("spawn" if local_gpus(os.environ) else "forkserver")


class NotProvenError(Exception):
    """A check that this machine or a quick test cannot make; the text says why."""


class Found(NamedTuple):
    """The finding of a check, whether it is as expected, and its figures."""

    text: str
    fits: bool = True
    figures: Mapping[str, Any] = {}


class SelfCheck(NamedTuple):
    """A check: what is expected, its function, and whether it needs a GPU or is no quick one."""

    group: str
    name: str
    expected: str
    run: Callable[[Bench], Found]
    gpu: bool = False
    long: bool = False


class Bench:
    """A folder, a device, a model and settings for the checks, and what earlier ones measured."""

    def __init__(self, folder: Path, model: str | None, quick: bool, on_step: OnMessage) -> None:
        self.folder, self.quick, self.on_step, self.device = folder, quick, on_step, Device()
        self.gpu = self.device.is_gpu
        # Stable Diffusion 1.4 if it is here, else its architecture, else a small model.
        paper = load_config(shipped_file("config", "paper"))
        self.random = model is None and not (self.gpu and find_folder(paper) is not None)
        self.model = model or paper.model.name
        if self.random and self.gpu:
            from sdwn.models.full_size import save_full_size  # torch and diffusers

            save_full_size(folder / REFERENCE, self.device.torch)
            self.model = str(folder / REFERENCE)
        elif self.random:
            self.model = "builtin:tiny"
        side, steps = (512, 8 if quick else 50) if self.gpu else (32, 2)
        self.settings: dict[str, Any] = {
            "height": side,
            "width": side,
            "num_inference_steps": steps,
            "scheduler": None,
            "precision": "fp16" if self.gpu else "fp32",
            "safety_checker": False,
        }
        weights = obtain_weights(self.config()).folder
        info = PipelineInfo(weights)
        self.settings["safety_checker"] = "safety_checker" in info.parts
        if not (info.embeds_guidance or info.guided(self.config().generation)):
            self.settings["guidance_scale"] = 0
        self.task_settings = {} if self.gpu or quick or model else MINIATURE
        # Estimates take the speeds of Stable Diffusion 1's architecture.
        self.is_reference = self.gpu and not quick and is_published_model(str(weights))
        # Without a GPU nothing is proven of speed.
        self.timed = TIMED if self.gpu or not quick else 2
        self.batch, self.peaks = EACH, dict[int, int]()
        self.speeds: dict[str, dict[int, float]] = {"plain": {}, "blocks": {}, "whole": {}}
        self.task_speed = 0.0
        self._loaded: tuple[RunConfig, ImageSampler] | None = None

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
        rows = [
            Synset(f"n{row:08d}", f"thing.n.{row}", ("thing",), f"{trials.PROMPT} {row}")
            for row in range(-(-images // EACH))
        ]
        return make_plan(self.config(**changes), rows)

    def specs(self, images: int) -> list[ImageSpec]:
        """Return so many images to make."""
        plan = self.plan(images)
        return list(plan.specs(plan.shards[0]))[:images]

    def sampler(self, **changes: Any) -> Any:
        """Load a model with these settings; the one that was loaded before is let go."""
        config = self.config(**changes)
        if config.needs_gpu and not self.gpu:
            raise NotProvenError(f"{config.generation.precision} needs a GPU")
        if self._loaded is None or self._loaded[0] != config:
            self.let_go()
            # Of all checks' prompts these are the first, so that none loads encoders again.
            self._loaded = config, load_sampler(config, specs=self.specs(2 * self.timed * EACH))
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

    def make(self, name: str, plan: Plan, sampler: ImageSampler) -> Made:
        """Make a run's images as a task does, a synset a batch, and read them."""
        paths = self.run(name, plan)
        make_shards(paths, plan, plan.shards, sampler, EACH)
        return Made(paths)


class Made:
    """The output of a task: its shard's rows and images, and its record."""

    def __init__(self, paths: RunPaths) -> None:
        with ImageFile(paths.shard(0)) as file:
            self.rows, payloads = file.rows(), [file.payload(n) for n in range(len(file))]
        side = read_plan(paths).config.generation
        self.images = [decode(one, "webp", side.width, side.height) for one in payloads]
        self.record = read_record(next(paths.tasks.glob("*.json")))


def _apart(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Return the largest root mean square by which two images of a pair differ."""
    return max(pixel_difference(*pair)[0] for pair in zip(one, other, strict=True))


def _pixels(sampler: ImageSampler, specs: Sequence[ImageSpec]) -> list[Any]:
    return [sample.pixels for sample in sampler.sample(specs)]


def _rate(images: int, action: Callable[[], Any]) -> float:
    """Return how many images a second an action takes."""
    began = time.perf_counter()
    action()
    return images / (time.perf_counter() - began)


# Each check, in their order


def _card(bench: Bench) -> Found:
    import torch
    from torch.nn.attention import SDPBackend

    if not bench.gpu:
        raise NotProvenError(f"no GPU here; torch {torch.__version__} on the CPU")
    memory, (major, minor) = bench.device.total_bytes / GB, torch.cuda.get_device_capability()
    # The largest attention of Stable Diffusion.
    query = torch.empty((2, 8, 4096, 40), device="cuda", dtype=torch.float16)
    attention = SDPBackend(torch._fused_sdp_choice(query, query, query)).name
    text = f"{bench.device.name}, {memory:.1f} GB, sm_{major}{minor}; driver "
    driver = output_lines(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    text += f"{(driver or ['not known'])[0]}; torch {torch.__version__}, CUDA "
    text += f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    return Found(f"{text}; {attention.lower().replace('_', ' ')}")


def _noise(bench: Bench) -> Found:
    import torch

    sampler, specs, seen = bench.sampler(), bench.specs(4), list[Any]()
    network = denoiser(sampler.pipeline)
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
    # Some schedulers begin with noise of another size.
    scale = (first.float() * noise).sum() / noise.square().sum()
    if torch.equal(first, noise.to(first.dtype)):
        return Found(f"equal to the bit, in {first.dtype}")
    near = torch.allclose(first.float(), scale * noise, rtol=0.01, atol=0.01)
    return Found(f"times {scale:.4g}" if near else "another", near)


def _twice(bench: Bench) -> Found:
    sampler, specs = bench.sampler(), bench.specs(EACH)
    apart = _apart(_pixels(sampler, specs), _pixels(sampler, specs))
    return Found(f"{EACH} images, {f'rms {apart:.3g}' if apart else 'equal'}", not apart)


def _alone(bench: Bench, precision: str) -> Found:
    sampler, specs = bench.sampler(precision=precision), bench.specs(EACH)
    count = 2 if bench.quick else 4
    alone = [_pixels(sampler, [spec])[0] for spec in specs[:count]]
    apart = _apart(alone, _pixels(sampler, specs)[:count])
    return Found(f"rms {apart:.3g} in {count} images", apart <= TOLERANCE, {"rms": apart})


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

    sampler.pipeline.vae.decoder.register_forward_hook(overflow)
    made = bench.make("nan", bench.plan(EACH, precision="fp16"), sampler)
    bench.let_go()
    if not struck:
        raise NotProvenError("its VAE decodes in fp32")
    retried = int(made.rows["retried_fp32"].sum())
    black = names(made.rows["status"], "status").count("nan")
    text = f"{len(struck)} made NaN, {retried} sampled again in fp32, {black} black"
    return Found(text, retried == len(struck) and not black)


def _flags(bench: Bench) -> Found:
    """Compare flags at a threshold that about half of the images pass."""
    import torch

    sampler = bench.sampler()
    if (checker := sampler._checker) is None:
        raise NotProvenError("this model has no safety checker")
    samples, seen = sampler.sample(bench.specs(EACH)), list[Any]()
    checker.visual_projection.register_forward_hook(lambda *given: seen.append(given[2]))
    sampler.check(samples)
    alike = torch.cosine_similarity(torch.cat(seen)[:, None], checker.concept_embeds[None], dim=-1)
    checker.concept_embeds_weights.data.fill_(alike.amax(dim=1).median())
    ours = [sample.status == "nsfw" for sample in sampler.check(samples)]
    pipeline, pixels = sampler.pipeline, np.stack([sample.pixels for sample in samples]) / 255
    pipeline.safety_checker = checker
    _, theirs = pipeline.run_safety_checker(pixels, bench.device.torch, checker.dtype)
    bench.let_go()
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return Found(f"{differ} differ; {sum(ours)} of {EACH} flagged", not differ)


def _prediction(bench: Bench) -> Found:
    sampler, found, worst = bench.sampler(), list[str](), 0.0
    for size in (1, EACH, 2 * EACH):
        bench.device.forget_peak()
        sampler.time_batch(bench.specs(size))
        bench.peaks[size] = bench.device.peak_bytes
        told, real = sampler.predicted_bytes(size) / GB, bench.peaks[size] / GB
        found.append(f"{told:.1f} and {real:.1f} GB for {size}")
        worst = max(worst, abs(told / real - 1))
    bench.speeds["plain"][1] = 1 / sampler.time_batch(bench.specs(1))
    return Found(f"{', '.join(found)}: off by {100 * worst:.0f} %", worst <= OFF)


def _out_of_memory(bench: Bench) -> Found:
    """Leave room for an image, and for less than a synset's in one batch."""
    sampler, plan = bench.sampler(), bench.plan(EACH)
    roomy = bench.make("roomy", plan, sampler)
    try:
        if bench.gpu:
            bench.device.release()
            room = bench.peaks[1] + (bench.peaks[EACH] - bench.peaks[1]) / 4
            bench.device.limit_share(room / bench.device.total_bytes)
        else:
            sample: Callable[..., list[Sample]] = sampler.sample

            def crowded(specs: Sequence[ImageSpec]) -> list[Sample]:
                if len(specs) > EACH // 2:
                    raise OutOfMemoryError("made up: this device has room")
                return sample(specs)

            sampler.sample = crowded
        made = bench.make("crowded", plan, sampler)
    finally:
        bench.device.limit_share(1.0)
    record, apart = made.record, _apart(made.images, roomy.images)
    text = "simulated: " * (not bench.gpu)
    text += f"{record.lowered_from} a batch lowered to {record.batch_size}"
    text += f"{', decoded one by one' * record.vae_slicing}, {plan.images} images, rms {apart:.3g}"
    return Found(text, record.lowered_from is not None and apart <= TOLERANCE)


def _tuned(bench: Bench) -> Found:
    # On a CPU a short work: its batch size says nothing.
    short = {} if bench.gpu else {"height": 16, "width": 16, "num_inference_steps": 1}
    bench.let_go()
    # Larger batches gain little, and take minutes.
    most = 4 * EACH if bench.gpu else 2 * EACH
    found = trials.tune_device(bench.config(**short), bench.on_step, most=most)
    batch, tuning = choose_batch(bench.config(**short), EACH, bench.sampler(**short)), found.tuning
    if bench.gpu:
        bench.batch = min(tuning.batch_size, 2 * EACH)
        speeds = ((probe.batch_size, probe.images_per_second) for probe in tuning.probes)
        bench.speeds["plain"] |= {size: speed for size, speed in speeds if speed}
    else:
        found.path.unlink()
        found.curve.unlink()
    tried = ", ".join(str(probe.batch_size) for probe in tuning.probes)
    text = f"of {tried} a batch {tuning.batch_size}, {tuning.images_per_second:.3g} images/s"
    return Found(f"{text}; a task takes {batch.images}", batch.images == tuning.batch_size)


def _run_task(root: str) -> None:
    """Be a task's process, which leaves its log in its run folder."""
    # With another, what is killed leaves a semaphore of a library behind.
    multiprocessing.set_start_method("fork", force=True)
    with Path(root, "log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["SDWN_FLUSH_SECONDS"] = "0"
    ArrayTask(GENERATE, root, (0,))()


def _killed(bench: Bench) -> Found:
    few = {"num_inference_steps": 8, "batch_size": EACH}
    plan, codes = bench.plan(4 * EACH, **few), list[int]()
    whole = bench.make("undisturbed", plan, bench.sampler(**few))
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
        log = (paths.root / "log.txt").read_text(encoding="utf-8")
        return Found(f"{ended}: not finished", False, {"log": log})
    same = Made(paths).rows["sha256"] == whole.rows["sha256"]
    equal = int(same.all(axis=-1).sum())
    fits = equal == plan.images and codes == [128 + signal.SIGUSR2, -signal.SIGKILL, 0]
    return Found(f"{ended}; {equal} of {plan.images} images equal", fits)


def _see_device(rank: int) -> str:
    """Be one of a task's two processes, and return which GPU it was left."""
    gpus = local_gpus(os.environ)
    os.environ.update(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID="1", SLURM_NTASKS="2")
    given = ",".join(gpus[:2]) if len(gpus) > 1 else "0,1"
    os.environ.update(SLURM_PROCID=str(rank), CUDA_VISIBLE_DEVICES=given)
    see_one_device(this_process())
    return os.environ["CUDA_VISIBLE_DEVICES"]


def _own_devices(_: Bench) -> Found:
    with PROCESSES.Pool(2, maxtasksperchild=1) as pool:
        first, second = pool.map_async(_see_device, range(2), 1).get(PATIENCE_S)
    text = f"GPU {first} and GPU {second}"
    if (gpus := len(local_gpus(os.environ))) < 2 and first != second:
        raise NotProvenError(f"{counted(gpus, 'GPU')} here; simulated, tasks see {text}")
    return Found(text, first != second)


def _whole_task(bench: Bench) -> Found:
    """Time a task, its model loaded, from the plan to the finished shard."""
    settings = bench.task_settings
    sampler, plan = bench.sampler(**settings), bench.plan(bench.timed * bench.batch, **settings)
    paths, shards = bench.run("task", plan), plan.shards
    sampler.time_batch(bench.specs(bench.batch))
    speed = _rate(plan.images, lambda: make_shards(paths, plan, shards, sampler, bench.batch))
    record, bench.task_speed = read_record(next(paths.tasks.glob("*.json"))), speed
    text = f"{speed:.3g} images/s with {bench.batch} a batch, sampling {100 * record.busy:.1f} %"
    if not bench.gpu:
        raise NotProvenError(f"{text}; on a CPU, sampling and encoding share the cores")
    if (joules := record.energy_joules) is not None:
        text += f"; {joules / plan.images:.0f} J an image"
    figures = {"images_per_second": speed, "busy": record.busy, "joules": joules}
    return Found(text, record.busy >= BUSY, figures)


def _loop(bench: Bench) -> Found:
    """Time the loop of accelerate's guide to distributed inference: same seeds, same batches."""
    from sdwn.preflight.peers import accelerate_loop

    config, specs = bench.config(**bench.task_settings), bench.specs(bench.timed * bench.batch)
    bench.let_go()
    weights = obtain_weights(config).folder
    make = accelerate_loop(weights, config.generation, bench.folder / "loop")
    make(specs[: bench.batch], bench.batch)
    speed = _rate(len(specs), lambda: make(specs, bench.batch))
    return _beside(bench, bench.task_speed, speed, "the loop")


def _beside(bench: Bench, ours: float, theirs: float, peer: str) -> Found:
    text = f"{ours:.4g} images/s, {peer} {theirs:.4g}: {ours / theirs:.2f} of it"
    if not bench.gpu:
        raise NotProvenError(f"{text}; on a CPU")
    figures = {"images_per_second": ours, "peer_images_per_second": theirs}
    return Found(text, ours >= (1 - NOISE) * theirs, figures)


def _variant(bench: Bench, kernel: str = "", **generation: Any) -> Found:
    """Time the first batch under settings, compiling included, and later ones."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    compiled = generation.get("compile")
    if compiled and shutil.which("g++") is None:
        raise NotProvenError("torch.compile needs a C++ compiler, g++")
    specs, sampler = bench.specs(bench.batch), bench.sampler(**generation)
    # The VAE's heads are too wide for some.
    others = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    kernels = [getattr(SDPBackend, kernel), *others] if kernel else []
    with sdpa_kernel(kernels, set_priority=True) if kernel else contextlib.nullcontext():
        began = time.monotonic()
        sampler.time_batch(specs)
        first = time.monotonic() - began
        speed = len(specs) / median([sampler.time_batch(specs) for _ in range(3)])
    if compiled:
        bench.speeds[compiled][bench.batch] = speed
    text = f"first batch of {len(specs)}: {duration(first)}, then {speed:.3g} images/s"
    return Found(text, figures={"first_seconds": first, "images_per_second": speed})


def _evaluation(bench: Bench, preset: str = "paper") -> Found:
    """Time a classifier over the task's images, and the loop of timm's validate.py over PNGs."""
    import timm

    from sdwn.prediction.network import Classifier, network_batch_size, run_batches
    from sdwn.prediction.pretrained import PRESETS
    from sdwn.preflight.peers import timm_loader, timm_validate
    from sdwn.releases.merge import merge

    bench.let_go()
    kind, total = PRESETS[preset], CLASSIFIED if bench.gpu else EACH
    release = merge([RunPaths(bench.folder / "task")], ReleasePaths(bench.folder / "release"))
    chosen = release.subset(rows=np.arange(total) % len(release))
    pictures = bench.folder / "validate" / "all"
    pictures.mkdir(parents=True, exist_ok=True)
    for index in range(total):
        path = pictures / f"{index:05d}.png"
        if index < len(release):
            release.image(index).save(path, compress_level=1)
        elif not path.exists():
            os.link(pictures / f"{index % len(release):05d}.png", path)
    with bench.device.torch:
        network = timm.create_model(kind.architecture, num_classes=1000, **kind.arguments)
    classifier = Classifier(preset, network, kind.preprocessing, {})
    workers = len(os.sched_getaffinity(0))
    classifier.batch = network_batch_size(classifier)
    options = {"num_workers": workers, "img_dtype": classifier.dtype, "device": classifier.device}
    loader = timm_loader(pictures.parent, kind.preprocessing, classifier.batch.images, **options)
    both = (
        lambda: deque(run_batches(classifier, chosen), maxlen=0),
        lambda: timm_validate(classifier.network, loader),
    )
    # In turn, the first of each to warm up; of the others the best.
    _, *rates = [[_rate(total, one) for one in both] for _ in range(3)]
    ours, theirs = (max(speeds) for speeds in zip(*rates, strict=True))
    return _beside(bench, ours, theirs, "timm")


# All of it

SAME = f"rms of at most {TOLERANCE:g} of 255"
FASTER = f"as fast or faster, within {NOISE:.0%}"
SELF_CHECKS = [
    SelfCheck("machine", "card", "a GPU that torch finds", _card),
    SelfCheck("images", "first noise", "the same as drawn on the CPU", _noise),
    SelfCheck("images", "a batch twice", "equal to the byte", _twice),
    SelfCheck("images", "safety checker's flags", "as diffusers' own: 0 differ", _flags),
    SelfCheck("images", "alone and in a batch, fp16", SAME, partial(_alone, precision="fp16")),
    SelfCheck("images", "NaN in half precision", "sampled again, none black", _nan),
    SelfCheck("images", "alone and in a batch, bf16", SAME, partial(_alone, precision="bf16")),
    SelfCheck("memory", "prediction for a batch", f"at most {OFF:.0%} off", _prediction, gpu=True),
    SelfCheck("memory", "out of memory", f"smaller batches, {SAME}", _out_of_memory),
    SelfCheck("memory", "tuning", "a size that a later task takes", _tuned),
    SelfCheck("tasks", "USR2 and SIGKILL in a batch", "equal to the byte", _killed),
    SelfCheck("tasks", "two processes of a task", "a GPU each", _own_devices),
    SelfCheck("speed", "a whole task", f"sampling {BUSY:.0%} of the time or more", _whole_task),
    SelfCheck("speed", "beside accelerate's loop", FASTER, _loop),
    SelfCheck("evaluation", "EfficientNet-Lite0", FASTER, partial(_evaluation, preset=LITE)),
    SelfCheck("evaluation", "ViT-H/14 at 518 pixels", FASTER, _evaluation, gpu=True),
    SelfCheck("settings", "no speed options", "", _variant, long=True),
    SelfCheck("settings", "channels_last", "", partial(_variant, channels_last=True), long=True),
    *(
        SelfCheck("settings", f"attention: {name}", "", partial(_variant, kernel=name), True, True)
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    ),
    SelfCheck("settings", "compile: blocks", "", partial(_variant, compile="blocks"), long=True),
    # A CPU's compiler takes minutes for it.
    SelfCheck("settings", "compile: whole", "", partial(_variant, compile="whole"), True, True),
]


def self_test(
    folder: Path, model: str | None, quick: bool, on_step: OnMessage = ignore
) -> dict[str, Any]:
    """Make all checks on this machine; return what ``selftest.json`` has, written after each."""
    if PROCESSES.get_start_method() == "forkserver":
        # Beside what this process imports; diffusers loads its parts only where one is asked for.
        built_in = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
        PROCESSES.set_forkserver_preload(
            ["sdwn.generation.task", "sdwn.generation.sampler", built_in]
        )
        # There nothing keeps libraries from warning.
        with Path(os.devnull).open("wb") as nothing, os.fdopen(os.dup(2), "wb") as kept:
            os.dup2(nothing.fileno(), 2)
            forkserver.ensure_running()
            os.dup2(kept.fileno(), 2)
    work, tried = folder / "work", list[dict[str, Any]]()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    on_step("loading the model")
    bench = Bench(work, model, quick, on_step)
    content = {
        **SELFTEST.head(),
        "sdwn": code_version(),
        "measured": now(),
        "device": bench.device.name,
        "memory_gb": round(bench.device.total_bytes / GB),
        "model": bench.model,
        "random_weights": bench.random,
        "quick": quick,
        "generation": bench.settings,
        "checks": tried,
    }
    for number, check in enumerate(SELF_CHECKS, start=1):
        on_step(f"{check.group}: {check.name}, {number} of {len(SELF_CHECKS)}")
        began = time.monotonic()
        try:
            if check.gpu and not bench.gpu:
                raise NotProvenError("no GPU here")
            if check.long and quick:
                raise NotProvenError("left out by --quick")
            found = check.run(bench)
            outcome = "ok" if found.fits else "failed"
        except NotProvenError as reason:
            outcome, found = "not proven", Found(str(reason))
        except Exception as error:  # whatever it is, the others are still to be made
            bench.let_go()
            figures = {"traceback": traceback.format_exc()}
            outcome, found = "failed", Found(first_line(error), False, figures)
        known = {"group": check.group, "check": check.name, "expected": check.expected}
        known |= {"outcome": outcome, "found": found.text}
        took = round(time.monotonic() - began, 1)
        tried.append({**known, "seconds": took, "figures": found.figures})
        content["speeds"] = bench.speeds if bench.is_reference else {}
        content["ok"] = all(one["outcome"] != "failed" for one in tried)
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
        self_test(folder, asked["model"], asked["quick"], trials.step_note(RunPaths(folder), index))


SELF_TEST = Stage("selftest", self_test_task)


def self_test_by_job(
    model: str | None, quick: bool, profile: ClusterProfile, callbacks: trials.TrialCallbacks
) -> dict[str, Any]:
    """Make all checks by a short job; a SdwnError if it ended before all were made."""
    trial = RunPaths(writable_cache() / "selftest" / "job")
    question = {"model": model, "quick": quick, "profile": profile.record()}
    trials.run_trial(trial, SELF_TEST, [profile], question, callbacks)
    answer = trial.root / ANSWER
    content = SELFTEST.read(answer) if answer.exists() else {"checks": []}
    if (done := len(content["checks"])) < len(SELF_CHECKS):
        text = f"the self-test ended after {done} of {len(SELF_CHECKS)} checks"
        raise SdwnError(f"{text}, see {answer}: {failure(trial, 0)}")
    keep_speeds(content)
    return content


def self_test_page(content: Mapping[str, Any]) -> str:
    """Write a self-test as a Markdown page."""
    settings, columns = content["generation"], ("group", "check", "expected", "found", "outcome")
    weights = "random weights" if content["random_weights"] else "its own weights"
    cells = [columns, ["---"] * 5]
    cells += [[one[name].replace("|", "\\|") for name in columns] for one in content["checks"]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"""# `sdwn selftest` on {content["device"]}

{content["measured"][:10]}, sdwn {content["sdwn"]}; {Path(content["model"]).name} with {weights}, \
{settings["width"]}x{settings["height"]}, {settings["num_inference_steps"]} steps, \
{settings["precision"]}.

{table}

*Not proven*: this machine or a quick test cannot show it; *found* says why.
"""

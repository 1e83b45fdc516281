"""GPU profiles: what ``sdwn tune`` measured on a card, kept where every later task finds it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdwn.config import RunConfig
from sdwn.devices.device import HEAD_ROOM
from sdwn.devices.tuning import GB, Probe, Tuning, draw_tuning
from sdwn.errors import IntegrityError
from sdwn.io import Format, atomic, refuse_planted, write_text
from sdwn.paths import cache_folder

FORMAT = Format("sdwn-gpu-profile", 1, "tune again")

# Stable Diffusion 1.4 at 512x512 in fp16 on an A100: 3.6 GB and 0.81 GB an image, the weights'
# 2.1 GB among them. Decoded one by one, the VAE's share does not grow with the batch.
WORKSPACE_BYTES = 1.5e9
IMAGE_BYTES = 0.81e9
SLICED_IMAGE_BYTES = 0.25e9
REFERENCE_PIXELS = 512 * 512
REFERENCE_ITEMSIZE = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """The work that a speed is valid for: the card, the model, and what an image costs.

    ``memory_gb`` is the card's, in whole GB of 10^9 bytes; ``revision`` the weights' own.
    """

    device: str
    memory_gb: int
    model: str
    revision: str
    precision: str
    height: int
    width: int
    guidance: bool
    channels_last: bool
    compile: bool
    torch: str

    @property
    def profile_path(self) -> Path:
        """The file in this user's cache that keeps what was measured for it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_folder() / "gpus" / f"{digest[:16]}.json"


def run_workload(config: RunConfig, provenance: dict[str, Any], total_bytes: int) -> Workload:
    """Describe a run's work on a device."""
    generation = config.generation
    return Workload(
        device=str(provenance["device"]),
        memory_gb=round(total_bytes / GB),
        model=config.model.name,
        revision=str(provenance.get("revision", "")),
        precision=generation.precision,
        height=generation.height,
        width=generation.width,
        guidance=generation.guidance_scale > 1,
        channels_last=generation.channels_last,
        compile=generation.compile,
        torch=str(provenance.get("torch", "")),
    )


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """A workload's measured batch size, and the measurements behind it.

    The batch size holds for any ``num_inference_steps`` and ``scheduler``, the speed for these.
    """

    workload: Workload
    vae_slicing: bool
    tuning: Tuning
    measured: str
    num_inference_steps: int | None = None
    scheduler: str | None = None

    @property
    def path(self) -> Path:
        """The file that it is kept in."""
        return self.workload.profile_path

    @property
    def curve(self) -> Path:
        """The path of its plot: speed and memory against batch size."""
        return self.path.with_suffix(".svg")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, with the paths of what is kept."""
        return {**asdict(self), "path": str(self.path), "curve": str(self.curve)}


def store_profile(profile: GpuProfile) -> GpuProfile:
    """Keep what was measured for every later task of the same workload, with its curve."""
    write_profile(profile, profile.path)
    work = profile.workload
    with atomic(profile.curve) as temporary:
        title = f"{work.model}, {work.width}x{work.height}, {work.device}"
        draw_tuning(profile.tuning, title, temporary, kind="svg")
    return profile


def write_profile(profile: GpuProfile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    write_text(path, json.dumps({**FORMAT.head(), **asdict(profile)}, indent=2) + "\n")


def find_profile(work: Workload) -> GpuProfile | None:
    """Return a workload's profile; one that cannot be read counts as none."""
    try:
        profile = read_profile(work.profile_path)
    except IntegrityError:
        return None
    return profile if profile.workload == work else None


def stored_profiles() -> list[GpuProfile]:
    """Read all profiles that are kept; those that cannot be read are left out."""
    found = []
    for path in sorted((cache_folder() / "gpus").glob("*.json")):
        with contextlib.suppress(IntegrityError):
            found.append(read_profile(path))
    return found


def read_profile(path: Path) -> GpuProfile:
    """Read a GPU profile.

    Raises:
        IntegrityError: it is damaged, of another version, or could be from any user.
    """
    content = FORMAT.read(path)
    refuse_planted(path)
    try:
        probes = tuple(Probe(**probe) for probe in content["tuning"]["probes"])
        tuning = Tuning(**{**content["tuning"], "probes": probes})
        if type(tuning.batch_size) is not int or tuning.batch_size < 1:
            raise ValueError(f"a batch of {tuning.batch_size!r} images")
        return GpuProfile(
            Workload(**content["workload"]),
            bool(content["vae_slicing"]),
            tuning,
            str(content["measured"]),
            content.get("num_inference_steps"),
            content.get("scheduler"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: damaged: {error!r}; tune again") from None


def estimated_fit(config: RunConfig, free_bytes: float, total_bytes: float, sliced: bool) -> int:
    """Estimate how many images fit beside weights that are loaded already.

    From published figures of Stable Diffusion 1.4, in proportion to pixels and precision;
    ``free_bytes`` of a card of ``total_bytes``. 0 where not even one fits.

    >>> from sdwn.config import load_config
    >>> config = load_config(Path("configs/paper.yaml"))
    >>> [estimated_fit(config, (gb - 2.7) * GB, gb * GB, False) for gb in (8, 16, 24, 40, 80)]
    [3, 12, 21, 39, 83]
    """
    itemsize = 4 if config.generation.precision == "fp32" else 2
    pixels = config.generation.height * config.generation.width
    scale = pixels / REFERENCE_PIXELS * itemsize / REFERENCE_ITEMSIZE
    room = free_bytes - HEAD_ROOM * total_bytes - WORKSPACE_BYTES
    each = (SLICED_IMAGE_BYTES if sliced else IMAGE_BYTES) * scale
    return max(0, int((room - (IMAGE_BYTES * scale if sliced else 0)) / each))

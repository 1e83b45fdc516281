"""The GPUs and the memory that a process was given, and running out of memory.

Only what asks a GPU itself imports torch: submitting, plain noise and ``--help`` need none.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdwn.errors import OutOfMemoryError

if TYPE_CHECKING:
    import torch

GB = 1e9

# NVIDIA's runtime reads the first, AMD's both; ROCR_VISIBLE_DEVICES is applied before them.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

# A card's memory that no batch may count on: other processes, fragments, a peak never seen.
HEAD_ROOM = 0.1

# Allocators, oneDNN, cuBLAS and C++ say it in words alone; a RuntimeError may be anything.
OUT_OF_MEMORY = re.compile(
    r"CU(BLAS|DNN)_STATUS_ALLOC_FAILED|CUDA error: out of memory|std::bad_alloc"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|could not create a (memory object|primitive)"
)


def given_gpus(environment: Mapping[str, str]) -> list[str] | None:
    """List the GPUs that a process was given; None where nothing in its environment says.

    >>> given = given_gpus
    >>> [given({"CUDA_VISIBLE_DEVICES": names}) for names in ("2,3", "-1", "NoDevFiles", "GPU-89")]
    [['2', '3'], [], [], ['GPU-89']]
    >>> given({"ROCR_VISIBLE_DEVICES": "6,7"}), given({})
    (['0', '1'], None)
    """
    # CUDA and HIP, too, end a list at the first name that is none.
    is_name = re.compile(r"\d+|(GPU|MIG)-.+", re.ASCII).fullmatch
    for variable in (*VISIBLE, "ROCR_VISIBLE_DEVICES"):
        if variable in environment:
            parts = (part.strip() for part in environment[variable].split(","))
            names = list(takewhile(is_name, parts))
            # What ROCR_VISIBLE_DEVICES leaves is numbered anew.
            return names if variable in VISIBLE else [str(n) for n in range(len(names))]
    return None


def local_gpus(environment: Mapping[str, str]) -> list[str]:
    """List the GPUs of this machine that a process may use."""
    if (names := given_gpus(environment)) is not None:
        return names
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def only_gpu(gpu: str) -> dict[str, str]:
    """Return the variables that leave a process one GPU."""
    return dict.fromkeys(VISIBLE, gpu)


def missing_gpu(device: str) -> str | None:
    """Describe that torch works on the CPU though this process was given a GPU; None if not."""
    # In a job, device files alone do not mean that one was given.
    gpus = given_gpus(os.environ) if "SLURM_JOB_ID" in os.environ else local_gpus(os.environ)
    if device != "cpu" or not gpus:
        return None
    return (
        f"a GPU was given (number {gpus[0]}) and torch finds none, so this runs on the CPU: "
        "install a torch built for this driver's CUDA, or load its modules (setup in the profile)"
    )


class Device:
    """This process's GPU, or the CPU; memory in bytes, as torch's allocator or Linux counts it.

    ``Device(gpu=False)`` is the CPU, and imports no torch.
    """

    def __init__(self, gpu: bool = True) -> None:
        self._cuda: Any = None
        if gpu:
            import torch

            # Not accelerate's PartialState: where torchrun or mpirun left their variables behind,
            # it joins a group of processes and waits for the others.
            self._cuda = torch.cuda if torch.cuda.is_available() else None
        self.is_gpu = self._cuda is not None

    @property
    def torch(self) -> torch.device:
        """The device as torch names it."""
        import torch

        return torch.device("cuda" if self.is_gpu else "cpu")

    @property
    def name(self) -> str:
        """The card's name, as its driver gives it, or ``cpu``."""
        return str(self._cuda.get_device_name()) if self.is_gpu else "cpu"

    @property
    def total_bytes(self) -> int:
        """All memory of the card, or the most that this process may use of the machine's."""
        if self.is_gpu:
            return int(self._cuda.mem_get_info()[1])
        limits = [_proc_bytes("meminfo", "MemTotal"), resource.getrlimit(resource.RLIMIT_AS)[0]]
        with contextlib.suppress(OSError, ValueError):  # A control group's limit may be "max".
            limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
        return min(limit for limit in limits if limit > 0)

    @property
    def usable_bytes(self) -> int:
        """Memory that this process has or could still get; others' share is taken off."""
        if self.is_gpu:
            return int(self._cuda.mem_get_info()[0]) + self.used_bytes
        return min(self.total_bytes, _proc_bytes("meminfo", "MemAvailable") + self.used_bytes)

    @property
    def limit_bytes(self) -> int:
        """The usable memory without the head-room: no batch may take more at its peak."""
        return int(self.usable_bytes - HEAD_ROOM * self.total_bytes)

    @property
    def used_bytes(self) -> int:
        """Memory that this process has now."""
        if self.is_gpu:
            return int(self._cuda.memory_reserved())
        return _proc_bytes("self/status", "VmRSS")

    @property
    def peak_bytes(self) -> int:
        """The most that this process has had since :meth:`forget_peak`."""
        if self.is_gpu:
            return int(self._cuda.max_memory_reserved())
        return _proc_bytes("self/status", "VmHWM")

    @property
    def energy_joules(self) -> float | None:
        """The energy that the card has taken since its driver was loaded; None where none says."""
        # A slice of a card would be told the whole card's.
        if not self.is_gpu or " MIG " in self.name:
            return None
        with contextlib.suppress(Exception):  # no NVML here, an older card, or another maker's
            import pynvml

            pynvml.nvmlInit()
            uuid = self._cuda.get_device_properties(self._cuda.current_device()).uuid
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000)
        return None

    def forget_peak(self) -> None:
        """Begin to look for a new peak; give back first what no tensor holds of a card's memory."""
        if self.is_gpu:
            self.release()
            self._cuda.reset_peak_memory_stats()
            return
        # See proc(5); where a container forbids it, peaks only grow.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done."""
        if self.is_gpu:
            self._cuda.synchronize()

    def limit_share(self, share: float) -> None:
        """Let this process have no more than a share of the card's memory."""
        if self.is_gpu:
            self._cuda.set_per_process_memory_fraction(share)

    def release(self) -> None:
        """Return to the system what no tensor holds."""
        gc.collect()
        if self.is_gpu:
            self._cuda.empty_cache()
        else:
            ctypes.CDLL(None).malloc_trim(0)


def _proc_bytes(file: str, name: str) -> int:
    """Read an amount that Linux writes in KiB, in bytes; 0 where the file has none of this name."""
    text = Path("/proc", file).read_text(encoding="ascii", errors="replace")
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


@contextlib.contextmanager
def plain_out_of_memory() -> Iterator[None]:
    """Turn every way of running out of memory into an OutOfMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        import torch

        # submitit's own exceptions are RuntimeErrors too: there the type alone says nothing.
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not OUT_OF_MEMORY.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemoryError(f"out of memory: {reason}") from None

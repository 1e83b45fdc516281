"""The device that samples: its name, its memory, and running out of it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from sdwn.devices import memory
from sdwn.errors import OutOfMemoryError

# Allocators, oneDNN, cuBLAS and C++ say it in words alone; a RuntimeError may be anything.
OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "could not create a memory object",
    "could not create a primitive",
    "std::bad_alloc",
)


def own_device() -> torch.device:
    """Return this process's GPU, or the CPU.

    Not from accelerate's PartialState: where torchrun or mpirun left their variables behind, it
    joins a group of processes and waits for the others.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Device:
    """This process's GPU, or the CPU; memory in bytes, as torch's allocator has it."""

    def __init__(self) -> None:
        self.torch: torch.device = own_device()

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.torch.type == "cuda"

    @property
    def name(self) -> str:
        """The card's name, as its driver gives it, or ``cpu``."""
        return str(torch.cuda.get_device_name(self.torch)) if self.is_gpu else "cpu"

    @property
    def total_bytes(self) -> int:
        """All memory of the card, or what a process may use of this machine's."""
        return int(torch.cuda.mem_get_info(self.torch)[1]) if self.is_gpu else memory.total()

    @property
    def usable_bytes(self) -> int:
        """What this process has and could still get; others' share is taken off."""
        if not self.is_gpu:
            return memory.usable()
        return int(torch.cuda.mem_get_info(self.torch)[0]) + self.used_bytes

    @property
    def used_bytes(self) -> int:
        """What this process has now."""
        return torch.cuda.memory_reserved(self.torch) if self.is_gpu else memory.used()

    @property
    def peak_bytes(self) -> int:
        """The most that this process has had since :meth:`forget_peak`."""
        return torch.cuda.max_memory_reserved(self.torch) if self.is_gpu else memory.peak()

    def forget_peak(self) -> None:
        """Give back what no tensor holds, and begin to look for a new peak."""
        self.release()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.torch)
        else:
            memory.forget_peak()

    def synchronize(self) -> None:
        """Wait until all that was asked of the device is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch)

    def release(self) -> None:
        """Give back what no tensor holds."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed from every other error.

    submitit's own exceptions are RuntimeErrors too, so the type alone says nothing.

    >>> is_out_of_memory(RuntimeError("Job not requeued because: timed-out too many times."))
    False
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in OUT_OF_MEMORY)


@contextlib.contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Turn every way of running out of memory into one error.

    Raises:
        OutOfMemoryError: the device has no room.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemoryError(f"out of memory: {reason}") from None

"""torch.compile of Stable Diffusion 1.4's UNet at full size: its blocks, or the whole of it.

``python benchmarks/compiling.py [fp32|bf16]`` takes steps of one image of 512 pixels on one core,
without and with each, every kind in a process of its own, and prints seconds of processor time: a
machine that does other work meanwhile hardly changes them. Weights are random.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("plain", "blocks", "whole")
STEPS = 3


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(kind: str, precision: str) -> None:
    """Print the seconds of the first step and the median of later ones."""
    import torch
    from sdwn.models.full_size import NETWORKS

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = NETWORKS["unet"]().to(torch.bfloat16 if precision == "bf16" else torch.float32).eval()
    if kind == "blocks":
        network.compile_repeated_blocks()
    elif kind == "whole":
        network.compile()
    given = [torch.randn(1, 4, 64, 64), torch.tensor(500), torch.randn(1, 77, 768)]
    latents, timestep, text = (one.to(network.dtype) if one.ndim else one for one in given)
    seconds = []
    with torch.no_grad():
        for _ in range(1 + STEPS):
            began = processor_seconds()
            output = network(latents, timestep, text).sample
            seconds.append(processor_seconds() - began)
    later = sorted(seconds[1:])[STEPS // 2]
    mean = output.float().abs().mean().item()
    print(f"{kind:7} first step {seconds[0]:7.1f} s, later {later:6.2f} s, mean {mean:.6f}")


def main() -> None:
    precision = sys.argv[1] if len(sys.argv) > 1 else "fp32"
    for kind in KINDS:
        # Nothing that an earlier one compiled.
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
            code = f"import compiling; compiling.measure({kind!r}, {precision!r})"
            began = time.monotonic()
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent,
                env=environment,
                check=True,
            )
            print(f"{'':7} {time.monotonic() - began:.0f} s by the clock", flush=True)


if __name__ == "__main__":
    main()

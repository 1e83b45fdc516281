"""One loop for every stage of the training: rate, average of weights, checkpoints, log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sdwn.io import atomic
from torch import nn

Loss = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps and learning rate: it rises, stays, and falls to zero over the last quarter."""

    steps: int
    rate: float
    rising: int = 200
    falling: float = 0.25
    averaged: float = 0.999
    decay: float = 0.01
    save_every: float = 180.0
    log_every: int = 50

    def rate_at(self, step: int) -> float:
        """Return the rate of a step.

        >>> fast = Schedule(steps=1000, rate=1.0, rising=100)
        >>> [round(fast.rate_at(step), 2) for step in (0, 99, 500, 875, 999)]
        [0.01, 1.0, 1.0, 0.5, 0.0]
        """
        left = (self.steps - step) / max(1.0, self.falling * self.steps)
        return self.rate * min(1.0, (step + 1) / self.rising, left)


class Average:
    """The exponential moving average of a model's parameters and buffers."""

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def add(self, model: nn.Module, step: int) -> None:
        """Add a step's weights; early steps count more."""
        share = min(self.share, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - share)
            else:
                self.values[name].copy_(value)


def fit(model: nn.Module, loss: Loss, schedule: Schedule, path: Path) -> dict[str, torch.Tensor]:
    """Train a model to the schedule's end, resuming from ``path``; return the averaged weights.

    ``loss`` takes the step's number and must draw what it draws by that number alone, so that a
    training that was interrupted sees what an undisturbed one would have seen.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.decay
    )
    average = Average(model, schedule.averaged)
    first = _resume(path, model, optimizer, average)
    model.train()
    saved, began, losses = time.monotonic(), time.monotonic(), list[float]()
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.add(model, step)
        losses.append(value.item())
        done = step + 1
        if done % schedule.log_every == 0:
            pace = (done - first) / (time.monotonic() - began)
            mean = sum(losses) / len(losses)
            _log(path.stem, f"{done}/{schedule.steps} {mean:.4f} {pace:.2f}/s")
            losses.clear()
        if time.monotonic() - saved > schedule.save_every or done == schedule.steps:
            _save(path, done, model, optimizer, average)
            saved = time.monotonic()
    return average.values


def _resume(path: Path, model: nn.Module, optimizer: Any, average: Average) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.values = state["average"]
    _log(path.stem, f"goes on from step {state['step']}")
    return int(state["step"])


def _save(path: Path, step: int, model: nn.Module, optimizer: Any, average: Average) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.values,
    }
    with atomic(path) as temporary:
        torch.save(state, temporary)


def _log(stage: str, text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {stage}: {text}\n")
    sys.stdout.flush()

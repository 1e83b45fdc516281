"""Sweeps: runs of one config that differ in a few settings, its cells, side by side in a folder.

A sweep's file is YAML. Its base is a config's file, a shipped config's name, or the settings
themselves. Every cell of ``cells``, settings that go together, is crossed with the values of
``vary``::

    base: paper
    cells:
      - {model.name: CompVis/stable-diffusion-v1-4}
      - {model.name: stabilityai/sdxl-turbo, generation: {num_inference_steps: 1}}
    vary:
      prompt: ["{definition}", "a photo of {a_lemma}"]

The run's seed is the base's in all cells: the images of a concept and number begin with the same
noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain, count, product
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field, JsonValue, ValidationError

from sdwn.config import (
    Record,
    RunConfig,
    Section,
    override_settings,
    read_yaml,
    validated,
    with_settings,
)
from sdwn.errors import IntegrityError, UsageError
from sdwn.io import Format
from sdwn.paths import SweepPaths, shipped_file
from sdwn.planning.plan import flat_settings

FORMAT = Format("sdwn-sweep", 1, "plan the sweep again with: sdwn sweep SWEEP FOLDER")
# In characters: of a value, and of a cell's name.
LONGEST_VALUE, LONGEST_NAME = 24, 120

# The settings of a cell that the sweep's file gives, by dotted name.
Settings = dict[str, Any]


class SweepFile(Section):
    """What a user writes: the base of a sweep, and what varies."""

    base: str | dict[str, JsonValue]
    vary: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field({})
    cells: list[dict[str, JsonValue]] = Field([{}], min_length=1)


class Cell(Record):
    """A cell: the name of its folder, what differs from the base, and its plan's digest."""

    # It names a folder and stands in commands; anybody may have written the file.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=,-]*$")]
    settings: Settings
    digest: str


class Sweep(Record):
    """The cells of a sweep's folder."""

    format: str = FORMAT.name
    format_version: int = FORMAT.version
    cells: list[Cell]


def read_sweep(folder: Path) -> Sweep:
    """Read what a sweep's folder holds."""
    path = SweepPaths(folder).sweep
    try:
        return Sweep.model_validate(FORMAT.read(path))
    except ValidationError as error:
        raise IntegrityError(f"{path}: damaged: {' '.join(str(error).split())}") from None


def sweep_configs(path: Path, overrides: tuple[str, ...] = ()) -> list[tuple[Settings, RunConfig]]:
    """Read a sweep's file: what differs in each cell, and its config; overrides are the base's.

    Raises:
        UsageError: a setting is unknown or wrong, the seed varies, or two cells are the same.
    """
    sweep, folder = validated(SweepFile, read_yaml(path), source=str(path)), path.resolve().parent
    if isinstance(sweep.base, str):
        beside = folder / sweep.base
        file = beside if beside.is_file() else shipped_file("config", sweep.base)
        base, origin = read_yaml(file), file.resolve().parent
    else:
        base, origin = dict(sweep.base), folder
    override_settings(base, origin, overrides)
    found = list[tuple[Settings, RunConfig]]()
    crossed = [dict(zip(sweep.vary, one, strict=True)) for one in product(*sweep.vary.values())]
    for listed, values in product(sweep.cells, crossed):
        settings = dict(flat_settings({**listed, **values}))
        if "seed" in settings:
            raise UsageError(
                f"{path}: seed: all cells have the base's, so that they are compared on the same "
                "noise; vary something else"
            )
        name = cell_name(settings)
        config = with_settings(base, settings, folder, f"{path}: cell {name}")
        for other, earlier in found:
            if config.model_copy(update={"evaluation": earlier.evaluation}) == earlier:
                raise UsageError(
                    f"{path}: the cells {cell_name(other)} and {name} would have the same images; "
                    "leave one out"
                )
        found.append((settings, config))
    return found


def cell_name(settings: Mapping[str, Any]) -> str:
    """Return a cell's name: short, and safe in folders, shells and names of jobs.

    >>> cell_name({"generation.guidance_scale": 1.5, "prompt": "a photo of {a_lemma}"})
    'guidance_scale=1.5,prompt=a-photo-of-a-lemma'
    >>> cell_name({"model.name": "stabilityai/sdxl-turbo", "generation.precision": "bf16"})
    'model=sdxl-turbo,precision=bf16'
    >>> cell_name({})
    'base'
    """
    parts = []
    for setting, value in settings.items():
        section, _, name = setting.rpartition(".")
        # Of a hub's name or a path, the last part.
        named = name == "name" and isinstance(value, str)
        text = PurePosixPath(value).name if named else value
        text = text if isinstance(text, str) else json.dumps(text)
        word = re.sub(r"[^A-Za-z0-9.]+", "-", text.replace("_", "-")).strip("-.")
        short = word[:LONGEST_VALUE].strip("-.") or "empty"
        key = section.rpartition(".")[2] if name == "name" else name
        parts.append(f"{re.sub(r'[^A-Za-z0-9_]+', '-', key)}={short}")
    return ",".join(parts)[:LONGEST_NAME].strip("-.,=_") or "base"


def free_name(settings: Settings, taken: Mapping[str, Settings]) -> str:
    """Return a name that no cell of other settings has.

    >>> free_name({"prompt": "{lemma}!"}, {"prompt=lemma": {"prompt": "{lemma}"}})
    'prompt=lemma-2'
    """
    name = cell_name(settings)
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(one for one in names if taken.get(one, settings) == settings)

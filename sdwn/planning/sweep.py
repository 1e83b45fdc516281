"""Sweeps: runs of one config, the base, that differ in a few settings.

Each run is a cell, in a folder of its own. All have the base's seed: the images of a concept and
number begin with the same noise in every cell.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue

from sdwn.config import Record, RunConfig, Section, read_yaml, validated, with_overrides
from sdwn.errors import UsageError
from sdwn.io import Format
from sdwn.paths import RunPaths, shipped_file
from sdwn.planning.plan import flat_settings

FORMAT = Format("sdwn-sweep", 1, "if it is no newer sdwn's, remove it and run sdwn sweep again")
# In characters: of a value in a cell's name, and of the name.
LONGEST_VALUE, LONGEST_NAME = 24, 120

# What a cell has otherwise than the base, by dotted name.
Settings = dict[str, Any]


class SweepFile(Section):
    """A sweep as its user writes it: each of ``cells`` is crossed with the values of ``vary``."""

    base: str | dict[str, JsonValue]
    vary: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field({})
    cells: list[dict[str, JsonValue]] = Field([{}], min_length=1)


class Cell(Record):
    """A cell: its folder's name, its settings, and its plan's digest."""

    # Anybody may have written the file, and the name leads to a folder.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=,-]*$")]
    settings: Settings
    digest: str


class Sweep(Record):
    """The cells of a sweep's folder."""

    format: str = FORMAT.name
    format_version: int = FORMAT.version
    cells: Annotated[list[Cell], Field(min_length=1)]


def read_sweep(folder: Path) -> Sweep:
    """Read which cells a sweep's folder has."""
    with FORMAT.reading(RunPaths(folder).sweep) as content:
        return Sweep.model_validate(content)


def read_sweep_file(
    path: Path, overrides: tuple[str, ...]
) -> tuple[list[Settings], Callable[[Settings], RunConfig]]:
    """Read a sweep's file: the settings of each cell, and what makes a config of them."""
    sweep = validated(SweepFile, read_yaml(path), source=str(path))
    file = path
    if isinstance(sweep.base, str) and not (file := path.parent / sweep.base).is_file():
        file = shipped_file("config", sweep.base)
    base = read_yaml(file) if isinstance(sweep.base, str) else sweep.base

    def config(settings: Settings) -> RunConfig:
        # JSON is YAML.
        changes = [f"{key}={json.dumps(settings[key], ensure_ascii=False)}" for key in settings]
        changed = copy.deepcopy(base)
        return with_overrides(changed, [*overrides, *changes], file, file.resolve().parent)

    crossed = [dict(zip(sweep.vary, one, strict=True)) for one in product(*sweep.vary.values())]
    cells = [dict(flat_settings({**a, **b})) for a, b in product(sweep.cells, crossed)]
    if any("seed" in settings for settings in cells):
        raise UsageError(
            f"{path}: seed: all cells have the base's, so that the same noise is compared; vary "
            "something else"
        )
    return cells, config


def cell_name(settings: Mapping[str, Any]) -> str:
    """Return a name for a cell that is safe in folders, shells and names of jobs.

    >>> cell_name({"model.name": "stabilityai/sdxl-turbo", "prompt": "a photo of {a_lemma}"})
    'model=sdxl-turbo,prompt=a-photo-of-a_lemma'
    """
    parts = []
    for setting, value in settings.items():
        section, _, key = setting.rpartition(".")
        text = value if isinstance(value, str) else json.dumps(value)
        if key == "name":
            # Of a hub's name or a path the last part.
            key, text = section.rpartition(".")[2], text.rpartition("/")[2]
        word = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-._")
        parts.append(f"{key}={word[:LONGEST_VALUE].strip('-._')}")
    name = re.sub(r"[^A-Za-z0-9_.=,-]+", "-", ",".join(parts))[:LONGEST_NAME]
    return name.strip("-._,=") or "base"

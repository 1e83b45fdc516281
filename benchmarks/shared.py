"""Parts of several benchmarks: made-up plans and records, and rows of figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PYTHON = sys.executable
# The kernel's own mark of this process alone; what wait4 tells counts its parent's too.
PEAK = """
import atexit, sys
from pathlib import Path
from sdwn.cli.main import main
status = Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().partition("VmHWM:")[2].split()[0]))
main(sys.argv[1:])
"""

IMAGES_PER_SYNSET = 10
GLOSSES = (
    "a building with glass walls and roof; for the cultivation of plants",
    "a member of the genus Canis that has been domesticated by man since prehistoric times",
    "small leaping insect that sucks the juices of plants",
)


def output_of(*command: object) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    return done.stdout


def script(file: str, *arguments: object) -> dict[str, float]:
    """Run one of a neighbour's in a process of its own, and read what it prints."""
    told = output_of(PYTHON, Path(__file__).with_name(file), *arguments)
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def peak_mb(*arguments: object) -> float:
    """Run the command line in a process of its own, and return its peak in MB."""
    return int(output_of(PYTHON, "-c", PEAK, *arguments).split()[-1]) / 1000


def machine_text(packages: Iterable[str], *more: str) -> str:
    """Describe this machine, and how busy it is without us."""
    today, cores = datetime.datetime.now(datetime.UTC).date(), len(os.sched_getaffinity(0))
    versions = (f"{name} {version(name)}" for name in packages)
    software = ", ".join((*more, f"Python {platform.python_version()}", *versions))
    return f"{today}, {cores} CPU cores, load {os.getloadavg()[0]:.1f} before; {software}"


def plan_made_up(
    folder: Path,
    images: int,
    model: str = "builtin:noise",
    shard: int | None = None,
    **sections: Any,
) -> Any:
    """Plan synsets that no WordNet has, with definitions as long as WordNet's.

    Args:
        folder: The run's folder.
        images: Images in all.
        model: The model's name.
        shard: Images a shard; all of them by default.
        sections: Other sections of the config.

    Returns:
        The run's paths and its plan.
    """
    from sdwn.config import RunConfig
    from sdwn.paths import RunPaths
    from sdwn.planning.plan import make_plan, write_plan
    from sdwn.wordnet.corpus import Synset

    config = RunConfig.model_validate(
        {
            "catalog": {"name": "closure"},
            "model": {"name": model},
            "storage": {"images_per_shard": shard or images},
            "images_per_synset": IMAGES_PER_SYNSET,
            **sections,
        }
    )
    synsets = tuple(
        Synset(f"n{i:08d}", f"thing.n.{i:05d}", ("thing",), f"{GLOSSES[i % 3]} {i}")
        for i in range(images // IMAGES_PER_SYNSET)
    )
    paths, plan = RunPaths(folder), make_plan(config, synsets)
    write_plan(plan, paths)
    paths.shards.mkdir()
    return paths, plan


def write_shard(
    paths: Any,
    plan: Any,
    shard: Any,
    payloads: list[bytes],
    digests: list[bytes],
    statuses: list[str] | None = None,
    **changes: Any,
) -> None:
    """Write a finished shard whose images are the given bytes; ``changes`` go into each record."""
    from sdwn.generation.task import shard_attributes
    from sdwn.storage.columns import to_columns
    from sdwn.storage.shards import write_images

    rows = [
        {
            "id": spec.concept.id,
            "wnid": spec.concept.wnid or "",
            "synset": spec.concept.synset or "",
            "number": spec.number,
            "seed": spec.seed,
            "prompt": spec.prompt,
            "prompt_number": spec.prompt_number,
            "negative_prompt": spec.negative_prompt or "",
            "tokens": 9,
            "truncated": False,
            "status": status,
            "batch": spec.index // 10 * 10,
            "batch_size": 10,
            "place": spec.index % 10,
            "vae_slicing": False,
            "retried_fp32": False,
            "attempt": 1,
            "task_run": 0,
            "width": 512,
            "height": 512,
            "codec": "raw",
            "sha256": digest,
            **changes,
        }
        for spec, digest, status in zip(
            plan.specs(shard), digests, statuses or ["ok"] * len(digests), strict=True
        )
    ]
    attributes, sizes = shard_attributes(plan, shard, "shard"), [len(one) for one in payloads]
    run: dict[str, Any] = {}
    contents = to_columns(rows), sizes, [run]
    write_images(paths.shard(shard.index), attributes, contents, payloads)


class Row(NamedTuple):
    """A figure, and what it had to be."""

    what: str
    measured: str
    expected: str = ""
    fits: bool = True


def exactly(what: str, measured: object, expected: object) -> Row:
    """Return the row of a figure that must have one value; integers with separators."""
    found, wanted = (f"{x:,}" if isinstance(x, int) else str(x) for x in (measured, expected))
    return Row(what, found, wanted, fits=measured == expected)


def print_rows(rows: list[Row], title: str, caption: str | None = None) -> list[str]:
    """Print rows as a table, and return the names of those that do not fit."""
    table = Table("what", "measured", "expected", title=title, caption=caption)
    for row in rows:
        table.add_row(*map(escape, row[:3]), style=None if row.fits else "bold red")
    Console().print(table)
    return [row.what for row in rows if not row.fits]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

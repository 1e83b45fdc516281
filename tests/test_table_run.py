"""A table of prompts from its rows to a data set: what docs/concepts.md promises, on 1,000 rows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from sdwn.evaluation.verify import verify
from sdwn.generation.task import generate
from sdwn.models.builtin import builtin_folder
from sdwn.paths import RunPaths
from sdwn.planning.plan import read_plan
from sdwn.releases.release import Release

from conftest import Sdwn

ROWS = 1000
SIZE = {"height": 16, "width": 16, "num_inference_steps": 1}


def rows() -> list[dict[str, Any]]:
    """Rows with columns of the user's, some without seed or label, two of one prompt."""
    found = []
    for number in range(ROWS):
        row: dict[str, Any] = {"id": f"r{number:04d}", "prompt": f"thing {number % (ROWS - 1)}"}
        row |= {"source": ["llama", "mine"][number % 2], "score": number / 8, "tags": ["a", "b"]}
        if number % 3:
            row |= {"seed": number, "label": "zebra" if number % 2 else f"label {number}"}
        found.append(row)
    return found


@pytest.mark.long
@pytest.mark.model
def test_a_thousand_rows_become_a_data_set_of_what_diffusers_makes(sdwn: Sdwn) -> None:
    import torch
    from datasets import load_dataset
    from diffusers import StableDiffusionPipeline

    given = rows()
    lines = "".join(json.dumps(row) + "\n" for row in given)
    (sdwn.folder / "prompts.jsonl").write_text(lines)
    config = {
        "catalog": {"table": "prompts.jsonl"},
        "images_per_synset": 1,
        "model": {"name": "builtin:tiny"},
        "generation": {**SIZE, "precision": "fp32", "batch_size": 1},
        "storage": {"codec": "png"},
    }
    (sdwn.folder / "mine.yaml").write_text(json.dumps(config))
    noise = ["--set", "model.name=builtin:noise", "--set", "generation.batch_size=null"]
    made = {}
    for name, changes in {
        "whole": ["--set", "storage.images_per_shard=300"],
        "noise": noise,
        "cut": [*noise, "--set", "storage.images_per_shard=77"],
    }.items():
        sdwn("plan", "mine.yaml", name, *changes)
        paths = RunPaths(sdwn.folder / name)
        generate(paths.root, range(len(read_plan(paths).shards)))
        sdwn("merge", name, "--release", f"{name}-release")
        made[name] = Release(sdwn.folder / f"{name}-release")
        assert verify(made[name].paths.root) == []
    columns = ["id", "seed", "sha256"]
    tables = [made[name].metadata.select(columns) for name in ("noise", "cut")]
    assert tables[0].equals(tables[1]), "another shard size, the same noise"

    sdwn("export", "whole-release", "tables", "--format", "parquet")
    data = load_dataset(str(sdwn.folder / "tables"), cache_dir=str(sdwn.folder / "cache"))["train"]
    plain = StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"))
    assert len(data) == ROWS
    for row, image in zip(given, data, strict=True):
        assert {name: image[name] for name in ("id", "prompt", "source", "score", "tags")} == {
            name: row[name] for name in ("id", "prompt", "source", "score", "tags")
        }
        assert image["seed"] == row.get("seed", image["seed"])
        generator = torch.Generator().manual_seed(image["seed"])
        latents = torch.randn((1, 4, 4, 4), generator=generator)
        expected = plain(row["prompt"], latents=latents, **SIZE).images[0]
        np.testing.assert_array_equal(np.asarray(image["image"]), np.asarray(expected))
    assert {image["wnid"] for image in data} == {None, "n02391049"}
    assert len({hashlib.sha256(str(image["seed"]).encode()).digest() for image in data}) == ROWS

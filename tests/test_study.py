"""The study of the guide, as its reader runs it."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from conftest import REPOSITORY, Sdwn


@pytest.mark.model
@pytest.mark.long
def test_the_guides_study_finds_the_model_that_teaches(sdwn: Sdwn, tmp_path: Path) -> None:
    guide = (REPOSITORY / "docs/study.md").read_text()
    block = re.findall(r"```sh\n(.+?)```", guide, re.DOTALL)[0]
    for line in block.splitlines():
        sdwn(*shlex.split(line, comments=True)[1:])
    with (tmp_path / "STUDY/comparison/cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 8
    accuracy = {cell["cell"]: float(cell["transfer_accuracy"]) for cell in cells}
    assert max(accuracy, key=lambda name: accuracy[name]) == cells[0]["cell"]
    learnt = [name for name in accuracy if "miniature,prompt=definition" in name]
    others = max(value for name, value in accuracy.items() if name not in learnt)
    assert min(accuracy[name] for name in learnt) > 2 * others
    assert (tmp_path / "STUDY/comparison/figures.tex").exists()

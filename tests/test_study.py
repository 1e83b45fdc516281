"""The study of the guide, as its reader runs it."""

from __future__ import annotations

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
    *lines, last = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    for words in lines:
        sdwn(*words)
    found = sdwn.json(*last)
    cells = found["cells"]
    assert len(cells) == 8
    assert "builtin-miniature" in cells[0]["name"]
    accuracy = {cell["name"]: cell["transfer_accuracy"] for cell in cells}
    learnt = [name for name in accuracy if "miniature,prompt=definition" in name]
    others = max(value for name, value in accuracy.items() if name not in learnt)
    assert min(accuracy[name] for name in learnt) > 2 * others
    assert (tmp_path / "STUDY/comparison/figures.tex").exists()

"""The table of the miniature's classes: what each is drawn from, and where it lies."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdwn.wordnet.corpus import open_wordnet

TABLE = Path(__file__).resolve().parents[2] / "sdwn" / "miniature" / "classes.csv"


@dataclass(frozen=True, slots=True)
class Subject:
    """A class: its synset, the names of its pictures, and the settings that they are put in."""

    wnid: str
    synset: str
    pictures: tuple[str, ...]
    settings: tuple[str, ...]


def read_table(path: Path = TABLE) -> tuple[Subject, ...]:
    """Read the table of classes."""
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            Subject(
                row["wnid"],
                row["synset"],
                tuple(row["pictures"].split()),
                tuple(row["settings"].split()),
            )
            for row in csv.DictReader(file)
        )


def glosses(subjects: Sequence[Subject]) -> list[str]:
    """Look the definitions up in WordNet, which are the prompts."""
    wordnet = open_wordnet()
    return [wordnet.synset(subject.wnid).definition for subject in subjects]

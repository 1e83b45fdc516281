"""Make the miniature: ``python -m training FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.make import FULL, SHORT, make


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("folder", type=Path, help="for checkpoints, and the pipeline")
    parser.add_argument("--packages", type=Path, help="for pictograms; by default in FOLDER")
    parser.add_argument("--short", action="store_true", help="a few steps on a few classes")
    given = parser.parse_args()
    packages = given.packages or given.folder / "packages"
    make(SHORT if given.short else FULL, given.folder, packages)


if __name__ == "__main__":
    main()

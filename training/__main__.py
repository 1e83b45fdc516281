"""Make the miniature: ``python -m training FOLDER``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.assemble import GUIDANCE
from training.make import FULL, SHORT, chosen, make
from training.measure import measure


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("folder", type=Path, help="for checkpoints, and the pipeline")
    parser.add_argument("--packages", type=Path, help="for pictograms; by default in FOLDER")
    parser.add_argument("--short", action="store_true", help="a few steps on a few classes")
    parser.add_argument("--judged", type=int, default=10, help="images of each class to judge")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of the judged images")
    given = parser.parse_args()
    packages = given.packages or given.folder / "packages"
    recipe = SHORT if given.short else FULL
    make(recipe, given.folder, packages)
    share = measure(chosen(recipe), given.folder, packages, given.judged, given.guidance)
    sys.stdout.write(f"{share:.1%} of the drawn pictures are recognised\n")


if __name__ == "__main__":
    main()

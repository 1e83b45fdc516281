"""Make the miniature: ``python -m tools.miniature FOLDER``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdwn.errors import SdwnError
from sdwn.prediction.pretrained import load_classifier

from tools.miniature.make import FULL, SHORT, chosen, make
from tools.miniature.measure import GUIDANCE, JUDGE, measure
from tools.miniature.pictures import Pictures


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m tools.miniature", description=__doc__)
    parser.add_argument("folder", type=Path, help="for checkpoints, and the pipeline")
    parser.add_argument("--packages", type=Path, help="for pictograms; by default in FOLDER")
    parser.add_argument("--short", action="store_true", help="a few steps on a few classes")
    parser.add_argument("--judged", type=int, default=10, help="images of each class to judge")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="of the judged images")
    given = parser.parse_args()
    packages = given.packages or given.folder / "packages"
    recipe = SHORT if given.short else FULL
    if given.judged < 1:
        parser.error(f"--judged: expected 1 or more, found {given.judged}")
    try:
        judge = load_classifier(JUDGE)
        pictures = Pictures(chosen(recipe), packages)
        make(recipe, pictures, given.folder)
        share = measure(judge, pictures, given.folder, given.judged, given.guidance)
    except SdwnError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{share:.1%} of the drawn pictures are recognised\n")


if __name__ == "__main__":
    main()

"""The pictures of the README, drawn by Chromium from a release of `make demo`.

::

    python -m tools.screenshots demo/release
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).resolve().parent.parent / "docs/pictures"
WIDTH, HEIGHT = 1300, 760


def take(address: str, name: str) -> None:
    """Write a page's first screen as a small PNG."""
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full.png"
        subprocess.run(
            [
                *("chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars"),
                *(f"--screenshot={full}", f"--window-size={WIDTH},{HEIGHT}"),
                *("--virtual-time-budget=5000", address),
            ],
            check=True,
            capture_output=True,
        )
        with Image.open(full) as image:
            PICTURES.mkdir(parents=True, exist_ok=True)
            # 256 colours are enough for drawings, and a third of the bytes.
            small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            small.save(PICTURES / name, optimize=True)


def main(release: Path) -> None:
    """Save pictures of the browser's first page and of the report's."""
    (report,) = release.glob("evaluations/*/report.html")
    take(report.resolve().as_uri(), "report.png")
    browse = [sys.executable, "-m", "sdwn", "browse", str(release), "--json"]
    with subprocess.Popen(browse, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = next(
                word for word in server.stdout.readline().split('"') if word.startswith("http")
            )
            take(address, "browser.png")
        finally:
            server.terminate()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

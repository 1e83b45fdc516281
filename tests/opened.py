"""A page that is open in a real browser, and what it complains of or asks for meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@dataclass
class Opened:
    """A page, and all that it complained of or asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def overflow(self) -> int:
        """The number of pixels by which it is wider than its window."""
        root = "document.documentElement"
        return int(self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))


def opened(browser: Any, place: Path | str, ready: str, **options: Any) -> Opened:
    """Open a page from disk or a server, and wait for an element that shows that it is ready."""
    found = Opened(browser.new_page(**{"viewport": WIDE, **options}))
    found.page.on("console", lambda said: found.complaints.append(f"{said.type}: {said.text}"))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on("request", lambda asked: found.requests.append(asked.url))
    found.page.goto(place.as_uri() if isinstance(place, Path) else place)
    found.page.wait_for_selector(ready, state="attached")
    return found

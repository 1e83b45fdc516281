"""A layout of files: what it is cut into, and how one such unit is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdwn.exchange.gallery import Gallery, Span
from sdwn.releases.writer import cut


@dataclass(frozen=True, slots=True)
class Layout:
    """How the units of an export are cut, named and written.

    A unit is finished as a whole. ``write`` is given the export's folder, the unit's name and
    which synsets go into it, and leaves everything on disk. ``unit`` is a number of synsets,
    or of bytes where each unit is a file. ``check`` refuses what the layout cannot hold.
    """

    name: Callable[[int, int], str]
    write: Callable[[Path, str, Gallery, Span], None]
    unit: int
    in_bytes: bool = True
    data_files: str | None = None
    check: Callable[[Gallery], None] = lambda _: None

    def spans(self, gallery: Gallery, part_bytes: int | None) -> list[Span]:
        """Cut the synsets into units."""
        if self.in_bytes:
            return cut(gallery.sizes(), part_bytes or self.unit)
        return cut([1] * len(gallery), self.unit)

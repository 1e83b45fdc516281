"""What a page shows, as its address says it: a search, filters, an order, a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlencode

from sdwn.errors import UsageError

SHOWS = ("all", "right", "wrong", "black", "ok", "unjudged")
ORDERS = ("best", "name", "rate", "-rate", "images", "shuffled")
# Longer texts are cut: nobody searches for more.
LONGEST = 200
_SWITCH = {"": False, "0": False, "1": True}


class BadViewError(UsageError):
    """An address that asks for something that there is not."""


@dataclass(frozen=True, slots=True)
class View:
    """What to show of a release.

    ``q`` is searched for. ``show`` takes images that are right, wrong, black, ok (not black), or
    unjudged: of them nobody knows whether they are right. ``group`` is a group of the
    evaluation's, ``imagenet`` takes synsets that are ImageNet-1k classes, ``below`` a synset and
    everything below it, ``seen`` images that were taken for a class. ``order`` is by relevance,
    by name, by the share of right images (lowest first, or highest with ``-rate``), by the number
    of images, most first, or shuffled, each time alike.
    """

    q: str = ""
    show: str = "all"
    group: str | None = None
    imagenet: bool = False
    below: str | None = None
    seen: str | None = None
    order: str = "best"
    page: int = 1

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> View:
        """Read a view from an address's parameters; others, and empty ones, are passed over.

        Raises:
            BadViewError: a value is none of those that are possible.

        >>> View.parse({"q": "zebra", "show": "wrong", "page": "2", "group": ""})
        View(q='zebra', show='wrong', group=None, imagenet=False, below=None, seen=None, \
order='best', page=2)
        """
        given = {name: params[name] for name in _PARSERS if params.get(name)}
        return cls(**{name: _PARSERS[name](name, value) for name, value in given.items()})

    def query(self, **changes: Any) -> str:
        """Write this view, with changes, as an address's parameters: what is no default.

        A change of anything but the page goes back to the first.

        >>> View(q="red fox", page=3).query(show="wrong")
        'q=red+fox&show=wrong'
        """
        return urlencode(replace(self, **{**({"page": 1} if changes else {}), **changes}).given)

    @property
    def given(self) -> dict[str, Any]:
        """The address's parameters: what is no default."""
        values = ((field.name, getattr(self, field.name), field.default) for field in _FIELDS)
        shown = [(name, value) for name, value, default in values if value != default]
        return {name: "1" if value is True else value for name, value in shown}

    @property
    def is_narrowed(self) -> bool:
        """Whether it takes images, not only synsets."""
        return self.show != "all" or self.seen is not None


def _text(_: str, value: str) -> str:
    # Half of a character, which a hand-made address may hold, cannot be written again.
    whole = value[:LONGEST].encode("utf-8", "ignore").decode("utf-8")
    return " ".join(whole.replace("\0", " ").split())


def _one_of(*valid: str) -> Any:
    def parse(name: str, value: str) -> str:
        if value not in valid:
            raise BadViewError(f"{name}={_shown(value)}: expected one of {', '.join(valid)}")
        return value

    return parse


def _wnid(name: str, value: str) -> str:
    if not re.fullmatch(r"n[0-9]{8}", value):
        raise BadViewError(f"{name}={_shown(value)}: expected a wnid such as n02084071")
    return value


def _switch(name: str, value: str) -> bool:
    if value not in _SWITCH:
        raise BadViewError(f"{name}={_shown(value)}: expected 1 or nothing")
    return _SWITCH[value]


def _page(name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < 1:
        raise BadViewError(f"{name}={_shown(value)}: expected the number of a page, from 1")
    return int(value)


def _shown(value: str) -> str:
    return repr(value if len(value) <= 40 else f"{value[:40]}…")


_PARSERS: dict[str, Any] = {
    "q": _text,
    "show": _one_of(*SHOWS),
    "group": _text,
    "imagenet": _switch,
    "below": _wnid,
    "seen": _wnid,
    "order": _one_of(*ORDERS),
    "page": _page,
}
_FIELDS = fields(View)

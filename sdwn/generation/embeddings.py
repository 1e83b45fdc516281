"""Encoded prompts between a task's two phases: in memory, and what has no room there on disk."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from sdwn.generation.encoder import Encoded

log = logging.getLogger(__name__)

# A prompt and its negative prompt, if any.
Pair = tuple[str, str | None]
# A thousand captions of FLUX.1, at 4 MB each.
MOST_BYTES = 4_000_000_000


class Embeddings:
    """Encoded pairs of a prompt and a negative prompt.

    Up to ``most_bytes`` stay in memory; the others go to a file without a name in the node's
    temporary folder, which the system removes with the process. A prompt and a negative one that
    stand in several pairs are kept once.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._room, self.full = most_bytes, False
        self._pairs: dict[Pair, Encoded] = {}  # without the embeddings
        # By whether it is negative, and the text: the embeddings, or where they begin in the file.
        self._halves: dict[tuple[bool, str | None], dict[str, Any] | int] = {}
        self._file: IO[bytes] | None = None

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __contains__(self, pair: Pair) -> bool:
        return pair in self._pairs

    def __getitem__(self, pair: Pair) -> Encoded:
        arguments: dict[str, Any] = {}
        for negative in (False, True):
            half = self._halves[negative, pair[negative]]
            if isinstance(half, int):
                assert self._file is not None
                self._file.seek(half)
                half = pickle.load(self._file)
            arguments |= half
        return replace(self._pairs[pair], arguments=arguments)

    def add(self, pair: Pair, encoded: Encoded) -> bool:
        """Keep a pair; return False where neither memory nor disk has room for it."""
        for negative in (False, True):
            named = encoded.arguments.items()
            half = {name: value for name, value in named if name.startswith("negative") == negative}
            if (negative, pair[negative]) not in self._halves:
                # A copy: a slice would keep all that it was cut from.
                half = tree_map(
                    lambda one: one.cpu().clone() if torch.is_tensor(one) else one, half
                )
                try:
                    self._halves[negative, pair[negative]] = self._put(half)
                except OSError as error:
                    log.warning("the disk takes no more encoded prompts: %s", error)
                    self.full = True
                    return False
        self._pairs[pair] = replace(encoded, arguments={})
        return True

    def _put(self, half: dict[str, Any]) -> dict[str, Any] | int:
        size = sum(one.nbytes for one in tree_leaves(half) if torch.is_tensor(one))
        if size <= self._room:
            self._room -= size
            return half
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
        start, content = self._file.seek(0, 2), pickle.dumps(half)
        # Not through its buffer, which would keep what the disk refuses and fail at every read.
        if os.pwrite(self._file.fileno(), content, start) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return start

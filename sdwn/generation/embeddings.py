"""Encoded prompts between a task's two phases, in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from sdwn.generation.encoder import Encoded

# A prompt and its negative prompt, if any.
Pair = tuple[str, str | None]
# A thousand captions of FLUX.1, at 4 MB each.
MOST_BYTES = 4_000_000_000


class Embeddings(dict[Pair, Encoded]):
    """A block of encoded pairs of a prompt and a negative prompt: about ``most_bytes``.

    A prompt and a negative one that stand in several pairs are kept once.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        super().__init__()
        self._room = most_bytes
        # By whether it is negative, and the text.
        self._halves: dict[tuple[bool, str | None], dict[str, Any]] = {}

    @property
    def full(self) -> bool:
        """True if the next pair belongs into another block."""
        return self._room <= 0

    def add(self, pair: Pair, encoded: Encoded) -> None:
        """Keep a pair."""
        arguments: dict[str, Any] = {}
        for negative in (False, True):
            if (key := (negative, pair[negative])) not in self._halves:
                named = encoded.arguments.items()
                half = {k: value for k, value in named if k.startswith("negative") == negative}
                # A copy: a slice would keep all that it was cut from.
                self._halves[key] = half = tree_map(
                    lambda one: one.cpu().clone() if torch.is_tensor(one) else one, half
                )
                self._room -= sum(one.nbytes for one in tree_leaves(half) if torch.is_tensor(one))
            arguments |= self._halves[key]
        self[pair] = replace(encoded, arguments=arguments)

"""Memory that a batch takes beside the weights, found by running its networks without any data.

The pipeline runs once with a denoiser that only notes what it is given. The denoiser and the VAE
then run on copies of no content (torch's device ``meta``), while their live tensors are counted.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sdwn.models.families import denoiser

log = logging.getLogger(__name__)


class _Decoded(Exception):  # noqa: N818
    """Ends a pipeline's call where it would decode."""


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, as long as they live."""

    def __init__(self, weights: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._seen = {id(one.untyped_storage()) for one in weights.state_dict().values()}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in filter(torch.is_tensor, tree_leaves(made)):
            storage = one.untyped_storage()
            if id(storage) not in self._seen:  # else it is a view
                self._seen.add(id(storage))
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return made

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


class _FusedAttention(TorchFunctionMode):
    """Makes attention's result alone, as fused kernels do: no matrix of all pairs of tokens."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = named["query"], named["value"]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def run_empty(part: Any, method: str, args: Any, kwargs: Any) -> tuple[Any, int]:
    """Run a network's method on a copy without content; return what it makes, and its peak."""
    args, kwargs = tree_map(
        lambda one: one.to("meta") if torch.is_tensor(one) else one, (args, kwargs)
    )
    with torch.device("meta"):
        copy = type(part).from_config(part.config)
    copy.to("meta", next(part.parameters()).dtype).eval()
    with _LiveBytes(copy) as live, _FusedAttention():
        made = getattr(copy, method)(*args, **kwargs)
    return made, live.peak


def activation_bytes(pipeline: Any, call: Callable[[], Any]) -> tuple[int, int]:
    """Return the most bytes of live tensors while the denoiser runs, and while the VAE does."""
    network, peaks, made = denoiser(pipeline), [0, 0], list[Any]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Every step takes as much as the first.
        if not made:
            first = next(one for one in tree_leaves((args, kwargs)) if torch.is_tensor(one))
            try:
                empty, peaks[0] = run_empty(network, "forward", args, kwargs)
            except RuntimeError as error:
                # It looks at numbers, as of a mask. Decoding takes more nearly always.
                log.info("memory of %s is not counted: %s", type(network).__name__, error)
                empty = (first,)
            made.append(tree_map(partial(torch.zeros_like, device=first.device), empty))
        return made[0]

    def decode(*args: Any, **kwargs: Any) -> Any:
        peaks[1] = run_empty(pipeline.vae, "decode", args, kwargs)[1]
        raise _Decoded

    with (
        patch.object(network, "forward", forward),
        patch.object(pipeline.vae, "decode", decode),
        suppress(_Decoded),
    ):
        call()
    return peaks[0], peaks[1]

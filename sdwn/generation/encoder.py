"""Prompts, each encoded once for a family of pipelines, and kept in memory between two phases."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from sdwn.config import GenerationConfig
from sdwn.errors import UsageError, first_line
from sdwn.models.families import PipelineInfo, call_options, text_readers

# A prompt and its negative prompt, if any.
Pair = tuple[str, str | None]
# A thousand captions of FLUX.1, at 4 MB each.
MOST_BYTES = 4_000_000_000
# Most runs have a single negative prompt.
_KEPT_NEGATIVES = 64
_GUIDED = "do_classifier_free_guidance"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its negative one, as a pipeline's call takes them."""

    arguments: dict[str, Any]  # embeddings, a batch of one, or texts
    tokens: int  # of the whole prompt, start and end included; 0 where nothing counts them
    truncated: bool  # the encoder that reads most of it took fewer
    cut: tuple[str, ...] = ()  # every text encoder that took fewer


@contextmanager
def refusals_named(pipeline: Any, generation: GenerationConfig) -> Iterator[None]:
    """Raise a UsageError that names the options where a pipeline does not take a value."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}: {value!r:.60}" for name, value in generation.options.items())
        raise UsageError(
            f"{type(pipeline).__name__} fails"
            + f" with generation.options {given}" * bool(given)
            + f": {first_line(error)}"
        ) from error


class PromptEncoder:
    """Encodes prompts, each once and alone: its embedding depends on no other of the batch.

    Only the text encoders of the pipeline are needed, and sampling needs none of them, unless
    the pipeline is of no known family.
    """

    def __init__(self, pipeline: Any, generation: GenerationConfig, info: PipelineInfo) -> None:
        self._pipeline, self._family, self._generation = pipeline, info.family, generation
        self._guided = info.guided(generation)
        self._readers = text_readers(info.family, pipeline.components, generation)
        self._negatives: dict[str | None, dict[str, Any]] = {}
        self._shared: dict[str, Any] = {}
        if info.family.embeddings:
            # All that the call would give it, by the call's own defaults.
            call = inspect.signature(pipeline.__call__).parameters
            taken = inspect.signature(pipeline.encode_prompt).parameters
            options = call_options(generation)
            self._shared = {
                name: options.get(name, call[name].default) for name in taken if name in call
            }
            self._takes_negative = _GUIDED in taken
        encoder: Any = getattr(pipeline, "text_encoder", None)
        if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model"):
            # Where diffusers looks for it with clip_skip; transformers 5 has no such level.
            encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)

    def encode(self, prompt: str, negative: str | None = None) -> Encoded:
        """Encode a prompt and its negative prompt."""
        counts = [(reader, reader.tokens([prompt])[0]) for reader in self._readers]
        cut = tuple(reader.name for reader, tokens in counts if tokens > reader.limit)
        tokens, truncated = 0, False
        if counts:
            tokens, truncated = counts[0][1], counts[0][0].name in cut
        return Encoded(self._arguments(prompt, negative), tokens, truncated, cut)

    def _arguments(self, prompt: str, negative: str | None) -> dict[str, Any]:
        if not self._family.embeddings:
            texts = {"prompt": prompt, "negative_prompt": negative}
            return {name: text for name, text in texts.items() if text is not None}
        if not self._guided:
            return self._embeddings(prompt)
        if negative in self._negatives:
            return self._embeddings(prompt) | self._negatives[negative]
        if len(self._negatives) >= _KEPT_NEGATIVES:
            self._negatives.clear()
        if self._takes_negative:
            given = {} if negative is None else {"negative_prompt": negative}
            both = self._embeddings(prompt, **{_GUIDED: True, **given})
            kept = {name: value for name, value in both.items() if name.startswith("negative")}
        else:
            both = self._embeddings(prompt)
            kept = {f"negative_{k}": v for k, v in self._embeddings(negative or "").items()}
        self._negatives[negative] = kept
        return both | kept

    @torch.no_grad()
    def _embeddings(self, prompt: str, **options: Any) -> dict[str, Any]:
        """Encode one prompt; the embeddings by the names that the call has for them."""
        unguided = {_GUIDED: False} if self._takes_negative else {}
        device = self._pipeline._execution_device
        given = {**self._shared, **unguided, **options, "prompt": prompt, "device": device}
        with refusals_named(self._pipeline, self._generation):
            made = self._pipeline.encode_prompt(**given)
        named = zip(self._family.embeddings, made, strict=True)
        return {name: value for name, value in named if name is not None and value is not None}


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


def equal_lengths(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Group prompts, by their positions, so that the embeddings of a group fit into one tensor.

    Padded ones would need a mask, and change the positions that some networks give to pixels.
    """
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(encoded):
        values = one.arguments.values()
        shapes = tuple(value.shape for value in values if torch.is_tensor(value))
        groups.setdefault(shapes, []).append(i)
    return list(groups.values())


def join_encoded(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """Join prompts of equal lengths to the arguments of a pipeline's call."""
    joined: dict[str, Any] = {}
    for name, first in encoded[0].arguments.items():
        every = [one.arguments[name] for one in encoded]
        if torch.is_tensor(first):
            joined[name] = torch.cat(every)
        else:
            joined[name] = list(chain(*every)) if isinstance(first, list) else every
    return joined

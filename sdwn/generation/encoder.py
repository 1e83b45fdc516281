"""Encoding prompts, each once, for a family of pipelines."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sdwn.config import GenerationConfig
from sdwn.models.families import FAMILIES, FROM_TEXTS

# A batch holds few different prompts; a shard's come one synset after another.
_KEPT_PROMPTS = 64


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as a pipeline's call takes it."""

    arguments: dict[str, Any]  # its embeddings, a batch of one, or its text
    tokens: int  # of the whole prompt, start and end included
    truncated: bool  # the encoder that reads most of it took fewer


class PromptEncoder:
    """Encodes prompts, each once and alone: its embedding depends on no other of the batch.

    The negative one is encoded with the first. Once a prompt is encoded, sampling needs no text
    encoder, unless the pipeline is of no known family.
    """

    def __init__(self, pipeline: Any, generation: GenerationConfig) -> None:
        self.family = FAMILIES.get(type(pipeline).__name__, FROM_TEXTS)
        self._pipeline = pipeline
        self._negative_prompt = generation.negative_prompt
        self._guided = generation.guidance_scale > 1
        self._negatives: dict[str, torch.Tensor] = {}
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    def encode(self, prompts: Iterable[str]) -> list[Encoded]:
        """Return prompts encoded, in their order; recent ones are kept."""
        found = []
        for prompt in prompts:
            if prompt not in self._kept:
                self._kept[prompt] = self._encode(prompt)
            found.append(self._kept[prompt])
        while len(self._kept) > _KEPT_PROMPTS:
            self._kept.popitem(last=False)
        return found

    @torch.no_grad()
    def _encode(self, prompt: str) -> Encoded:
        family, negative = self.family, self._negative_prompt
        tokenizers = {name: getattr(self._pipeline, name) for name in family.encoders}
        tokenizer, limit = family.longest_reader(tokenizers)
        tokens = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if not family.embeddings:
            texts = {"prompt": prompt, "negative_prompt": negative}
            given = {name: text for name, text in texts.items() if text is not None}
            return Encoded(given, tokens, tokens > limit)
        first = self._guided and not self._negatives
        embeddings = self._pipeline.encode_prompt(
            prompt=prompt,
            device=self._pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=first,
            negative_prompt=family.empty_negative if negative is None else negative,
            **family.encode_options,
        )
        named = dict(zip(family.embeddings, embeddings, strict=True))
        if first:
            self._negatives = {k: v for k, v in named.items() if k.startswith("negative")}
        positives = {k: v for k, v in named.items() if not k.startswith("negative")}
        return Encoded(positives | self._negatives, tokens, tokens > limit)

"""Prompts as a pipeline's embeddings: each text encoded once, the negative one once a task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from sdwn.config import GenerationConfig
from sdwn.models.pipelines import FAMILIES

# A batch holds few different prompts; a shard's come one synset after another.
_KEPT = 64


class PromptEncoder:
    """Turns prompts into the arguments of a pipeline's call.

    A prompt is encoded alone, so that its embedding depends on no other prompt of the batch.
    Pipelines of other families encode the texts themselves, in every call.
    """

    def __init__(self, pipeline: Any, generation: GenerationConfig) -> None:
        self._pipeline = pipeline
        self._negative_prompt = generation.negative_prompt
        self._guidance = generation.guidance_scale > 1
        self._family = FAMILIES.get(type(pipeline).__name__)
        self._negatives: dict[str, torch.Tensor] = {}
        self._positives: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._counts: dict[str, int] = {}

    @property
    def known(self) -> bool:
        """Whether this family takes embeddings, and latents of the plain shape."""
        return self._family is not None

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Give the pipeline's arguments for a batch of prompts."""
        if self._family is None:
            return self._texts(prompts)
        encoded = [self._encoded(prompt) for prompt in prompts]
        batch = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
        for name, negative in self._negatives.items():
            batch[name] = negative.expand(len(prompts), *negative.shape[1:])
        return {**self._family.call_options, **batch}

    def tokens(self, prompt: str) -> int:
        """Count a prompt's tokens, start and end included."""
        if prompt not in self._counts:
            ids = self._pipeline.tokenizer(prompt, truncation=False, verbose=False).input_ids
            self._counts = {prompt: len(ids)}  # ten images of a synset ask one after another
        return self._counts[prompt]

    @property
    def token_limit(self) -> int:
        """How many of them the text encoder takes."""
        limit = self._family.token_limit if self._family else None
        return int(limit or self._pipeline.tokenizer.model_max_length)

    def _texts(self, prompts: Sequence[str]) -> dict[str, Any]:
        texts: dict[str, Any] = {"prompt": list(prompts)}
        if self._negative_prompt is not None:
            texts["negative_prompt"] = [self._negative_prompt] * len(prompts)
        return texts

    def _encoded(self, prompt: str) -> dict[str, torch.Tensor]:
        if prompt not in self._positives:
            self._positives[prompt] = self._encode(prompt)
            if len(self._positives) > _KEPT:
                self._positives.popitem(last=False)
        return self._positives[prompt]

    @torch.no_grad()
    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        assert self._family is not None
        first = self._guidance and not self._negatives
        negative = self._negative_prompt
        encoded = self._pipeline.encode_prompt(
            prompt=prompt,
            device=self._pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=first,
            negative_prompt=self._family.empty_negative if negative is None else negative,
            **self._family.encode_options,
        )
        named = dict(zip(self._family.returns, encoded, strict=True))
        if first:
            self._negatives = {k: v for k, v in named.items() if k.startswith("negative")}
        return {k: v for k, v in named.items() if not k.startswith("negative")}

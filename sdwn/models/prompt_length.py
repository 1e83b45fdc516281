"""Lengths of prompts in tokens, found where the weights are here, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdwn.config import RunConfig
from sdwn.models.pipelines import FAMILIES
from sdwn.models.weights import INDEX, components, find_folder

MOST = 10_000


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """How many of the prompts ``counted`` the text encoder cuts at its ``limit`` of tokens."""

    counted: int
    cut: int
    limit: int


def prompt_lengths(config: RunConfig, prompts: Sequence[str]) -> PromptLengths | None:
    """Count the tokens of at most 10,000 distinct prompts, spread evenly over all.

    Returns:
        None where the weights are not on this machine, or a model has no tokenizer.
    """
    folder = find_folder(config)
    if folder is None or (name := components(folder).get("tokenizer")) is None:
        return None
    import transformers  # a second; its tokenizers come without torch

    tokenizer: Any = getattr(transformers, name).from_pretrained(folder / "tokenizer")
    family = FAMILIES.get(json.loads((folder / INDEX).read_bytes())["_class_name"])
    limit = int((family and family.token_limit) or tokenizer.model_max_length)
    distinct = list(dict.fromkeys(prompts))
    chosen = distinct[:: -(-len(distinct) // MOST)]
    encoded = tokenizer(chosen, truncation=False, verbose=False).input_ids
    return PromptLengths(len(chosen), sum(len(ids) > limit for ids in encoded), limit)

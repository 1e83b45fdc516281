"""Lengths of prompts in tokens, found where the weights are here, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdwn.io import read_json
from sdwn.models.families import FAMILIES, FROM_TEXTS
from sdwn.models.weights import INDEX, components

MOST = 10_000


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """How many of the prompts ``counted`` the text encoder cuts at its ``limit`` of tokens."""

    counted: int
    cut: int
    limit: int

    def __str__(self) -> str:
        return f"{self.cut:,} of {self.counted:,} are longer than {self.limit} tokens"


def prompt_lengths(folder: Path | None, prompts: Iterable[str]) -> PromptLengths | None:
    """Count the tokens of at most 10,000 distinct prompts, spread evenly over all.

    Args:
        folder: a pipeline in diffusers format, None where its weights are not on this machine.
        prompts: also equal ones.

    Returns:
        None without a folder, or of a model without a tokenizer.
    """
    if folder is None or "tokenizer" not in (kinds := components(folder)):
        return None
    import transformers  # a second; its tokenizers come without torch

    family = FAMILIES.get(str(read_json(folder / INDEX).get("_class_name")), FROM_TEXTS)
    tokenizers = {
        name: getattr(transformers, kinds[name]).from_pretrained(folder / name)
        for name in family.encoders
    }
    tokenizer, limit = family.longest_reader(tokenizers)
    distinct = list(dict.fromkeys(prompts))
    chosen = distinct[:: -(-len(distinct) // MOST)]
    encoded = tokenizer(chosen, truncation=False, verbose=False).input_ids
    return PromptLengths(len(chosen), sum(len(ids) > limit for ids in encoded), limit)

"""The text encoder: a vocabulary of the glosses' own words, trained to tell the glosses apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from tools.miniature import parts
from tools.miniature.loop import Schedule, fit

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 1900


def tokenizer(glosses: Sequence[str], folder: Path) -> CLIPTokenizer:
    """Learn byte pairs from glosses, the way CLIP's were learnt, and write them to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    pairs.normalizer = normalizers.Lowercase()
    pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=symbols,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    pairs.train_from_iterator(glosses, trainer)
    learnt = json.loads(pairs.to_str())["model"]
    words = dict.fromkeys([*learnt["vocab"], *(f"{symbol}</w>" for symbol in symbols), START, END])
    numbered = {word: number for number, word in enumerate(words)}
    merges = "\n".join(" ".join(pair) for pair in learnt["merges"])
    (folder / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=parts.TOKENS)


# CLIP's own way to take words apart.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""


def token_numbers(words: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Turn texts into numbers, (n, 77), as Stable Diffusion's pipeline does."""
    numbers: torch.Tensor = words(
        list(texts), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return numbers


class Reader(nn.Module):
    """The text encoder under a classifier of glosses; what is after a text's end must tell it."""

    def __init__(self, words: CLIPTokenizer, glosses: int) -> None:
        super().__init__()
        self.encoder = parts.text_encoder(len(words), words.bos_token_id, words.eos_token_id)
        self.classes = nn.Linear(parts.TEXT_WIDTH, glosses)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the logits at every position, (n, 77, glosses)."""
        logits: torch.Tensor = self.classes(self.encoder(numbers).last_hidden_state)
        return logits


def fit_text(
    words: CLIPTokenizer, glosses: Sequence[str], schedule: Schedule, path: Path
) -> CLIPTextModel:
    """Train the text encoder until each gloss is known from all that follows its last word."""
    numbers = token_numbers(words, glosses)
    after = (numbers == words.eos_token_id).float()
    torch.manual_seed(0)
    reader = Reader(words, len(glosses))

    def loss(step: int) -> torch.Tensor:
        random = np.random.default_rng((3, step))
        chosen = torch.from_numpy(random.choice(len(glosses), min(64, len(glosses)), replace=False))
        logits = reader(_with_gaps(numbers[chosen], words, random))
        wrong = F.cross_entropy(
            logits.transpose(1, 2), chosen[:, None].expand(-1, parts.TOKENS), reduction="none"
        )
        share = after[chosen]
        mean: torch.Tensor = (wrong * share).sum() / share.sum()
        return mean

    reader.load_state_dict(fit(reader, loss, schedule, path))
    encoder: CLIPTextModel = reader.encoder.eval().requires_grad_(requires_grad=False)
    return encoder


def _with_gaps(
    numbers: torch.Tensor, words: CLIPTokenizer, random: np.random.Generator
) -> torch.Tensor:
    """Put other words in the place of some, so that no one word is all that tells a gloss."""
    others = torch.from_numpy(random.integers(0, words.bos_token_id, numbers.shape))
    kept = torch.from_numpy(random.random(numbers.shape) > 0.15)
    kept |= (numbers == words.eos_token_id) | (numbers == words.bos_token_id)
    return torch.where(kept, numbers, others)

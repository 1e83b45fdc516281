"""Prompts from templates, whose fields are filled with what WordNet says of a synset."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sdwn.errors import UsageError
from sdwn.wordnet.corpus import Synset, find_synset

# Vowels by sound: an hour (but a houri), letters that are spelled out: an X-ray, an LP, an mRNA.
# Of capitals that could be a word (RAM), it is one.
_AN = re.compile(
    r"(?i:[aeiou]|heir|honest|honou?r|hour(?!i)|[fhlmnrsx](?![a-z']))"
    r"|[FHLMNRSXfhlmnrsx](?=[B-DF-HJ-NP-TV-Z])"
)
# But consonants by sound: a eucalyptus, a one-way street, a Ouija, a unicorn (an unillustrated), a
# uakari, a Ukrainian, a user (an usher), a U-boat, a UFO.
_A = re.compile(
    r"(?i:e[uw]|on(?:e(?![a-z])|ce)|oui|u(?:[aeio]|ni(?!dent|ll|mp|n)|kr|[bcfghjkqrstv][aeiou])"
    r"|u(?![a-z]))|U[A-Z]"
)


def with_article(noun: str) -> str:
    """Return a noun with its article, a or an.

    >>> [with_article(noun) for noun in ("electric guitar", "unicorn", "hour", "X-ray film")]
    ['an electric guitar', 'a unicorn', 'an hour', 'an X-ray film']
    """
    return f"{'an' if _AN.match(noun) and not _A.match(noun) else 'a'} {noun}"


def fill_prompts(templates: Sequence[str], synsets: Sequence[Synset]) -> Iterator[tuple[str, ...]]:
    """Yield the prompts of each synset, one of each template."""
    for template in templates or [""]:
        if "{" not in template.replace("{{", ""):
            raise UsageError(
                f'prompt: "{template}" has no field, so that all synsets would have the same '
                'prompt; write one into it, as in "a photo of a {lemma}, {definition}"'
            )
    above = "{hypernym" in "".join(templates)
    for synset in synsets:
        if above and not synset.parents:
            raise UsageError(
                f"prompt: {synset.name} has no hypernym to fill into the prompt; leave the synset "
                "out of the catalog, or the field out of the prompt"
            )
        lemmas, *hypernyms = (
            [lemma.replace("_", " ") for lemma in one.lemmas]
            for one in (synset, *(map(find_synset, synset.parents) if above else ()))
        )
        fields = {
            "definition": synset.definition,
            "lemma": lemmas[0],
            "a_lemma": with_article(lemmas[0]),
            "lemmas": ", ".join(lemmas),
            "synset": synset.name,
            "hypernym": hypernyms[0][0] if above else "",
            "hypernyms": ", ".join(words[0] for words in hypernyms),
        }
        yield tuple(template.format(**fields) for template in templates)

"""WordNet's noun hypernyms between wnids: what lies below what, and how far apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdwn.errors import UsageError
from sdwn.wordnet.corpus import WordNet


class Taxonomy:
    """Hypernyms and names by wnid, each read once."""

    def __init__(self, wordnet: WordNet) -> None:
        self.wordnet = wordnet
        self._above: dict[str, dict[str, int]] = {}
        self._names: dict[str, str] = {}

    def name(self, wnid: str) -> str:
        """Give WordNet's name of a synset, as ``dog.n.01``."""
        found = self._names.get(wnid)
        if found is None:
            found = self._names[wnid] = self.wordnet.synset(wnid).name
        return found

    def above(self, wnid: str) -> Mapping[str, int]:
        """Map each hypernym, and the synset itself, to the least number of steps up to it.

        Raises:
            UsageError: WordNet has no such noun synset.
        """
        found = self._above.get(wnid)
        if found is None:
            found = {wnid: 0}
            for parent in self.wordnet.hypernyms(wnid):
                for hypernym, steps in self.above(parent).items():
                    found[hypernym] = min(found.get(hypernym, steps + 1), steps + 1)
            self._above[wnid] = found
        return found

    def is_below(self, wnid: str, root: str) -> bool:
        """Tell whether a synset is another one or lies anywhere below it."""
        return root in self.above(wnid)

    def distance(self, one: str, other: str) -> int:
        """Count the steps of the shortest path between two synsets over a common hypernym.

        All nouns have one: ``entity.n.01``.
        """
        first, second = self.above(one), self.above(other)
        return min(steps + second[wnid] for wnid, steps in first.items() if wnid in second)


@dataclass(frozen=True, slots=True)
class Scope:
    """The smallest subtree around a synset that a classifier has classes in.

    ``wnid`` is its top: the synset itself, with ``steps`` 0, if a class is it or lies below it;
    else its nearest hypernym of which that holds. ``classes`` are indices into the classifier's
    own list, in order.
    """

    wnid: str
    steps: int
    classes: tuple[int, ...]


def scopes(
    taxonomy: Taxonomy, wnids: Iterable[str], classes: Sequence[str | None]
) -> dict[str, Scope]:
    """Find the scope of each synset, given the wnid of each class.

    Of several nearest hypernyms the one with the fewest classes is taken, then the first by
    wnid. A class without a wnid, or with one that WordNet does not have, is in no scope.

    Raises:
        UsageError: a synset that WordNet does not have, or no class that it has.
    """
    below = _classes_below(taxonomy, classes)
    found = {}
    for wnid in wnids:
        above = taxonomy.above(wnid)
        known = [(steps, len(below[top]), top) for top, steps in above.items() if top in below]
        if not known:
            what = "none of the classifier's classes is in WordNet, so none is near"
            raise UsageError(f"{wnid}: {what}")
        steps, _, top = min(known)
        found[wnid] = Scope(top, steps, tuple(below[top]))
    return found


def _classes_below(taxonomy: Taxonomy, classes: Sequence[str | None]) -> dict[str, list[int]]:
    below: dict[str, list[int]] = {}
    for index, wnid in enumerate(classes):
        try:
            above: Iterable[str] = taxonomy.above(wnid) if wnid else ()
        except UsageError:
            continue
        for hypernym in above:
            below.setdefault(hypernym, []).append(index)
    return below

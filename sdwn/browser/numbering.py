"""Numbers for nodes of a graph without cycles, so that all below a node are few runs of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Children = Mapping[str, Sequence[str]]
# Runs of numbers, each from a start up to a stop, apart and in order.
Pieces = tuple[tuple[int, int], ...]


def numbered(tops: Sequence[str], children: Children) -> tuple[dict[str, int], dict[str, Pieces]]:
    """Number all nodes from 0, and give for each the numbers of all that is at or below it.

    In a tree each node has one run; a node that has several parents adds runs to those that it
    was not numbered under ("Efficient management of transitive relationships in large data and
    knowledge bases", SIGMOD 1989).

    >>> numbers, below = numbered(["a"], {"a": ["b", "c"], "b": ["d", "e"], "c": ["d", "f"]})
    >>> numbers["d"], below["b"], below["c"]
    (2, ((1, 4),), ((2, 3), (4, 6)))
    """
    numbers, stops = _depth_first(tops, children)
    return numbers, _pieces(numbers, stops, children)


def _depth_first(tops: Sequence[str], children: Children) -> tuple[dict[str, int], dict[str, int]]:
    """Number nodes depth first, from 0; also say where each one's own run of numbers stops."""
    numbers: dict[str, int] = {}
    stops: dict[str, int] = {}
    for top in tops:
        numbers[top] = len(numbers)
        ways: list[tuple[str, Iterator[str]]] = [(top, iter(children.get(top, ())))]
        while ways:
            wnid, rest = ways[-1]
            child = next((one for one in rest if one not in numbers), None)
            if child is None:
                stops[wnid] = len(numbers)
                ways.pop()
            else:
                numbers[child] = len(numbers)
                ways.append((child, iter(children.get(child, ()))))
    return numbers, stops


def _pieces(
    numbers: dict[str, int], stops: dict[str, int], children: Children
) -> dict[str, Pieces]:
    """Give, for each node, the numbers of all that is at or below it."""
    found: dict[str, Pieces] = {}
    # In the order in which numbering left them, what is below a node stands before it.
    for wnid, stop in stops.items():
        start = numbers[wnid]
        others = {
            piece
            for child in children.get(wnid, ())
            for piece in found[child]
            if piece[0] < start or piece[1] > stop
        }
        found[wnid] = _joined([(start, stop), *others]) if others else ((start, stop),)
    return found


def _joined(pieces: list[tuple[int, int]]) -> Pieces:
    """Join pieces that overlap or touch.

    >>> _joined([(5, 8), (0, 2), (1, 3), (8, 9)])
    ((0, 3), (5, 9))
    """
    found: list[tuple[int, int]] = []
    for start, stop in sorted(pieces):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)

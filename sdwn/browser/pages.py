"""The pages: what each address shows, gathered for its template."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from sdwn.browser import dress, making
from sdwn.browser.dress import short
from sdwn.browser.links import url_view
from sdwn.browser.pairs import Pairs, told_apart
from sdwn.browser.responses import entry_of, exhibit_of, shot_of
from sdwn.browser.view import View
from sdwn.evaluation.metrics import metrics_shown
from sdwn.wordnet.imagenet import class_lemmas

if TYPE_CHECKING:
    from sdwn.browser.collection import Entry
    from sdwn.browser.library import Library
    from sdwn.browser.shot import Shot
    from sdwn.browser.tree import Node

# Kept by a browser for going back, and asked for again when it is opened anew.
HEADERS = {"Cache-Control": "no-cache", "Vary": "HX-Request"}
NODE_SHOTS = 8
# Of classes that a synset's images were taken for.
TAKEN_FOR = 6
# Of images on a page; a run makes ten of a synset, but an import may have thousands.
LEAF = 100

T = TypeVar("T")


def common(request: Request) -> dict[str, Any]:
    """Gather what every page shows; ``changed`` says that the release is another one by now."""
    here, there = request.app.state.here, request.app.state.there
    changes = [one.changed for one in (here, there) if one is not None]
    return {
        "library": here.library,
        "other": there.library if there else None,
        "names": told_apart(here.library, there.library) if there else None,
        "changed": " ".join(filter(None, changes)) or None,
    }


def _page(request: Request, template: str, **values: Any) -> Response:
    found = dress.render(template, {**common(request), **values})
    return HTMLResponse(found, headers=HEADERS)


def search(request: Request) -> Response:
    """``/``: ``view``, ``selection``; for htmx the results alone."""
    view = View.parse(request.query_params)
    selection = exhibit_of(request).library.select(view)
    asked = request.headers
    # Going back, htmx asks for a page whose results it has forgotten, and wants all of it.
    part = "hx-request" in asked and "hx-history-restore-request" not in asked
    answer = _page(
        request, "results.html" if part else "search.html", view=view, selection=selection
    )
    if part and asked.get("hx-trigger") == "search":
        answer.headers["HX-Replace-Url"] = url_view(view)
    return answer


def synset(request: Request) -> Response:
    """``/synsets/WNID``: entry, node, path, neighbours, shots, show, counts, seeds, ..."""
    exhibit = exhibit_of(request)
    library, entry, show = exhibit.library, entry_of(request, exhibit), _show_asked(request)
    shots, leaf = _leaf(request, library.shots(entry.wnid, show))
    node = library.tree.node(entry.wnid) if library.tree else None
    return _page(
        request,
        "synset.html",
        entry=entry,
        node=node,
        path=library.tree.path(entry.wnid) if library.tree and node else [],
        neighbours=neighbours(library, entry),
        shots=shots,
        show=show,
        counts=library.counts(entry.wnid),
        regenerate=making.command(library.release, entry.synset),
        seeds=_seeds(library, shots),
        taken_for=_taken_for(library, entry),
        **leaf,
    )


def _taken_for(library: Library, entry: Entry) -> list[tuple[str, str, int]]:
    rows = library.collection.rows(entry.wnid)
    return library.judgement.taken_for(rows)[:TAKEN_FOR] if library.judgement else []


def _show_asked(request: Request) -> str:
    return View.parse({"show": request.query_params.get("show", "")}).show


def _leaf(request: Request, items: Sequence[T]) -> tuple[Sequence[T], dict[str, int]]:
    """Take the page that was asked for, the last one if there are fewer; say which of how many."""
    pages = max(1, math.ceil(len(items) / LEAF))
    page = min(_page_asked(request), pages)
    return items[(page - 1) * LEAF : page * LEAF], {"page": page, "pages": pages}


def _page_asked(request: Request) -> int:
    return View.parse({"page": request.query_params.get("page", "")}).page


def neighbours(library: Library, entry: Entry) -> dict[str, Any]:
    """Gather the synsets around one: right above, beside and below it, and the next by name."""
    synsets = library.collection.synsets
    before, after = entry.position - 1, entry.position + 1
    found = {
        "previous": synsets[before] if before >= 0 else None,
        "next": synsets[after] if after < len(synsets) else None,
    }
    node = library.tree.node(entry.wnid) if library.tree else None
    above = _nodes(library, node.parents) if node else []
    beside = sorted({wnid for one in above for wnid in one.children} - {entry.wnid})
    wnids = {
        "hypernyms": [one.wnid for one in above],
        "sisters": beside,
        "hyponyms": node.children if node else (),
    }
    return {**found, **{name: _entries(library, near) for name, near in wnids.items()}}


def _nodes(library: Library, wnids: Sequence[str]) -> list[Node]:
    assert library.tree is not None
    return [node for wnid in wnids if (node := library.tree.node(wnid)) is not None]


def _entries(library: Library, wnids: Sequence[str]) -> list[Entry]:
    found = [entry for wnid in wnids if (entry := library.collection.entry(wnid)) is not None]
    return sorted(found, key=lambda entry: entry.position)


def _seeds(library: Library, shots: Sequence[Shot]) -> dict[int, int]:
    """Give the seed of each image by its number; none for what was imported."""
    made = making.recorded(library.release, shots)
    return {
        shot.number: one["seed"] for shot, one in zip(shots, made, strict=True) if "seed" in one
    }


def image(request: Request) -> Response:
    """``/synsets/WNID/NUMBER``: entry, shot, show, record, previous, next, leaf, ..."""
    exhibit = exhibit_of(request)
    library, entry, show = exhibit.library, entry_of(request, exhibit), _show_asked(request)
    shot, shots = shot_of(request, exhibit), library.shots(entry.wnid, show)
    try:
        place = shots.place(shot.row)
    except IndexError:  # an address that was made by hand: it is not of that kind
        show, shots = "all", library.shots(entry.wnid)
        place = shots.place(shot.row)
    command = making.command(library.release, entry.synset)
    return _page(
        request,
        "image.html",
        entry=entry,
        shot=shot,
        show=show,
        nth=place + 1,
        total=len(shots),
        page=place // LEAF + 1,
        record=library.release.row(shot.row),
        previous=shots[place - 1] if place else None,
        next=shots[place + 1] if place + 1 < len(shots) else None,
        regenerate=f"{command} {shot.number}" if command else None,
        provenance=making.provenance(library.release, shot),
        damaged=exhibit.pictures.is_damaged(shot.row),
    )


def tree(request: Request) -> Response:
    """``/tree`` and ``/tree/WNID``: node, path, children, order, samples, entry, shots."""
    library = exhibit_of(request).library
    order = View.parse({"order": request.query_params.get("order", "")}).order
    wnid = request.path_params.get("wnid")
    if library.tree is None:
        return _page(request, "tree.html", node=None, path=[], children=[], samples={}, **_NO_ENTRY)
    node = library.tree.node(wnid or library.tree.root)
    if node is None:
        raise HTTPException(404, f"No images of {str(wnid)[:40]} or below it are in this release.")
    children = sorted(_nodes(library, node.children), key=BELOW.get(order, BELOW["best"]))
    samples = {one.wnid: shot for one in children if (shot := library.sample(one.wnid))}
    return _page(
        request,
        "tree.html",
        node=node,
        path=library.tree.path(node.wnid),
        children=children,
        order=order,
        samples=samples,
        entry=library.collection.entry(node.wnid),
        shots=library.shots(node.wnid)[:NODE_SHOTS],
    )


_NO_ENTRY: dict[str, Any] = {"entry": None, "shots": [], "order": "best"}
# How a tree's nodes stand: most images first, unless asked otherwise; what was not judged last.
BELOW: dict[str, Callable[[Node], Any]] = {
    "best": lambda node: (-node.images, short(node.name).lower()),
    "name": lambda node: short(node.name).lower(),
    "rate": lambda node: (node.rate is None, node.rate or 0),
    "-rate": lambda node: (node.rate is None, -(node.rate or 0)),
}


def class_map(request: Request) -> Response:
    """``/map``: circles, map, missing, view, names, classes, samples."""
    from sdwn.reports.palette import circles

    library = exhibit_of(request).library
    record = library.judgement.record if library.judgement else {}
    placed = record.get("map")
    found = circles(record) if placed else []
    classes = {row["wnid"]: row for row in record.get("classes", [])}
    return _page(
        request,
        "map.html",
        circles=found,
        map=placed,
        missing=record.get("map_missing") or "these images have not been judged.",
        view=View.parse(request.query_params),
        names=_names(library, classes),
        classes=classes,
        samples={wnid: shot for wnid in classes if (shot := library.sample(wnid))},
    )


def _names(library: Library, wnids: Any) -> dict[str, str]:
    """Give the first lemma of classes."""
    known = class_lemmas()
    found = {wnid: library.collection.entry(wnid) for wnid in wnids}
    return {
        wnid: entry.label if entry else known.get(wnid, wnid).partition(", ")[0].replace("_", " ")
        for wnid, entry in found.items()
    }


def about(request: Request) -> Response:
    """``/about``: manifest, settings, record, evaluations, root."""
    library = exhibit_of(request).library
    manifest = library.release.described
    return _page(
        request,
        "about.html",
        manifest=manifest,
        settings=manifest.settings,
        record=library.judgement.record if library.judgement else None,
        evaluations=library.evaluations,
        metrics=metrics_shown("browser"),
        root=library.release.paths.root,
    )


def comparison(request: Request) -> Response:
    """``/compare``: rows, page, pages, total, only_here, only_there, judged, rates."""
    pairs = _pairs(request)
    page = min(_page_asked(request), pairs.pages)
    return _page(
        request,
        "compare.html",
        rows=pairs.page(page),
        page=page,
        pages=pairs.pages,
        total=len(pairs),
        only_here=pairs.only_here,
        only_there=pairs.only_there,
        judged=pairs.judged,
        rates=pairs.rates,
    )


def pair(request: Request) -> Response:
    """``/compare/WNID``: entry, pairs of images by number, here, there, previous, next."""
    entry = entry_of(request, exhibit_of(request))
    found = _pairs(request).find(entry.wnid)
    if found is None:
        raise HTTPException(404, f"The other release has no images of {entry.synset}.")
    both, previous, following = found
    images, leaf = _leaf(request, _by_number(request, entry.wnid))
    return _page(
        request,
        "pair.html",
        entry=both.entry,
        pairs=images,
        here=both.here,
        there=both.there,
        previous=previous,
        next=following,
        **leaf,
    )


def _pairs(request: Request) -> Pairs:
    found: Pairs | None = request.app.state.pairs
    if found is None:
        raise HTTPException(404, "No other release was given to compare with.")
    return found


def _by_number(request: Request, wnid: str) -> list[tuple[Shot | None, Shot | None]]:
    sides = [
        {shot.number: shot for shot in exhibit.library.shots(wnid)}
        for exhibit in (request.app.state.here, request.app.state.there)
    ]
    numbers = sorted(sides[0].keys() | sides[1].keys())
    return [(sides[0].get(number), sides[1].get(number)) for number in numbers]

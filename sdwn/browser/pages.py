"""Answers to requests: pages, images and files to download."""

from __future__ import annotations

import math
import mimetypes
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from operator import attrgetter
from typing import IO, Any, cast

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from sdwn.browser.collection import Entry, ImageView, Node
from sdwn.browser.library import Library, SideBySide
from sdwn.browser.views import KINDS, LARGE, SMALL, View, assets, render_page, short_name, url
from sdwn.errors import IntegrityError, SdwnError
from sdwn.evaluation.class_map import map_circles, map_labels
from sdwn.evaluation.metrics import metrics_shown
from sdwn.io import csv_cell, csv_text
from sdwn.storage.codecs import CODECS
from sdwn.wordnet.imagenet import class_name

# A release may be made anew under the same name: then a browser asks, and gets it.
FOR_A_MINUTE = "private, max-age=60"
FOR_EVER = "private, max-age=31536000, immutable"
# Images on a page; a run makes ten of a concept, but an import may have thousands.
IMAGES_A_PAGE = 100
NODE_IMAGES = 8
PREDICTED_CLASSES = 6
# A table of images; of an image's own record, what an import has not stays empty.
LIST_HEAD = "id wnid synset number status right top1_wnid top1 top1_probability".split()
RECORDED = (
    "id label wnid synset number status seed prompt negative_prompt width height sha256".split()
)
PREDICTED = ("right", *(f"top{n}{what}" for n in range(1, 6) for what in ("", "_probability")))
ROWS_AT_ONCE = 500
CORRECT = {None: None, True: "yes", False: "no"}


def library_of(request: Request) -> Library:
    """Return the release that a request is about, below ``/other`` the other one."""
    other, state = str(request.scope["path"]).startswith("/other/"), request.app.state
    found: Library = state.there if other else state.here
    return found


def entry_of(request: Request) -> Entry:
    """Return the concept that a request is about; answer 404 if it has no images here."""
    id_ = request.path_params["id"]
    entry = library_of(request).collection.by_id.get(id_)
    if entry is None:
        raise HTTPException(404, f"No images of {id_[:40]} are in this release.")
    return entry


def image_of(request: Request) -> ImageView:
    """Return the image that a request is about; answer 404 if there is none."""
    entry, number = entry_of(request), request.path_params["number"]
    # As it is written in addresses: no sign, no leading zero, no digit of another script.
    written = re.fullmatch(r"0|[1-9][0-9]{0,8}", number)
    image = library_of(request).image(entry.id, int(number)) if written else None
    if image is None:
        raise HTTPException(404, f"{entry.concept.name} has no image {number[:20]}.")
    return image


def common_values(request: Request) -> dict[str, Any]:
    """Return what every page shows; ``changed`` says that a release on disk was replaced."""
    state = request.app.state
    changes = [library.changed for library in (state.here, state.there) if library]
    return {
        "library": state.here,
        "unit": state.here.release.unit,
        "other": state.there,
        "names": state.side_by_side.names if state.side_by_side else None,
        "changed": " ".join(filter(None, changes)) or None,
    }


def _page(request: Request, template: str, **values: Any) -> Response:
    found = render_page(template, {**common_values(request), **values})
    # Kept by a browser for going back, and asked for again when it is opened anew.
    return HTMLResponse(found, headers={"Cache-Control": "no-cache", "Vary": "HX-Request"})


def _part(request: Request, count: int) -> tuple[slice, dict[str, int]]:
    """Return which images of so many a page shows, the last page if there are fewer."""
    pages = max(1, math.ceil(count / IMAGES_A_PAGE))
    page = min(View.parse(request.query_params).page, pages)
    return slice((page - 1) * IMAGES_A_PAGE, page * IMAGES_A_PAGE), {"page": page, "pages": pages}


def search_page(request: Request) -> Response:
    """``/``: what a search finds; for htmx the results alone."""
    library, view, headers = library_of(request), View.parse(request.query_params), request.headers
    results, tree = library.select(view), library.tree
    below = tree.full_name(view.below) if tree and view.below and tree.node(view.below) else None
    # Going back, htmx asks for a page whose results it has forgotten, and wants all of it.
    part = "hx-request" in headers and "hx-history-restore-request" not in headers
    template = "results.html" if part else "search.html"
    answer = _page(request, template, view=view, results=results, below=below)
    if part and headers.get("hx-trigger") == "search":
        answer.headers["HX-Replace-Url"] = url(**view.parameters())
    return answer


def concept_page(request: Request) -> Response:
    """``/concepts/ID``: a concept, its images, and those of its class, above, beside and below."""
    library, entry = library_of(request), entry_of(request)
    view, wnid = View.parse(request.query_params), entry.concept.wnid
    rows = library.rows(entry.id, view)
    views = {kind: view.model_copy(update={"show": kind}) for kind in KINDS}
    part, page = _part(request, len(rows))
    images = [library.describe(row) for row in rows[part]]
    collection, predictions, tree = library.collection, library.predictions, library.tree
    near = {"Of its class": {wnid}} if wnid else {}
    if tree is not None and wnid and (node := tree.node(wnid)):
        siblings = {wnid for one in tree.nodes(node.parents) for wnid in one.children}
        near |= {"Above it": set(node.parents), "Beside it": siblings - {wnid}}
        near["Below it"] = set(node.children)
    neighbours = dict[str, list[Entry]]()
    for title, wnids in near.items():
        known = chain.from_iterable(collection.by_wnid.get(one, ()) for one in wnids)
        others = (one for one in known if one is not entry)
        neighbours[title] = sorted(others, key=attrgetter("position"))
    classes = predictions.predicted_classes(collection.rows(entry.id)) if predictions else []
    return _page(
        request,
        "concept.html",
        entry=entry,
        path=tree.path(wnid) if tree and wnid else [],
        neighbours=neighbours,
        previous=collection.entries[entry.position - 1] if entry.position else None,
        next=next(iter(collection.entries[entry.position + 1 :]), None),
        images=list(zip(images, library.seeds_and_prompts(images), strict=True)),
        view=view,
        counts={kind: len(library.rows(entry.id, one)) for kind, one in views.items()},
        regenerate=library.regenerate_command(entry.concept),
        classes=classes[:PREDICTED_CLASSES],
        **page,
    )


def image_page(request: Request) -> Response:
    """``/concepts/ID/NUMBER``: one image and all that is recorded of it."""
    library, entry, image = library_of(request), entry_of(request), image_of(request)
    view = View.parse(request.query_params)
    rows = library.rows(entry.id, view)
    if image.row not in rows:  # an address that was made by hand: it is not of that kind
        view, rows = View(similar=view.similar), library.rows(entry.id)
    index, regenerate = rows.index(image.row), library.regenerate_command(entry.concept)
    provenance, damaged = None, False
    with suppress(SdwnError, OSError):  # its part may be damaged, or have no such task run
        provenance = library.release.provenance(image.row) if regenerate else None
    try:
        # Nothing is decoded: of large images that takes seconds, and a gigabyte for a few at once.
        library.collection.payload(image.row)
    except IntegrityError:
        damaged = True
    return _page(
        request,
        "image.html",
        entry=entry,
        image=image,
        view=view,
        found=library.scores_of(image.row),
        duplicates=library.duplicates(image.row),
        similar=library.similar(image.row, view.similar)
        if view.similar in library.features
        else [],
        rank=index + 1,
        total=len(rows),
        page=index // IMAGES_A_PAGE + 1,
        record=library.release.row(image.row),
        previous=library.describe(rows[index - 1]) if index else None,
        next=library.describe(rows[index + 1]) if index + 1 < len(rows) else None,
        regenerate=regenerate and f"{regenerate} {image.number}",
        provenance=provenance,
        damaged=damaged,
    )


# How a tree's nodes are sorted: most images first by default; without a rate last.
NODE_ORDERS: dict[str, Callable[[Node], Any]] = {
    "best": lambda node: (-node.images, short_name(node.name).lower()),
    "name": lambda node: short_name(node.name).lower(),
    "rate": lambda node: (node.rate is None, node.rate or 0),
    "-rate": lambda node: (node.rate is None, -(node.rate or 0)),
}


def tree_page(request: Request) -> Response:
    """``/tree`` and ``/tree/WNID``: a node of WordNet's tree and what is right below it."""
    library, order = library_of(request), View.parse(request.query_params).order
    tree, wnid = library.tree, request.path_params.get("wnid")
    if tree is None:
        return _page(request, "tree.html", node=None)
    node = tree.node(wnid or tree.root)
    if node is None:
        raise HTTPException(404, f"No images of {str(wnid)[:40]} or below it are in this release.")
    rows = library.collection.rows_of_wnid(node.wnid)
    children = sorted(tree.nodes(node.children), key=NODE_ORDERS.get(order, NODE_ORDERS["best"]))
    return _page(
        request,
        "tree.html",
        node=node,
        path=tree.path(node.wnid),
        children=children,
        order=order,
        samples=library.samples(child.wnid for child in children),
        own=library.collection.by_wnid.get(node.wnid, ()),
        images=[library.describe(row) for row in rows[:NODE_IMAGES].tolist()],
    )


def map_page(request: Request) -> Response:
    """``/map``: the map of an evaluation's classes."""
    library = library_of(request)
    record = library.predictions.record if library.predictions else {}
    classes = {row["wnid"]: row for row in record.get("classes", [])}
    return _page(
        request,
        "map.html",
        circles=map_circles(record) if record.get("map") else [],
        labels=map_labels(record) if record.get("map") else [],
        map=record.get("map"),
        missing=record.get("map_missing") or "these images have not been evaluated.",
        view=View.parse(request.query_params),
        names={wnid: class_name(wnid) for wnid in classes},
        classes=classes,
        samples=library.samples(classes),
    )


def about_page(request: Request) -> Response:
    """``/about``: the release, its evaluations, and the keys."""
    manifest = library_of(request).release.described
    return _page(request, "about.html", manifest=manifest, metrics=metrics_shown("browser"))


def compare_page(request: Request) -> Response:
    """``/compare``: the concepts of two releases."""
    both: SideBySide = request.app.state.side_by_side
    page = min(View.parse(request.query_params).page, both.pages)
    return _page(request, "compare.html", both=both, rows=both.page(page), page=page)


def pair_page(request: Request) -> Response:
    """``/compare/ID``: the images of a concept in two releases, by number."""
    both: SideBySide = request.app.state.side_by_side
    entry = entry_of(request)
    index, images = both.index.get(entry.id), both.images(entry.id)
    part, page = _part(request, len(images))
    if index is None:
        raise HTTPException(404, f"The other release has no images of {entry.concept.name}.")
    return _page(
        request,
        "pair.html",
        entry=entry,
        pair=both.pair(index),
        previous=both.entries[index - 1] if index else None,
        next=next(iter(both.entries[index + 1 :]), None),
        shown=images[part],
        **page,
    )


# --- Images and downloads ----------------------------------------------------------------------
def picture_answer(request: Request) -> Response:
    """``/images/ID/NUMBER`` and ``/thumbnails/…``: an image as it is stored, or a small one.

    Where it is damaged, a picture that says so; an error for who asks for the file.
    """
    library, image = library_of(request), image_of(request)
    params, small = request.query_params, "/thumbnails/" in str(request.scope["path"])
    size, download = params.get("size", str(SMALL)), "download" in params
    if size not in (str(SMALL), str(LARGE)):
        raise HTTPException(400, f"size: expected {SMALL} or {LARGE}.")
    # The digest is recorded: a browser's copy is checked without reading or drawing. A proxy
    # that packs an answer makes its tag a weak one.
    tag = f'"{library.release.location(image.row)["sha256"]}{f"-{size}" * small}"'
    headers = {"ETag": tag, "Cache-Control": FOR_A_MINUTE}
    kept = request.headers.get("if-none-match", "").split(",")
    if tag in (one.strip().removeprefix("W/") for one in kept):
        return Response(status_code=304, headers=headers)
    try:
        if small:
            content, codec = library.collection.thumbnail(image.row, int(size)), CODECS["webp"]
        else:
            content, codec = library.collection.read(image.row)
    except IntegrityError as error:
        if download:
            raise
        drawn = render_page("damaged.svg", {"side": size if small else LARGE, "text": str(error)})
        return Response(drawn, 200, {"Cache-Control": "no-store"}, media_type="image/svg+xml")
    if download:
        name = download_name(image.entry, codec.extension, image.number)
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return Response(content, media_type=codec.media_type, headers=headers)


def zip_answer(request: Request) -> Response:
    """``/zips/ID``: a concept's images and what is known of them."""
    library, entry = library_of(request), entry_of(request)
    content = image_zip(library, library.images(entry.id))
    return _streamed(content, "application/zip", download_name(entry, "zip"))


def list_answer(request: Request) -> Response:
    """``/list.csv``: all images of a search, as a table that ``sdwn export --only`` reads."""
    library = library_of(request)
    found = image_list(library, library.all_images(View.parse(request.query_params)))
    return _streamed(found, "text/csv; charset=utf-8", "list.csv")


def _streamed(content: Any, media_type: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return StreamingResponse(content, headers=headers, media_type=media_type)


def asset_answer(request: Request) -> Response:
    """``/assets/NAME``: a file that pages load, from memory."""
    name = request.path_params["name"]
    if name not in assets():
        raise HTTPException(404, "There is no such file.")
    # Pages name its version (`url_asset`).
    kept = FOR_EVER if "v" in request.query_params else "no-cache"
    headers = {"Cache-Control": kept}
    return Response(assets()[name], media_type=mimetypes.guess_type(name)[0], headers=headers)


def image_zip(library: Library, images: Iterable[ImageView]) -> Iterator[bytes]:
    """Yield a zip of images as they are stored, with a table of what is known of them.

    A block an image, so that a zip of any size takes little memory. An image that is damaged
    is named in DAMAGED.txt and left out.
    """
    blocks, rows, damaged = _Blocks(), list[list[Any]](), list[str]()
    with zipfile.ZipFile(cast("IO[bytes]", blocks), "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, content: bytes | str) -> None:
            # As of the zip format's first day: the same images give the same bytes.
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o644 << 16
            archive.writestr(member, content)

        for image in images:
            try:
                payload, codec = library.collection.read(image.row)
            except IntegrityError as error:
                damaged.append(f"{image.entry.concept.name} {image.number}: {error}\n")
                continue
            name = download_name(image.entry, codec.extension, image.number)
            add(name, payload)
            record = library.release.row(image.row)
            top5 = [(guess.name, round(guess.probability, 6)) for guess in image.top5]
            cells = [CORRECT[image.correct], *chain(*top5)]
            cells += [None] * (len(PREDICTED) - len(cells))
            cells += map(library.scores_of(image.row).get, library.scores)
            rows.append([name, *(record.get(key) for key in RECORDED), *cells])
            yield blocks.take()
        add("metadata.csv", csv_text(("file", *RECORDED, *PREDICTED, *library.scores), rows))
        if damaged:
            add("DAMAGED.txt", "".join(damaged))
    yield blocks.take()


class _Blocks(list[bytes]):
    """The bytes that a zip writes, until they are taken; zipfile sees that it cannot seek in it."""

    def write(self, block: Any) -> int:
        self.append(bytes(block))
        return len(block)

    def flush(self) -> None:
        """Do nothing; zipfile calls it."""

    def take(self) -> bytes:
        found = b"".join(self)
        self.clear()
        return found


def image_list(library: Library, images: Iterable[ImageView]) -> Iterator[str]:
    """Yield a CSV table of images, some rows at a time, which ``sdwn export --only`` reads."""

    def row(image: ImageView) -> list[Any]:
        best = image.top5[0] if image.top5 else None
        cells = [best.wnid, best.name, round(best.probability, 6)] if best else [None] * 3
        concept, found = image.entry.concept, library.scores_of(image.row)
        known = [concept.id, concept.wnid, concept.synset, image.number, image.status]
        known += [CORRECT[image.correct], *cells, *map(found.get, library.scores)]
        return [csv_cell(cell) for cell in known]

    rows = chain([[*LIST_HEAD, *library.scores]], map(row, images))
    while block := list(islice(rows, ROWS_AT_ONCE)):
        yield csv_text(block[0], block[1:])


def download_name(entry: Entry, extension: str, number: int | None = None) -> str:
    """Return a file name, in characters that every file system and every header takes."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", entry.concept.name).lstrip(".-")[:80] or "_"
    return f"{plain}{'' if number is None else f'-{number}'}.{extension}"

"""Pages and their addresses, and downloads: images, zips, lists, and contact sheets."""

from __future__ import annotations

import math
import mimetypes
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.resources import files
from itertools import chain, islice
from operator import attrgetter
from typing import IO, Any, cast
from urllib.parse import quote, urlencode

from markupsafe import Markup
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from sdwn.browser.collection import Entry, ImageView, Node
from sdwn.browser.library import KINDS, ORDERS, PAGE, Library, SideBySide, View
from sdwn.errors import SdwnError, command
from sdwn.evaluation.class_map import map_circles, map_labels
from sdwn.evaluation.metrics import metrics_shown
from sdwn.evaluation.record import as_recorded
from sdwn.io import csv_text, in_threads
from sdwn.measures.record import SCORES
from sdwn.reports.page import data_url, policy_hash, shared_text, template_environment
from sdwn.storage.codecs import CODECS
from sdwn.storage.images import CELL, contact_sheet
from sdwn.wordnet.corpus import class_name

# A release may be made anew under the same name, or sdwn be upgraded.
FOR_A_MINUTE = "private, max-age=60"
# Images on a page; a run makes ten of a concept, but an import may have thousands.
IMAGES_A_PAGE = 100
NODE_IMAGES = 8
PREDICTED_CLASSES = 6
# A table of images; in a zip also of an image's own record, of which an import lacks some.
LIST_HEAD = "id wnid synset number status right top1_wnid top1 top1_probability".split()
RECORDED = "label seed prompt negative_prompt width height sha256".split()
ROWS_AT_ONCE = 500
CORRECT = {None: None, True: "yes", False: "no"}
# In pixels: a thumbnail in a list, and one on the page of its concept.
SMALL, LARGE = 192, 384


# --- Addresses and templates ---------------------------------------------------------------------
# A parameter that has its default is left out of an address.
DEFAULTS = {"size": SMALL, **{name: one.default for name, one in View.model_fields.items()}}


def url(*parts: str | int, **parameters: Any) -> str:
    """Return the address of a page or image: parts of its path, and parameters.

    >>> url("concepts", "n02391049", 3, show="wrong"), url("tree", order="best"), url(q="a&b")
    ('/concepts/n02391049/3?show=wrong', '/tree', '/?q=a%26b')
    """
    given = {name: value for name, value in parameters.items() if value != DEFAULTS.get(name)}
    path = "/".join(quote(str(part), safe="") for part in parts)
    return f"/{path}?{urlencode(given)}".removesuffix("?")


@cache
def assets() -> dict[str, bytes]:
    """Read all files that pages load, by name."""
    own = files("sdwn").joinpath("templates/browse")
    names = ("browse.css", "browse.js", "map.js", "icon.svg")
    found = {name: own.joinpath(name).read_bytes() for name in names}
    for name, shared in {"browse.css": "house.css", "map.js": "class_map.js"}.items():
        found[name] = shared_text(shared).encode() + found[name]
    found["htmx.min.js"] = files("js_lib_htmx").joinpath("static/htmx/htmx.min.js").read_bytes()
    return found


_ENVIRONMENT = template_environment("browse", lstrip_blocks=True)
_ENVIRONMENT.globals |= {"url": url, "sdwn": command}
_ENVIRONMENT.globals |= {"kinds": KINDS, "orders": ORDERS, "scores": SCORES}
_ENVIRONMENT.filters |= {"class_name": class_name}


def render_page(template: str, values: dict[str, Any]) -> str:
    """Render a page, or a part of one, as HTML."""
    found = _ENVIRONMENT.get_template(template).render(values)
    # A folder's name may be no text.
    return found.encode("utf-8", "replace").decode()


# --- Pages ---------------------------------------------------------------------------------------
def library_of(request: Request) -> Library:
    """Return the release that a request is about, below ``/other`` the other one."""
    other, state = str(request.scope["path"]).startswith("/other/"), request.app.state
    return cast("Library", state.there if other else state.here)


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
    """Return what every page shows."""
    state = request.app.state
    return {
        "library": state.here,
        "unit": state.here.release.unit,
        "other": state.there,
        "names": state.side_by_side.names if state.side_by_side else None,
    }


def _page(request: Request, template: str, **values: Any) -> Response:
    found = render_page(template, {**common_values(request), **values})
    # Kept by a browser for going back, and asked for again when it is opened anew.
    return HTMLResponse(found, headers={"Cache-Control": "no-cache", "Vary": "HX-Request"})


def _part(request: Request, count: int, size: int) -> tuple[slice, dict[str, int]]:
    """Return which of so many a page of this size shows, the last page if there are fewer."""
    pages = max(1, math.ceil(count / size))
    page = min(View.parse(request.query_params).page, pages)
    return slice((page - 1) * size, page * size), {"page": page, "pages": pages}


def search_page(request: Request) -> Response:
    """``/``: what a search finds; for htmx the results alone."""
    library, view, headers = library_of(request), View.parse(request.query_params), request.headers
    results, tree = library.select(view), library.tree
    below = tree.node(view.below) if tree and view.below else None
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
    views = {kind: view.model_copy(update={"show": kind}) for kind in KINDS}
    rows = library.rows(entry.id, view)
    part, page = _part(request, len(rows), IMAGES_A_PAGE)
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
    classes = predictions.predicted_classes(collection.rows(entry)) if predictions else []
    return _page(
        request,
        "concept.html",
        entry=entry,
        path=library.path(entry),
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
    similar = view.similar if view.similar in library.features else None
    damaged = False
    try:
        # Nothing is decoded: of large images that takes seconds, and a gigabyte for a few at once.
        library.release.payload(library.release.location(image.row))
    except SdwnError:
        damaged = True
    return _page(
        request,
        "image.html",
        entry=entry,
        image=image,
        view=view,
        found=library.scores_of(image.row),
        duplicates=library.duplicates(image.row),
        similar=library.similar(image.row, similar) if similar else [],
        rank=index + 1,
        total=len(rows),
        page=index // IMAGES_A_PAGE + 1,
        record=library.release.row(image.row),
        previous=library.describe(rows[index - 1]) if index else None,
        next=library.describe(rows[index + 1]) if index + 1 < len(rows) else None,
        regenerate=regenerate and f"{regenerate} {image.number}",
        damaged=damaged,
    )


# How a tree's nodes are sorted; those without a rate last.
NODE_ORDERS: dict[str, Callable[[Node], Any]] = {
    "best": lambda node: -node.images,
    "name": lambda node: node.label.lower(),
    "rate": lambda node: (node.rate is None, node.rate or 0),
    "-rate": lambda node: (node.rate is None, -(node.rate or 0)),
}


def tree_page(request: Request) -> Response:
    """``/tree`` and ``/tree/WNID``: a node of WordNet's tree and what is right below it."""
    library, wnid = library_of(request), request.path_params.get("wnid")
    order = View.parse(request.query_params).order
    if (tree := library.tree) is None:
        return _page(request, "tree.html", node=None)
    node = tree.node(wnid or tree.root)
    if node is None:
        raise HTTPException(404, f"No images of {str(wnid)[:40]} or below it are in this release.")
    own = library.collection.by_wnid.get(node.wnid, ())
    return _page(
        request,
        "tree.html",
        node=node,
        path=tree.path(node.wnid),
        children=sorted(tree.nodes(node.children), key=NODE_ORDERS.get(order, NODE_ORDERS["best"])),
        order=order,
        samples=library.samples(node.children),
        own=own,
        images=list(map(library.describe, library.collection.rows(*own)[:NODE_IMAGES])),
    )


def map_page(request: Request) -> Response:
    """``/map``: the map of an evaluation's classes."""
    library = library_of(request)
    record = library.predictions.record if library.predictions else {}
    with as_recorded(library.release.paths.evaluations):
        places, classes = record.get("map"), {row["wnid"]: row for row in record.get("classes", [])}
        return _page(
            request,
            "map.html",
            circles=map_circles(record) if places else [],
            labels=map_labels(record) if places else [],
            map=places,
            missing=record.get("map_missing") or "these images have not been evaluated.",
            view=View.parse(request.query_params),
            names={wnid: class_name(wnid) for wnid in classes},
            classes=classes,
            samples=library.samples(classes),
        )


def about_page(request: Request) -> Response:
    """``/about``: the release, its evaluations, and the keys."""
    release, metrics = library_of(request).release, metrics_shown("browser")
    with as_recorded(release.paths.evaluations):
        return _page(request, "about.html", manifest=release.manifest, metrics=metrics)


def compare_page(request: Request) -> Response:
    """``/compare``: the concepts of two releases."""
    both: SideBySide = request.app.state.side_by_side
    part, page = _part(request, len(both.entries), PAGE)
    rows = [both.pair(index) for index in both.order[part]]
    return _page(request, "compare.html", both=both, rows=rows, **page)


def pair_page(request: Request) -> Response:
    """``/compare/ID``: the images of a concept in two releases, by number."""
    both: SideBySide = request.app.state.side_by_side
    entry = entry_of(request)
    index = both.index.get(entry.id)
    if index is None:
        raise HTTPException(404, f"The other release has no images of {entry.concept.name}.")
    images = both.images(entry.id)
    part, page = _part(request, len(images), IMAGES_A_PAGE)
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
    """``/images/ID/NUMBER`` and ``/thumbnails/…``: an image; a picture that says it is damaged."""
    library, image = library_of(request), image_of(request)
    params, small = request.query_params, "/thumbnails/" in str(request.scope["path"])
    size, download = params.get("size", str(SMALL)), "download" in params
    if size not in (str(SMALL), str(LARGE)):
        raise HTTPException(400, f"size: expected {SMALL} or {LARGE}.")
    # The digest is recorded: a browser's copy is checked without reading or drawing.
    tag = f'"{library.release.location(image.row)["sha256"]}{f"-{size}" * small}"'
    headers = {"ETag": tag, "Cache-Control": FOR_A_MINUTE}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    try:
        if small:
            content, codec = library.collection.thumbnail(image.row, int(size)), CODECS["webp"]
        else:
            content, codec = library.collection.read(image.row)
    except SdwnError as error:
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
    headers = {"Cache-Control": FOR_A_MINUTE}
    return Response(assets()[name], media_type=mimetypes.guess_type(name)[0], headers=headers)


def image_zip(library: Library, images: Iterable[ImageView]) -> Iterator[bytes]:
    """Yield a zip of images and a table of them, a block an image; damaged ones are named in it."""
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
            except SdwnError as error:
                damaged.append(f"{image.entry.concept.name} {image.number}: {error}\n")
                continue
            name = download_name(image.entry, codec.extension, image.number)
            add(name, payload)
            recorded = map(library.release.row(image.row).get, RECORDED)
            rows.append([name, *recorded, *image_cells(library, image)])
            yield blocks.take()
        add("metadata.csv", csv_text(("file", *RECORDED, *LIST_HEAD, *library.scores), rows))
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
    yield csv_text((*LIST_HEAD, *library.scores), [])
    rows = (image_cells(library, image) for image in images)
    while block := list(islice(rows, ROWS_AT_ONCE)):
        yield csv_text((), block).removeprefix("\n")


def image_cells(library: Library, image: ImageView) -> list[Any]:
    """Return what tables say of an image: the columns of ``LIST_HEAD``, then its scores."""
    concept, best = image.entry.concept, image.top5[0] if image.top5 else None
    scores = library.scores_of(image.row)
    return [
        *(concept.id, concept.wnid, concept.synset),
        *(image.number, image.status, CORRECT[image.correct]),
        *((best.wnid, best.name, round(best.probability, 6)) if best else (None, None, None)),
        *map(scores.get, library.scores),
    ]


def download_name(entry: Entry, extension: str, number: int | None = None) -> str:
    """Return a file name, in characters that every file system and every header takes."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", entry.concept.name).lstrip(".-")[:80] or "_"
    return f"{plain}{'' if number is None else f'-{number}'}.{extension}"


# --- The sheet of a concept: as values, as a page by itself, as one picture -----------------------

# Of more images, as an import may have, each is smaller.
MANY, SHEET_QUALITY = 50, 85
# More are left out: of photographs these are 10 MB, and a browser opens no page of a gigabyte.
SHEET_IMAGES = 1000
SHEET_THREADS = 8
SHEET_FACTS = "id wnid synset definition prompts negative_prompt imagenet_class".split()


def sheet_record(library: Library, entry: Entry) -> dict[str, Any]:
    """Return the facts about a concept and each image, the record of ``sdwn show --json``."""
    predictions, images = library.predictions, library.images(entry.id)
    correct, labelled = library.tally(entry)
    regenerate = library.regenerate_command(entry.concept)
    return {
        "release": library.root,
        **{name: getattr(entry.concept, name) for name in SHEET_FACTS},
        **{name: getattr(entry, name) for name in ("label", "lemmas", "prompt", "images", "black")},
        "above": [one.label for one in library.path(entry)[:-1]],
        "judged": labelled,
        "right": correct,
        "evaluation": predictions.name if predictions else None,
        "model": predictions.model if predictions else None,
        "regenerate": f"{regenerate} NUMBER" if regenerate else None,
        "shots": [
            {
                "number": image.number,
                **made,
                "status": image.status,
                "state": image.state,
                "top5": [guess._asdict() for guess in image.top5] or None,
                "right": image.correct,
                "rank": image.rank,
                "subtree_probability": image.subtree_probability,
            }
            for image, made in zip(images, library.seeds_and_prompts(images), strict=True)
        ],
    }


def sheet_page(library: Library, entry: Entry) -> str:
    """Render a concept as one HTML file that loads nothing, up to SHEET_IMAGES images inside."""
    # A parser of HTML makes one line end of two characters, and the hash would not be its own.
    style = assets()["browse.css"].decode().replace("\r\n", "\n")
    pixels = LARGE if entry.images <= MANY else SMALL
    images, urls = _small(library, entry, pixels, lambda image: data_url(image, SHEET_QUALITY))
    values = {
        "library": library,
        "entry": entry,
        "above": library.path(entry)[:-1],
        "regenerate": library.regenerate_command(entry.concept),
        "images": list(zip(images, library.seeds_and_prompts(images), urls, strict=True)),
        "left_out": entry.images - len(images),
        "style": Markup(style),
        "style_hash": Markup(policy_hash(style)),
    }
    return render_page("sheet.html", values)


def sheet_picture(library: Library, entry: Entry) -> Image.Image:
    """Render a concept as one picture: up to SHEET_IMAGES images, with number and prediction."""
    images, small = _small(library, entry, CELL, lambda image: image)
    counted = f"{len(images):,} of {entry.images:,} images" if len(images) < entry.images else ""
    name = " ".join(dict.fromkeys((entry.concept.name, entry.id)))
    facts = [name, counted, entry.prompt or entry.concept.definition]
    words = {"right": ", correct", "wrong": ", incorrect", "black": ", black"}
    captions = (f"{image.number}{words.get(image.state, '')}" for image in images)
    cells = zip(small, captions, strict=True)
    return contact_sheet(": ".join(filter(None, facts)), len(images), cells)


def _small(
    library: Library, entry: Entry, pixels: int, use: Callable[[Image.Image], Any]
) -> tuple[list[ImageView], list[Any]]:
    """Make a concept's images small, up to SHEET_IMAGES, and use each; None for a damaged one."""

    def drawn(view: ImageView) -> Any:
        try:
            image = library.release.image(view.row)
        except SdwnError:
            return None
        image.thumbnail((pixels, pixels))
        return use(image)

    images = library.images(entry.id)[:SHEET_IMAGES]
    return images, list(in_threads(drawn, images, SHEET_THREADS, ahead=2 * SHEET_THREADS))

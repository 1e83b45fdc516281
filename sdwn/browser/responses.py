"""Answers that are no pages: pictures, downloads, and the pages' own files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter, to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sdwn.browser import downloads, dress
from sdwn.browser.guard import path_of
from sdwn.browser.pictures import SIZES
from sdwn.browser.view import View
from sdwn.errors import IntegrityError

if TYPE_CHECKING:
    from sdwn.browser.collection import Entry
    from sdwn.browser.exhibit import Exhibit
    from sdwn.browser.shot import Shot

SVG, CSV, ZIP = "image/svg+xml", "text/csv; charset=utf-8", "application/zip"
# A release may be made anew under the same name: then a browser asks, and gets it.
FOR_A_MINUTE = "private, max-age=60"
FOR_EVER = "private, max-age=31536000, immutable"
NOT_KEPT = "no-store"

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")

DAMAGED = """<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" \
viewBox="0 0 96 96" role="img"><title>{text}</title><rect width="96" height="96" fill="#777"/>\
<path d="M30 22 66 58M66 22 30 58" stroke="#fff" stroke-width="6"/><text x="48" y="82" \
font-family="sans-serif" font-size="14" fill="#fff" text-anchor="middle">damaged</text></svg>"""


def exhibit_of(request: Request) -> Exhibit:
    """Give the release that a request is about: the other one below ``/other``.

    Raises:
        HTTPException: 404, there is no other.
    """
    state = request.app.state
    found: Exhibit | None = state.there if path_of(request).startswith("/other/") else state.here
    if found is None:
        raise HTTPException(404, "No other release was given to compare with.")
    return found


def entry_of(request: Request, exhibit: Exhibit) -> Entry:
    """Look the synset of a request up.

    Raises:
        HTTPException: 404, it has no images here.
    """
    wnid = request.path_params["wnid"]
    entry = exhibit.library.collection.entry(wnid)
    if entry is None:
        raise HTTPException(404, f"No images of {wnid[:40]} are in this release.")
    return entry


def shot_of(request: Request, exhibit: Exhibit) -> Shot:
    """Look the image of a request up.

    Raises:
        HTTPException: 404, there is no such image.
    """
    entry, number = entry_of(request, exhibit), request.path_params["number"]
    # As it is written in addresses: no sign, no leading zero, no digit of another script.
    known = _NUMBER.fullmatch(number) and exhibit.library.shot(entry.wnid, int(number))
    if not known:
        raise HTTPException(404, f"{entry.synset} has no image {number[:20]}.")
    return known


class Gallery:
    """The answers with pictures in them; few are drawn at once, that pages need not wait."""

    def __init__(self) -> None:
        self._at_once = CapacityLimiter(max(2, os.cpu_count() or 1))

    async def thumbnail(self, request: Request) -> Response:
        """Answer with a small picture; one that says so where the image is damaged."""
        return await to_thread.run_sync(_thumbnail, request, limiter=self._at_once)

    async def image(self, request: Request) -> Response:
        """Answer with an image as it is stored."""
        return await to_thread.run_sync(_image, request, limiter=self._at_once)


def _thumbnail(request: Request) -> Response:
    exhibit = exhibit_of(request)
    shot, pixels = shot_of(request, exhibit), _size(request)

    def drawn() -> Response:
        try:
            content = exhibit.pictures.thumbnail(shot.row, pixels)
        except IntegrityError as error:
            return damaged(error, pixels)
        return Response(content, media_type="image/webp")

    return _unless_known(request, f"{exhibit.pictures.digest(shot.row)[:32]}-{pixels}", drawn)


def _size(request: Request) -> int:
    given = request.query_params.get("size", str(SIZES[0]))
    if given not in map(str, SIZES):
        raise HTTPException(400, f"size: expected {' or '.join(map(str, SIZES))}.")
    return int(given)


def _image(request: Request) -> Response:
    exhibit = exhibit_of(request)
    shot, download = shot_of(request, exhibit), "download" in request.query_params

    def read() -> Response:
        try:
            stored = exhibit.pictures.stored(shot.row, upright=not download)
        except IntegrityError as error:
            if download:
                raise
            return damaged(error, SIZES[-1], 500)
        name = downloads.file_name(shot.synset, shot.number, stored.suffix)
        headers = attached(name) if download else {}
        return Response(stored.payload, media_type=stored.media_type, headers=headers)

    return _unless_known(request, exhibit.pictures.digest(shot.row), read)


def _unless_known(request: Request, tag: str, make: Callable[[], Response]) -> Response:
    """Answer, or say that the browser has it already: its tag is told by the image's record."""
    headers = {"ETag": f'"{tag}"', "Cache-Control": FOR_A_MINUTE}
    known = request.headers.get("if-none-match", "").split(",")
    # A proxy that packs an answer makes its tag a weak one.
    if headers["ETag"] in (one.strip().removeprefix("W/") for one in known):
        return Response(status_code=304, headers=headers)
    answer = make()
    if "Cache-Control" not in answer.headers:
        answer.headers.update(headers)
    return answer


def damaged(error: IntegrityError, side: int, status: int = 200) -> Response:
    """Answer with a picture that says that the one asked for is damaged."""
    content = DAMAGED.format(side=side, text=escape(str(error)))
    return Response(content, status, {"Cache-Control": NOT_KEPT}, media_type=SVG)


def attached(name: str) -> dict[str, str]:
    """Tell a browser to save an answer as a file; the name has no character that needs quotes."""
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def synset_zip(request: Request) -> Response:
    """Answer with a synset's images and what is known of them, as one file."""
    exhibit = exhibit_of(request)
    entry = entry_of(request, exhibit)
    shots, release = exhibit.library.shots(entry.wnid), exhibit.library.release
    name = f"{downloads.plain_name(entry.synset)}.zip"
    return _streamed(request, downloads.zipped(release, exhibit.pictures, shots), ZIP, name)


def image_list(request: Request) -> Response:
    """Answer with all images of a search, as a table that ``sdwn export --only`` takes."""
    library = exhibit_of(request).library
    shots = library.all_rows(View.parse(request.query_params))
    return _streamed(request, downloads.image_list(shots), CSV, "list.csv")


def _streamed(request: Request, content: Any, media_type: str, name: str) -> Response:
    headers = {**attached(name), "Cache-Control": NOT_KEPT}
    # Who asks for the head alone gets no work done.
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    return StreamingResponse(content, headers=headers, media_type=media_type)


def asset(request: Request) -> Response:
    """Answer with a file that pages need; what there is stands in memory."""
    found = dress.assets().get(request.path_params["name"])
    if found is None:
        raise HTTPException(404, "There is no such file.")

    def given() -> Response:
        return Response(found.content, media_type=found.media_type)

    answer = _unless_known(request, found.digest, given)
    if request.query_params.get("v") == found.digest:
        answer.headers["Cache-Control"] = FOR_EVER
    return answer

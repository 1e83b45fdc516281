"""The application: which address is answered by what, behind which guards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from sdwn.browser import dress, pages, responses
from sdwn.browser.exhibit import Exhibit
from sdwn.browser.guard import LOOPBACK_HOSTS, Gate, Hardened, path_of
from sdwn.browser.pairs import Pairs
from sdwn.errors import SdwnError, UsageError, first_line

log = logging.getLogger(__name__)

NO_TOKEN = "Open the whole address that sdwn browse printed; its token is missing or wrong here."
TITLES = {
    400: "This cannot be asked",
    403: "Not without the token",
    404: "Nothing here",
    405: "Only for looking",
    500: "That went wrong",
}
SENTENCES = {
    404: "There is no such page.",
    405: "Pages can be read, and nothing can be sent to them.",
}


def make_app(
    here: Exhibit,
    there: Exhibit | None = None,
    *,
    token: str | None = None,
    hosts: Sequence[str] = LOOPBACK_HOSTS,
) -> ASGIApp:
    """Make the application that shows a release, and perhaps another one beside it.

    Args:
        here: the release.
        there: the one to compare it with.
        token: what lets a visitor in; None lets everybody in who reaches the server.
        hosts: names that a visitor may know this machine by.
    """
    app = Starlette(
        routes=_routes(),
        middleware=_guards(token, hosts),
        exception_handlers={HTTPException: _refused, SdwnError: _failed, Exception: _broken},
    )
    # An address has one spelling.
    app.router.redirect_slashes = False
    app.state.here, app.state.there = here, there
    app.state.pairs = Pairs(here.library, there.library) if there else None
    # Around all of it: Starlette puts the answer to an unexpected error before its middleware.
    return Hardened(app)


def _guards(token: str | None, hosts: Sequence[str]) -> Sequence[Middleware]:
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    if token is not None:
        guards.append(Middleware(Gate, token=token, refused=_without_token))
    return guards


def _routes() -> list[Route]:
    gallery = responses.Gallery()
    pictures = [
        ("/images/{wnid}/{number}", gallery.image),
        ("/thumbnails/{wnid}/{number}", gallery.thumbnail),
    ]
    texts = [
        ("/", pages.search),
        ("/synsets/{wnid}", pages.synset),
        ("/synsets/{wnid}/{number}", pages.image),
        ("/tree", pages.tree),
        ("/tree/{wnid}", pages.tree),
        ("/map", pages.class_map),
        ("/about", pages.about),
        ("/compare", pages.comparison),
        ("/compare/{wnid}", pages.pair),
        ("/list.csv", responses.image_list),
        ("/assets/{name}", responses.asset),
    ]
    # For tunnels over slow lines; pictures and zips are as small as they get.
    smaller = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)]
    return [
        Route("/synsets/{wnid}.zip", responses.synset_zip),
        *(Route(path, endpoint) for path, endpoint in pictures),
        *(Route(f"/other{path}", endpoint) for path, endpoint in pictures),
        *(Route(path, endpoint, middleware=smaller) for path, endpoint in texts),
    ]


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    own = error.detail if error.detail.endswith(".") else SENTENCES.get(error.status_code)
    return _error_page(request, error.status_code, own or error.detail, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, UsageError):
        return _error_page(request, 400, str(error))
    log.error("%r: %s", path_of(request), error)
    return _error_page(request, 500, str(error))


def _broken(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response()  # nobody is there to read it
    log.error(
        "%r: %s", path_of(request), first_line(error), exc_info=log.isEnabledFor(logging.DEBUG)
    )
    return _error_page(
        request, 500, "sdwn browse goes on; what went wrong stands in the terminal where it runs."
    )


def _without_token(request: Request) -> Response:
    found = _page({"status": 403, "title": TITLES[403], "message": NO_TOKEN})
    return HTMLResponse(found, 403, {"Cache-Control": "no-store"})


def _error_page(
    request: Request, status: int, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    values = {
        "status": status,
        "title": TITLES.get(status, "That went wrong"),
        "message": message,
        **pages.common(request),
    }
    return HTMLResponse(_page(values), status, {**(headers or {}), "Cache-Control": "no-store"})


def _page(values: dict[str, object]) -> str:
    return dress.render("error.html", values)

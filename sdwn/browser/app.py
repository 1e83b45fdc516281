"""The application: which address is answered by what, who may ask, and what errors look like.

A request passes, from the outside in:

    HardenedApp          headers against framing, guessing and foreign scripts on every answer
      TrustedHost        the name of this machine in the request: no other site's name for it
        TokenGate        the token, where there is one: from the address once, then by a cookie
          the routes     pages.py
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from secrets import compare_digest
from urllib.parse import urlencode

from anyio import CapacityLimiter
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdwn.browser import pages
from sdwn.browser.compare import SideBySide
from sdwn.browser.library import Library
from sdwn.browser.templates import render_page
from sdwn.errors import SdwnError, UsageError, first_line

log = logging.getLogger(__name__)

# A new page: its line here, its function in pages.py, and its template.
PAGES = (
    ("/", pages.search_page),
    ("/synsets/{wnid}", pages.synset_page),
    ("/synsets/{wnid}/{number}", pages.image_page),
    ("/tree", pages.tree_page),
    ("/tree/{wnid}", pages.tree_page),
    ("/map", pages.map_page),
    ("/about", pages.about_page),
    ("/compare", pages.compare_page),
    ("/compare/{wnid}", pages.pair_page),
    ("/list.csv", pages.list_answer),
    ("/assets/{name}", pages.asset_answer),
)
IMAGES = (
    ("/images/{wnid}/{number}", pages.image_answer),
    ("/thumbnails/{wnid}/{number}", pages.thumbnail_answer),
)

# A page on another site can make its own name mean 127.0.0.1, and would read what is here.
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
ANY_HOST = ("*",)
TOKEN_PARAMETER = "token"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}

# By status: the title of its page, and what it says where the error says nothing.
ERRORS = {
    400: ("Bad request", "This address is not valid."),
    403: (
        "Token missing",
        "Open the whole address that sdwn browse printed; its token is missing or wrong here.",
    ),
    404: ("Not found", "There is no such page."),
    405: ("Read only", "Pages can be read, and nothing can be sent to them."),
    500: (
        "Something went wrong",
        "sdwn browse goes on; what went wrong stands in the terminal where it runs.",
    ),
}


def make_app(
    here: Library,
    there: Library | None = None,
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
    # For tunnels over slow lines; images and zips are as small as they get.
    zipped = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    if token is not None:
        guards.append(Middleware(TokenGate, token=token))
    app = Starlette(
        routes=[
            Route("/synsets/{wnid}.zip", pages.zip_answer),
            *(Route(path, endpoint) for path, endpoint in IMAGES),
            *(Route(f"/other{path}", endpoint) for path, endpoint in IMAGES),
            *(Route(path, endpoint, middleware=zipped) for path, endpoint in PAGES),
        ],
        middleware=guards,
        exception_handlers={HTTPException: _http_error, SdwnError: _sdwn_error, Exception: _fault},
    )
    # An address has one spelling.
    app.router.redirect_slashes = False
    app.state.here, app.state.there = here, there
    app.state.side_by_side = SideBySide(here, there) if there else None
    # Few images are drawn at once, so that pages need not wait for them.
    app.state.drawing = CapacityLimiter(max(2, os.cpu_count() or 1))
    # Around all of it: Starlette puts the answer to an unexpected error before its middleware.
    return HardenedApp(app)


class HardenedApp:
    """Adds to every answer what keeps a browser from loading, framing or guessing anything.

    An error ends here: Starlette raises it again after it was answered, and a server that sees
    one closes the connection of a visitor who may have asked for more already.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with suppress(Exception):
            await self._app(scope, receive, hardened)


class TokenGate:
    """Lets in who has the token: from the address once, and from then on by a cookie."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()
        # Cookies know no ports: another server's, forwarded to the same name, has another name.
        self._cookie = f"sdwn-{hashlib.sha256(self._token).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        request = Request(scope)
        # As it was sent: Starlette's own `url.path` has the host's name in front, which a visitor
        # writes, and `a/assets/?` as a name would be a path to there.
        path = str(scope["path"])
        answer: ASGIApp
        if self._knows(request.query_params.get(TOKEN_PARAMETER, "")):
            answer = self._enter(request, path)
        elif self._knows(request.cookies.get(self._cookie, "")) or path.startswith("/assets/"):
            # The style of the page that refuses needs no token: it says nothing.
            answer = self._app
        else:
            values = {"status": 403, "title": ERRORS[403][0], "message": ERRORS[403][1]}
            page = render_page("error.html", values)
            answer = HTMLResponse(page, 403, {"Cache-Control": "no-store"})
        await answer(scope, receive, send)

    def _knows(self, given: str) -> bool:
        return compare_digest(given.encode("utf-8", "surrogateescape"), self._token)

    def _enter(self, request: Request, path: str) -> Response:
        """Set the cookie, and redirect to the same address without the token."""
        rest = [pair for pair in request.query_params.multi_items() if pair[0] != TOKEN_PARAMETER]
        # Two slashes would begin the name of another machine.
        target = "/" + path.lstrip("/") + (f"?{urlencode(rest)}" if rest else "")
        answer = RedirectResponse(target, 303, {"Cache-Control": "no-store"})
        answer.set_cookie(self._cookie, self._token.decode(), httponly=True, samesite="strict")
        return answer


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # Starlette's own say "Not Found"; those of pages.py are sentences.
    sentence = error.detail if error.detail.endswith(".") else None
    return _error_page(request, error.status_code, sentence, dict(error.headers or {}))


def _sdwn_error(request: Request, error: Exception) -> Response:
    if isinstance(error, UsageError):
        return _error_page(request, 400, str(error))
    log.error("%r: %s", str(request.scope["path"]), error)
    return _error_page(request, 500, str(error))


def _fault(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response()  # nobody is there to read it
    debug = log.isEnabledFor(logging.DEBUG)
    log.error("%r: %s", str(request.scope["path"]), first_line(error), exc_info=debug)
    return _error_page(request, 500)


def _error_page(
    request: Request, status: int, message: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    title, usual = ERRORS.get(status, ERRORS[500])
    values = {
        "status": status,
        "title": title,
        "message": message or usual,
        **pages.common_values(request),
    }
    page = render_page("error.html", values)
    return HTMLResponse(page, status, {**(headers or {}), "Cache-Control": "no-store"})

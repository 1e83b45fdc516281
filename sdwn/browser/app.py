"""The web application: its routes, the access token, and error pages.

A request passes, from the outside in:

    hardened             headers against framing, guessing and foreign scripts on every answer
      TrustedHost        the name of this machine in the request: no other site's name for it
        token_gate       the token, where there is one: in the address once, then in a cookie
          the routes     pages.py
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from secrets import compare_digest
from typing import Any
from urllib.parse import urlencode

from anyio import CapacityLimiter, to_thread
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

# By status: the page's title, and its text if the error has none.
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
        "sdwn browse keeps running; the error is in the terminal where it runs.",
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
    # Few images are drawn at once, so that pages need not wait for them.
    at_once = CapacityLimiter(max(2, os.cpu_count() or 1))

    def drawn(answer: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await to_thread.run_sync(answer, request, limiter=at_once)

        return endpoint

    images = [(path, drawn(answer)) for path, answer in IMAGES]
    # For tunnels over slow lines; images and zips are as small as they get.
    zipped = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    if token is not None:
        guards.append(Middleware(token_gate, token=token))
    app = Starlette(
        routes=[
            Route("/synsets/{wnid}.zip", pages.zip_answer),
            *(Route(path, endpoint) for path, endpoint in images),
            *(Route(f"/other{path}", endpoint) for path, endpoint in images),
            *(Route(path, endpoint, middleware=zipped) for path, endpoint in PAGES),
        ],
        middleware=guards,
        exception_handlers=dict.fromkeys((HTTPException, SdwnError, Exception), _answer_error),
    )
    # An address has one spelling.
    app.router.redirect_slashes = False
    app.state.here, app.state.there = here, there
    app.state.side_by_side = SideBySide(here, there) if there else None
    # Around all of it: Starlette puts the answer to an unexpected error before its middleware.
    return hardened(app)


def hardened(app: ASGIApp) -> ASGIApp:
    """Return an application that keeps browsers from loading, framing or guessing anything.

    An error ends here: Starlette raises it again after it was answered, and a server that sees
    one closes the connection of a visitor who may have asked for more already.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with suppress(Exception):
            await app(scope, receive, send_hardened)

    return answer


def token_gate(app: ASGIApp, token: str) -> ASGIApp:
    """Return an application for those who have the token: in an address once, then in a cookie."""
    secret = token.encode()
    # Cookies know no ports: another server's, forwarded to the same name, has another name.
    cookie = f"sdwn-{hashlib.sha256(secret).hexdigest()[:8]}"

    def is_token(given: str) -> bool:
        return compare_digest(given.encode("utf-8", "surrogateescape"), secret)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        # As it was sent: Starlette's own `url.path` has the host's name in front, which a visitor
        # writes, and `a/assets/?` as a name would be a path to there.
        path = str(scope["path"])
        if is_token(request.query_params.get(TOKEN_PARAMETER, "")):
            # To the same address without the token; two slashes would begin another machine's name.
            rest = [
                pair for pair in request.query_params.multi_items() if pair[0] != TOKEN_PARAMETER
            ]
            target = "/" + path.lstrip("/") + (f"?{urlencode(rest)}" if rest else "")
            entered = RedirectResponse(target, 303, {"Cache-Control": "no-store"})
            entered.set_cookie(cookie, token, httponly=True, samesite="strict")
            await entered(scope, receive, send)
        elif is_token(request.cookies.get(cookie, "")) or path.startswith("/assets/"):
            # The style of the page that refuses needs no token: it holds no data.
            await app(scope, receive, send)
        else:
            await _error_page(403)(scope, receive, send)

    return answer


def _answer_error(request: Request, error: Exception) -> Response:
    status, message, headers = 500, None, dict[str, str]()
    if isinstance(error, ClientDisconnect):
        return Response()  # the client has gone
    if isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        # Those of pages.py are sentences, Starlette's own are "Not Found".
        message = error.detail if error.detail.endswith(".") else None
    elif isinstance(error, UsageError):
        status, message = 400, str(error)
    else:
        known = isinstance(error, SdwnError)
        message = str(error) if known else None
        text = message or first_line(error)
        debug = not known and log.isEnabledFor(logging.DEBUG)
        log.error("%r: %s", str(request.scope["path"]), text, exc_info=debug)
    answer = _error_page(status, message, **pages.common_values(request))
    answer.headers.update(headers)
    return answer


def _error_page(status: int, message: str | None = None, **common: Any) -> Response:
    title, usual = ERRORS.get(status, ERRORS[500])
    values = {"status": status, "title": title, "message": message or usual, **common}
    return HTMLResponse(render_page("error.html", values), status, {"Cache-Control": "no-store"})

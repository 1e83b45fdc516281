"""The server of ``sdwn browse``: address, access, routes, error pages.

A request passes, from the outside in:

    hardened           headers against framing, guessing and foreign scripts on every answer
      TrustedHost      the name of this machine in the request: no other site's name for it
        token_gate     the token, where there is one: in the address once, then in a cookie
          the routes   pages.py
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdwn.browser import pages
from sdwn.browser.library import Library, SideBySide
from sdwn.errors import SdwnError, UsageError, first_line

log = logging.getLogger(__name__)

# A new page: its line here, its function in pages.py, and its template.
PAGES = (
    ("/", pages.search_page),
    ("/concepts/{id}", pages.concept_page),
    ("/concepts/{id}/{number}", pages.image_page),
    # Links that people kept from earlier versions.
    ("/synsets/{id}", pages.concept_page),
    ("/synsets/{id}/{number}", pages.image_page),
    ("/tree", pages.tree_page),
    ("/tree/{wnid}", pages.tree_page),
    ("/map", pages.map_page),
    ("/about", pages.about_page),
    ("/compare", pages.compare_page),
    ("/compare/{id}", pages.pair_page),
    ("/list.csv", pages.list_answer),
    ("/assets/{name}", pages.asset_answer),
)
IMAGES = ("/images/{id}/{number}", "/thumbnails/{id}/{number}")
# A page on another site can make its own name mean 127.0.0.1, and would read what is here.
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
ANY_HOST = ("*",)
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
    403: ("Token missing", "Open the whole address that sdwn browse printed, with its token."),
    404: ("Not found", "There is no such page."),
    405: ("Read only", "Pages can be read, and nothing can be sent to them."),
    500: ("Something went wrong", "sdwn browse runs on; the error is in the terminal of it."),
}

PORTS = range(8642, 8742)
# Connections that wait for room in the system's queue.
BACKLOG = 128
# Forty browsers have fewer connections at once; others are answered 503.
MOST_CONNECTIONS = 500


def make_app(
    here: Library,
    there: Library | None = None,
    *,
    token: str | None = None,
    hosts: Sequence[str] = LOOPBACK_HOSTS,
) -> ASGIApp:
    """Make the application that shows a release, perhaps another; without a token, to everybody."""
    # Few images are drawn at once, so that pages need not wait for them.
    at_once = CapacityLimiter(max(2, os.cpu_count() or 1))

    async def picture(request: Request) -> Response:
        return await to_thread.run_sync(pages.picture_answer, request, limiter=at_once)

    # For tunnels over slow lines; images and zips are as small as they get.
    zipped = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    if token is not None:
        guards.append(Middleware(token_gate, token=token))
    app = Starlette(
        routes=[
            Route("/zips/{id}", pages.zip_answer),
            *(Route(path, picture) for path in IMAGES),
            *(Route(f"/other{path}", picture) for path in IMAGES if there),
            *(
                Route(path, endpoint, middleware=zipped)
                for path, endpoint in PAGES
                if there or not path.startswith("/compare")
            ),
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
    """Return an application that keeps browsers from loading, framing or guessing anything."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        # Starlette raises an error again after it was answered, and a server that sees one closes
        # the connection of a visitor who may have asked for more already.
        with suppress(Exception):
            await app(scope, receive, send_hardened)

    return answer


def token_gate(app: ASGIApp, token: str) -> ASGIApp:
    """Return an application for those who have the token: in an address once, then in a cookie."""
    secret = token.encode()
    # Cookies know no ports: another server's, forwarded to the same name, has another name.
    cookie = f"sdwn-{hashlib.sha256(secret).hexdigest()[:8]}"

    def is_token(given: str) -> bool:
        return secrets.compare_digest(given.encode("utf-8", "surrogateescape"), secret)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        # As it was sent: Starlette's own `url.path` has the host's name in front, which a visitor
        # writes, and `a/assets/?` as a name would be a path to there.
        path = str(scope["path"])
        if is_token(request.query_params.get("token", "")):
            # To the same address without the token; two slashes would begin another machine's name.
            rest = [pair for pair in request.query_params.multi_items() if pair[0] != "token"]
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
    status, message, headers = 500, None, None
    if isinstance(error, HTTPException):
        status, headers = error.status_code, error.headers
        # Those of pages.py are sentences, Starlette's own are "Not Found".
        message = error.detail if error.detail.endswith(".") else None
    elif isinstance(error, SdwnError):
        status, message = 400 if isinstance(error, UsageError) else 500, str(error)
    if status == 500:
        debug = message is None and log.isEnabledFor(logging.DEBUG)
        text = message or first_line(error)
        log.error("%r: %s", str(request.scope["path"]), text, exc_info=debug)
    answer = _error_page(status, message, **pages.common_values(request))
    answer.headers.update(headers or {})
    return answer


def _error_page(status: int, message: str | None = None, **common: Any) -> Response:
    title, usual = ERRORS.get(status, ERRORS[500])
    values = {"status": status, "title": title, "message": message or usual, **common}
    page = pages.render_page("error.html", values)
    return HTMLResponse(page, status, {"Cache-Control": "no-store"})


# --- Listening and serving ---------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Listening:
    """A port that is listened at, the address to open, and what `make_app` takes."""

    socket: socket.socket
    port: int
    url: str
    hosts: tuple[str, ...]
    token: str | None

    @property
    def tunnel(self) -> str | None:
        """The command that forwards the port to another machine; None where none is needed."""
        job = "SLURM_JOB_ID" in os.environ
        if self.hosts == ANY_HOST or not (job or "SSH_CONNECTION" in os.environ):
            return None
        user = ""
        with suppress(KeyError, OSError):  # a container's user has no name
            user = f"{getpass.getuser()}@"
        # To a node of SLURM the way is over the login node.
        here, login = socket.gethostname(), os.environ.get("SLURM_SUBMIT_HOST") if job else None
        jump = f"-J {user}{login} " if login and login != here else ""
        return f"ssh -N {jump}-L {self.port}:{self.hosts[-1]}:{self.port} {user}{here}"


@contextmanager
def listen(host: str, port: int | None, token: bool) -> Iterator[Listening]:
    """Listen at this port, or the first free one from 8642 on; off loopback with a token."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no name or address of this machine: {error}") from None
    family, address = found[0][0], str(found[0][4][0])
    for tried in PORTS if port is None else [port]:
        # With its protocol named, asyncio sends small answers at once and not 40 ms later.
        taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((address, tried))
            # Two that were started at once would both have it until one of them listens.
            taken.listen(BACKLOG)
            break
        except OSError as error:
            taken.close()
            if error.errno != errno.EADDRINUSE:
                reason = f"cannot listen at {host}, port {tried}: {error.strerror}"
                raise SdwnError(reason) from None
    else:
        advice = "leave --port away to get the next free one, or choose another"
        raise SdwnError(f"port {tried} is taken; {advice}")
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    # 0.0.0.0 is no machine's name.
    name = socket.gethostname() if address in ("0.0.0.0", "::") else address
    name = f"[{name}]" if ":" in name else name
    secret = secrets.token_urlsafe() if token or not loopback else None
    bound = int(taken.getsockname()[1])
    url = f"http://{name}:{bound}/" + (f"?token={secret}" if secret else "")
    hosts = (*LOOPBACK_HOSTS, name) if loopback else ANY_HOST
    with taken:
        yield Listening(taken, bound, url, hosts, secret)


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Make the server of an application, for a socket that is listened at already."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            limit_concurrency=MOST_CONNECTIONS,
            # Pages have a log of their own: a line an error, none of clients that went away.
            log_config=None,
            log_level="critical",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,  # seconds for downloads that are running
            backlog=BACKLOG,
        )
    )


def serve(app: ASGIApp, listening: Listening) -> None:
    """Serve pages until Ctrl-C or SIGTERM."""
    # uvicorn raises the signal again that ended it; here its end is that of the command.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: None)
    make_server(app).run([listening.socket])

"""Who may look: names of this machine, a token, and what a browser may do with the pages."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable
from contextlib import suppress
from secrets import compare_digest
from urllib.parse import urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PARAMETER = "token"
ASSETS = "/assets/"
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


def is_loopback(address: str) -> bool:
    """Tell whether only this machine can reach an IP address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("10.0.0.7")
    (True, True, False)
    """
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def path_of(request: Request) -> str:
    """Give a request's path, not as Starlette puts an address together: with the host's name.

    A visitor writes that name, and ``a/assets/?`` in its place would be a path to there.
    """
    return str(request.scope["path"])


class Hardened:
    """Adds to every answer what keeps a browser from loading, framing or guessing anything.

    An error ends here: Starlette raises it again after it was answered, and a server that sees
    one hangs up on a visitor who may have asked for more already.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with suppress(Exception):
            await self._app(scope, receive, hardened)


class Gate:
    """Lets in who has the token: from the address once, and from then on by a cookie.

    Args:
        app: what is behind the gate.
        token: the secret.
        refused: answers a request that has it not.
    """

    def __init__(self, app: ASGIApp, token: str, refused: Callable[[Request], Response]) -> None:
        self._app, self._token, self._refused = app, token.encode(), refused
        # Cookies know no ports: another server's, forwarded to the same name, is another's.
        self._cookie = f"sdwn-{hashlib.sha256(self._token).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse to."""
        request = Request(scope)
        given = request.query_params.get(PARAMETER, "")
        if self._knows(given):
            await self._entered(request)(scope, receive, send)
        elif self._knows(request.cookies.get(self._cookie, "")) or _is_open(request):
            await self._app(scope, receive, send)
        else:
            await self._refused(request)(scope, receive, send)

    def _knows(self, given: str) -> bool:
        return compare_digest(given.encode("utf-8", "surrogateescape"), self._token)

    def _entered(self, request: Request) -> Response:
        """Give the cookie, and the same address without the token."""
        rest = [pair for pair in request.query_params.multi_items() if pair[0] != PARAMETER]
        # Two slashes would begin the name of another machine.
        path = "/" + path_of(request).lstrip("/")
        answer = RedirectResponse(path + (f"?{urlencode(rest)}" if rest else ""), 303)
        answer.set_cookie(self._cookie, self._token.decode(), httponly=True, samesite="strict")
        answer.headers["Cache-Control"] = "no-store"
        return answer


def _is_open(request: Request) -> bool:
    """Tell whether a request is for the style of the page that refuses: it says nothing."""
    return path_of(request).startswith(ASSETS)

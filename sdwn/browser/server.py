"""The server: where it listens, what it prints when it is ready, and how it ends."""

from __future__ import annotations

import errno
import getpass
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn

from sdwn.browser.connections import ACCEPTED_AT_ONCE, Connection
from sdwn.browser.guard import ANY_HOST, LOOPBACK_HOSTS, PARAMETER, is_loopback
from sdwn.errors import SdwnError, UsageError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

DEFAULT_PORT = 8642
PORTS_TRIED = 100
# Who downloads when the server ends is not waited for longer.
GRACE_SECONDS = 1
BACKLOG = 512


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a server can be found: its socket, the name of this machine to others, the token."""

    socket: socket.socket
    host: str
    token: str | None

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def port(self) -> int:
        """The port that it has."""
        return int(self.socket.getsockname()[1])

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.socket.getsockname()[0])

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names that a visitor may know this machine by; off loopback any."""
        return (*LOOPBACK_HOSTS, self._host) if self.loopback else ANY_HOST

    @property
    def url(self) -> str:
        """The address to open; with the token, if there is one."""
        query = f"?{PARAMETER}={self.token}" if self.token else ""
        return f"http://{self._host}:{self.port}/{query}"

    @property
    def tunnel(self) -> str | None:
        """The command that brings the page to another machine; None if this one has the screen."""
        jump = _jump(os.environ)
        if not self.loopback or jump is None:
            return None
        target = f"{self.port}:{self._host}:{self.port}"
        return f"ssh -N {jump}-L {target} {_login(socket.gethostname())}"

    @property
    def _host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def _jump(environment: Any) -> str | None:
    """Tell how SSH comes here: directly, over the login node, or (None) that it need not."""
    if "SLURM_JOB_ID" in environment:
        node = environment.get("SLURM_SUBMIT_HOST")
        return f"-J {_login(node)} " if node and node != socket.gethostname() else ""
    return "" if "SSH_CONNECTION" in environment else None


def _login(node: str) -> str:
    try:
        return f"{getpass.getuser()}@{node}"
    except (KeyError, OSError):  # a container's user, whom nobody named
        return node


def listen(host: str, port: int | None, token: bool) -> Listening:
    """Take a port: this one, or without one the first free one from 8642 on.

    Off loopback there is always a token.

    Raises:
        UsageError: no such host is here.
        SdwnError: the port is taken, or all that were tried are.
    """
    family, address = _address(host)
    ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED)
    for wanted in ports:
        try:
            taken = _bound(family, address, wanted)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            raise _unfit(host, wanted, error) from None
        secret = secrets.token_urlsafe() if token or not is_loopback(address) else None
        return Listening(taken, _reachable(address), secret)
    raise SdwnError(
        f"ports {ports[0]} to {ports[-1]} are all taken; choose another one with --port"
    )


def _address(host: str) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host}: expected a name or address of this machine") from None
    family, _, _, _, place = found[0]
    return family, str(place[0])


def _bound(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    # With its protocol named, asyncio sends small answers at once and not 40 ms later.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((address, port))
        # Two that were started at once would both have it until one of them listens.
        taken.listen(BACKLOG)
    except OSError:
        taken.close()
        raise
    return taken


def _unfit(host: str, port: int, error: OSError) -> SdwnError:
    if error.errno == errno.EADDRINUSE:
        return SdwnError(f"port {port} is taken; leave --port away to get the next free one")
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"--host {host}: expected a name or address of this machine")
    return SdwnError(f"cannot listen at {host}, port {port}: {error.strerror}")


def _reachable(address: str) -> str:
    """Name what others open: not 0.0.0.0, which is no machine's name."""
    return socket.gethostname() if address in ("0.0.0.0", "::") else address


class Server(uvicorn.Server):
    """uvicorn's server at a socket that is taken already; it says when it is ready."""

    def __init__(
        self, app: ASGIApp, listening: Listening, ready: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            # Pages have a log of their own: a line an error, none of clients that went away.
            log_config=None,
            log_level="critical",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
            backlog=ACCEPTED_AT_ONCE,
        )
        super().__init__(config)
        self._sockets, self._ready = [listening.socket], ready

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests until it is told to end."""
        super().run(sockets or self._sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        for one in self._sockets:
            # More may stand in line than are taken at once.
            one.listen(BACKLOG)
        self._ready()


def serve(app: ASGIApp, listening: Listening, ready: Callable[[], None]) -> None:
    """Answer requests until Ctrl-C or SIGTERM; ``ready`` is called when the first one may come."""
    with _ending_quietly():
        Server(app, listening, ready).run()


@contextmanager
def _ending_quietly() -> Iterator[None]:
    """Let the server's end be the command's, without a word: uvicorn raises its signal again."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, lambda *_: None) for one in signals]
    try:
        yield
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)

"""The server of ``sdwn browse``: address, limits on connections, shutdown."""

from __future__ import annotations

import asyncio
import errno
import getpass
import ipaddress
import os
import resource
import secrets
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdwn.browser.app import ANY_HOST, LOOPBACK_HOSTS, TOKEN_PARAMETER
from sdwn.errors import SdwnError, UsageError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

DEFAULT_PORT = 8642
PORTS_TRIED = 100
# Downloads that are running when the server ends are not waited for longer.
GRACE_SECONDS = 1
# Connections may wait for room in the system's queue ...
BACKLOG = 512
# ... while asyncio looks for room between such runs of new ones; without any it floods the
# terminal.
ACCEPTED_AT_ONCE = 32
# Forty browsers have fewer connections at once.
MOST_CONNECTIONS = 1000
# From a connection's beginning until what it asks for has arrived. Pages ask with a few hundred
# bytes; uvicorn's own limits begin after that (idle after an answer) or wait for a request.
REQUEST_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Listening:
    """A port that is listened at, and the address and token by which a visitor gets in.

    Attributes:
        url: the address to open; with the token, if there is one.
        hosts: the names that a visitor may know this machine by.
        token: what lets a visitor in; None lets everybody in.
    """

    socket: socket.socket
    port: int
    url: str
    hosts: tuple[str, ...]
    token: str | None

    def __enter__(self) -> Listening:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def tunnel(self) -> str | None:
        """The command that forwards the port to another machine; None where none is needed.

        In a SLURM job the tunnel goes over the login node.
        """
        job = "SLURM_JOB_ID" in os.environ
        if self.hosts == ANY_HOST or not (job or "SSH_CONNECTION" in os.environ):
            return None
        here, login = socket.gethostname(), os.environ.get("SLURM_SUBMIT_HOST") if job else None
        jump = f"-J {_user_at(login)} " if login and login != here else ""
        return f"ssh -N {jump}-L {self.port}:{self.hosts[-1]}:{self.port} {_user_at(here)}"


def _user_at(node: str) -> str:
    try:
        return f"{getpass.getuser()}@{node}"
    except (KeyError, OSError):  # a container's user without a name
        return node


def listen(host: str, port: int | None, token: bool) -> Listening:
    """Listen at a port: this one, or without one the first free one from 8642 on.

    Off loopback there is always a token, and this machine may have any name.

    Raises:
        UsageError: this machine has no such host.
        SdwnError: the port is taken, or all that were tried are.
    """
    unknown = UsageError(f"--host {host}: expected a name or address of this machine")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise unknown from None
    family, address = found[0][0], str(found[0][4][0])
    ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED)
    for tried in ports:
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
            if error.errno == errno.EADDRNOTAVAIL:
                raise unknown from None
            if error.errno != errno.EADDRINUSE:
                reason = f"cannot listen at {host}, port {tried}: {error.strerror}"
                raise SdwnError(reason) from None
    else:
        raise SdwnError(
            f"port {port} is taken; leave --port away to get the next free one"
            if port is not None
            else f"ports {ports[0]} to {ports[-1]} are all taken; choose another one with --port"
        )
    loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    # 0.0.0.0 is no machine's name.
    name = socket.gethostname() if address in ("0.0.0.0", "::") else address
    name = f"[{name}]" if ":" in name else name
    secret = secrets.token_urlsafe() if token or not loopback else None
    bound = int(taken.getsockname()[1])
    return Listening(
        socket=taken,
        port=bound,
        url=f"http://{name}:{bound}/" + (f"?{TOKEN_PARAMETER}={secret}" if secret else ""),
        hosts=(*LOOPBACK_HOSTS, name) if loopback else ANY_HOST,
        token=secret,
    )


class Connection(H11Protocol):
    """uvicorn's connection, closed where a request does not arrive, or there are too many."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection, or close it if there are too many."""
        super().connection_made(transport)
        # Files that the process may open (-1: any number) are needed for more than connections.
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(MOST_CONNECTIONS, files // 4) if files > 0 else MOST_CONNECTIONS
        if len(self.connections) > most:
            transport.abort()
        else:
            self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Read a request, or some of one."""
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_timer()
        elif self._timer is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of a connection that has ended."""
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn's server, which calls ``on_ready`` when the first request may come."""

    def __init__(self, app: ASGIApp, on_ready: Callable[[], None] = lambda: None) -> None:
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
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to answer requests."""
        await super().startup(sockets)
        for one in sockets or ():
            # asyncio made the queue as short as what it accepts at once.
            one.listen(BACKLOG)
        self._on_ready()


def serve(app: ASGIApp, listening: Listening, on_ready: Callable[[], None]) -> None:
    """Serve pages until Ctrl-C or SIGTERM."""
    # uvicorn raises the signal again that ended it; here its end is that of the command.
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, lambda *_: None) for one in signals]
    try:
        Server(app, on_ready).run([listening.socket])
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, handler)

"""Connections to the server: how many there may be, and how long one may take to ask."""

from __future__ import annotations

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# From a connection's beginning until what it asks for has arrived; pages ask with a few hundred
# bytes, and uvicorn waits for ever.
PATIENCE_SECONDS = 20.0
# Forty browsers have fewer at once.
MOST = 1000
# asyncio looks for room between such runs of new connections, and without any it floods the
# terminal.
ACCEPTED_AT_ONCE = 32


def most() -> int:
    """Tell how many connections fit, the files that the process may open being for more than them.

    >>> 0 < most() <= MOST
    True
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if files == resource.RLIM_INFINITY else min(MOST, files // 4)


class Connection(H11Protocol):
    """uvicorn's connection, which hangs up on who does not ask, and where there are too many."""

    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a visitor in, or turn one away."""
        super().connection_made(transport)
        if len(self.connections) > most():
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        """Read a request, or some of one."""
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif self._waits is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a visitor who has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waits = self.loop.call_later(PATIENCE_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None

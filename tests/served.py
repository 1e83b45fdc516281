"""Releases that are served by a thread of this process, at a free port."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from sdwn.browser.library import Library
from sdwn.browser.server import listen, make_app, make_server

from conftest import wait_until


@contextlib.contextmanager
def served(*libraries: Library, **options: Any) -> Iterator[str]:
    """Serve a release, or two side by side; give the address without a slash at its end."""
    with listen("127.0.0.1", 0, token=False) as listening:
        server = make_server(make_app(*libraries, **options))
        thread = threading.Thread(target=server.run, args=([listening.socket],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listening.port}"
        finally:
            server.should_exit = True
            thread.join()

"""Ports that nobody listens on."""

from __future__ import annotations

import random
import socket


def free_port(*, below: int = 65_536) -> int:
    """below: also leave room above it, as a Cluster's nodes speak to each other at port + 10,000."""
    if below == 65_536:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
            return port
    while True:
        port = random.randrange(10_000, below)
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 10_000)):
                return port
        except OSError:
            continue

"""Python client of the Mixtral chat service, and the wire that its server and workers share.

from mixtral_client import MixtralClient     # the client: see clients/python/README.md
from mixtral_client import SyncClient        # the same for scripts that are not asynchronous
from mixtral_client import protocol          # the wire; needs pydantic alone
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_client.client import Answer, JobOptions, JobStream, MixtralClient
    from mixtral_client.errors import MixtralError
    from mixtral_client.resume import Retry, Timeouts
    from mixtral_client.sync import SyncClient, SyncStream

    __version__: str

__all__ = [
    "Answer",
    "JobOptions",
    "JobStream",
    "MixtralClient",
    "MixtralError",
    "Retry",
    "SyncClient",
    "SyncStream",
    "Timeouts",
    "__version__",
]

HOMES = {
    "Answer": "client",
    "JobOptions": "client",
    "JobStream": "client",
    "MixtralClient": "client",
    "MixtralError": "errors",
    "Retry": "resume",
    "SyncClient": "sync",
    "SyncStream": "sync",
    "Timeouts": "resume",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # The server and the workers import the wire from here, and must not load an HTTP client with it.
    if name == "__version__":
        from importlib.metadata import version

        return version("mixtral-chat")
    if name not in HOMES:
        raise AttributeError(f"module 'mixtral_client' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mixtral_client.{HOMES[name]}"), name)

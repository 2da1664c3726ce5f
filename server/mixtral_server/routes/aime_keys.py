"""Whose key an AIME request names: of the database, or of the endpoint's own file.

Decides that a key counts by what it is and where it stands, in the request itself. Leaves keys of the database to auth.py, and what a wrong
one is answered with to the routes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from aiohttp import web

from mixtral_server.apikeys import Scope
from mixtral_server.auth import Caller
from mixtral_server.endpoints import EndpointConfig
from mixtral_server.errors import NotAllowed, NotAuthenticated
from mixtral_server.routes.service import Service

FILE_KEY = "aime_file"  # whose sessions are those of workers with the key of the endpoint's file


async def holder(service: Service, request: web.Request, key: object, scope: Scope) -> Caller | None:
    """Who this key belongs to; None for one that is unknown, revoked or for something else. Raises Unavailable."""
    if not (isinstance(key, str) and key and key.isascii() and key.isprintable()):
        return None
    try:
        return await service.auth.caller(request.clone(headers={"Authorization": f"Bearer {key}"}), scope)
    except (NotAuthenticated, NotAllowed):
        return None


async def client(service: Service, request: web.Request, key: object) -> Caller | None:
    """Who asks with this client key, one of an endpoint file's among them."""
    found = await holder(service, request, key, "client")
    if found is not None or not isinstance(key, str):
        return found
    hashed = _sha256(key)
    endpoints = frozenset(one.name for one in service.endpoints.values() if _is_among(hashed, one.clients.key_names))
    owner = f"aime-{hashed[:32]}"
    return Caller(owner, frozenset({"client"}), owner, endpoints) if endpoints else None


async def worker_key_id(service: Service, request: web.Request, key: object, endpoint: EndpointConfig) -> str | None:
    """Under which name the sessions of this worker key stand at the endpoint; None for a key that is not good there."""
    if isinstance(key, str) and endpoint.worker.auth_key_sha256 and _is_among(_sha256(key), [endpoint.worker.auth_key_sha256]):
        return FILE_KEY
    caller = await holder(service, request, key, "worker")
    return caller.key_id if caller is not None and caller.may_use(endpoint.name) else None


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _is_among(hashed: str, known: Iterable[str]) -> bool:
    """In a time that does not depend on how much of it is right."""
    return sum(hmac.compare_digest(hashed, one) for one in known) > 0

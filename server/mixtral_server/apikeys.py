"""What an API key is: its form, its hash, what it may do. Pure; the table of keys is accounts.py, the checking of callers auth.py.

A key is `mx-<letter>-<43 characters>`: 256 random bits in URL-safe base64. Its first 11 characters are its visible name in lists and logs;
the 220 bits after them are never stored or shown again. Stored is the SHA-256: with so many random bits no slow hash is needed.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Scope: TypeAlias = Literal["client", "worker", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX_LENGTH = 11


@dataclass(frozen=True)
class KeyLimits:
    """What the jobs of one key are held to, at each endpoint. None: what the endpoint says; 0: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_running: int | None = None
    priority: int = 0  # the smallest number, and so the best place, that its jobs may have


NO_LIMITS = KeyLimits()


@dataclass(frozen=True)
class ApiKey:
    """A row of the table of keys, joined with its user. No endpoints means every endpoint."""

    id: str
    user_id: str
    user: str
    name: str
    prefix: str
    sha256: str
    scopes: frozenset[Scope]
    endpoints: frozenset[str]
    weight: float
    created_s: float
    revoked_s: float | None = None
    limits: KeyLimits = NO_LIMITS


def new_secret(scope: Scope) -> str:
    return f"mx-{scope[0]}-{secrets.token_urlsafe(32)}"


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def prefix_of(secret: str) -> str:
    return secret[:PREFIX_LENGTH]

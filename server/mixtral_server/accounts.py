"""Users and their API keys in SQL, and the secrets that all replicas share.

Decides how a key comes to be and ends. Leaves to auth.py who may do what, and to apikeys.py what a key looks like.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, String, Table, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mixtral_server.apikeys import NO_LIMITS, SCOPES, ApiKey, KeyLimits, Scope, hash_of, new_secret, prefix_of
from mixtral_server.database import METADATA, Database

USERS = Table(
    "users",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("weight", Float, nullable=False),  # share of the queue against other users
    Column("created_s", Float, nullable=False),
)
KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("user_id", String(40), ForeignKey("users.id"), nullable=False),
    Column("name", String(100), nullable=False),
    Column("prefix", String(20), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("scopes", String(100), nullable=False),  # words with blanks between
    Column("endpoints", String(1000), nullable=False),  # likewise; "" is every endpoint
    Column("created_s", Float, nullable=False),
    Column("revoked_s", Float),
    Column("requests_per_minute", Integer),  # this and the next two: NULL is what the endpoint says, 0 is no limit
    Column("tokens_per_minute", BigInteger),
    Column("max_running", Integer),
    Column("priority", Integer, nullable=False, server_default="0"),  # the best that its jobs may have
)
SECRETS = Table("secrets", METADATA, Column("name", String(40), primary_key=True), Column("value", String(200), nullable=False))

_KEY_COLUMNS = (*KEYS.c, USERS.c.name.label("user"), USERS.c.weight)


class KeyNotFound(Exception):
    """No key, or more than one, answers to what was given."""


class Accounts:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def keys(self, with_revoked: bool = False) -> list[ApiKey]:
        """In order of creation."""
        query = select(*_KEY_COLUMNS).join(USERS, USERS.c.id == KEYS.c.user_id).order_by(KEYS.c.created_s, KEYS.c.id)
        if not with_revoked:
            query = query.where(KEYS.c.revoked_s.is_(None))
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        return [
            ApiKey(
                id=row.id,
                user_id=row.user_id,
                user=row.user,
                name=row.name,
                prefix=row.prefix,
                sha256=row.sha256,
                scopes=frozenset(scope for scope in SCOPES if scope in row.scopes.split()),
                endpoints=frozenset(row.endpoints.split()),
                weight=row.weight,
                created_s=row.created_s,
                revoked_s=row.revoked_s,
                limits=KeyLimits(row.requests_per_minute, row.tokens_per_minute, row.max_running, row.priority),
            )
            for row in rows
        ]

    async def create_key(
        self,
        *,
        user: str,
        name: str,
        scopes: Sequence[Scope],
        now_s: float,
        endpoints: Sequence[str] = (),
        weight: float | None = None,
        limits: KeyLimits = NO_LIMITS,
    ) -> str:
        """A new key of that user, who is made when unknown. Returns the key itself: it can be read this once."""
        async with self._database.writing() as connection:
            return await _add_key(connection, user, name, scopes, endpoints, weight, now_s, limits)

    async def set_key(self, name: str, limits: Mapping[str, int | None], weight: float | None = None) -> ApiKey:
        """Change those of the key's limits that are named, and its user's weight when given. Raises KeyNotFound."""
        key = await self.key(name)
        async with self._database.writing() as connection:
            if limits:
                await connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(**limits))
            if weight is not None:
                await connection.execute(update(USERS).where(USERS.c.id == key.user_id).values(weight=weight))
        return await self.key(key.id)

    async def revoke_key(self, name: str, now_s: float) -> ApiKey:
        """End the key with this id, visible prefix or name. Raises KeyNotFound unless exactly one live key answers to it."""
        key = await self.key(name)
        async with self._database.writing() as connection:
            await connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(revoked_s=now_s))
        return key

    async def key(self, name: str) -> ApiKey:
        """The live key with this id, visible prefix or name. Raises KeyNotFound unless exactly one answers to it."""
        found = [key for key in await self.keys() if name in (key.id, key.prefix, key.name)]
        if len(found) != 1:
            shown = ", ".join(key.id for key in found) or "none"
            raise KeyNotFound(
                f"exactly one live key must have the id, prefix or name {name!r}; found {shown}: see `mixtral-server keys list`"
            )
        return found[0]

    async def create_first_keys(self, now_s: float) -> dict[Scope, str] | None:
        """One client, one worker and one admin key when there has never been a key, however many replicas ask at once; else None."""
        async with self._database.writing() as connection:
            if (await connection.execute(select(func.count()).select_from(KEYS))).scalar_one():
                return None
            return {scope: await _add_key(connection, "operator", f"first {scope}", [scope], (), None, now_s) for scope in SCOPES}

    async def shared_secret(self, name: str) -> bytes:
        """256 random bits, the same for every replica, made by whoever asks first."""
        async with self._database.writing() as connection:
            value = (await connection.execute(select(SECRETS.c.value).where(SECRETS.c.name == name))).scalar_one_or_none()
            if value is None:
                value = secrets.token_hex(32)
                await connection.execute(insert(SECRETS).values(name=name, value=value))
        return bytes.fromhex(value)


async def _add_key(
    connection: AsyncConnection,
    user: str,
    name: str,
    scopes: Sequence[Scope],
    endpoints: Sequence[str],
    weight: float | None,
    now_s: float,
    limits: KeyLimits = NO_LIMITS,
) -> str:
    user_id = (await connection.execute(select(USERS.c.id).where(USERS.c.name == user))).scalar_one_or_none()
    if user_id is None:
        user_id = f"u{secrets.token_hex(8)}"
        await connection.execute(insert(USERS).values(id=user_id, name=user, weight=1.0 if weight is None else weight, created_s=now_s))
    elif weight is not None:
        await connection.execute(update(USERS).where(USERS.c.id == user_id).values(weight=weight))
    secret = new_secret(scopes[0])
    await connection.execute(
        insert(KEYS).values(
            id=f"k{secrets.token_hex(8)}",
            user_id=user_id,
            name=name,
            prefix=prefix_of(secret),
            sha256=hash_of(secret),
            scopes=" ".join(scopes),
            endpoints=" ".join(endpoints),
            created_s=now_s,
            **asdict(limits),
        )
    )
    return secret

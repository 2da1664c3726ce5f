"""What AIME's clients hold in their hands: job ids and session keys that any replica can check without having kept anything. Pure.

On AIME's wire whoever names a job may read it, so a job id there is the queue's id with a seal: ids of other wires open nothing. A session
key is the API key of the login, encrypted: a revoked key ends its sessions too, and no answer shows a key. Leaves to aime.py who gets them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import secrets

NONCE_BYTES = 16
SEAL_BYTES = 16


class Tickets:
    """One per process; the counter behind `#` in job ids starts at 1, as AIME's does."""

    def __init__(self, secret: bytes) -> None:
        """secret: 256 bits that all replicas share."""
        self._job_secret, self._stream_secret, self._session_secret = (
            hmac.digest(secret, purpose, "sha256") for purpose in (b"job", b"stream", b"session")
        )
        self._numbers = itertools.count(1)

    def of_job(self, job_id: str) -> str:
        """`<job id>.<seal>#<number>`"""
        return f"{job_id}.{self._seal_of_job(job_id)}#{next(self._numbers)}"

    def job_of(self, ticket: str) -> str | None:
        """The queue's id; None for what was not made here."""
        job_id, _, seal = ticket.partition("#")[0].rpartition(".")
        is_ours = hmac.compare_digest(_bytes(self._seal_of_job(job_id)), _bytes(seal))
        return job_id if is_ours else None

    def session_key(self, key: str) -> str:
        nonce = secrets.token_bytes(NONCE_BYTES)
        closed = nonce + self._crypt(nonce, _bytes(key))
        return base64.urlsafe_b64encode(self._seal_of_session(closed) + closed).decode()

    def key_of(self, session_key: str) -> str | None:
        """The API key of the login; None for what was not made here."""
        try:
            given = base64.urlsafe_b64decode(_bytes(session_key))
        except binascii.Error:
            return None
        seal, closed = given[:SEAL_BYTES], given[SEAL_BYTES:]
        if not hmac.compare_digest(self._seal_of_session(closed), seal):
            return None
        return self._crypt(closed[:NONCE_BYTES], closed[NONCE_BYTES:]).decode("utf-8", "surrogatepass")

    def _crypt(self, nonce: bytes, text: bytes) -> bytes:
        """Its own inverse: exclusive or with a stream that SHAKE256 makes of secret and nonce."""
        stream = hashlib.shake_256(self._stream_secret + nonce).digest(len(text))
        return bytes(a ^ b for a, b in zip(text, stream, strict=True))

    def _seal_of_job(self, job_id: str) -> str:
        return hmac.digest(self._job_secret, _bytes(job_id), "sha256")[:SEAL_BYTES].hex()

    def _seal_of_session(self, closed: bytes) -> bytes:
        return hmac.digest(self._session_secret, closed, "sha256")[:SEAL_BYTES]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

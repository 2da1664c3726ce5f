"""Real parts that tests need and Python cannot bring: their absence fails the tests that need them, and is said once at the end."""

from __future__ import annotations


class PartMissing(RuntimeError):
    """A part of the test set-up is not on this machine; the message names the line that installs it."""

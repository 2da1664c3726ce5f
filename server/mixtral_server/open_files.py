"""Open files: how many this process may have. Every connection is one.

A login shell gives its programs 1,024 on most systems, and lets them ask for more themselves, up to a hard limit that only root can raise.
"""

from __future__ import annotations

import resource
import sys


def allow_open_files(wanted: int) -> int:
    """Ask for as many, or as near to them as the system lets this process go. Returns how many it may have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft >= wanted:
        return soft
    raised = min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, limits[1]))
    except (OSError, ValueError):  # macOS has a lower bound than the one it shows
        return soft
    return raised

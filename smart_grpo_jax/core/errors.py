"""Errors that a user meets: one line on stderr, one exit code each, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LINE_LIMIT = 200


class UserError(Exception):
    """A mistake in what was asked: `field: got value, wanted what (try nearest)`. Exit code 2."""

    exit_code = 2

    @property
    def line(self) -> str:
        """The message as the single line that is printed, at most 200 characters."""
        text = " ".join(str(self).split())
        return text if len(text) <= LINE_LIMIT else text[: LINE_LIMIT - 1] + "…"


class LockedError(UserError):
    """The run folder belongs to a running process."""

    exit_code = 3


class NumericsError(UserError):
    """Losses or parameters stopped being numbers."""

    exit_code = 4


class RewardError(UserError):
    """A reward failed, or failed its check."""

    exit_code = 5


class StorageError(UserError):
    """A file could not be written, or everything stored is damaged."""

    exit_code = 6


class PleaseRestart(UserError):
    """Nothing is lost: the same command goes on from the last checkpoint."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that ends a message about an unknown name: `try "x"`, or the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'try "{close[0]}"' if close else "known: " + ", ".join(known)

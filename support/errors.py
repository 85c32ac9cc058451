"""The two failures that a script says in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend. The scripts print it as one line and exit with 2."""


class Diverged(RuntimeError):
    """The loss is no longer finite. The scripts print it as one line and exit with 1."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)

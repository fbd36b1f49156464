"""Errors that a user can mend. The command line prints them in one or two lines and exits with their code."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong use or bad input: the message says what is wrong and what to do about it."""

    exit_code = 2


class StoreUnavailableError(UserError):
    """The object storage did not answer until the deadline. It may later: a job with this code comes back."""

    exit_code = 69


class PortTakenError(UserError):
    """Another program listens where the ranks are to meet. The next attempt of a job takes another port."""

    # EX_PROTOCOL of sysexits.h.
    exit_code = 76

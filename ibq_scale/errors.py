"""Errors for users. The command line prints them in one or two lines and exits with their code."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong use or bad input. The message names the fault and the fix."""

    exit_code = 2


class StoreUnavailableError(UserError):
    """The object storage did not answer within the deadline. A job with this code is requeued."""

    exit_code = 69


class PortTakenError(UserError):
    """Another program has the rendezvous port. The next attempt of a job takes another port."""

    # EX_PROTOCOL of sysexits.h.
    exit_code = 76

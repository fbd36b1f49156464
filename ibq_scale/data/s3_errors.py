"""Classifies errors of an S3 store: transient ones, and messages for the others."""

from __future__ import annotations

import os
from typing import Any

from ibq_scale.errors import UserError

ANONYMOUS = "IBQ_SCALE_S3_ANONYMOUS"
# With 200, the error is inside the body.
_TRANSIENT_STATUS = {200, 408, 409, 425, 429}
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}


class ShortReadError(OSError):
    """A store delivered fewer bytes than requested, although the object has them."""


class AnswerError(Exception):
    """An error answered by the store, in botocore's form."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message or code)
        self.response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}


class PastEndError(Exception):
    """A range begins at or after the object's end."""


def fault(error: Exception, url: str, *, writing: bool, patient: bool) -> Exception | None:
    """The error to raise if no retry can help. None for a transient failure.

    `url`: s3://bucket/prefix. `patient`: whether an unreachable endpoint is transient. `writing`: whether the request
    writes.
    """
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(error, UserError):
        return error
    if _status(error):
        return _refusal(error, url, writing)
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return UserError(
            f"{url}: no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            f"or {ANONYMOUS}=1 for a public bucket"
        )
    if unreachable(error) and not patient:
        return UserError(f"{url}: {cannot_connect(error)}")
    transient = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError)
    damaged = (boto.FlexibleChecksumError, boto.MetadataRetrievalError, boto.CredentialRetrievalError)
    # aiohttp is not imported: it is a dependency of aiobotocore, replaceable by another client.
    http = any(base.__module__.startswith("aiohttp") for base in type(error).__mro__)
    if http or isinstance(error, (OSError, *transient, *damaged)):
        return None
    if isinstance(error, boto.BotoCoreError):
        return UserError(f"{url}: {first_line(error)}")
    return error


def unreachable(error: Exception) -> bool:
    """Whether no connection was made: refused, unknown host, TLS failure."""
    from botocore import exceptions as boto

    return isinstance(error, (boto.EndpointConnectionError, boto.SSLError, boto.ProxyConnectionError))


def cannot_connect(error: Exception) -> str:
    """The message, with the settings to check."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint")
    return f"cannot connect to {endpoint} ({first_line(error)}): check AWS_ENDPOINT_URL and the network"


def _refusal(error: Exception, url: str, writing: bool) -> Exception | None:
    """As `fault`, for a response of the server."""
    bucket = url.removeprefix("s3://").partition("/")[0]
    code, status, reason = _code(error), _status(error), first_line(error)
    if code == "NoSuchBucket" or (writing and status == 404 and code != "NoSuchUpload"):
        return UserError(f"bucket '{bucket}' does not exist: create it or correct {url}")
    if status == 404:
        return error if isinstance(error, FileNotFoundError) else FileNotFoundError(reason)
    if status == 416:
        return PastEndError(reason)
    if code in _EXPIRED_CODES:
        return UserError(f"{url}: the credentials have expired ({code}: {reason}): renew them")
    if denied(error):
        return UserError(f"{url}: access denied ({code}: {reason}): check the credentials")
    if status in _TRANSIENT_STATUS or (status >= 500 and status != 501) or code in _TRANSIENT_CODES:
        return None
    hint = ""
    if status == 301 or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        hint = ": is AWS_DEFAULT_REGION the bucket's?"
    elif writing:
        hint = ": a store without checksums needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
    return UserError(f"{url}: the store refused ({code}: {reason}){hint}")


def _response(error: Exception) -> dict[str, Any]:
    """The server's response behind an error of s3fs or botocore. Empty without a response."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


def _status(error: Exception) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Exception) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def denied(error: Exception) -> bool:
    """Whether access was denied. HEAD has no body, so its code for an expired token is the status, 400 at AWS."""
    code = _code(error)
    return _status(error) in (401, 403) or code in _EXPIRED_CODES or code == "400"


def status_of(error: Exception) -> str:
    """``, status 503`` if the server responded."""
    return f", status {status}" if (status := _status(error)) else ""


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__

"""What can go wrong for a caller of the client, one class for each thing to do about it.

    MixtralError                     .message .code .status .kind .param .request_id
    ├── Refused                      any other status
    │   ├── RequestRefused           400 408 413 415 422, and what the client itself finds wrong with a request: change it
    │   │   └── NotFound             404: no such model, or no such job (any more)
    │   ├── NotAuthenticated         401, or no key at all
    │   ├── NotAllowed               403
    │   ├── LimitReached             429: try later (.retry_after_s)
    │   └── ServerFailed             5xx
    │       └── Unavailable          502 503 504: try later (.retry_after_s)
    ├── JobFailed                    the job was taken and ended in an error; code and sentence are the worker's (.job_id)
    │   └── JobStopped               the job was cancelled, or expired in the queue (.finish)
    ├── TimedOut                     the caller's own limit passed: first_token_s or total_s of Timeouts (.limit .job_id)
    ├── ConnectionLost               nobody answered, for as long as the client goes on trying
    └── BadAnswer                    an answer that this wire does not know
        └── EventTooLarge            one event of a stream beyond the limit

LimitReached, Unavailable and ConnectionLost reach a caller only after the client's own tries. The codes of answers are the service's;
connection_lost, connect_timeout, answer_timeout and silence_timeout (of ConnectionLost), first_token_timeout, total_timeout, bad_answer
and no_api_key are the client's own. Errors may be copied and pickled. Leaves the choice of class by status to `refusal`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from pydantic import ValidationError

from mixtral_client.protocol import ErrorBody, ErrorDetail, Finish


class MixtralError(Exception):
    def __init__(self, message: str, *, code: str, status: int | None = None, kind: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.kind = kind
        self.param = param
        self.request_id: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with the message alone, which would fail where errors cross processes.
        return _bare, (type(self), self.args), self.__dict__


def _bare(kind: type[MixtralError], args: tuple[Any, ...]) -> MixtralError:
    return kind.__new__(kind, *args)


class Refused(MixtralError):
    """The server answered, and not with a 2xx. retry_after_s is what it asked to wait, if it did."""

    retry_after_s: float | None = None


class RequestRefused(Refused):
    pass


class NotFound(RequestRefused):
    pass


class NotAuthenticated(Refused):
    pass


class NotAllowed(Refused):
    pass


class LimitReached(Refused):
    pass


class ServerFailed(Refused):
    pass


class Unavailable(ServerFailed):
    pass


class JobFailed(MixtralError):
    def __init__(self, job_id: str, detail: ErrorDetail) -> None:
        super().__init__(detail.message, code=detail.code, kind=detail.type, param=detail.param)
        self.job_id = job_id


class JobStopped(JobFailed):
    """Raised by chat() and complete(), which promise a whole answer; a stream gives the `done` event instead."""

    def __init__(self, job_id: str, finish: Finish, text: str) -> None:
        message = f"job {job_id} was {finish} after {len(text):,} characters of its answer; they are in .text"
        super().__init__(job_id, ErrorDetail(message=message, type="job_stopped", code=finish))
        self.finish = finish
        self.text = text


class TimedOut(MixtralError):
    """Without detach the job was cancelled; with it, and for a mere reader, it runs on."""

    def __init__(self, limit: Literal["first_token", "total"], limit_s: float, job_id: str) -> None:
        missed = "brought no token" if limit == "first_token" else "was not finished"
        name = f"job {job_id}" if job_id else "the job, which has no id yet,"
        super().__init__(f"{name} {missed} within {limit}_s, {limit_s:g} s; allow more, or ask for less", code=f"{limit}_timeout")
        self.limit = limit
        self.job_id = job_id


class ConnectionLost(MixtralError):
    """Of one try. The code says where a limit of Timeouts passed: connect_timeout, answer_timeout or silence_timeout."""

    def __init__(self, message: str, *, code: str = "connection_lost") -> None:
        super().__init__(message, code=code)


class BadAnswer(MixtralError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="bad_answer")


class EventTooLarge(BadAnswer):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"one event of the stream is larger than {limit_bytes:,} bytes, the most this client holds; look at what sends it")


PASSING = (LimitReached, Unavailable, ConnectionLost)
"""What the same request may not meet again later."""

CLASS_OF_STATUS: dict[int, type[Refused]] = {
    400: RequestRefused,
    401: NotAuthenticated,
    403: NotAllowed,
    404: NotFound,
    408: RequestRefused,
    413: RequestRefused,
    415: RequestRefused,
    422: RequestRefused,
    429: LimitReached,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def refusal(asked: str, status: int, headers: Mapping[str, str], body: bytes) -> Refused:
    """The error of a non-2xx answer: the service's own sentence where there is one. asked is for people: 'POST http://…'."""
    found = CLASS_OF_STATUS.get(status, ServerFailed if status >= 500 else Refused)
    try:
        detail = ErrorBody.model_validate_json(body).error
        error = found(detail.message, code=detail.code, status=status, kind=detail.type, param=detail.param)
    except ValidationError:  # not the service but a proxy speaks
        said = body[:200].decode(errors="replace").strip()
        error = found(f"{asked} was answered {status}: {said}", code=f"http_{status}", status=status)
    error.request_id = headers.get("x-request-id")
    error.retry_after_s = retry_after_s(headers.get("retry-after"), now=datetime.now(UTC))
    return error


def retry_after_s(header: str | None, *, now: datetime) -> float | None:
    """Retry-After as seconds from now: a number of seconds or an HTTP date. None if absent or neither."""
    if header is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d+)?", header.strip()):
        return float(header)
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - now).total_seconds())

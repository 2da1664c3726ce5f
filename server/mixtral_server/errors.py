"""What can go wrong for a caller: one class, one code word, one HTTP status each.

    ServiceError                     500 internal_error
    ├── RequestRefused               400 invalid_request
    │   ├── ContextLengthExceeded    400 context_length_exceeded
    │   ├── ModelNotFound            404 model_not_found
    │   ├── JobNotFound              404 job_not_found
    │   ├── RouteNotFound            404 route_not_found
    │   ├── MethodNotAllowed         405 method_not_allowed
    │   ├── BodyTooSlow              408 body_too_slow
    │   ├── SessionLapsed            410 session_lapsed
    │   ├── JobCancelled             410 cancelled
    │   ├── BodyTooLarge             413 body_too_large
    │   ├── WrongContentType         415 wrong_content_type
    │   └── IdempotencyConflict      422 idempotency_conflict
    ├── NotAuthenticated             401 invalid_api_key
    ├── NotAllowed                   403 not_allowed
    ├── LimitReached                 429 rate_limit_exceeded
    │   ├── QueueFull                429 queue_full
    │   └── TooManySessions          429 too_many_sessions
    ├── JobFailed                    500 (the worker's own code word)
    └── Unavailable                  503 unavailable
        ├── JobExpired               503 expired
        └── RedisUnavailable         503 redis_unavailable

Leaves to app.py how an error becomes a body, and to whoever raises it the sentence: what was asked, the rule with its number,
what was given, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixtral_client.protocol import ErrorBody, ErrorDetail
from mixtral_server.rates import Allowance


class ServiceError(Exception):
    status = 500
    code = "internal_error"
    kind = "server_error"  # OpenAI's error.type

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def detail(self) -> ErrorDetail:
        return ErrorDetail(message=self.message, type=self.kind, param=self.param, code=self.code)

    def body(self) -> ErrorBody:
        return ErrorBody(error=self.detail())


class RequestRefused(ServiceError):
    status, code, kind = 400, "invalid_request", "invalid_request_error"


class ContextLengthExceeded(RequestRefused):
    code = "context_length_exceeded"


class ModelNotFound(RequestRefused):
    status, code = 404, "model_not_found"


class JobNotFound(RequestRefused):
    status, code = 404, "job_not_found"


class RouteNotFound(RequestRefused):
    status, code = 404, "route_not_found"


class MethodNotAllowed(RequestRefused):
    status, code = 405, "method_not_allowed"


class BodyTooSlow(RequestRefused):
    status, code = 408, "body_too_slow"


class SessionLapsed(RequestRefused):
    status, code = 410, "session_lapsed"


class JobCancelled(RequestRefused):
    """An OpenAI call whose job was cancelled. Not 409, which clients of OpenAI's take as a call to try again."""

    status, code = 410, "cancelled"


class BodyTooLarge(RequestRefused):
    status, code = 413, "body_too_large"


class WrongContentType(RequestRefused):
    status, code = 415, "wrong_content_type"


class IdempotencyConflict(RequestRefused):
    status, code = 422, "idempotency_conflict"


class NotAuthenticated(ServiceError):
    status, code, kind = 401, "invalid_api_key", "authentication_error"


class NotAllowed(ServiceError):
    status, code, kind = 403, "not_allowed", "permission_error"


class LimitReached(ServiceError):
    """allowances: what the caller's rates still hold, for the answer's headers."""

    status, code, kind = 429, "rate_limit_exceeded", "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None, allowances: Sequence[Allowance] = ()) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.allowances = tuple(allowances)


class QueueFull(LimitReached):
    code = "queue_full"


class TooManySessions(LimitReached):
    code = "too_many_sessions"


class JobFailed(ServiceError):
    """The job ended in an error of its worker's; carries the worker's own code word and sentence."""

    def __init__(self, detail: ErrorDetail) -> None:
        super().__init__(detail.message, param=detail.param)
        self.code, self.kind = detail.code, detail.type
        self.status = 400 if detail.type == "invalid_request_error" else 500


class Unavailable(ServiceError):
    status, code = 503, "unavailable"


class JobExpired(Unavailable):
    """No worker began the job within its queue time."""

    code = "expired"


class RedisUnavailable(Unavailable):
    code = "redis_unavailable"

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

Each says in `when` what it is for; docs/api.md and openapi.json say it in the same words. Leaves to answers.py how an error becomes a
body, and to whoever raises it the sentence: what was asked, the rule with its number, what was given, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

from mixtral_client.protocol import ErrorBody, ErrorDetail
from mixtral_server.rates import Allowance


class ServiceError(Exception):
    status = 500
    code = "internal_error"
    kind = "server_error"  # OpenAI's error.type
    when = "a fault of the server's; its log has the trace under the request id"

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
    when = "a body that cannot be read, or a field that breaks its rule; `param` names it"


class ContextLengthExceeded(RequestRefused):
    code = "context_length_exceeded"
    when = "prompt and answer are longer than the model's context (said by the worker)"


class ModelNotFound(RequestRefused):
    status, code = 404, "model_not_found"
    when = "no endpoint has this name"


class JobNotFound(RequestRefused):
    status, code = 404, "job_not_found"
    when = "no such job, its result is gone, or it is another user's"


class RouteNotFound(RequestRefused):
    status, code = 404, "route_not_found"
    when = "no such route"


class MethodNotAllowed(RequestRefused):
    """allowed: the methods that the route takes, for the answer's Allow header."""

    status, code = 405, "method_not_allowed"
    when = "the route takes other methods"

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class BodyTooSlow(RequestRefused):
    status, code = 408, "body_too_slow"
    when = "the body did not arrive within 20 s"


class SessionLapsed(RequestRefused):
    status, code = 410, "session_lapsed"
    when = "the worker's session is gone: log in anew"


class JobCancelled(RequestRefused):
    """An OpenAI call whose job was cancelled. Not 409, which clients of OpenAI's take as a call to try again."""

    status, code = 410, "cancelled"
    when = "the job of an OpenAI call was cancelled"


class BodyTooLarge(RequestRefused):
    status, code = 413, "body_too_large"
    when = "the body is above its limit; it is not read"


class WrongContentType(RequestRefused):
    status, code = 415, "wrong_content_type"
    when = "not JSON, or compressed"


class IdempotencyConflict(RequestRefused):
    status, code = 422, "idempotency_conflict"
    when = "the Idempotency-Key was used with another body"


class NotAuthenticated(ServiceError):
    status, code, kind = 401, "invalid_api_key", "authentication_error"
    when = "no key, an unknown one, or a revoked one"


class NotAllowed(ServiceError):
    status, code, kind = 403, "not_allowed", "permission_error"
    when = "the key lacks the scope, the endpoint or the priority; a visitor's chat came from elsewhere"


class LimitReached(ServiceError):
    """allowances: what the caller's rates still hold, for the answer's headers."""

    status, code, kind = 429, "rate_limit_exceeded", "rate_limit_error"
    when = "a key, a visitor or an address is over its requests or tokens a minute"

    def __init__(self, message: str, *, retry_after_s: float | None = None, allowances: Sequence[Allowance] = ()) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.allowances = tuple(allowances)


class QueueFull(LimitReached):
    code = "queue_full"
    when = "the queue, or this user's part of it, is full"


class TooManySessions(LimitReached):
    code = "too_many_sessions"
    when = "too many workers logged in with one key"


class JobFailed(ServiceError):
    """The job ended in an error of its worker's; carries the worker's own code word and sentence."""

    def __init__(self, detail: ErrorDetail) -> None:
        super().__init__(detail.message, param=detail.param)
        self.code, self.kind = detail.code, detail.type
        self.status = 400 if detail.type == "invalid_request_error" else 500


class Unavailable(ServiceError):
    status, code = 503, "unavailable"
    when = "the server is stopping or cannot take work; ask again"


class JobExpired(Unavailable):
    """No worker began the job within its queue time."""

    code = "expired"
    when = "no worker began the job of an OpenAI call in time"


class RedisUnavailable(Unavailable):
    code = "redis_unavailable"
    when = "the queue is away for a moment"

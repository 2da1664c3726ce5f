"""What AIME's worker routes say of themselves in openapi.json: loose models of bodies that third-party programs make.

Leaves what is read of them and what is answered to aime_workers.py.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from mixtral_server.errors import RedisUnavailable
from mixtral_server.routes.operation import Answer, Operation


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


class AimeWorkerName(Loose):
    auth: str = Field(description="the worker's name, by which it is known again")
    job_type: str = Field(description="of the endpoint's file, or the endpoint's name")
    auth_key: str = Field(description="a key with scope worker, or the one in the endpoint's file")


class AimeWorkerLogin(Loose):
    worker_parameters: AimeWorkerName
    model_parameters: dict[str, Any] = Field(default_factory=dict)


class AimeJobRequest(AimeWorkerName):
    version: str | None = Field(None, description="with it, a worker that is not known is logged in")
    max_job_batch: int = 1


class AimeJobProgress(Loose):
    job_id: str
    auth_key: str
    progress: float | None = None
    progress_data: dict[str, Any] = Field(default_factory=dict, description="the whole text so far, other outputs, and auth")


class AimeJobsProgress(RootModel[list[AimeJobProgress] | AimeJobProgress]):
    """One job's progress or several jobs'."""


class AimeJobResult(AimeWorkerName):
    """The outputs that the endpoint declares stand beside these."""

    job_id: str
    error: str | None = None


class AimeServerStatus(Loose):
    logged_in: bool
    job_type_present: bool
    key_valid: bool


class AimeWorkerLoggedIn(Loose):
    success: bool
    request_timeout: float | None = None
    error_msg: str | None = None


class AimeCommand(Loose):
    """job with its job_data; no_job; or error or warning with msg."""

    cmd: Literal["job", "no_job", "error", "warning"]
    job_data: list[dict[str, Any]] | None = None
    msg: str | None = None


class AimeItemTaken(Loose):
    success: bool
    job_id: str | None = Field(None, description="of a job that is no longer the worker's")
    error_msg: str | None = None


class AimeItemsTaken(RootModel[list[AimeItemTaken]]):
    """One for each item, in their order."""


class AimeResultTaken(Loose):
    """cmd is ok, or warning with msg; without success it was not taken."""

    cmd: str | None = None
    success: bool | None = None


def _operation(summary: str, takes: type[BaseModel], what: str, answer: type[BaseModel]) -> Operation:
    return Operation("AIME", summary, {200: Answer(what, answer)}, takes=takes, errors=(RedisUnavailable,))


OPERATIONS = {
    "/worker_check_server_status": _operation(
        "a worker asks whether the server is there and knows it", AimeWorkerName, "what is known of it", AimeServerStatus
    ),
    "/worker_login": _operation("a worker says what it is", AimeWorkerLogin, "whether it is let in", AimeWorkerLoggedIn),
    "/worker_job_request": _operation("a worker asks for jobs, and waits for them", AimeJobRequest, "what it is to do", AimeCommand),
    "/worker_job_progress": _operation("how far a worker's jobs are", AimeJobsProgress, "what was taken", AimeItemsTaken),
    "/worker_job_result": _operation("the result of one job", AimeJobResult, "whether it was taken", AimeResultTaken),
}
"""By path."""

"""What mixtral-chat remembers: a conversation, the file it may be kept in, and which answer was still coming when the program went.

Decides the form of both files (JSON, readable by their owner alone) and what is wrong with one. Leaves to cli.py when they are written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError

from mixtral_client.protocol import ChatMessage, Wire


class Conversation(Wire):
    """What the next request says: the system prompt and every exchange that got an answer, or the beginning of one."""

    system: str = ""
    messages: list[ChatMessage] = Field(default_factory=list)

    def asking(self, question: str) -> list[ChatMessage]:
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        return [*system, *self.messages, ChatMessage(role="user", content=question)]

    def add(self, question: str, answer: str) -> None:
        if answer:
            self.messages += [ChatMessage(role="user", content=question), ChatMessage(role="assistant", content=answer)]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError for what is no conversation, OSError for what cannot be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} holds no conversation as /save writes it; name another file, or remove it") from error

    def save(self, path: Path) -> None:
        _write(path, self.model_dump())


class Unfinished(Wire):
    """An answer that is coming: enough to read it after this program is gone, and to go on with its conversation."""

    api_server: list[str]
    job_id: str
    question: str
    conversation: Conversation


class UnfinishedFile:
    """The newest unfinished answer of this user, in $XDG_STATE_HOME/mixtral-chat."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        state = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
        self._path = Path(state) / "mixtral-chat" / "unfinished.json"

    def note(self, unfinished: Unfinished) -> None:
        """A disk that takes no note must not cost the answer itself."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(self._path, unfinished.model_dump())
        except OSError:
            return

    def read(self) -> Unfinished | None:
        try:
            return Unfinished.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            return None

    def forget(self, job_id: str) -> None:
        """Unless another program has noted another since."""
        if (noted := self.read()) is not None and noted.job_id == job_id:
            self._path.unlink(missing_ok=True)


def _write(path: Path, fields: Any) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(fields, file, ensure_ascii=False, indent=1)
    scratch.replace(path)

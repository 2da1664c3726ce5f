"""A scripted worker whose every answer is one JSON object, in one token."""

from __future__ import annotations

from dataclasses import dataclass

from support.scripted_worker import ScriptedWorker

ANSWER = '{"name":"Ann","age":30}'


@dataclass
class JsonWorker(ScriptedWorker):
    length: int = 1

    def text(self, word: str) -> str:
        return ANSWER

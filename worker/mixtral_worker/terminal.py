"""A chat in the terminal: what the worker does without --api_server.

Decides what a line means (a message or a /command) and what is shown. Leaves the answer to the same Batch that serves jobs. At a terminal
each line, or several pasted at once, is one message and the chat goes on; from a pipe the whole of stdin is one message, its answer is all
that stands on stdout, and the program ends. Ctrl-C stops an answer; at the prompt it ends the chat.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ValidationError

from mixtral_client.protocol import ChatMessage, FrameError, JobSpec, Sampling, SamplingFields, WorkerJob
from mixtral_worker.loop import Batch, Crew, advance
from mixtral_worker.telemetry import LOG

LOOK_AWAY_S = 0.25
PASTE_GAP_S = 0.05  # lines that follow each other this closely were pasted
CTRL_C = b"\x03"
HELP = """\
/system TEXT   set the system prompt; without TEXT, take it away
/reset         forget the conversation, keep the system prompt
/set NAME N    how answers are drawn: temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty
/stats         figures of the last answer and of the conversation
/quit          leave (so does Ctrl-D)
/help          this list
Ctrl-C stops an answer. Several lines pasted at once are one message."""


@dataclass(frozen=True)
class Manner:
    """How answers are drawn."""

    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Figures:
    prompt_tokens: int
    tokens: int
    first_token_s: float
    total_s: float

    def __str__(self) -> str:
        after_first_s = self.total_s - self.first_token_s
        rate = f", {(self.tokens - 1) / after_first_s:.1f} tokens/s" if self.tokens > 1 and after_first_s > 0 else ""
        return f"{self.prompt_tokens} prompt tokens, {self.tokens} answer tokens, first after {self.first_token_s:.2f} s{rate}"


class Interrupted(Exception):
    """A signal asked the program to end."""


class TerminalChat:
    def __init__(
        self, batch: Batch, crew: Crew, manner: Manner, asked_to_stop: Callable[[], signal.Signals | None], stdin_fd: int = 0
    ) -> None:
        self._batch, self._crew, self._manner, self._asked_to_stop = batch, crew, manner, asked_to_stop
        self._stdin_fd = stdin_fd
        self._is_terminal = os.isatty(stdin_fd)
        self._system = ""
        self._turns: list[ChatMessage] = []
        self._asked = 0
        self._figures: Figures | None = None
        self._typed_ahead = b""

    def run(self) -> int:
        """Chat until there is no more input; returns the program's exit code."""
        LOG.setLevel(max(LOG.level, logging.ERROR))
        try:
            return self._converse() if self._is_terminal else self._answer_pipe()
        except Interrupted:
            return 0
        except BrokenPipeError:  # whoever read stdout has seen enough
            return 1

    # ------------------------------------------------------------------ the two kinds of input

    def _answer_pipe(self) -> int:
        message = b"".join(self._chunks()).decode(errors="replace").strip()
        if not message:
            print("stdin is empty, so there is no message to answer; pipe one in, or give --api_server to serve", file=sys.stderr)
            return 2
        end = self._ask(message)
        if isinstance(end, FrameError):
            print(end.message, file=sys.stderr)
            return 1
        return 0

    def _converse(self) -> int:
        self._show("Chat with the model. /help lists the commands.\n")
        while (message := self._read_message()) is not None:
            if not message:
                continue
            if message.startswith("/"):
                command, *rest = message.split(maxsplit=1)
                if command == "/quit":
                    break
                self._show(self._command(command, "".join(rest)) + "\n")
                continue
            end = self._ask(message)
            if isinstance(end, FrameError):
                self._show(f"[{end.message}]\n")
            elif end != "stop":
                self._show(f"[{'stopped' if end == 'cancelled' else 'the context is full; /reset begins anew'}]\n")
        return 0

    def _command(self, command: str, rest: str) -> str:
        if command == "/system":
            self._system = rest
            return "system prompt set" if rest else "no system prompt"
        if command == "/reset":
            self._turns.clear()
            return "conversation forgotten"
        if command == "/set":
            return self._set(*rest.split())
        if command == "/stats":
            numbers = self._batch.telemetry()
            kv = f"KV blocks {numbers.kv_blocks}, tokens so far {numbers.tokens_total}, turns {len(self._turns) // 2}"
            return f"{self._figures or 'no answer yet'}\n{kv}"
        return HELP if command == "/help" else f"no command {command}\n{HELP}"

    def _set(self, name: str = "", value: str = "", *more: str) -> str:
        fields = {field: getattr(self._manner.sampling, field) for field in Sampling.model_fields if field != "logit_bias"}
        if name in fields and not more:
            try:
                wanted = SamplingFields.model_validate({name: value})
            except ValidationError as error:
                return f"{name}: {error.errors()[0]['msg']}"
            fields[name] = getattr(wanted, name)
            self._manner = replace(self._manner, sampling=Sampling(**fields))
        return ", ".join(f"{field} {number:g}" for field, number in fields.items())

    # ------------------------------------------------------------------ one answer

    def _ask(self, message: str) -> Literal["stop", "length", "cancelled"] | FrameError:
        """Stream the answer to a message. The two join the conversation unless the message was refused."""
        self._asked += 1
        question = ChatMessage(role="user", content=message)
        head = [ChatMessage(role="system", content=self._system)] if self._system else []
        room = self._batch.scheduler.max_seq_len
        spec = JobSpec(
            messages=[*head, *self._turns, question], sampling=self._manner.sampling, max_tokens=room, seed=self._manner.seed + self._asked
        )
        job = WorkerJob(id=f"chat-{self._asked}", attempt=1, spec=spec)
        with self._keyboard():
            text, end = self._stream(job)
        if not isinstance(end, FrameError):
            self._turns += [question, ChatMessage(role="assistant", content=text)]
        return end

    def _stream(self, job: WorkerJob) -> tuple[str, Literal["stop", "length", "cancelled"] | FrameError]:
        began_s = time.monotonic()
        first_s, tokens, text = 0.0, 0, ""
        pieces = self._batch.take(job)
        while True:
            for piece in pieces:
                if piece.id is not None:
                    tokens += 1
                    first_s = first_s or time.monotonic() - began_s
                self._show(piece.text)
                text += piece.text
                self._figures = Figures(piece.prompt_tokens, tokens, first_s, time.monotonic() - began_s)
                if piece.end is not None:
                    self._show("\n")
                    return text, piece.end
            if self._wants_to_stop():
                self._batch.drop(job.id, job.attempt)
                self._show("\n")
                return text, "cancelled"
            plan = self._batch.plan_step()
            if plan is None:
                raise RuntimeError(f"job {job.id} is in the batch and the scheduler has no step for it")
            pieces = advance(self._batch, self._crew, plan)

    # ------------------------------------------------------------------ keyboard and screen

    @contextmanager
    def _keyboard(self) -> Iterator[None]:
        """While an answer runs, Ctrl-C is a byte to read, for the terminal would send the signal to torchrun as well."""
        if not self._is_terminal:
            yield
            return
        before = termios.tcgetattr(self._stdin_fd)
        quiet = termios.tcgetattr(self._stdin_fd)
        quiet[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._stdin_fd, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            termios.tcsetattr(self._stdin_fd, termios.TCSANOW, before)

    def _wants_to_stop(self) -> bool:
        if self._asked_to_stop() is not None:
            raise Interrupted
        if not self._is_terminal or not self._has_input(0):
            return False
        self._typed_ahead += os.read(self._stdin_fd, 65_536)
        if CTRL_C not in self._typed_ahead:
            return False
        self._typed_ahead = b""
        return True

    def _read_message(self) -> str | None:
        """The next message; None at the end of the input."""
        self._show("> " + self._typed_ahead.decode(errors="replace"))
        typed, self._typed_ahead = self._typed_ahead, b""
        chunks = self._chunks()
        while not typed.endswith(b"\n") or self._has_input(PASTE_GAP_S):
            chunk = next(chunks, None)
            if chunk is None:
                break
            typed += chunk
        else:
            return typed.decode(errors="replace").strip()
        self._show("\n")
        return None

    def _chunks(self) -> Iterator[bytes]:
        """Input as it comes, to its end, while the other ranks are kept awake."""
        while True:
            while not self._has_input(LOOK_AWAY_S):
                self._crew.idle()
                if self._asked_to_stop() is not None:
                    raise Interrupted
            chunk = os.read(self._stdin_fd, 65_536)
            if not chunk:
                return
            yield chunk

    def _has_input(self, wait_s: float) -> bool:
        return bool(select.select([self._stdin_fd], [], [], wait_s)[0])

    def _show(self, text: str) -> None:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()

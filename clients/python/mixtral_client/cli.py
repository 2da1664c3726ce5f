"""mixtral-chat: a chat in the terminal, or one question through a pipe.

    mixtral-chat --api_server http://127.0.0.1:7777          # a chat: /system TEXT, /reset, /quit; Ctrl-C stops an answer
    echo "Tell a story." | mixtral-chat --json               # one answer, its events as JSON lines

Decides what is shown and what a chat remembers. Leaves the network to client.py. Exit status: 0 answered, 1 the service or the
job failed, 2 called wrongly, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from typing import cast

from mixtral_client.client import DEFAULT_MODEL, KEY_VARIABLE, JobOptions, MixtralClient
from mixtral_client.errors import MixtralError
from mixtral_client.protocol import ChatMessage, DoneEvent, JobEvent, MovedEvent, QueuedEvent, RewindEvent, TokenEvent

HELP = "/system TEXT sets the system prompt, /reset starts a new chat, /quit leaves; Ctrl-C stops an answer"
# What a terminal would obey instead of show: an answer must not move the cursor or set the title.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Conversation:
    """What the next request says: the system prompt and every exchange that got an answer, or the beginning of one."""

    system: str = ""
    messages: list[ChatMessage] = field(default_factory=list)

    def asking(self, question: str) -> list[ChatMessage]:
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        return [*system, *self.messages, ChatMessage(role="user", content=question)]

    def add(self, question: str, answer: str) -> None:
        if answer:
            self.messages += [ChatMessage(role="user", content=question), ChatMessage(role="assistant", content=answer)]


class Screen:
    """Shows one answer: text on stdout, notices on stderr; or, as_json, each event as a line on stdout."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._is_terminal = sys.stdout.isatty()
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def show(self, event: JobEvent) -> None:
        if isinstance(event, TokenEvent):
            self._pieces.append(event.text)
        elif isinstance(event, RewindEvent):
            del self._pieces[event.to :]
        if self.as_json:
            print(event.model_dump_json(), flush=True)
        elif isinstance(event, TokenEvent):
            self._write(event.text)
        elif isinstance(event, RewindEvent):
            self.notice("\n[the end of the answer was lost; again, from its start]")
            self._write(self.text)
        elif isinstance(event, QueuedEvent) and event.position > 1:
            self.notice(f"[waiting: place {event.position} in the queue]")
        elif isinstance(event, MovedEvent):
            self.notice("\n[another worker goes on]")
        elif isinstance(event, DoneEvent):
            self._write("\n")
            if event.finish != "stop":
                self.notice({"length": "[cut: the answer reached max_tokens]"}.get(event.finish, f"[{event.finish}]"))

    def failed(self, error: MixtralError) -> None:
        if self.as_json:
            detail = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
            print(json.dumps({"event": "error", "error": detail}), flush=True)
        request = f" (request {error.request_id})" if error.request_id else ""
        self.notice(f"{error.code}: {error.message}{request}")

    def notice(self, words: str) -> None:
        print(self._safe(words), file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        sys.stdout.write(self._safe(text))
        sys.stdout.flush()

    def _safe(self, text: str) -> str:
        return CONTROL_CHARACTERS.sub("�", text) if self._is_terminal else text


class TerminalChat:
    """Turns of one conversation with one client, each run to its end on the runner's loop."""

    def __init__(self, runner: asyncio.Runner, client: MixtralClient, options: JobOptions, *, system: str, as_json: bool) -> None:
        self._runner = runner
        self._client = client
        self._options = options
        self._as_json = as_json
        self._conversation = Conversation(system)

    def ask(self, question: str) -> int:
        """One exchange; gives its exit status. Ctrl-C cancels the job and keeps what came of the answer."""
        screen = Screen(as_json=self._as_json)
        try:
            self._runner.run(self._answer(question, screen))
        except MixtralError as error:
            screen.failed(error)
            return 1
        except KeyboardInterrupt:
            screen.notice("\n[stopped]")
            return 130
        finally:
            self._conversation.add(question, screen.text)
        return 0

    async def _answer(self, question: str, screen: Screen) -> None:
        async with self._client.stream(self._conversation.asking(question), **self._options) as events:
            async for event in events:
                screen.show(event)

    def talk(self) -> int:
        """Read questions and commands from the terminal until /quit or its end."""
        print(HELP, file=sys.stderr)
        while True:
            try:
                line = input("" if self._as_json else "> ").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print("\n(/quit leaves)", file=sys.stderr)
                continue
            if line == "/quit":
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                self.ask(line)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self._conversation.messages.clear()
            print("[a new chat]", file=sys.stderr)
        elif name == "/system":
            self._conversation.system = rest.strip()
            print(f"[system prompt: {self._conversation.system or 'none'}]", file=sys.stderr)
        else:
            print(f"{name} is no command here: {HELP}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    names = ("model", "max_tokens", "temperature", "top_p", "top_k", "seed")
    options = cast(JobOptions, {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None})
    try:
        client = MixtralClient(arguments.api_server, arguments.api_key)
    except (MixtralError, ValueError) as error:
        print(f"mixtral-chat: {error}", file=sys.stderr)
        return 2
    with asyncio.Runner() as runner:
        try:
            chat = TerminalChat(runner, client, options, system=arguments.system, as_json=arguments.json)
            return _ask_pipe(chat) if not sys.stdin.isatty() else _talk(chat)
        except BrokenPipeError:  # `mixtral-chat | head`: who read us is gone, and the interpreter must not complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        finally:
            runner.run(client.close())


def _ask_pipe(chat: TerminalChat) -> int:
    question = sys.stdin.buffer.read().decode("utf-8", errors="replace").strip()
    if not question:
        print(
            "mixtral-chat: stdin is not a terminal and holds no message; pipe one in, such as: echo Hello | mixtral-chat", file=sys.stderr
        )
        return 2
    return chat.ask(question)


def _talk(chat: TerminalChat) -> int:
    with contextlib.suppress(ImportError):  # line editing and history, where this Python has them
        import readline  # noqa: F401
    return chat.talk()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixtral-chat", description=f"Chat with a Mixtral service. {HELP}.")
    server = "address of the service; of its replicas, if there are several (default: %(default)s)"
    parser.add_argument("--api_server", nargs="+", default=["http://127.0.0.1:7777"], metavar="URL", help=server)
    parser.add_argument("--api_key", help=f"a client key (default: {KEY_VARIABLE} of the environment)")
    parser.add_argument("--endpoint_name", dest="model", default=DEFAULT_MODEL, help="which model answers (default: %(default)s)")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--max_tokens", type=int, help="longest answer, in tokens (default: the endpoint's)")
    parser.add_argument("--temperature", type=float, help="0 is greedy, at most 2 (default: the endpoint's)")
    parser.add_argument("--top_p", type=float, help="keep the likeliest tokens of this total probability")
    parser.add_argument("--top_k", type=int, help="keep this many of the likeliest tokens; 0 keeps all")
    parser.add_argument("--seed", type=int, help="the same seed and chat give the same answer")
    parser.add_argument("--json", action="store_true", help="print each event as a line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""mixtral-chat: a chat in the terminal, or one question from a pipe or the command line.

Decides what is shown and when it is kept. Leaves the network to client.py and the files to transcript.py. The answer, and nothing else,
goes to stdout; everything that is said about it to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

from mixtral_client.client import DEFAULT_MODEL, KEY_VARIABLE, JobOptions, JobStream, MixtralClient
from mixtral_client.errors import PASSING, MixtralError, TimedOut
from mixtral_client.protocol import DoneEvent, JobEvent, MovedEvent, QueuedEvent, RewindEvent, TokenEvent
from mixtral_client.resume import Timeouts
from mixtral_client.transcript import Conversation, Unfinished, UnfinishedFile

DEFAULT_SERVER = "http://127.0.0.1:7777"
SERVER_VARIABLE = "MIXTRAL_API_SERVER"
ANSWERED, FAILED, CALLED_WRONGLY, TRY_AGAIN, STOPPED = 0, 1, 2, 75, 130

COMMANDS = {
    "/system TEXT": "set the system prompt; without TEXT there is none",
    "/reset": "start a new chat",
    "/show": "print the chat so far",
    "/save FILE": "keep the chat in FILE",
    "/load FILE": "go on with the chat in FILE",
    "/help": "these lines",
    "/quit": "leave; so does Ctrl-D",
}
HELP = "\n".join(f"  {name:14}{words}" for name, words in COMMANDS.items())
EXAMPLES = f"""\
in a chat:
{HELP}
  Ctrl-C        stop the answer and cancel its job; what came of it is kept
  a line that ends in \\ goes on in the next

examples:
  mixtral-chat --api_server http://127.0.0.1:7777                 # a chat
  mixtral-chat "Tell a story about a cat."                        # one answer
  head -50 README.md | mixtral-chat "Sum this up in a sentence:"  # one answer about what is piped in
  mixtral-chat --history cat.json "And then?"                     # goes on with the chat in that file, and keeps it there
  mixtral-chat --json "Hello" | tail -1                           # events as lines of JSON: queued, token, …, done or error
  mixtral-chat --resume                                           # the answer that was coming when this program or its terminal ended

exit status: {ANSWERED} answered, {FAILED} the service or the job failed, {CALLED_WRONGLY} called wrongly,
{TRY_AGAIN} the service is full, away or too slow and may answer later, {STOPPED} stopped by Ctrl-C
"""
# What a terminal would obey instead of show: an answer must not move the cursor or set the title.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Shows one answer: text on stdout, notices on stderr; or, as_json, each event as a line on stdout."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._is_terminal = sys.stdout.isatty()

    def show(self, event: JobEvent, text: str) -> None:
        """text: the whole answer so far."""
        if self.as_json:
            print(event.model_dump_json(), flush=True)
        elif isinstance(event, TokenEvent):
            self._write(event.text)
        elif isinstance(event, RewindEvent):
            self.notice("\n[the end of the answer was lost; again, from its start]")
            self._write(text)
        elif isinstance(event, QueuedEvent) and event.position > 1:
            eta = "" if event.eta_s is None else f", about {event.eta_s:.0f} s"
            self.notice(f"[waiting: place {event.position} in the queue{eta}]")
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


@dataclass(frozen=True)
class Settings:
    """How this run asks and shows. history: the file that keeps the conversation, if one was named."""

    api_server: list[str]
    options: JobOptions
    as_json: bool
    history: Path | None


class TerminalChat:
    """Turns of one conversation with one client, each run to its end on the runner's loop."""

    def __init__(
        self, runner: asyncio.Runner, client: MixtralClient, settings: Settings, conversation: Conversation, unfinished: UnfinishedFile
    ) -> None:
        self._runner = runner
        self._client = client
        self._settings = settings
        self._conversation = conversation
        self._unfinished = unfinished

    def ask(self, question: str) -> int:
        """One exchange; gives its exit status. Ctrl-C cancels the job and keeps what came of the answer."""
        return self._read(self._client.stream(self._conversation.asking(question), **self._settings.options), question)

    def resume(self, job_id: str, question: str) -> int:
        """Read an answer that was asked for before, from its start; question "" is not known."""
        return self._read(self._client.events(job_id), question)

    def _read(self, stream: JobStream, question: str) -> int:
        screen = Screen(as_json=self._settings.as_json)
        status, is_lost = ANSWERED, False
        try:
            self._runner.run(self._show(stream, question, screen))
            status = {"stop": ANSWERED, "length": ANSWERED, "expired": TRY_AGAIN}.get(stream.finish or "", FAILED)
        except MixtralError as error:
            screen.failed(error)
            is_lost = isinstance(error, PASSING) and stream.job_id != ""
            status = TRY_AGAIN if isinstance(error, (*PASSING, TimedOut)) else FAILED
        except KeyboardInterrupt:
            screen.notice("\n[stopped]")
            status = STOPPED
        if is_lost:
            screen.notice("[the answer goes on without us: mixtral-chat --resume reads it once the service can be reached]")
        else:
            self._unfinished.forget(stream.job_id)
        if question:
            self._conversation.add(question, stream.text)
            self._keep(screen)
        return status

    async def _show(self, stream: JobStream, question: str, screen: Screen) -> None:
        is_noted = False
        try:
            async with stream:
                async for event in stream:
                    if not is_noted:
                        self._note(stream.job_id, question)
                        is_noted = True
                    screen.show(event, stream.text)
        except (asyncio.CancelledError, BrokenPipeError, TimedOut):  # of a resumed job too: whoever reads it wants no more
            with contextlib.suppress(MixtralError):
                await asyncio.shield(stream.cancel())
            self._unfinished.forget(stream.job_id)
            raise

    def _note(self, job_id: str, question: str) -> None:
        self._unfinished.note(
            Unfinished(api_server=self._settings.api_server, job_id=job_id, question=question, conversation=self._conversation)
        )

    def _keep(self, screen: Screen) -> None:
        if self._settings.history is not None:
            try:
                self._conversation.save(self._settings.history)
            except OSError as error:
                screen.notice(f"the chat could not be kept: {error}")

    # ------------------------------------------------------------------------------------------ the terminal

    def talk(self) -> int:
        """Read questions and commands from the terminal until /quit or its end."""
        print("/help lists the commands; Ctrl-C stops an answer, /quit leaves", file=sys.stderr)
        while True:
            try:
                line = self._line().strip()
            except EOFError:
                return ANSWERED
            except KeyboardInterrupt:
                print("\n(/quit leaves)", file=sys.stderr)
                continue
            if line == "/quit":
                return ANSWERED
            if line.startswith("/"):
                self._command(line)
            elif line:
                self.ask(line)

    def _line(self) -> str:
        lines = [self._input("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._input("... "))
        return "\n".join(lines)

    def _input(self, prompt: str) -> str:
        if sys.stdout.isatty() and not self._settings.as_json:
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for answers
        return input()

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            print(self._obey(name, rest.strip()), file=sys.stderr)
        except (OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)

    def _obey(self, name: str, rest: str) -> str:
        chat = self._conversation
        if name == "/system":
            chat.system = rest
            return f"[system prompt: {rest or 'none'}]"
        if name == "/reset":
            chat.messages.clear()
            return "[a new chat]"
        if name == "/show":
            return "\n".join(f"{one.role}: {CONTROL_CHARACTERS.sub('�', one.content)}" for one in chat.messages) or "[nothing was said yet]"
        if name in ("/save", "/load") and not rest:
            raise ValueError(f"name a file, as in {name} chat.json")
        if name == "/save":
            chat.save(Path(rest).expanduser())
            return f"[{len(chat.messages)} messages are in {rest}]"
        if name == "/load":
            self._conversation = Conversation.load(Path(rest).expanduser())
            return f"[{len(self._conversation.messages)} messages from {rest}]"
        if name == "/help":
            return HELP
        raise ValueError("there is no such command; /help lists them")


# ---------------------------------------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a letter gets "?" for it, not a traceback
    arguments = _parser().parse_args(argv)
    unfinished = UnfinishedFile(os.environ)
    try:
        coming = _coming(arguments, unfinished)
        settings = _settings(arguments, coming, os.environ)
        conversation = _conversation(arguments, coming, settings.history)
        client = MixtralClient(settings.api_server, arguments.api_key, timeouts=Timeouts(total_s=arguments.timeout_s))
    except (MixtralError, ValueError, OSError) as error:
        print(f"mixtral-chat: {error}", file=sys.stderr)
        return CALLED_WRONGLY
    with asyncio.Runner() as runner:
        try:
            return _run(TerminalChat(runner, client, settings, conversation, unfinished), arguments, coming)
        except BrokenPipeError:  # `mixtral-chat | head`: who read us is gone, and the interpreter must not complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return ANSWERED
        except KeyboardInterrupt:  # while the question was still coming
            return STOPPED
        finally:
            runner.run(client.close())


def _run(chat: TerminalChat, arguments: argparse.Namespace, coming: Unfinished | None) -> int:
    is_terminal = sys.stdin.isatty()
    if coming is not None:
        status = chat.resume(coming.job_id, coming.question)
        return _talk(chat) if is_terminal and status in (ANSWERED, STOPPED) else status
    if not is_terminal or arguments.message:
        piped = "" if is_terminal else sys.stdin.buffer.read().decode("utf-8", errors="replace").strip()
        question = "\n\n".join(part for part in (" ".join(arguments.message), piped) if part)
        if not question:
            words = "stdin is not a terminal and holds no message; pipe one in, such as: echo Hello | mixtral-chat"
            print(f"mixtral-chat: {words}", file=sys.stderr)
            return CALLED_WRONGLY
        return chat.ask(question)
    return _talk(chat)


def _talk(chat: TerminalChat) -> int:
    with contextlib.suppress(ImportError):  # line editing, and the lines before with the up key, where this Python has them
        import readline  # noqa: F401
    return chat.talk()


def _coming(arguments: argparse.Namespace, file: UnfinishedFile) -> Unfinished | None:
    """The answer to resume, if one is meant. Raises ValueError if there is none."""
    if arguments.resume is None:
        return None
    if arguments.message:
        raise ValueError("--resume reads an answer that was asked for before and takes no message; leave one of them out")
    noted = file.read()
    if arguments.resume == "":
        if noted is None:
            raise ValueError("no answer was left unfinished here; name a job, as in --resume JOB_ID")
        return noted
    if noted is not None and noted.job_id == arguments.resume:
        return noted
    return Unfinished(api_server=[], job_id=arguments.resume, question="", conversation=Conversation())


def _settings(arguments: argparse.Namespace, coming: Unfinished | None, environment: Mapping[str, str]) -> Settings:
    named = environment.get(SERVER_VARIABLE, "").split()
    servers = arguments.api_server or (coming.api_server if coming else []) or named or [DEFAULT_SERVER]
    names = ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "priority")
    options = cast(JobOptions, {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None})
    return Settings(servers, options, arguments.json, arguments.history)


def _conversation(arguments: argparse.Namespace, coming: Unfinished | None, history: Path | None) -> Conversation:
    conversation = coming.conversation if coming else Conversation.load(history) if history and history.exists() else Conversation()
    if arguments.system is not None:
        conversation.system = arguments.system
    return conversation


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixtral-chat",
        description="Chat with a Mixtral service: in the terminal, from a pipe, or one message from the command line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("message", nargs="*", help="one message; before what is piped in, if something is")
    server = f"address of the service, or those of its replicas (default: {SERVER_VARIABLE} of the environment, or {DEFAULT_SERVER})"
    parser.add_argument("--api_server", action="append", metavar="URL", help=f"{server}; may be repeated")
    parser.add_argument("--api_key", help=f"a client key (default: {KEY_VARIABLE} of the environment, where others cannot read it)")
    parser.add_argument("--endpoint_name", dest="model", default=DEFAULT_MODEL, help="which model answers (default: %(default)s)")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--history", type=Path, metavar="FILE", help="the chat goes on from FILE, if it exists, and is kept there")
    parser.add_argument("--resume", nargs="?", const="", metavar="JOB_ID", help="read an answer again; the newest unfinished one")
    parser.add_argument("--json", action="store_true", help="print each event as a line of JSON")
    parser.add_argument("--timeout_s", type=float, metavar="S", help="give an answer up, and cancel it, after so many seconds")
    sampling = parser.add_argument_group("the answer", "What is left out is the endpoint's to decide.")
    sampling.add_argument("--max_tokens", type=int, metavar="N", help="longest answer, in tokens")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, at most 2")
    sampling.add_argument("--top_p", type=float, metavar="P", help="keep the likeliest tokens of this total probability")
    sampling.add_argument("--top_k", type=int, metavar="K", help="keep this many of the likeliest tokens; 0 keeps all")
    sampling.add_argument("--min_p", type=float, metavar="P", help="keep tokens of at least this share of the best one's probability")
    sampling.add_argument("--repetition_penalty", type=float, metavar="R", help="1 is none, at most 10")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed and chat give the same answer")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated")
    sampling.add_argument("--priority", type=int, metavar="N", help="0 is served first, 9 last")
    parser.add_argument("--version", action="version", version=version("mixtral-chat"))
    return parser


if __name__ == "__main__":
    sys.exit(main())

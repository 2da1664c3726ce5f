"""The terminal chat on a real pseudo-terminal, under a real torchrun, as a person at a keyboard meets it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtral_client.protocol import ChatMessage, JobSpec, Sampling
from support.tiny_worker import TinyWorker, reference, write_tiny_worker
from support.torchrun import HANG_S, Torchrun, torchrun

ALONE = (sys.executable, "-m", "worker")
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """A keyboard and a screen."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        settings = termios.tcgetattr(self.theirs)
        settings[1] &= ~termios.OPOST  # newlines as they were written
        termios.tcsetattr(self.theirs, termios.TCSANOW, settings)
        self.screen = b""

    def type(self, keys: str | bytes) -> None:
        os.write(self.ours, keys.encode() if isinstance(keys, str) else keys)

    def read_until(self, words: str) -> str:
        """What appears up to and with these words."""
        ends_s = time.monotonic() + HANG_S
        while words.encode() not in self.screen:
            assert select.select([self.ours], [], [], max(0.0, ends_s - time.monotonic()))[0], f"no {words!r} in {self.screen!r}"
            self.screen += os.read(self.ours, 65_536)
        head, found, self.screen = self.screen.partition(words.encode())
        return (head + found).decode(errors="replace")

    @property
    def takes_signals(self) -> bool:
        return bool(termios.tcgetattr(self.theirs)[3] & termios.ISIG)

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_worker(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chat(tiny: Path) -> Iterator[tuple[Terminal, Torchrun]]:
    """One chat for all tests of this file, in their order: a start costs seconds."""
    terminal = Terminal()
    arguments = ["--nproc_per_node", "2", "worker", "--ckpt_dir", str(tiny), "--temperature", "0"]
    with torchrun(arguments, stdin=terminal.theirs, stdout=terminal.theirs) as worker:
        assert terminal.read_until("> ") == "Chat with the model. /help lists the commands.\n> "
        yield terminal, worker
    terminal.close()


def answer(tiny: Path, *messages: tuple[str, str]) -> str:
    spec = JobSpec(
        messages=[ChatMessage(role=role, content=content) for role, content in messages],  # type: ignore[arg-type]
        max_tokens=10_000,
        seed=0,
        sampling=Sampling(temperature=0),
    )
    return reference(TinyWorker.load(tiny), spec).text


def test_an_answer_streams_to_the_screen_and_the_prompt_comes_back(chat: tuple[Terminal, Torchrun], tiny: Path) -> None:
    terminal, _ = chat
    terminal.type("c\n")
    assert terminal.read_until(answer(tiny, ("user", "c")) + "\n> ").startswith("c\n")
    assert terminal.takes_signals


def test_the_conversation_is_remembered_until_it_is_reset(chat: tuple[Terminal, Torchrun], tiny: Path) -> None:
    terminal, _ = chat
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")
    first = answer(tiny, ("user", "c"))
    terminal.type("c\n")
    terminal.read_until(first + "\n> ")
    terminal.type("b\n")
    terminal.read_until(answer(tiny, ("user", "c"), ("assistant", first), ("user", "b")) + "\n")
    terminal.read_until("> ")
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")
    terminal.type("c\n")
    terminal.read_until("c\n" + first + "\n> ")
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")


def test_a_system_prompt_holds_from_the_next_answer_on_until_it_is_taken_away(chat: tuple[Terminal, Torchrun], tiny: Path) -> None:
    terminal, _ = chat
    terminal.type("/system Be kind.\nAlways.\n")
    terminal.read_until("system prompt set\n> ")
    terminal.type("c\n")
    terminal.read_until("c\n" + answer(tiny, ("system", "Be kind.\nAlways."), ("user", "c")) + "\n")
    terminal.read_until("> ")
    terminal.type("/system\n")
    terminal.read_until("no system prompt\n> ")
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")


def test_how_answers_are_drawn_can_be_set_and_a_wrong_value_changes_nothing(chat: tuple[Terminal, Torchrun], tiny: Path) -> None:
    terminal, _ = chat
    terminal.type("/set temperature 9\n")
    terminal.read_until("temperature: Input should be less than or equal to 2\n> ")
    terminal.type("/set repetition_penalty 8\n")
    terminal.read_until("repetition_penalty 8, presence_penalty 0, frequency_penalty 0\n> ")
    terminal.type("c\n")
    terminal.read_until("\n> ")
    terminal.type("/set repetition_penalty 1\n")
    terminal.read_until("repetition_penalty 1,")
    terminal.read_until("> ")
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")
    terminal.type("c\n")
    terminal.read_until("c\n" + answer(tiny, ("user", "c")) + "\n")
    terminal.read_until("> ")
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")


def test_lines_pasted_together_are_one_message(chat: tuple[Terminal, Torchrun], tiny: Path) -> None:
    terminal, _ = chat
    terminal.type("Two\nlines\n")
    terminal.read_until(answer(tiny, ("user", "Two\nlines")) + "\n")
    terminal.read_until("/reset begins anew]\n> ")
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: tuple[Terminal, Torchrun], tiny: Path) -> None:
    terminal, worker = chat
    whole = answer(tiny, ("user", "Hi"))
    rank_0 = worker.rank(0)
    terminal.type("Hi\n")
    terminal.read_until("Hi\n" + whole[:1])
    os.kill(rank_0, signal.SIGSTOP)
    assert not terminal.takes_signals
    terminal.type(CTRL_C)
    os.kill(rank_0, signal.SIGCONT)
    shown = terminal.read_until("\n[stopped]\n> ")
    assert len(shown) < len(whole)
    assert whole[1:].startswith(shown.removesuffix("\n[stopped]\n> ").rstrip("�"))
    assert terminal.takes_signals
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")
    terminal.type("c\n")
    terminal.read_until("c\n" + answer(tiny, ("user", "c")) + "\n> ")


def test_stats_and_help_tell_what_there_is(chat: tuple[Terminal, Torchrun]) -> None:
    terminal, _ = chat
    terminal.type("/stats\n")
    assert "74 answer tokens" in terminal.read_until("turns 1\n> ")
    terminal.type("/nonsense\n")
    shown = terminal.read_until("one message.\n> ")
    assert "no command /nonsense" in shown
    assert all(f"\n{command} " in shown for command in ("/system", "/reset", "/stats", "/quit", "/help"))


def test_a_message_too_long_for_the_context_is_refused_and_the_chat_goes_on(chat: tuple[Terminal, Torchrun], tiny: Path) -> None:
    terminal, _ = chat
    terminal.type("/reset\n")
    terminal.read_until("conversation forgotten\n> ")
    terminal.type("zqx " * 200 + "\n")
    assert "255" in terminal.read_until("shorten the chat]\n> ")
    terminal.type("c\n")
    terminal.read_until("c\n" + answer(tiny, ("user", "c")) + "\n> ")


def test_ctrl_c_at_the_prompt_ends_every_rank(chat: tuple[Terminal, Torchrun]) -> None:
    terminal, worker = chat
    ranks = [worker.rank(0), worker.rank(1)]
    terminal.type(CTRL_C)
    worker.wait()
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)


def test_a_chat_without_torchrun_ends_with_code_0_at_the_end_of_input(tiny: Path) -> None:
    terminal = Terminal()
    with torchrun(["--ckpt_dir", str(tiny)], stdin=terminal.theirs, stdout=terminal.theirs, launcher=ALONE) as worker:
        terminal.read_until("> ")
        terminal.type(CTRL_D)
        assert worker.wait() == 0
    terminal.close()


def test_a_pipe_is_one_message_and_stdout_holds_nothing_but_the_answer(tiny: Path) -> None:
    with torchrun(["--ckpt_dir", str(tiny), "--temperature", "0"], stdin=subprocess.PIPE, launcher=ALONE) as worker:
        assert worker.process.stdin is not None
        assert worker.process.stdout is not None
        with worker.process.stdin as pipe:
            pipe.write(b"Two lines\nof one message\n")
        shown = worker.process.stdout.read().decode()
        assert worker.wait() == 0
    assert shown == answer(tiny, ("user", "Two lines\nof one message")) + "\n"


def test_an_empty_pipe_is_told_what_to_do(tiny: Path) -> None:
    with torchrun(["--ckpt_dir", str(tiny)], stdin=subprocess.DEVNULL, launcher=ALONE) as worker:
        assert worker.wait() == 2
        assert "--api_server" in worker.rest_of_log()

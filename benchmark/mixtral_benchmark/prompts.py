"""What the benchmark asks: the talks of a run, each of one or more turns.

Pure but for reading files. Decides the words of every user turn, how long they are, what talks share, and what a line of a prompt
file or a trace may say. Leaves when a talk begins to load.py, and the wire to wires.py.

No tokenizer is here. A synthetic prompt of N tokens is made of so many plain words as the server itself counted (calibrate.py),
and the result states the count that came back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

START_PROMPT = "Tell a long story: Once upon a time"
"""The start prompt of AIME's article on serving Mixtral."""

LONG_TEXT_TASK = "Summarise the following text.\n\n"
FOLLOW_UP = "Go on."

WORDS = tuple(
    word
    for line in (
        "the a of and to in is was for on with as at by from that this it he she they we you not but or had has have be are were",
        "day night house door tree river road sun moon sky rain snow bird dog cat horse king man woman boy girl friend home",
        "red blue green old new good bad big small long little great first last hand eye head heart foot",
        "time year way life world work word book song story game food water fire stone gold bread fish egg milk",
        "went came saw said made took gave found ran sat stood walked looked asked told knew thought felt loved wanted",
    )
    for word in line.split()
)
"""Plain words, most of them one token to any tokenizer of English."""


@dataclass(frozen=True)
class Ask:
    """One request: a chat as far as it has come, whose answer is wanted. seed None leaves the draw to the server."""

    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    temperature: float | None = None
    seed: int | None = None
    ignore_eos: bool = False

    def body(self, endpoint: str) -> dict[str, object]:
        """The fields that OpenAI's wire and the native one share; what is None is left out, so that the endpoint's default holds.

        ignore_eos is no field of OpenAI's own; this server, vLLM and others take it.
        """
        fields = {
            "model": endpoint,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos or None,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Talk:
    """What one user says, turn after turn; each turn is asked with all that was said and answered before."""

    turns: tuple[str, ...]
    system: str | None = None
    max_tokens: int = 500
    temperature: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    think_s: float = 0.0  # between an answer's end and the next turn
    at_s: float | None = None  # when a trace sends it, from the start of the run

    def ask(self, turn: int, answers: Sequence[str]) -> Ask:
        """The request of a turn (from 0). answers: what came back to the turns before."""
        said = [{"role": "system", "content": self.system}] if self.system is not None else []
        for user, answer in zip(self.turns, answers, strict=False):
            said += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        said.append({"role": "user", "content": self.turns[turn]})
        seed = None if self.seed is None else self.seed + turn
        return Ask(tuple(said), self.max_tokens, self.temperature, seed, self.ignore_eos)


class PromptFileError(ValueError):
    """A prompt file or trace that cannot be used; the message names file, line and rule."""


def same(total: int, prompt: str, like: Talk) -> list[Talk]:
    """total talks that begin with the same prompt. like holds what is alike in all; its seed, where given, is the first talk's."""
    return [numbered(replace(like, turns=(prompt, *like.turns)), i) for i in range(total)]


def numbered(talk: Talk, index: int) -> Talk:
    """Talk i draws with seed + i·turns and on: no two requests of a run draw alike, and a second run asks the same."""
    return talk if talk.seed is None else replace(talk, seed=talk.seed + index * len(talk.turns))


@dataclass(frozen=True)
class Shape:
    """Synthetic prompts: so many words, the first of which are shared.

    There are `prefixes` different beginnings of prefix_words each; talk i has the beginning i mod prefixes. A server that keeps the
    work of shared beginnings computes each of them once.
    """

    words: int
    prefix_words: int = 0
    prefixes: int = 1
    spread: float = 0.0  # lengths are drawn evenly from words · (1 ± spread)


def synthetic(total: int, shape: Shape, like: Talk, seed: int) -> list[Talk]:
    """total talks of random words. The same seed gives the same words."""
    draw = random.Random(seed)
    beginnings = [text_of(shape.prefix_words, random.Random(f"{seed} prefix {i}")) for i in range(shape.prefixes)]
    talks = []
    for i in range(total):
        length = round(shape.words * draw.uniform(1 - shape.spread, 1 + shape.spread)) if shape.spread else shape.words
        own = text_of(max(1, length - shape.prefix_words), draw)
        prompt = f"{beginnings[i % shape.prefixes]} {own}" if shape.prefix_words else own
        talks.append(numbered(replace(like, turns=(prompt, *like.turns)), i))
    return talks


def text_of(words: int, draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def read_prompts(path: Path, total: int, like: Talk) -> list[Talk]:
    """total talks from a JSONL file, its lines in order, over again when it ends.

    A line is an object with one of `prompt` (text), `turns` (the user's texts) or `messages` (a chat whose last message is a user's),
    and, where it wants its own, `system`, `max_tokens`, `temperature`, `seed`. Raises PromptFileError.
    """
    lines = [_talk(path, number, line, like) for number, line in _lines(path)]
    return [numbered(lines[i % len(lines)], i) for i in range(total)]


def read_trace(path: Path, total: int | None, speed: float, like: Talk, words_for: Mapping[int, int]) -> list[Talk]:
    """A trace: lines like those of a prompt file, each with the moment to send it, `at_s` (seconds) or `timestamp` (milliseconds), and
    `output_tokens` or `output_length` for its answer. In the place of a prompt a line may give only its length, `input_tokens` or
    `input_length`; words_for says how many words have so many tokens. speed 2 sends twice as fast. Raises PromptFileError.
    """
    talks: list[Talk] = []
    for number, line in _lines(path):
        at_s = _moment_s(path, number, line)
        length = input_tokens_of(line)
        if length is not None and not {"prompt", "turns", "messages"} & line.keys():
            line = line | {"prompt": text_of(words_for[length], random.Random(f"{path.name} {number}"))}
        tokens = line.get("output_tokens", line.get("output_length", line.get("max_tokens", like.max_tokens)))
        talk = _talk(path, number, line | {"max_tokens": tokens}, like)
        talks.append(numbered(replace(talk, at_s=at_s), len(talks)))
    begin_s = min(talk.at_s or 0.0 for talk in talks)
    ordered = sorted((replace(talk, at_s=((talk.at_s or 0.0) - begin_s) / speed) for talk in talks), key=lambda talk: talk.at_s or 0.0)
    return ordered[:total]


def _moment_s(path: Path, number: int, line: Mapping[str, Any]) -> float:
    for name, unit_s in (("at_s", 1.0), ("timestamp", 0.001)):
        moment = line.get(name)
        if isinstance(moment, int | float) and not isinstance(moment, bool) and moment >= 0:
            return moment * unit_s
    raise PromptFileError(f"{path} line {number}: a trace needs at_s (seconds) or timestamp (milliseconds), a number from 0")


def trace_lengths(path: Path) -> set[int]:
    """The prompt lengths in tokens that a trace names. Raises PromptFileError."""
    return {length for _, line in _lines(path) if (length := input_tokens_of(line)) is not None}


def input_tokens_of(line: Mapping[str, Any]) -> int | None:
    length = line.get("input_tokens", line.get("input_length"))
    return length if isinstance(length, int) and length > 0 else None


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not empty; at least one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path} cannot be read as UTF-8: {getattr(error, 'strerror', None) or error}") from error
    found = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            read = json.loads(line)
        except ValueError as error:
            raise PromptFileError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(read, dict):
            raise PromptFileError(f"{path} line {number} must be a JSON object; got {line[:60]!r}")
        found = True
        yield number, read
    if not found:
        raise PromptFileError(f"{path} holds no line; give one JSON object per line")


def _talk(path: Path, number: int, line: Mapping[str, Any], like: Talk) -> Talk:
    where = f"{path} line {number}"
    own = {name: line[name] for name in ("system", "max_tokens", "temperature", "seed") if line.get(name) is not None}
    if not isinstance(own.get("max_tokens", 1), int) or own.get("max_tokens", 1) < 1:
        raise PromptFileError(f"{where}: max_tokens must be a whole number from 1; got {own['max_tokens']!r}")
    if "prompt" in line:
        turns = (line["prompt"], *like.turns)
    elif "turns" in line and isinstance(line["turns"], list):
        turns = tuple(line["turns"])
    elif "messages" in line and isinstance(line["messages"], list):
        system, turns = _of_messages(where, line["messages"])
        own = own if system is None else own | {"system": system}
    else:
        raise PromptFileError(f"{where} needs prompt (text), turns (texts) or messages (a chat); it has {', '.join(line) or 'nothing'}")
    if not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise PromptFileError(f"{where}: every turn must be a text that is not empty; got {str(turns)[:60]}")
    return replace(like, turns=turns, **own)


def _of_messages(where: str, messages: Sequence[Any]) -> tuple[str | None, tuple[Any, ...]]:
    """(system prompt, user turns). Answers in the file are left out: the server gives its own."""
    said = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, dict)]
    if len(said) < len(messages) or not said or said[-1][0] != "user":
        raise PromptFileError(f"{where}: messages must be objects with role and content, the last of them a user's")
    system = next((content for role, content in said if role == "system"), None)
    turns: tuple[Any, ...] = tuple(content for role, content in said if role == "user")
    return system, turns

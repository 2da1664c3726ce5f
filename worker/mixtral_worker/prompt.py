"""The prompt of a chat, as token ids.

Decides which template ids stand around each message, and refuses chats that the template has no place for.
Leaves text to ids to tokenizer.py, and how long a prompt may be to the scheduler.

Content never meets the template as a string: every content is encoded alone. Control ids cannot come out of text; where the vocabulary
has a template mark only as ordinary text ([INST] in the tokenizer of 8x7B), a run of content ids that equals the mark is broken by writing
its first piece in byte pieces: the same text, other ids.

Two formats:
* `instruct` (the form of Llama 2): each pair is BOS, `[INST] {user} [/INST] {assistant} `, EOS; the system prompt stands inside the first
  user turn as `<<SYS>>\\n{system}\\n<</SYS>>\\n\\n`.
* `mistral`: Mistral's own templates. BOS once; the system prompt and an empty line in front of the first user turn where [INST] is ordinary
  text (8x7B), of the last one where it is a control id (8x22B).
Where the vocabulary has a mark as a control id, that id is the mark, with no blank around it. A trailing assistant message is continued:
nothing follows it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from mixtral_worker.tokenizer import Tokenizer

FORMATS = ("instruct", "mistral")
USER_MARKS = ("[INST]", "[/INST]")
SYSTEM_MARKS = ("<<SYS>>", "<</SYS>>")


class PromptRefused(ValueError):
    """A chat or format that no prompt can be made of. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Message:
    """One message of a chat. role: system, developer (read as system), user or assistant."""

    role: str
    content: str


def resolve_format(tokenizer: Tokenizer, ckpt_dir_declared: str | None, requested: str) -> str:
    """Name of the format to use: as requested, or for "auto" what the checkpoint folder declares, else what the vocabulary speaks for."""
    if requested == "auto":
        requested = ckpt_dir_declared or ("instruct" if tokenizer.control_id("[INST]") is None else "mistral")
    if requested not in FORMATS:
        raise PromptRefused("unknown_prompt_format", f"prompt format is {requested!r}; known are auto, {', '.join(FORMATS)}")
    return requested


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a plain completion prompt: BOS and the text."""
    return [tokenizer.bos_id, *_encode(tokenizer, text)]


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], prompt_format: str = "auto") -> list[int]:
    """Ids of a chat, ready for the answer. Leading system messages are joined by an empty line; then user and assistant take turns."""
    return _Format(_Template(tokenizer), resolve_format(tokenizer, None, prompt_format), _read(messages)).ids(dropped=0)


def encode_fitting(tokenizer: Tokenizer, messages: Sequence[Message], prompt_format: str, most_tokens: int) -> tuple[list[int], int]:
    """Ids of the longest end of a chat that fits, in whole turns, and how many messages were left out for it.

    System messages stay. The last turn stays too, also where it alone does not fit.
    """
    chat_format = _Format(_Template(tokenizer), resolve_format(tokenizer, None, prompt_format), _read(messages))
    last = len(chat_format.chat.turns) - 1
    dropped = next((index for index, length in enumerate(chat_format.lengths()) if length <= most_tokens or index == last), last)
    return chat_format.ids(dropped), 2 * dropped


_Turn: TypeAlias = tuple[str, str | None]
"""(user, assistant); None only where the answer is asked for."""


@dataclass(frozen=True)
class _Chat:
    system: str | None
    turns: list[_Turn]
    continues: bool  # the last assistant message is to be continued


def _read(messages: Sequence[Message]) -> _Chat:
    if not messages:
        raise PromptRefused("no_messages", "the chat has 0 messages; send at least one user message")
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    for number, role in enumerate(roles, 1):
        if role not in ("system", "user", "assistant"):
            raise PromptRefused("unknown_role", f"message {number} has role {role!r}; roles are system, developer, user and assistant")
    first = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    if first == len(roles):
        raise PromptRefused("no_user_message", f"the chat has {first} system messages and nothing else; add a user message")
    for index in range(first, len(roles)):
        expected = ("user", "assistant")[(index - first) % 2]
        if roles[index] != expected:
            raise PromptRefused(
                "roles_out_of_order",
                f"message {index + 1} has role {messages[index].role!r} where {expected!r} must stand; after leading system messages "
                "user and assistant take turns, user first: join neighbouring messages of one role",
            )
    contents = [message.content for message in messages]
    users, answers = contents[first::2], contents[first + 1 :: 2]
    continues = len(users) == len(answers)
    turns = list(zip(users, [*answers, None], strict=False))
    return _Chat("\n\n".join(contents[:first]) if first else None, turns, continues)


class _Format:
    """Turns as ids of one template. A chat is its turns in a row, so how long it is follows from how long they are."""

    def __init__(self, template: "_Template", name: str, chat: _Chat) -> None:
        self.template, self.chat = template, chat
        self.is_instruct = name == "instruct"
        self.system_stands_last = not self.is_instruct and template.tokenizer.control_id("[INST]") is not None
        self.opening = [] if self.is_instruct else [template.tokenizer.bos_id]

    def ids(self, dropped: int) -> list[int]:
        """The prompt without so many of the first turns."""
        turns = self.chat.turns[dropped:]
        bearer = len(turns) - 1 if self.system_stands_last else 0
        told = (self.turn(*turn, self.chat.system if index == bearer else None) for index, turn in enumerate(turns))
        ended = self.ended(turns)
        return [*self.opening, *(id for ids, end in zip(told, ended, strict=True) for id in (*ids, *end))]

    def lengths(self) -> Iterator[int]:
        """How long the prompt is without any turn, without one, without two …"""
        turns, system = self.chat.turns, self.chat.system
        plain = [len(self.turn(*turn, None)) + len(end) for turn, end in zip(turns, self.ended(turns), strict=True)]
        left = len(self.opening) + sum(plain)
        for index, turn in enumerate(turns):
            bearer = turns[-1] if self.system_stands_last else turn
            yield left + (0 if system is None else len(self.turn(*bearer, system)) - len(self.turn(*bearer, None)))
            left -= plain[index]

    def ended(self, turns: Sequence[_Turn]) -> Iterator[list[int]]:
        """What stands after each turn: nothing where an answer is asked for or continued."""
        for index, (_, assistant) in enumerate(turns):
            is_open = assistant is None or (self.chat.continues and index == len(turns) - 1)
            yield [] if is_open else [*(self.template.blank if self.is_instruct else ()), self.template.tokenizer.eos_id]

    def turn(self, user: str, assistant: str | None, system: str | None) -> list[int]:
        """One pair, with the system prompt if this is the turn that bears it."""
        template = self.template
        ids = [template.tokenizer.bos_id] if self.is_instruct else []
        ids += template.mark("[INST]")
        if system is None:
            ids += template.content(user)
        elif self.is_instruct:
            ids += template.mark("<<SYS>>") + template.continuing("\n", system) + template.continuing("\n")
            ids += template.mark("<</SYS>>", leading_blank=False) + template.continuing("\n\n", user)
        else:
            ids += template.content(system) + template.continuing("\n\n", user)
        ids += template.mark("[/INST]")
        return ids if assistant is None else ids + template.content(assistant)


class _Template:
    """Template marks and contents as ids of one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._contents: dict[tuple[str, bool], list[int]] = {}

    def mark(self, text: str, leading_blank: bool = True) -> list[int]:
        control_id = self.tokenizer.control_id(text)
        return self.tokenizer.encode(text, leading_blank) if control_id is None else [control_id]

    @cached_property
    def blank(self) -> list[int]:
        return self.tokenizer.encode(" ", leading_blank=False)

    def content(self, text: str, leading_blank: bool = True) -> list[int]:
        if (text, leading_blank) not in self._contents:  # where a chat is shortened, one content is looked at several times
            self._contents[text, leading_blank] = self._break_marks(_encode(self.tokenizer, text, leading_blank))
        return self._contents[text, leading_blank]

    def continuing(self, newlines: str, content: str = "") -> list[int]:
        """Newlines of the template, then a content without SentencePiece's blank in front."""
        return self.tokenizer.encode(newlines, leading_blank=False) + self.content(content, leading_blank=False)

    @cached_property
    def _mark_runs(self) -> dict[int, list[list[int]]]:
        """Every run of ordinary ids that reads as a template mark, with and without a blank in front, by its first id."""
        runs: dict[int, list[list[int]]] = defaultdict(list)
        for mark in USER_MARKS + SYSTEM_MARKS:
            if self.tokenizer.control_id(mark) is None:
                for run in (self.tokenizer.encode(mark), self.tokenizer.encode(mark, leading_blank=False)):
                    runs[run[0]].append(run)
        return runs

    def _break_marks(self, ids: list[int]) -> list[int]:
        """Same text, no mark run. Each break leaves one piece less that is not a byte, so the passes come to an end."""
        while (broken := self._break_once(ids)) != ids:
            ids = broken
        return ids

    def _break_once(self, ids: list[int]) -> list[int]:
        broken: list[int] = []
        for index, id in enumerate(ids):
            run = next((run for run in self._mark_runs.get(id, ()) if ids[index : index + len(run)] == run), None)
            broken += [id] if run is None else self._as_bytes(id, run)
        return broken

    def _as_bytes(self, id: int, run: list[int]) -> list[int]:
        if self.tokenizer.is_byte(id):
            raise PromptRefused(
                "template_in_content",
                f"a message holds {self.tokenizer.decode(run)!r}, which this vocabulary writes only as its template does; leave it out",
            )
        return self.tokenizer.bytes_to_ids(self.tokenizer.token_bytes(id))


def _encode(tokenizer: Tokenizer, text: str, leading_blank: bool = True) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptRefused(
            "text_not_unicode", f"character {error.start + 1} of a message is half a surrogate pair; send whole characters"
        ) from error
    return tokenizer.encode(text, leading_blank)

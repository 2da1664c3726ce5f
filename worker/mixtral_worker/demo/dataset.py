"""Chats for the demo model, made of short stories.

Decides which wish each story answers (in words that the story itself uses), which chats have a second turn or a system prompt, and which
tokens are learnt: those of answers. Leaves the form of the prompt to prompt.py, so the model meets in training what it meets when serving.
"""

import random
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_worker.prompt import Message, encode_chat
from mixtral_worker.tokenizer import Tokenizer, train_vocabulary

STORY_END = "<|endoftext|>"
CONTROL_PIECES = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
LONG_CHARS, SHORT_CHARS = 1000, 600
NO_TARGET = -100

PHRASES = tomllib.loads((Path(__file__).parent / "phrases.toml").read_text())
DETERMINERS = "a|an|the|his|her|my|their|your|our"
AFTER_NOUN = set(
    "and was is are were to in on at with had said for that who but from of went saw could would did ran felt looked".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Row:
    """One chat. targets[i] is the id to be predicted after ids[i], or NO_TARGET."""

    ids: list[int]
    targets: list[int]


def read_stories(path: Path) -> list[str]:
    return [story.strip() for story in path.read_text().split(STORY_END) if story.strip()]


def train_tokenizer(stories: Sequence[str], path: Path, vocab_size: int = 4096) -> None:
    """A vocabulary of the stories' own pieces; the template's marks are control pieces, which no text can produce."""
    train_vocabulary((line for story in stories for line in story.splitlines()), path, vocab_size, CONTROL_PIECES)


class Storyteller:
    """Chats from stories. The same seed gives the same chats."""

    def __init__(self, stories: Sequence[str], tokenizer: Tokenizer, max_seq_len: int, seed: int = 0) -> None:
        self.stories, self.tokenizer, self.max_seq_len, self.seed = stories, tokenizer, max_seq_len, seed
        self._nouns = _nouns(stories)

    def plain_rows(self) -> list[Row]:
        """Every story once, as the answer to one wish: what perplexity is measured on."""
        draw = random.Random(self.seed)
        return [self._row([Message("user", self._wish(story, draw)), Message("assistant", story)]) for story in self.stories]

    def epoch(self, number: int) -> Iterator[Row]:
        """Every story once, in chats of one to five turns, with wishes drawn anew each epoch."""
        draw = random.Random(f"{self.seed} {number}")
        order = list(self.stories)
        draw.shuffle(order)
        if number % 2:
            order = _neighbour_names(order, draw)
        while order:
            yield self._row(self._chat(order, draw))

    def _chat(self, order: list[str], draw: random.Random) -> list[Message]:
        """Take the stories of one chat from the end of order."""
        kind = draw.random()
        messages = [Message("system", _phrase("system_prompts", draw))] if draw.random() < 0.12 else []
        if kind < 0.08:
            return messages + _talk(draw) + (self._told(order, draw) if draw.random() < 0.5 else [])
        if kind < 0.16 and _main_name(order[-1]) and len(order) > 3:
            return messages + self._long_chat(order, draw)
        messages += self._told(order, draw)
        turns = draw.choices([1, 2, 3, 5], [0.70, 0.22, 0.04, 0.04])[0]
        while turns > 1 and order and sum(len(message.content) for message in messages) + len(order[-1]) < 3.5 * self.max_seq_len:
            messages += _talk(draw) if draw.random() < 0.15 else self._told(order, draw)
            turns -= 1
        return messages

    def _told(self, order: list[str], draw: random.Random) -> list[Message]:
        story = order.pop()
        return [Message("user", self._wish(story, draw)), Message("assistant", story)]

    def _long_chat(self, order: list[str], draw: random.Random) -> list[Message]:
        """One long wish, answered by several stories, of the same child where neighbours in order allow it."""
        parts = [order.pop()]
        while order and sum(map(len, parts)) + len(order[-1]) < 3.3 * self.max_seq_len and _main_name(order[-1]) == _main_name(parts[0]):
            parts.append(order.pop())
        story = "\n".join(parts)
        return [Message("user", self._wish(story, draw)), Message("assistant", story)]

    def _wish(self, story: str, draw: random.Random) -> str:
        kind = draw.random()
        if kind < 0.12:
            return _phrase("any_wishes", draw)
        if len(story) > LONG_CHARS and kind < 0.55:
            if story.startswith("Once upon a time") and kind < 0.35:
                return _phrase("long_opening_wishes", draw).format("Once upon a time")
            return _phrase("long_wishes", draw).format(self._topic(story, draw))
        if len(story) < SHORT_CHARS and kind < 0.4:
            return _phrase("short_wishes", draw).format(self._topic(story, draw))
        if kind < 0.25 or (kind < 0.45 and story.startswith("Once upon a time")):
            words = 4 if story.startswith("Once upon a time") else draw.randint(3, 8)
            return _phrase("opening_wishes", draw).format(" ".join(story.split()[:words]).rstrip(".,!?"))
        return _phrase("topic_wishes", draw).format(self._topic(story, draw))

    def _topic(self, story: str, draw: random.Random) -> str:
        """A name or a thing or both, such as the story holds: "Lily", "a dog", "Tom and a ball"."""
        name = _main_name(story)
        seen = Counter(match[1] for match in re.finditer(rf"\b(?:{DETERMINERS})(?: [a-z]+)? ([a-z]+)\b", story) if match[1] in self._nouns)
        best = sorted(seen, key=lambda noun: -seen[noun] * self._nouns[noun])[:4]
        things = [_with_article(noun) for noun in best]
        kind = draw.random()
        if name and (kind < 0.25 or not things):
            return name
        if not things:
            return "a good day"
        if name and kind < 0.5:
            child = re.search(rf"\b(boy|girl|cat|dog|bird|fish|bear|bunny|rabbit|mouse|duck|frog) named {name}\b", story)
            if child and kind < 0.38:
                return f"a {child[1]} named {name}"
            return f"{name} and {draw.choice(things)}"
        if len(things) > 1 and kind < 0.65:
            return " and ".join(draw.sample(things[:3], 2))
        return draw.choice(things[:3])

    def _row(self, messages: list[Message]) -> Row:
        ids = [*encode_chat(self.tokenizer, messages, "instruct"), self.tokenizer.eos_id]
        targets = [NO_TARGET] * len(ids)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                start = len(encode_chat(self.tokenizer, messages[:index], "instruct"))
                end = len(encode_chat(self.tokenizer, messages[: index + 1], "instruct"))
                # The answer ends in EOS at once, although a history has a blank between them: no answer shows a stray blank.
                targets[start - 1 : end] = [*ids[start:end], self.tokenizer.eos_id]
        return Row(ids[: self.max_seq_len], targets[: self.max_seq_len])


def batches(rows: Sequence[Row], max_tokens: int, draw: random.Random | None) -> list[list[Row]]:
    """Rows of like length together, each batch at most max_tokens with its padding; shuffled by draw, else in order of length."""
    found: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.ids) + (draw.uniform(-12, 12) if draw else 0)):
        longest = max((len(other.ids) for other in found[-1]), default=0)
        if found[-1] and max(longest, len(row.ids)) * (len(found[-1]) + 1) > max_tokens:
            found.append([])
        found[-1].append(row)
    if draw is not None:
        draw.shuffle(found)
    return found


def _phrase(kind: str, draw: random.Random) -> str:
    phrase: str = draw.choice(PHRASES[kind])
    return phrase


def _talk(draw: random.Random) -> list[Message]:
    kind = PHRASES["off_topic"] if draw.random() < 0.5 else draw.choice(PHRASES["talk"])
    return [Message("user", draw.choice(kind["said"])), Message("assistant", draw.choice(kind["answers"]))]


def _with_article(noun: str) -> str:
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _neighbour_names(stories: list[str], draw: random.Random) -> list[str]:
    """Stories of one name side by side in runs, so that long chats stay with one child."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for story in stories:
        by_name[_main_name(story) or ""].append(story)
    runs = [group[start : start + 5] for group in by_name.values() for start in range(0, len(group), 5)]
    draw.shuffle(runs)
    return [story for run in runs for story in run]


def _main_name(story: str) -> str | None:
    named = re.search(r"\b(?:named|called) ([A-Z][a-z]+)\b", story)
    if named:
        return named[1]
    inside = Counter(re.findall(r"(?<=[a-z,] )([A-Z][a-z]{2,})\b", story))
    return inside.most_common(1)[0][0] if inside else None


def _nouns(stories: Sequence[str]) -> dict[str, float]:
    """Nouns with a weight that is higher for rarer ones: words after a determiner that mostly end the phrase."""
    ends: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    stories_with: Counter[str] = Counter()
    for story in stories:
        stories_with.update(set(re.findall(r"[a-z]+", story)))
        for match in re.finditer(rf"\b(?:{DETERMINERS}) ([a-z]+)([.,!?]| [a-z]+)", story):
            seen[match[1]] += 1
            ends[match[1]] += match[2] in ".,!?" or match[2].strip() in AFTER_NOUN
    share = {word: stories_with[word] / len(stories) for word in seen}
    return {word: 1 / (0.02 + share[word]) for word in seen if seen[word] >= 4 and ends[word] > 0.6 * seen[word] and share[word] < 0.3}

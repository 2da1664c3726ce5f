"""What steers one job's draws beyond temperature and cuts: penalties, biases, tokens that are not allowed yet, a grammar, logprobs.

Keeps the books of one job on rank 0, in numpy: which tokens it has seen and made, and how often. All of it follows from the job's own
tokens, so that a job that moved, yielded its slot or was batched anew is steered as before. Leaves to penalties.py what becomes of the
logits. A job that asks for none of this has no Steering, and costs no other job anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mixtral_worker.grammar import Grammar


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a job asks for; the defaults ask for nothing. Ranges are those of the wire (protocol.SamplingFields)."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    end_ids: tuple[int, ...] = ()  # what would end the answer, and is not drawn before min_tokens
    top_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class Chances:
    """Natural logarithms of probabilities at one place: of the token drawn, and of the likeliest, best first."""

    drawn: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Steering:
    """One job's. produced_ids is the scheduler's own list, which grows."""

    wishes: Wishes
    prompt_ids: Sequence[int]
    produced_ids: Sequence[int]
    grammar: Grammar | None = None
    chances: Chances | None = None  # of the last draw, where asked for
    _seen: "_Tally | None" = field(default=None, repr=False)

    def look_ahead(self) -> None:
        """Begin what takes time: call it before the forward pass whose logits are to be steered."""
        if self.grammar is not None:
            self.grammar.look_ahead(self.produced_ids)

    def forbidden(self) -> tuple[int, ...]:
        """Ids that may not be drawn now. A grammar says itself when an answer is whole."""
        return self.wishes.end_ids if len(self.produced_ids) < self.wishes.min_tokens and self.grammar is None else ()

    def counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Every id of prompt and answer once, and how often the answer has it. The arrays are good until the next call."""
        if self._seen is None:
            self._seen = _Tally(self.prompt_ids)
        return self._seen.after(self.produced_ids)


class _Tally:
    """Ids seen so far and how often they were made. A token costs the same whatever came before it."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        seen = list(dict.fromkeys(prompt_ids))
        self._place = {id: place for place, id in enumerate(seen)}
        self._ids = np.array(seen, np.int64)
        self._counts = np.zeros(len(seen), np.float32)
        self._made = 0

    def after(self, produced_ids: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        for id in produced_ids[self._made :]:
            place = self._place.setdefault(id, len(self._place))
            if place == len(self._ids):  # full: twice the room
                self._ids = np.concatenate([self._ids, np.zeros(place + 64, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(place + 64, np.float32)])
            self._ids[place] = id
            self._counts[place] += 1
        self._made = len(produced_ids)
        return self._ids[: len(self._place)], self._counts[: len(self._place)]

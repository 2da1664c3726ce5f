"""What all ranks do in one step, and how it travels.

A StepPlan is made by the scheduler on rank 0 and sent to every rank as one int32 buffer whose size depends on the limits alone,
so that a single broadcast of known length carries any plan. No torch here: ranks.py sends the buffer, engine.py runs the plan.

The buffer has room for what one step can add, not for what the ranks know already: of a row's block table only the part that is new
travels, and each rank keeps the tables of all slots. What bounds it is `max_new_blocks`. At 64 slots of 32,768 tokens that is 12 KB,
where whole tables would be 530 KB. How a token is drawn does not travel either: rank 0 alone draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from mixtral_worker.steering import Steering


class Kind(IntEnum):
    STEP = 0  # one forward pass over `rows`
    IDLE = 1  # a heartbeat: nothing to compute, everyone is alive
    STOP = 2  # leave the loop, no plan will follow


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one job draws its tokens. The draw at an offset depends on these, the offset and the logits, on nothing else."""

    temperature: float = 0.8  # 0 takes the best token
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    seed: int = 0
    min_p: float = 0.0  # 0 keeps all

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a number from 0 up; given {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and at most at 1; given {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be 0 (all) or a positive 32-bit number; given {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 and 1; given {self.min_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a signed 64-bit number; given {self.seed}")


GREEDY = Sampling(0.0)


@dataclass(frozen=True, slots=True)
class Row:
    """What one sequence feeds in one step: one token when it decodes, a chunk of its prompt when it prefills."""

    slot: int  # the row of the running batch that the sequence holds
    start: int  # position of the first token
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]  # KV blocks of positions 0 … start + len(tokens) - 1
    samples: bool  # whether the last token's logits yield the next id
    # How that id is drawn. Rank 0 alone draws: these do not travel, and no two rows differ by them.
    offset: int = field(default=1, compare=False)  # 1-based offset of the next id among the job's generated tokens
    sampling: Sampling = field(default=GREEDY, compare=False)
    known: int = 0  # so many of `blocks`, from the first on, are as in the slot's row before this one
    steering: Steering | None = field(default=None, compare=False)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    kind: Kind
    step: int = 0  # counts the steps of this worker; every rank names it when it fails
    rows: tuple[Row, ...] = ()  # those of one token first, each kind by rising end


def places(rows: Sequence[Row], last: Sequence[int]) -> list[int]:
    """Where, in the flat batch of the rows' tokens, so many last tokens of each row are."""
    ends = accumulate(len(row.tokens) for row in rows)
    return [place for end, count in zip(ends, last, strict=True) for place in range(end - count, end)]


def max_new_blocks(max_slots: int, max_seq_len: int, max_step_tokens: int, block_size: int) -> int:
    """The most blocks that the rows of one plan may add to the tables together; the scheduler holds it.

    New tokens begin at most one block per block_size of them and one more in each slot. A row that begins behind blocks found in the
    cache brings its whole table: of these one always fits, and several of them share that room.
    """
    return -(-max_step_tokens // block_size) + max_slots + -(-max_seq_len // block_size)


class PlanCodec:
    """StepPlan ⇄ one int32 array of `self.size` numbers. Who unpacks remembers the tables, and so unpacks every plan, in order."""

    def __init__(self, max_slots: int, max_seq_len: int, max_step_tokens: int, block_size: int) -> None:
        self.max_new_blocks = max_new_blocks(max_slots, max_seq_len, max_step_tokens, block_size)
        row = [
            ("slot", np.int32),
            ("start", np.int32),
            ("samples", np.int32),
            ("n_tokens", np.int32),
            ("known", np.int32),
            ("n_new", np.int32),
        ]
        message = [
            ("step", np.int64),
            ("kind", np.int32),
            ("n_rows", np.int32),
            ("tokens", np.int32, (max_step_tokens,)),
            ("blocks", np.int32, (self.max_new_blocks,)),
            ("rows", row, (max_slots,)),
        ]
        self._dtype: np.dtype[Any] = np.dtype(message)
        self.size = self._dtype.itemsize // 4
        self._tables: list[tuple[int, ...]] = [()] * max_slots

    def pack(self, plan: StepPlan) -> npt.NDArray[np.int32]:
        buffer = np.zeros(self.size, np.int32)
        message = buffer.view(self._dtype)[0]
        message["step"], message["kind"], message["n_rows"] = plan.step, plan.kind, len(plan.rows)
        tokens = [token for row in plan.rows for token in row.tokens]
        blocks = [block for row in plan.rows for block in row.blocks[row.known :]]
        if len(blocks) > self.max_new_blocks:
            raise ValueError(f"step {plan.step} adds {len(blocks)} blocks to the tables; at most {self.max_new_blocks} travel in one step")
        message["tokens"][: len(tokens)] = tokens
        message["blocks"][: len(blocks)] = blocks
        for i, row in enumerate(plan.rows):
            message["rows"][i] = (row.slot, row.start, row.samples, len(row.tokens), row.known, len(row.blocks) - row.known)
        return buffer

    def unpack(self, buffer: npt.NDArray[np.int32]) -> StepPlan:
        message = buffer.view(self._dtype)[0]
        tokens, blocks = iter(message["tokens"].tolist()), iter(message["blocks"].tolist())
        rows = []
        for packed in message["rows"][: message["n_rows"]]:
            slot, start, samples, n_tokens, known, n_new = packed.item()
            table = self._tables[slot] = self._tables[slot][:known] + tuple(islice(blocks, n_new))
            rows.append(Row(slot, start, tuple(islice(tokens, n_tokens)), table, bool(samples), known=known))
        return StepPlan(Kind(int(message["kind"])), int(message["step"]), tuple(rows))

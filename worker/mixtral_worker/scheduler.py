"""Which tokens of which jobs run this step.

Decides who enters the batch, who feeds what, and who gives up its KV blocks when they run out. Pure Python: no tensors, no clock,
no I/O; the same calls give the same plans. What an id means, and whether it ends the answer, is the loop's to say (`remove`).

Each step: every decoding sequence feeds one token; what is left of the token budget goes to prompts, oldest first, in chunks,
so that a long prompt never stalls running chats. Sequences enter and leave between steps. All orders are by arrival: nobody
overtakes, the youngest yields, and so the oldest always gets on and nobody starves.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from mixtral_worker.blocks import BlockPool
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan

PREFILL_CHUNK = 512  # about where one H100 stops being bound by bandwidth


class DoesNotFit(ValueError):
    """This worker could never run the sequence to its end, however empty it were."""


@dataclass(eq=False)
class Sequence:
    """One job in this worker. `produced_ids` may come with tokens that an earlier attempt generated: it goes on after them."""

    job_id: str
    attempt: int
    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    produced_ids: list[int] = field(default_factory=list)
    # The scheduler's own:
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # positions whose keys and values are in the blocks

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.produced_ids)

    @property
    def is_complete(self) -> bool:
        return len(self.produced_ids) >= self.max_tokens

    @property
    def is_decoding(self) -> bool:
        return self.cached == len(self) - 1

    def tokens(self, start: int, count: int) -> tuple[int, ...]:
        from_produced = start - len(self.prompt_ids)
        if from_produced >= 0:
            return tuple(self.produced_ids[from_produced : from_produced + count])
        head = self.prompt_ids[start : start + count]
        return (*head, *self.produced_ids[: count - len(head)])


class Scheduler:
    def __init__(
        self,
        max_slots: int,
        pool: BlockPool,
        max_seq_len: int,
        max_step_tokens: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.max_slots = max_slots
        self.pool = pool
        self.max_seq_len = max_seq_len
        self.prefill_chunk = prefill_chunk
        self.max_step_tokens = max_step_tokens or prefill_chunk + max_slots
        if self.max_step_tokens < max_slots:
            raise ValueError(f"max_step_tokens {self.max_step_tokens} leaves no token for each of {max_slots} slots; raise it")
        self.step = 0
        self.running: list[Sequence] = []  # oldest first
        self.waiting: deque[Sequence] = deque()  # all younger than any running
        self._by_slot: list[Sequence | None] = [None] * max_slots

    @property
    def free_slots(self) -> int:
        """Slots that neither a running nor a waiting sequence has a claim on."""
        return max(0, self.max_slots - len(self.running) - len(self.waiting))

    def admit(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others. Raises DoesNotFit with the numbers."""
        if any(other.job_id == sequence.job_id for other in self._all()):
            raise ValueError(f"job {sequence.job_id} is in this worker already; remove it before it is admitted anew")
        if sequence.is_complete:
            raise ValueError(f"job {sequence.job_id} has all its {sequence.max_tokens} tokens; finish it instead of admitting it")
        self._require_fit(sequence)
        self.waiting.append(sequence)

    def remove(self, job_id: str) -> Sequence | None:
        """Forget a job, whatever it was doing; its slot and blocks are free at once. None if it is not here."""
        for sequence in self._all():
            if sequence.job_id == job_id:
                if sequence in self.running:
                    self._vacate(sequence)
                else:
                    self.waiting.remove(sequence)
                return sequence
        return None

    def plan_step(self) -> StepPlan | None:
        """The next step's work; None when no sequence has any."""
        rows = [self._row(sequence, 1) for sequence in self._decoding()]
        budget = self.max_step_tokens - len(rows)
        for sequence in self._prefilling():  # a slot that does not decode leaves at least one token of budget
            count = min(budget, self.prefill_chunk, len(sequence) - sequence.cached)
            rows.append(self._row(sequence, count))
            budget -= count
            if budget == 0:
                break
        if not rows:
            return None
        self.step += 1
        rows.sort(key=lambda row: (len(row.tokens) > 1, row.end))
        return StepPlan(Kind.STEP, self.step, tuple(rows))

    def record(self, plan: StepPlan, next_ids: list[int]) -> list[tuple[Sequence, int]]:
        """Take in what a step computed, one id for each row that samples. Returns who got which id.

        A negative id says that the row's logits were not finite: it is returned but never appended. A sequence that got such an
        id, or the last of its max_tokens, leaves the batch by itself. Sequences removed since the plan was made are left out.
        """
        sampled = iter(next_ids)
        news = []
        for row in plan.rows:
            next_id = next(sampled) if row.samples else None
            sequence = self._by_slot[row.slot]  # None if removed; slots are given out in plan_step alone, so never another's
            if sequence is None:
                continue
            sequence.cached = row.end
            if next_id is None:
                continue
            if next_id >= 0:
                sequence.produced_ids.append(next_id)
            if next_id < 0 or sequence.is_complete:
                self._vacate(sequence)
            news.append((sequence, next_id))
        return news

    def _all(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def _decoding(self) -> Iterator[Sequence]:
        """Running sequences that feed one token, each with a block to write it to. The youngest yield if blocks run out."""
        for sequence in list(self.running):
            if not sequence.is_decoding:
                continue
            while sequence.slot >= 0 and not self._grow(sequence):
                self._preempt_youngest()
            if sequence.slot >= 0:
                yield sequence

    def _prefilling(self) -> Iterator[Sequence]:
        """Running sequences with prompt left to feed, then those that can enter now."""
        yield from [sequence for sequence in self.running if not sequence.is_decoding]
        while self.waiting and len(self.running) < self.max_slots and self._has_room(self.waiting[0]):
            yield self._enter(self.waiting.popleft())

    def _row(self, sequence: Sequence, count: int) -> Row:
        end = sequence.cached + count
        return Row(
            slot=sequence.slot,
            start=sequence.cached,
            tokens=sequence.tokens(sequence.cached, count),
            blocks=tuple(sequence.blocks[: self.pool.blocks_for(end)]),
            samples=end == len(sequence),
            offset=len(sequence.produced_ids) + 1,
            sampling=sequence.sampling,
        )

    def _has_room(self, sequence: Sequence) -> bool:
        # One block stays back for each running sequence, or the newcomer would be thrown out again within a few steps.
        return self.pool.blocks_for(len(sequence)) + len(self.running) <= self.pool.free_blocks

    def _enter(self, sequence: Sequence) -> Sequence:
        sequence.blocks = self.pool.allocate(self.pool.blocks_for(len(sequence)))
        sequence.cached = 0
        sequence.slot = self._by_slot.index(None)
        self._by_slot[sequence.slot] = sequence
        self.running.append(sequence)
        return sequence

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._by_slot[sequence.slot] = None
        self.pool.free(sequence.blocks)
        sequence.slot, sequence.blocks, sequence.cached = -1, [], 0

    def _grow(self, sequence: Sequence) -> bool:
        missing = self.pool.blocks_for(len(sequence)) - len(sequence.blocks)
        if missing > self.pool.free_blocks:
            return False
        sequence.blocks += self.pool.allocate(missing)
        return True

    def _preempt_youngest(self) -> None:
        """Send the youngest back to wait. It keeps its tokens and computes their keys and values anew when it re-enters."""
        youngest = self.running[-1]
        self._vacate(youngest)
        self.waiting.appendleft(youngest)

    def _require_fit(self, sequence: Sequence) -> None:
        if not sequence.prompt_ids:
            raise DoesNotFit(f"job {sequence.job_id} has an empty prompt; a sequence needs at least one token to start from")
        whole = len(sequence.prompt_ids) + sequence.max_tokens
        if whole > self.max_seq_len:
            raise DoesNotFit(
                f"{len(sequence.prompt_ids):,} prompt tokens and {sequence.max_tokens:,} to generate make {whole:,}; "
                f"this worker takes at most {self.max_seq_len:,} (max_seq_len); shorten the chat or ask for fewer tokens"
            )
        if self.pool.blocks_for(whole) > self.pool.num_blocks:
            raise DoesNotFit(
                f"{len(sequence.prompt_ids):,} prompt tokens and {sequence.max_tokens:,} to generate need "
                f"{self.pool.blocks_for(whole):,} KV blocks of {self.pool.block_size} tokens; this worker has "
                f"{self.pool.num_blocks:,}; shorten the chat, ask for fewer tokens, or give the worker more KV memory"
            )

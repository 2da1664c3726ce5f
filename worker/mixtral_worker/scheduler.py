"""Which tokens of which jobs run this step.

Decides who enters the batch, who feeds what, who shares which KV blocks, and who gives them up when they run out. Pure Python: no
tensors, no clock, no I/O; the same calls give the same plans. What an id means, and whether it ends the answer, is the loop's to say
(`remove`).

Each step: every decoding sequence feeds one token; what is left of the token budget goes to prompts in chunks, so that a long prompt
never stalls running chats. Sequences enter and leave between steps. All orders are by priority, then by arrival: nobody overtakes,
the last yields, and so the first always gets on. A job of lower priority also yields its slot or its blocks to one that waits.

A sequence that enters begins behind the blocks that are kept of its beginning: those of the chat's last turn, of an equal prompt, or
its own from before it yielded. Only full blocks are shared, so nothing is ever copied, and what is shared is never written. A block
is kept only once a token was drawn from finite logits over it: numbers that break one job can reach no other.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from mixtral_worker.blocks import BlockPool, chain_key
from mixtral_worker.grammar import Grammar
from mixtral_worker.plan import Kind, Row, Sampling, StepPlan, max_new_blocks
from mixtral_worker.steering import Steering

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
    priority: int = 0  # lower is served first
    steering: Steering | None = None
    # The scheduler's own:
    arrival: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    known: int = 0  # so many of the blocks the last row named; 0: no row yet, or they have changed since
    cached: int = 0  # positions whose keys and values are in the blocks
    keys: list[bytes] = field(default_factory=list)  # of the full blocks, from the first on
    kept: int = 0  # so many of the blocks were offered to others

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.produced_ids)

    @property
    def grammar(self) -> Grammar | None:
        return None if self.steering is None else self.steering.grammar

    @property
    def is_complete(self) -> bool:
        return len(self.produced_ids) >= self.max_tokens

    def __lt__(self, other: "Sequence") -> bool:
        """Who is served before whom."""
        return (self.priority, self.arrival) < (other.priority, other.arrival)

    @property
    def is_decoding(self) -> bool:
        return self.cached == len(self) - 1 and self.known > 0

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
        self.max_new_blocks = max_new_blocks(max_slots, max_seq_len, self.max_step_tokens, pool.block_size)
        self.step = 0
        self.running: list[Sequence] = []  # in the order in which they are served, as are those who wait
        self.waiting: list[Sequence] = []
        self.entered_tokens = self.reused_tokens = self.preemptions = 0  # since the start; of the tokens that entered some were reused
        self._arrivals = 0
        self._by_slot: list[Sequence | None] = [None] * max_slots

    @property
    def free_slots(self) -> int:
        """Slots that neither a running nor a waiting sequence has a claim on."""
        return max(0, self.max_slots - len(self.running) - len(self.waiting))

    def admit(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others of its priority. Raises DoesNotFit with the numbers."""
        if any(other.job_id == sequence.job_id for other in self._all()):
            raise ValueError(f"job {sequence.job_id} is in this worker already; remove it before it is admitted anew")
        if sequence.is_complete:
            raise ValueError(f"job {sequence.job_id} has all its {sequence.max_tokens} tokens; finish it instead of admitting it")
        self._require_fit(sequence)
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._name_blocks(sequence, self._reusable(sequence))
        insort(self.waiting, sequence)

    def remove(self, job_id: str) -> Sequence | None:
        """Forget a job, whatever it was doing; its slot and blocks are free at once. None if it is not here.

        Blocks of it that others may share stay in the cache.
        """
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
        self._let_in()
        rows = [self._row(sequence, 1) for sequence in self._decoding()]
        tokens_left = self.max_step_tokens - len(rows)  # a slot that does not decode leaves at least one
        blocks_left = self.max_new_blocks - sum(len(row.blocks) - row.known for row in rows)
        for sequence in [one for one in self.running if not one.is_decoding]:
            self._reuse(sequence)
            count = min(tokens_left, self.prefill_chunk, len(sequence) - sequence.cached)
            new_blocks = self.pool.blocks_for(sequence.cached + count) - sequence.known
            if not count or new_blocks > blocks_left:
                break
            rows.append(self._row(sequence, count))
            tokens_left -= count
            blocks_left -= new_blocks
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
                self._keep(sequence)
                sequence.produced_ids.append(next_id)
            else:
                self.pool.forget(sequence.blocks)  # also those that it shares, until another's finite logits vouch for them anew
            if next_id < 0 or sequence.is_complete:
                self._vacate(sequence)
            news.append((sequence, next_id))
        return news

    def _all(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def _let_in(self) -> None:
        """Those who wait enter, in order, as far as there are slots, blocks, and tokens in this step."""
        while self.waiting and self._tokens_before(self.waiting[0]) < self.max_step_tokens and self._make_room(self.waiting[0]):
            self._enter(self.waiting.pop(0))

    def _tokens_before(self, newcomer: Sequence) -> int:
        """How many of this step's tokens others take first: all who decode, and prompts that are served before."""
        prompts = [one for one in self.running if not one.is_decoding]
        chunks = [min(self.prefill_chunk, len(one) - one.cached) for one in prompts if one < newcomer]
        return len(self.running) - len(prompts) + sum(chunks)

    def _decoding(self) -> Iterator[Sequence]:
        """Running sequences that feed one token, each with a block to write it to. The last yield if blocks run out."""
        for sequence in list(self.running):
            if not sequence.is_decoding:
                continue
            while sequence.slot >= 0 and self._missing(sequence) > self.pool.free_blocks:
                self._preempt(self.running[-1])
            if sequence.slot >= 0:
                self._grow(sequence)
                yield sequence

    def _row(self, sequence: Sequence, count: int) -> Row:
        end, known = sequence.cached + count, sequence.known
        sequence.known = self.pool.blocks_for(end)
        return Row(
            slot=sequence.slot,
            start=sequence.cached,
            tokens=sequence.tokens(sequence.cached, count),
            blocks=tuple(sequence.blocks[: sequence.known]),
            samples=end == len(sequence),
            offset=len(sequence.produced_ids) + 1,
            sampling=sequence.sampling,
            known=known,
            steering=sequence.steering,
        )

    def _make_room(self, newcomer: Sequence) -> bool:
        """Whether it can enter now, if need be in the place of the youngest of a lower priority."""
        lower = [one for one in self.running if one.priority > newcomer.priority]
        if not self._has_room(newcomer, lower):  # nobody yields in vain
            return False
        while not self._has_room(newcomer, []):
            self._preempt(lower.pop())
        return True

    def _has_room(self, newcomer: Sequence, yielding: list[Sequence]) -> bool:
        """Whether it could enter if those who yield, the last of the running, were gone."""
        staying = self.running[: len(self.running) - len(yielding)]
        released = self.pool.released_by([block for one in yielding for block in one.blocks])
        found = self.pool.find(newcomer.keys[: self._reusable(newcomer)])
        shared = sum(self.pool.is_owned(block) and block not in released for block in found)
        # One block stays back for each running sequence, or the newcomer would be thrown out again within a few steps.
        wanted = self.pool.blocks_for(len(newcomer)) - shared + sum(self._missing(one) + 1 for one in staying)
        return len(staying) < self.max_slots and wanted <= self.pool.free_blocks + len(released)

    def _enter(self, sequence: Sequence) -> None:
        sequence.slot = self._by_slot.index(None)
        self._by_slot[sequence.slot] = sequence
        insort(self.running, sequence)
        self._reuse(sequence)
        self._grow(sequence)
        self.entered_tokens += len(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._by_slot[sequence.slot] = None
        self.pool.free(sequence.blocks)
        sequence.slot, sequence.blocks, sequence.known, sequence.cached, sequence.kept = -1, [], 0, 0, 0

    def _preempt(self, sequence: Sequence) -> None:
        """Send it back to wait. It keeps its tokens; what the cache loses of them in the meantime it computes anew when it re-enters."""
        self._vacate(sequence)
        insort(self.waiting, sequence)
        self.preemptions += 1

    def _missing(self, sequence: Sequence) -> int:
        return self.pool.blocks_for(len(sequence)) - len(sequence.blocks)

    def _grow(self, sequence: Sequence) -> None:
        sequence.blocks += self.pool.allocate(self._missing(sequence))

    def _reusable(self, sequence: Sequence) -> int:
        """How many blocks it may take from the cache. Never that of its last token: only computing it gives logits."""
        return (len(sequence) - 1) // self.pool.block_size

    def _reuse(self, sequence: Sequence) -> None:
        """Go on behind the kept blocks that hold what it would compute next, instead of in blocks of its own."""
        first = sequence.cached // self.pool.block_size
        found = self.pool.find(sequence.keys[first : self._reusable(sequence)])
        if not found:
            return
        end = first + len(found)
        self.pool.share(found)
        self.pool.free(sequence.blocks[first:end])
        sequence.blocks[first:end] = found
        self.reused_tokens += end * self.pool.block_size - sequence.cached
        sequence.cached, sequence.known = end * self.pool.block_size, 0

    def _keep(self, sequence: Sequence) -> None:
        """Let others find what it has computed."""
        full = sequence.cached // self.pool.block_size
        self._name_blocks(sequence, full)
        for i in range(sequence.kept, full):
            self.pool.keep(sequence.blocks[i], sequence.keys[i])
        sequence.kept = full

    def _name_blocks(self, sequence: Sequence, count: int) -> None:
        for i in range(len(sequence.keys), count):
            tokens = sequence.tokens(i * self.pool.block_size, self.pool.block_size)
            sequence.keys.append(chain_key(sequence.keys[-1] if i else b"", tokens))

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

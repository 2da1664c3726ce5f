"""The step loop: jobs in, tokens out, one forward pass at a time.

Decides what a job's ids mean (its prompt, its text, its end) and which job fails alone. Rank 0 runs `run_leader` (or the terminal chat)
with a Batch; the other ranks run `run_follower`. Leaves to scheduler.py who computes what in a step, to engine.py the step, to link.py
the server.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mixtral_client.protocol import FrameError, JobSpec, TokenChance, TokenLogprobs, WorkerJob
from mixtral_worker.account import Account
from mixtral_worker.detokenizer import Detokenizer
from mixtral_worker.grammar import GrammarRefused, Grammars
from mixtral_worker.link import DrainAsked, End, JobDropped, JobTaken, Link, LinkEnded, Piece
from mixtral_worker.plan import Kind, PlanCodec, Sampling, StepPlan
from mixtral_worker.prompt import Message, PromptRefused, encode_chat, encode_fitting, encode_text
from mixtral_worker.scheduler import DoesNotFit, Scheduler, Sequence
from mixtral_worker.steering import Chances, Steering, Wishes
from mixtral_worker.telemetry import LOG, SUMMARY_EVERY_S, TELL_EVERY_S, Rate, Telemetry, line, summary
from mixtral_worker.tokenizer import Tokenizer
from mixtral_worker.watchdog import Watchdog

if TYPE_CHECKING:  # the loop itself needs no torch, and so starts in half a second where another engine stands in
    from mixtral_worker.engine import Engine
    from mixtral_worker.ranks import Ranks

IDLE_WAIT_S = 0.25
COMPILE_WAIT_S = 0.001
HEARTBEAT_EVERY_S = 1.0
MOST_OF_CONTEXT_KEPT = 4  # a chat is not shortened further than to three quarters of the context, however long an answer was asked for
FINISH_WITHIN_S = 20.0  # torchrun kills 30 s after SIGTERM; the link needs the rest to say goodbye
LOGOUT_WITHIN_S = 3.0


@dataclass
class _Answer:
    """One job's way from ids to text."""

    job: WorkerJob
    sequence: Sequence
    detokenizer: Detokenizer
    end_ids: frozenset[int]  # tokens that end the answer
    dropped_messages: int
    taken_s: float


class Batch:
    """Every job in this worker, on rank 0. Pieces go out in the order in which tokens were made."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, prompt_format: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler = scheduler
        self._tokenizer = tokenizer
        self._prompt_format = prompt_format
        self._clock = clock
        self._grammars = Grammars(tokenizer)
        self._answers: dict[str, _Answer] = {}
        self._compiling: list[_Answer] = []  # wait for their grammar, outside the scheduler
        self._tokens, self._steps = Rate(), Rate()
        self._schedule_s = self._detokenise_s = 0.0
        self._tokens_total = self._jobs_total = self._failed_total = 0

    def __len__(self) -> int:
        return len(self._answers)

    def take(self, job: WorkerJob) -> list[Piece]:
        """Let a job in. What comes back is empty, or its end: refused, or nothing left to do."""
        self._jobs_total += 1
        return self._failing_alone(job, lambda: self._admit(job))

    def let_in(self) -> list[Piece]:
        """Jobs whose grammar is ready now enter. What comes back are the ends of those that can have none."""
        return [end for answer in self._compiling[:] for end in self._failing_alone(answer.job, partial(self._enter, answer))]

    def drop(self, job_id: str, attempt: int) -> None:
        """Forget a job; it feeds nothing from the next step on."""
        answer = self._answers.get(job_id)
        if answer is not None and answer.job.attempt == attempt:
            del self._answers[job_id]
            self.scheduler.remove(job_id)
            LOG.info(line("dropped", job=job_id, attempt=attempt, tokens=len(answer.sequence.produced_ids)))

    def plan_step(self) -> StepPlan | None:
        began_s = time.perf_counter()
        plan = self.scheduler.plan_step()
        self._schedule_s += time.perf_counter() - began_s
        return plan

    def record(self, plan: StepPlan, next_ids: list[int]) -> list[Piece]:
        """Take in the ids of a step: their text, and which jobs end with them."""
        began_s = time.perf_counter()
        news = self.scheduler.record(plan, next_ids)
        recorded_s = time.perf_counter()
        now_s = self._clock()
        self._steps.add(now_s, 1)
        self._tokens.add(now_s, len(news))
        self._tokens_total += len(news)
        pieces = [self._piece(self._answers[sequence.job_id], next_id) for sequence, next_id in news]
        self._schedule_s += recorded_s - began_s
        self._detokenise_s += time.perf_counter() - recorded_s
        return pieces

    def give_up_largest(self, plan: StepPlan, reason: str) -> list[Piece]:
        """A step found no memory: the job that asked for most of it fails, newcomers first, so that the others go on."""
        row = max(plan.rows, key=lambda row: (len(row.tokens) > 1, len(row.tokens) * row.end))
        sequence = next(one for one in self.scheduler.running if one.slot == row.slot)
        answer = self._answers[sequence.job_id]
        self._forget(answer)
        sentence = f"this worker's memory holds no chat of {row.end:,} tokens beside those that run ({reason}); shorten it, or ask again"
        return [self._failed(answer.job, len(sequence.prompt_ids), "out_of_memory", sentence)]

    def telemetry(self, of_steps: Mapping[str, Any] = MappingProxyType({})) -> Telemetry:
        """of_steps: the crew's figures, by the names of Telemetry's fields."""
        scheduler, now_s = self.scheduler, self._clock()
        return Telemetry(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=scheduler.max_slots,
            kv_blocks_used=scheduler.pool.num_blocks - scheduler.pool.free_blocks,
            kv_blocks_kept=scheduler.pool.kept_blocks,
            kv_blocks=scheduler.pool.num_blocks,
            tokens_per_s=round(self._tokens.per_s(now_s), 1),
            steps_per_s=round(self._steps.per_s(now_s), 1),
            tokens_total=self._tokens_total,
            jobs_total=self._jobs_total,
            failed_total=self._failed_total,
            prompt_tokens_total=scheduler.entered_tokens,
            reused_tokens_total=scheduler.reused_tokens,
            preemptions_total=scheduler.preemptions,
            schedule_s_total=self._schedule_s,
            detokenise_s_total=self._detokenise_s,
            **of_steps,
        )

    def _admit(self, job: WorkerJob) -> Piece | None:
        if job.id in self._answers:
            raise ValueError(f"job {job.id} is in this worker already; it must be dropped before it is taken anew")
        spec, drawn = job.spec, job.spec.sampling
        prompt_ids, dropped = self._prompt_ids(job)
        self._require_known(chain(prompt_ids, job.produced_ids, drawn.logit_bias, spec.stop_token_ids))
        room = self.scheduler.max_seq_len - len(prompt_ids)
        if room < 1:
            without = f" even without its {dropped:,} oldest messages" if dropped else ""
            raise PromptRefused(
                "context_length_exceeded",
                f"prompt is {len(prompt_ids):,} tokens{without}; this worker takes at most {self.scheduler.max_seq_len - 1:,} "
                f"({self.scheduler.max_seq_len:,} context minus 1 kept for the answer); shorten the chat",
            )
        begun = spec.messages[-1].content if spec.messages is not None and spec.messages[-1].role == "assistant" else None
        is_fresh_answer = spec.messages is not None and begun is None
        produced_ids = list(job.produced_ids)
        sequence = Sequence(
            job.id,
            job.attempt,
            prompt_ids,
            min(spec.max_tokens, room),
            Sampling(drawn.temperature, drawn.top_p, drawn.top_k, spec.seed, drawn.min_p),
            produced_ids,
            job.priority,
            steering=self._steering(spec, prompt_ids, produced_ids, begun or ""),
        )
        ends_by_eos = not spec.ignore_eos or sequence.grammar is not None  # a grammar says itself when an answer is whole
        end_ids = frozenset((*spec.stop_token_ids, self._tokenizer.eos_id) if ends_by_eos else spec.stop_token_ids)
        is_over = sequence.is_complete or produced_ids[-1:] in [[id] for id in end_ids]
        sent_bytes = 0 if is_over else job.sent_bytes  # what was held back has left with the last token
        detokenizer = Detokenizer(self._tokenizer, spec.stop, produced_ids, sent_bytes, is_fresh_answer, spec.min_tokens)
        answer = _Answer(job, sequence, detokenizer, end_ids, dropped, self._clock())
        end = self._end(answer)
        if end is not None:  # an earlier attempt made the last token and died before it could say so
            return self._ended(answer, Piece(job.id, job.attempt, len(prompt_ids), end=end, dropped_messages=dropped))
        self._answers[job.id] = answer
        self._compiling.append(answer)
        self._enter(answer)
        LOG.info(
            line(
                "taken",
                job=job.id,
                attempt=job.attempt,
                prompt_tokens=len(prompt_ids),
                max_tokens=sequence.max_tokens,
                from_offset=len(job.produced_ids) + 1,
            )
        )
        return None

    def _enter(self, answer: _Answer) -> None:
        """Into the scheduler, unless the job's grammar is not compiled yet."""
        grammar = answer.sequence.grammar
        if self._answers.get(answer.job.id) is not answer:  # dropped meanwhile
            self._compiling.remove(answer)
        elif grammar is None or grammar.is_ready():
            self._compiling.remove(answer)
            self.scheduler.admit(answer.sequence)

    def _failing_alone(self, job: WorkerJob, action: Callable[[], Piece | None]) -> list[Piece]:
        """The end of the job that the action comes to, if it does; one job's trouble must not end the others."""
        try:
            end = action()
        except (PromptRefused, GrammarRefused) as refused:
            end = self._refused(job, refused.code, str(refused))
        except DoesNotFit as refused:
            end = self._refused(job, "context_length_exceeded", str(refused))
        except Exception as error:  # noqa: BLE001 - whatever it is
            LOG.exception(line("job_failed", job=job.id))
            end = self._refused(job, "worker_error", f"this worker could not read the job: {type(error).__name__}: {error}")
        return [] if end is None else [end]

    def _refused(self, job: WorkerJob, code: str, sentence: str) -> Piece:
        answer = self._answers.get(job.id)
        if answer is not None and answer.job is job:
            del self._answers[job.id]
            self._compiling = [one for one in self._compiling if one is not answer]
        return self._failed(job, 0, code, sentence)

    def _prompt_ids(self, job: WorkerJob) -> tuple[list[int], int]:
        """The prompt, and how many messages were left out so that it and its answer fit."""
        spec, max_seq_len = job.spec, self.scheduler.max_seq_len
        if spec.messages is not None:
            messages = [Message(message.role, message.content) for message in spec.messages]
            if spec.truncate is None:
                return encode_chat(self._tokenizer, messages, self._prompt_format), 0
            kept_for_answer = min(spec.max_tokens, max_seq_len // MOST_OF_CONTEXT_KEPT)
            return encode_fitting(self._tokenizer, messages, self._prompt_format, max_seq_len - kept_for_answer)
        if isinstance(spec.prompt, str):
            return encode_text(self._tokenizer, spec.prompt), 0
        if not spec.prompt:
            raise PromptRefused("no_messages", "the job has neither messages nor a prompt; send one of them")
        return list(spec.prompt), 0

    def _steering(self, spec: JobSpec, prompt_ids: list[int], produced_ids: list[int], begun: str) -> Steering | None:
        """None for a job whose draws need no more than temperature and cuts. begun: the text that the answer continues."""
        drawn, end_ids = spec.sampling, (*spec.stop_token_ids, self._tokenizer.eos_id)
        wishes = Wishes(
            drawn.repetition_penalty,
            drawn.presence_penalty,
            drawn.frequency_penalty,
            tuple(drawn.logit_bias.items()),
            spec.min_tokens,
            end_ids if spec.min_tokens else (),
            spec.top_logprobs,
        )
        schema = spec.response_format.schema_text if spec.response_format is not None else None
        if wishes == Wishes() and schema is None:
            return None
        return Steering(wishes, prompt_ids, produced_ids, None if schema is None else self._grammars.compile(schema, produced_ids, begun))

    def _require_known(self, ids: Iterable[int]) -> None:
        size = self._tokenizer.vocab_size
        unknown = next((id for id in ids if not 0 <= id < size), None)
        if unknown is not None:
            raise PromptRefused(
                "token_out_of_vocabulary", f"token id {unknown} is not in this model's vocabulary of {size:,}, counted from 0"
            )

    def _piece(self, answer: _Answer, next_id: int) -> Piece:
        job, prompt_tokens = answer.job, len(answer.sequence.prompt_ids)
        steering, grammar = answer.sequence.steering, answer.sequence.grammar
        if next_id < 0:
            del self._answers[job.id]
            if grammar is not None and grammar.error:
                return self._failed(job, prompt_tokens, "response_format_refused", grammar.error)
            at = len(answer.sequence.produced_ids) + 1
            sentence = f"the model's scores for token {at} are not finite numbers; the job was stopped there; repeat it"
            return self._failed(job, prompt_tokens, "numerical_error", sentence)
        try:
            # Like a stop string, a stop token is no part of the text.
            text = "" if next_id in answer.job.spec.stop_token_ids else answer.detokenizer.push(next_id)
            end = self._end(answer)
            if end is not None:
                text += answer.detokenizer.flush()
            chances = steering.chances if steering is not None else None
            logprobs = None if chances is None else self._logprobs(next_id, chances)
        except Exception as error:  # noqa: BLE001 - one job's trouble must not end the others
            LOG.exception(line("job_failed", job=job.id))
            self._forget(answer)
            return self._failed(
                job, prompt_tokens, "worker_error", f"this worker could not write the answer: {type(error).__name__}: {error}"
            )
        piece = Piece(job.id, job.attempt, prompt_tokens, next_id, text, end, logprobs, answer.dropped_messages)
        return piece if end is None else self._ended(answer, piece)

    def _end(self, answer: _Answer) -> End | None:
        produced = answer.sequence.produced_ids
        if answer.detokenizer.stopped or (produced and produced[-1] in answer.end_ids):
            return "stop"
        return "length" if answer.sequence.is_complete else None

    def _logprobs(self, id: int, chances: Chances) -> str:
        top = [self._chance(*one) for one in chances.top]
        return TokenLogprobs(**self._chance(id, chances.drawn).model_dump(), top=top).model_dump_json()

    def _chance(self, id: int, logprob: float) -> TokenChance:
        text_bytes = self._tokenizer.token_bytes(id)
        text = text_bytes.decode(errors="replace") if text_bytes else self._tokenizer.piece(id)
        return TokenChance(id=id, text=text, bytes=text_bytes.hex(), logprob=logprob)

    def _ended(self, answer: _Answer, piece: Piece) -> Piece:
        self._forget(answer)
        tokens = len(answer.sequence.produced_ids)
        LOG.info(line("finished", job=piece.job, finish=piece.end, tokens=tokens, after_s=self._clock() - answer.taken_s))
        return piece

    def _forget(self, answer: _Answer) -> None:
        self._answers.pop(answer.job.id, None)
        self.scheduler.remove(answer.job.id)

    def _failed(self, job: WorkerJob, prompt_tokens: int, code: str, sentence: str) -> Piece:
        self._failed_total += 1
        LOG.warning(line("failed", job=job.id, attempt=job.attempt, code=code, reason=sentence))
        return Piece(job.id, job.attempt, prompt_tokens, end=FrameError(code=code, message=sentence))


class Crew:
    """All ranks as one engine, seen from rank 0."""

    def __init__(self, engine: Engine, ranks: Ranks, codec: PlanCodec, watchdog: Watchdog, account: Account | None = None) -> None:
        self._engine, self._ranks, self._codec, self._watchdog = engine, ranks, codec, watchdog
        self._account = account or Account()
        self._step = 0
        self._shared_s = 0.0

    def step(self, plan: StepPlan) -> list[int]:
        """Raises MemoryError where no rank had room for it; where only some had, no rank can go on, and all end."""
        self._step = plan.step
        began_s = time.perf_counter()
        self._share(plan)
        shared_s = time.perf_counter()
        try:
            next_ids = self._engine.step(plan)
        except MemoryError:
            self._ranks.meet()
            raise
        self._account.add(plan, shared_s - began_s, time.perf_counter() - shared_s)
        return next_ids

    def figures(self) -> dict[str, Any]:
        """What the steps cost and carried, for Telemetry."""
        return self._account.figures(self._engine.sample_s, self._engine.expert_tokens())

    def idle(self) -> None:
        """Call at least every second while there is no step: the other ranks wait for a plan, the watchdog for a sign of life."""
        self._watchdog.beat(self._step)
        if time.monotonic() - self._shared_s > HEARTBEAT_EVERY_S:
            self._share(StepPlan(Kind.IDLE, self._step))

    def stop(self) -> None:
        self._share(StepPlan(Kind.STOP, self._step))

    def _share(self, plan: StepPlan) -> None:
        self._watchdog.beat(self._step)
        self._ranks.share(plan, self._codec)
        self._shared_s = time.monotonic()


def advance(batch: Batch, crew: Crew, plan: StepPlan) -> list[Piece]:
    """One step of all ranks, and what came of it."""
    try:
        next_ids = crew.step(plan)
    except MemoryError as error:
        return batch.give_up_largest(plan, str(error))
    return batch.record(plan, next_ids)


def run_leader(batch: Batch, crew: Crew, link: Link, asked_to_stop: Callable[[], signal.Signals | None]) -> None:
    """Serve until a signal or the server asks to stop. SIGTERM lets jobs finish for a while, the other signals hand them back at once.

    Raises what ended the link (LinkRefused), after the other ranks were told to stop.
    """
    link.start()
    draining, give_up_s = False, float("inf")
    summary_due_s, told_s, told = 0.0, float("-inf"), Telemetry()
    plan: StepPlan | None = None
    while True:
        link.beat()
        for event in link.poll(IDLE_WAIT_S if link.is_full or not len(batch) else 0.0 if plan else COMPILE_WAIT_S):
            match event:
                case JobTaken(job):
                    link.report(batch.take(job))
                case JobDropped(job_id, attempt):
                    batch.drop(job_id, attempt)
                case DrainAsked():
                    LOG.info(line("draining", asked_by="server", jobs=len(batch)))
                    draining = True
                case LinkEnded(error):
                    crew.stop()
                    raise error
        now_s, received = time.monotonic(), asked_to_stop()
        if received is not None and give_up_s == float("inf"):
            LOG.info(line("draining", asked_by=received.name, jobs=len(batch)))
            draining, give_up_s = True, now_s + (FINISH_WITHIN_S if received == signal.SIGTERM else 0.0)
            link.drain()
        if draining and (not len(batch) or now_s >= give_up_s):
            break
        link.report(batch.let_in())
        plan = None if link.is_full else batch.plan_step()
        if plan is None:
            crew.idle()
            link.telemetry, summary_due_s = batch.telemetry(crew.figures()), now_s + SUMMARY_EVERY_S
            continue
        link.report(advance(batch, crew, plan))
        if now_s >= told_s + TELL_EVERY_S:
            told_s, link.telemetry = now_s, batch.telemetry(crew.figures())
        if now_s >= summary_due_s:
            summary_due_s = now_s + SUMMARY_EVERY_S
            LOG.info(line("summary", **summary(told, link.telemetry)))
            told = link.telemetry
    crew.idle()
    link.close(LOGOUT_WITHIN_S)
    crew.stop()
    LOG.info(line("stopped", handed_back=len(batch)))


def run_follower(engine: Engine, ranks: Ranks, codec: PlanCodec, watchdog: Watchdog) -> None:
    """Do what rank 0 plans until it says stop. A broken connection to another rank raises, and ends this one too."""
    while True:
        plan = ranks.share(None, codec)
        watchdog.beat(plan.step)
        if plan.kind == Kind.STOP:
            return
        if plan.kind == Kind.STEP:
            try:
                engine.step(plan)
            except MemoryError:
                ranks.meet()

"""A queue under test with short words for what clients and workers do to it."""

from __future__ import annotations

from redis.asyncio import Redis

from mixtral_client.protocol import Frame, JobSpec, SessionRequest, TurnRequest, WorkerJob
from mixtral_server.keys import Shard
from mixtral_server.queue import JobQueue
from mixtral_server.records import Turned

ENDPOINT = "mixtral_chat"


class Bench:
    def __init__(self, queue: JobQueue, redis: Redis) -> None:
        self.queue = queue
        self.redis = redis
        self.shard = Shard(ENDPOINT)

    async def put(self, owner: str = "ann", *, max_tokens: int = 10, **more: object) -> str:
        spec = JobSpec(prompt=[1, 2, 3], max_tokens=max_tokens, seed=7)
        return (await self.queue.put(ENDPOINT, owner, spec, **more)).job_id  # type: ignore[arg-type]

    async def worker(self, name: str = "w", *, slots: int = 64, key: str = "key", static_batch: int | None = None) -> Hand:
        login = SessionRequest(
            endpoint=ENDPOINT,
            name=name,
            protocol=1,
            version="1",
            model="toy",
            device="cpu",
            max_slots=slots,
            max_seq_len=512,
            static_batch=static_batch,
        )
        return Hand(self.queue, (await self.queue.open_session(login, key)).session, key)

    async def lapse(self, *workers: Hand) -> None:
        """Their leases end now, as if they had been silent for so long."""
        await self.queue.reap(ENDPOINT)
        for worker in workers:
            await self.redis.zadd(self.shard.key("sessions"), {worker.session: 1})

    async def state(self, job: str) -> str:
        return (await self.queue.read(job)).state

    async def waiting_order(self, room: int = 1000) -> list[str]:
        """All waiting jobs in the order in which one worker is given them, one at a time."""
        worker, order = await self.worker("order", slots=room), []
        while answer := await worker.take(1):
            order.append(answer[0].id)
        return order


class Hand:
    """One worker session, driven turn by turn. Keeps what it holds as a worker would."""

    def __init__(self, queue: JobQueue, session: str, key: str) -> None:
        self.queue = queue
        self.session = session
        self.key = key
        self.number = 0
        self.holding: dict[str, int] = {}

    async def turn(self, *frames: Frame, room: int = 0, number: int | None = None, lose_answer: bool = False) -> Turned:
        """Send one turn; a lost answer changes nothing in what the worker knows."""
        self.number = self.number + 1 if number is None else number
        answer = await self.queue.turn(self.request(*frames, room=room), self.key)
        if not lose_answer:
            self.holding |= {job.id: job.attempt for job in answer.jobs}
            for drop in answer.drops:
                if self.holding.get(drop.job) == drop.attempt:
                    del self.holding[drop.job]
        return answer

    def request(self, *frames: Frame, room: int = 0) -> TurnRequest:
        holding = list(self.holding.items())
        return TurnRequest(session=self.session, turn=self.number, holding=holding, frames=list(frames), room=room)

    async def take(self, room: int = 1) -> list[WorkerJob]:
        return (await self.turn(room=room)).jobs

    async def close(self) -> int:
        return await self.queue.close_session(self.session, self.key)


def frame(job: WorkerJob, offset: int, ids: str | list[int], **more: object) -> Frame:
    """Tokens whose texts are letters: frame(job, 1, "abc") has three."""
    numbers = [ord(letter) for letter in ids] if isinstance(ids, str) else ids
    texts = [chr(number) for number in numbers]
    return Frame(job=job.id, attempt=job.attempt, offset=offset, ids=numbers, texts=texts, **more)  # type: ignore[arg-type]

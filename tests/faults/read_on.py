"""Reads one chat with the Python client: read_on.py URL,URL KEY JSON, where JSON is {"request"} or {"job", "after"}. Prints {"job"}, then
its events as lines of JSON, each with the id that resumes after it."""

from __future__ import annotations

import asyncio
import json
import sys

from mixtral_client import MixtralClient, Retry


async def main(urls: str, key: str, order: str) -> None:
    wanted = json.loads(order)
    async with MixtralClient(urls.split(","), key, retry=Retry(first_wait_s=0.1, max_wait_s=1.0, give_up_after_s=60.0)) as client:
        stream = client.stream(**wanted["request"]) if "request" in wanted else client.events(wanted["job"], wanted["after"])
        is_first = True
        async for event in stream:
            if is_first:
                print(json.dumps({"job": stream.job_id}), flush=True)
                is_first = False
            print(json.dumps(event.model_dump(mode="json") | {"id": stream.last_id}), flush=True)


asyncio.run(main(*sys.argv[1:]))

"""Many FakeServers behind one port, so that tests in any language share one process.

`api.script(…)` gives a FakeServer whose url ends in /s/1, /s/2, …; POST /scripts does the same over HTTP, from JSON with the names of
FakeServer's arguments, and answers {"base": "/s/1"}; GET <base>/history tells what was asked there and what became of its jobs.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from mixtral_client.testing import Cut, FakeServer, Fault

KEY = "test-key"


class ScriptedApi:
    """`async with ScriptedApi() as api: world = api.script(["Once", {"cut": "abort"}, " upon"])`."""

    def __init__(self) -> None:
        self.worlds: list[FakeServer] = []
        self.url = ""
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/scripts", self._new_script)
        app.router.add_get("/s/{world}/history", self._history)
        app.router.add_route("*", "/s/{world}/{path:.*}", self._respond)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def __aenter__(self) -> ScriptedApi:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for world in self.worlds:
            world.release()
        await self._runner.cleanup()

    def script(self, *scripts: Any, **fields: Any) -> FakeServer:
        world = FakeServer(*scripts, api_key=KEY, **fields)
        self.worlds.append(world)
        world.url = f"{self.url}/s/{len(self.worlds)}"
        return world

    async def _new_script(self, request: web.Request) -> web.Response:
        fields = await request.json()
        try:
            faults = [Fault(**fault) for fault in fields.pop("faults", [])]
            cuts = [Cut(**cut) for cut in fields.pop("cuts", [])]
            world = self.script(*fields.pop("scripts", []), faults=faults, cuts=cuts, **fields)
        except (TypeError, ValueError) as error:
            return web.Response(status=400, text=str(error))
        return web.json_response({"base": world.url.removeprefix(self.url)})

    async def _history(self, request: web.Request) -> web.Response:
        world = self._world(request)
        requests = [{"call": one.call, "path": one.path, "headers": one.headers, "body": one.body} for one in world.requests]
        return web.json_response({"requests": requests, "states": world.states, "connections": world.connections})

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        return await self._world(request).respond(request, "/" + request.match_info["path"])

    def _world(self, request: web.Request) -> FakeServer:
        return self.worlds[int(request.match_info["world"]) - 1]

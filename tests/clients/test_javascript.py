"""The JavaScript client's own tests, run by Node against the scripted API, so that one command runs all; and its types."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from support.node import find_node, find_tsc
from support.scripted_api import ScriptedApi

FOLDER = Path(__file__).parent / "javascript"
PACKAGE = Path(__file__).resolve().parents[2] / "clients/javascript"

EXAMPLE = """
import { AnswerText, MixtralClient, MixtralError, type Answer, type JobEvent } from "mixtral-client";
import { SseDecoder, type ServerSentEvent } from "mixtral-client/sse";
import { FakeServer, type Step } from "mixtral-client/testing";

const steps: Step[] = ["Once", { cut: "abort" }, " upon", { rewind: 1 }, { hold: true }];
const server = new FakeServer(steps, "a story");
const client = new MixtralClient({ baseUrl: server.url, apiKey: server.apiKey, fetch: server.fetch, patience: { totalMs: 1000 } });
const said = new AnswerText();
for await (const event of client.stream({ messages: [{ role: "user", content: "Hello" }] }, { signal: AbortSignal.timeout(1000) })) {
  said.take(event);
  if (event.event === "token") { const offset: number = event.offset; const logprob: number | undefined = event.logprobs?.logprob; }
  if (event.event === "done") { const cost: number = event.usage.total_tokens; }
}
const answer: Answer = await client.withOptions({ patience: { maxTries: 1 } }).answer({ prompt: [1, 2, 3], stop: "x" });
const error = new MixtralError("no", { code: "x" });
const wait: number | null = error.retryAfterMs;
const events: ServerSentEvent[] = new SseDecoder().feed(new Uint8Array());
"""
MISTAKES = [  # one line each
    'client.stream({ messages: [{ role: "robot", content: "x" }] });',
    'client.answer({ prompt: "x", temprature: 1 });',
    'const text: string = (await client.answer({ prompt: "x" })).finish.length;',
    'new FakeServer([{ cut: "softly" }]);',
    "client.job();",
]


async def test_javascript_tests_pass_under_node(api: ScriptedApi) -> None:
    files = sorted(str(path) for path in FOLDER.glob("*.test.mjs"))
    node = await asyncio.create_subprocess_exec(
        find_node(),
        *("--test", "--test-reporter=tap", *files),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "SCRIPTED_API": api.url},
    )
    try:
        output = (await node.communicate())[0].decode()
    finally:
        if node.returncode is None:
            node.kill()
            await node.wait()
    failures = "\n".join(re.findall(r"^ *not ok [\s\S]*?\.\.\.$", output, re.M))
    assert node.returncode == 0, failures or output
    counts = {name: int(count) for name, count in re.findall(r"^# (tests|pass|fail|skipped|todo) (\d+)$", output, re.M)}
    assert counts["pass"] == counts["tests"] > 150, output


def compiled(*arguments: str) -> str:
    """What the compiler complains of."""
    command = [str(find_node()), str(find_tsc(PACKAGE)), "--pretty", "false", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100).stdout


def test_modules_are_what_their_declarations_say() -> None:
    """Each class names its declaration with @implements, so that the compiler compares them."""
    assert compiled("--project", str(PACKAGE / "tsconfig.json")) == ""


async def test_modules_export_what_their_declarations_do() -> None:
    for name in ("mixtral-client", "sse", "testing"):
        declared = re.findall(r"^export (?:class|const|function) (\w+)", (PACKAGE / f"{name}.d.ts").read_text(), re.M)
        script = f"console.log(Object.keys(await import({json.dumps((PACKAGE / f'{name}.js').as_uri())})).join())"
        node = await asyncio.create_subprocess_exec(
            find_node(), "--input-type=module", "-e", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        assert (await node.communicate())[0].decode().strip().split(",") == sorted(declared)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with the package installed as npm would from its `files`."""
    package = tmp_path / "node_modules/mixtral-client"
    package.mkdir(parents=True)
    for name in ["package.json", *json.loads((PACKAGE / "package.json").read_text())["files"]]:
        (package / name).write_bytes((PACKAGE / name).read_bytes())
    (tmp_path / "package.json").write_text('{"type": "module"}')
    return tmp_path


FLAGS = ("--noEmit", "--strict", "--target", "es2022", "--lib", "es2023,dom,dom.iterable,dom.asynciterable")


@pytest.mark.parametrize(
    "resolution", [("--module", "nodenext"), ("--module", "esnext", "--moduleResolution", "bundler")], ids=["node", "bundler"]
)
def test_typescript_program_of_a_user_compiles_and_its_mistakes_do_not(project: Path, resolution: tuple[str, ...]) -> None:
    program = project / "program.ts"
    program.write_text(EXAMPLE)
    assert compiled(*FLAGS, *resolution, str(program)) == ""
    program.write_text(EXAMPLE + "\n".join(MISTAKES))
    first = EXAMPLE.count("\n") + 1
    wrong = {int(line) for line in re.findall(r"program\.ts\((\d+),", compiled(*FLAGS, *resolution, str(program)))}
    assert wrong == set(range(first, first + len(MISTAKES)))


def test_tests_in_javascript_keep_to_the_declared_types(tmp_path: Path) -> None:
    config = {
        "extends": str(PACKAGE / "tsconfig.json"),
        "compilerOptions": {"types": ["node"], "typeRoots": [str(PACKAGE / "node_modules/@types")], "skipLibCheck": True},
        "files": [],
        "include": [str(FOLDER / "*.mjs"), str(FOLDER.parents[1] / "faults/*.mjs")],
    }
    (tmp_path / "tsconfig.json").write_text(json.dumps(config))
    assert compiled("--project", str(tmp_path)) == ""

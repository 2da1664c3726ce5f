"""The command as a person or a program meets it: a real process against the scripted server."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixtral_benchmark.cli import INTERRUPTED, NOT_RUN, OK, SOME_FAILED
from mixtral_benchmark.flags import parse, parser
from support.limits import with_open_files
from support.scripted_server import KEY, ScriptedServer, chunk, done, openai_end, token

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60
Write = Callable[[bytes], Awaitable[None]]


async def three_tokens(api: str, write: Write) -> None:
    if api == "native":
        await write(b"".join([token(1, "Once"), token(2, " upon"), token(3, " a")]) + done(3, queue_s=0.01, first_token_s=0.02))
    else:
        await write(b"".join([chunk(1, "Once"), chunk(2, " upon"), chunk(3, " a")]) + openai_end(3))


@dataclass
class Ended:
    code: int | None
    stdout: str
    stderr: str

    @property
    def outcome(self) -> dict[str, object]:
        read = json.loads(self.stdout.rstrip("\n").splitlines()[-1])
        assert isinstance(read, dict)
        return read


async def start(*flags: str, key: str | None = KEY, files: tuple[int, int] | None = None) -> asyncio.subprocess.Process:
    """files: open files that it may have at first, and may ask for."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_")}
    if key is not None:
        environment["MIXTRAL_CLIENT_KEY"] = key
    command = [sys.executable, "-m", "benchmark", *flags]
    if files is not None:
        command = with_open_files(*files, command)
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe)


async def finish(process: asyncio.subprocess.Process) -> Ended:
    async with asyncio.timeout(LIMIT_S):
        stdout, stderr = await process.communicate()
    return Ended(process.returncode, stdout.decode(), stderr.decode())


async def run(*flags: str, key: str | None = KEY, files: tuple[int, int] | None = None) -> Ended:
    return await finish(await start(*flags, key=key, files=files))


async def test_run_prints_the_target_a_table_and_one_json_line_last(server: ScriptedServer) -> None:
    server.play = three_tokens
    ended = await run("--api_server", server.url, "--total_requests", "5", "--concurrent_requests", "2", "--max_tokens", "7")
    assert ended.code == OK
    expected = {"completed": 5, "failed": 0, "total_output_tokens": 15, "total_input_tokens": 55, "tokens_counted_by_offsets": 5}
    assert expected.items() <= ended.outcome.items()
    assert f"{server.url}, endpoint mixtral_chat, by its openai API" in ended.stderr
    assert "chats: 5/5 chats, 0 running, 15 tokens" in ended.stderr
    assert re.search(r"chats completed +5 +0 failed", ended.stdout)
    assert re.search(r"time to first token +[\d.]+", ended.stdout)
    assert "\x1b" not in ended.stdout + ended.stderr
    assert len(server.requests) == 6, "five chats and one to warm up"
    assert {request["max_tokens"] for request in server.requests} == {7}
    assert {request["messages"][0]["content"] for request in server.requests} == {"Tell a long story: Once upon a time"}


async def test_result_says_under_which_circumstances_and_never_the_key(server: ScriptedServer, tmp_path: Path) -> None:
    server.play = three_tokens
    file = tmp_path / "result.json"
    ended = await run("-as", server.url, "-tr", "2", "-cr", "1", "-k", KEY, "--json_file", str(file), "--seed", "3", key=None)
    assert ended.code == OK
    written = json.loads(file.read_text())
    rows = written.pop("chats")
    assert written == ended.outcome
    assert [(row["index"], row["tokens"], row["finish"], row["failure"]) for row in rows] == [(0, 3, "stop", None), (1, 3, "stop", None)]
    assert written["flags"]["total_requests"] == 2
    assert written["flags"]["api_server"] == server.url
    assert re.fullmatch(r"[0-9a-f]{12,}(-dirty)?", written["git_commit"])
    assert written["platform"]["cpu_count"] == os.cpu_count()
    assert KEY not in ended.stdout + ended.stderr + file.read_text()
    assert [request["seed"] for request in server.requests] == [3, 3, 4]


async def test_file_that_cannot_be_written_costs_the_exit_code_but_not_the_result(server: ScriptedServer, tmp_path: Path) -> None:
    server.play = three_tokens
    ended = await run("--api_server", server.url, "--total_requests", "2", "--json_file", str(tmp_path))
    assert ended.code == SOME_FAILED
    assert ended.outcome["completed"] == 2
    assert "could not be written (Is a directory)" in ended.stderr


async def test_more_chats_at_once_than_a_login_shell_has_files_for_are_sent(server: ScriptedServer) -> None:
    server.play = three_tokens
    ended = await run("--api_server", server.url, "--total_requests", "150", "--concurrent_requests", "150", files=(64, 1000))
    assert (ended.code, ended.outcome["completed"]) == (OK, 150)


async def test_more_chats_at_once_than_the_account_may_have_files_for_are_refused(server: ScriptedServer) -> None:
    ended = await run("--api_server", server.url, "--total_requests", "200", "--concurrent_requests", "150", files=(64, 100))
    assert ended.code == NOT_RUN
    assert "150 chats at once need 182 open files, and this account may have 100: " in ended.stderr
    assert "or ask for at most 68 at once" in ended.stderr
    assert not server.requests


async def test_native_run_verifies_every_stream_against_its_job(server: ScriptedServer) -> None:
    server.play = three_tokens
    right = {"id": "job", "model": "m", "state": "done", "created": 0, "tokens": 3, "text": "Once upon a"}
    server.views = {f"job-{seed}": right for seed in range(4)} | {"job-2": right | {"text": "Once upon b"}}
    ended = await run("--api_server", server.url, "--total_requests", "4", "--verify", "--seed", "0")
    assert ended.code == SOME_FAILED
    assert ended.outcome["completed"] == 3
    assert ended.outcome["failures"] == {"verify_text": 1}
    assert ended.outcome["mean_server_queue_ms"] == 10
    assert "stream and log differ from character 11 of 11" in ended.stdout


async def test_failed_chats_are_named_and_counted_and_make_the_exit_code_1(server: ScriptedServer) -> None:
    async def cut_every_other(api: str, write: Write) -> None:
        if len(server.requests) % 2:
            await write(chunk(1, "Once"))
        else:
            await three_tokens(api, write)

    server.play = cut_every_other
    ended = await run("--api_server", server.url, "--total_requests", "4", "--concurrent_requests", "1", "--warmup_requests", "0")
    assert ended.code == SOME_FAILED
    assert (ended.outcome["completed"], ended.outcome["failed"], ended.outcome["total_output_tokens"]) == (2, 2, 6)
    assert ended.outcome["failures"] == {"stream_cut": 2}
    assert re.search(r"stream_cut +2 +the stream ended after 1 tokens without \[DONE\]", ended.stdout)


def counting(tokens_per_word: int) -> Callable[[ScriptedServer], Callable[[str, Write], Awaitable[None]]]:
    """A server to whose tokenizer each word is so many tokens, and the chat's frame 7."""

    def of(server: ScriptedServer) -> Callable[[str, Write], Awaitable[None]]:
        async def play(api: str, write: Write) -> None:
            words = sum(len(message["content"].split()) for message in server.requests[-1]["messages"])
            await write(chunk(1, "Once") + openai_end(1, prompt=7 + tokens_per_word * words))

        return play

    return of


async def test_synthetic_prompts_have_the_tokens_asked_for_as_the_server_counts_them(server: ScriptedServer) -> None:
    server.play = counting(2)(server)  # type: ignore[assignment]
    ended = await run("-as", server.url, "-tr", "4", "-cr", "1", "--input_tokens", "107", "--shared_prefix_tokens", "60", "--prefixes", "2")
    assert ended.code == OK
    assert ended.outcome["total_input_tokens"] == 4 * 107
    assert "2.00 tokens a word and 7 for the chat's frame" in ended.stderr
    asked = [request["messages"][0]["content"].split() for request in server.requests[-4:]]
    assert [words[:30] for words in asked[:2]] == [words[:30] for words in asked[2:]]
    assert asked[0][:30] != asked[1][:30]


async def test_long_texts_fill_the_context_with_their_answers(server: ScriptedServer) -> None:
    server.play = counting(1)(server)  # type: ignore[assignment]
    ended = await run("-as", server.url, "-tr", "2", "-cr", "1", "--context_length", "1K", "--max_tokens", "24")
    assert ended.code == OK
    assert ended.outcome["total_input_tokens"] == 2 * 1000
    texts = {request["messages"][0]["content"] for request in server.requests[-2:]}
    assert len(texts) == 2, "each chat has a text of its own"
    assert all(text.startswith("Summarise the following text.") for text in texts)


async def test_server_that_counts_no_prompt_tokens_is_sent_no_synthetic_load(server: ScriptedServer) -> None:
    async def silent(api: str, write: Write) -> None:
        await write(chunk(1, "Once") + chunk(None, None, "stop") + b"data: [DONE]\n\n")

    server.play = silent
    ended = await run("-as", server.url, "--input_tokens", "100")
    assert ended.code == NOT_RUN
    assert "the server reports no prompt tokens" in ended.stderr
    assert len(server.requests) == 1


async def test_turns_go_on_with_what_was_answered(server: ScriptedServer) -> None:
    server.play = three_tokens
    ended = await run("-as", server.url, "-tr", "2", "-cr", "1", "--turns", "3", "--warmup_requests", "0")
    assert (ended.code, ended.outcome["completed"]) == (OK, 6)
    last = [message["content"] for message in server.requests[2]["messages"]]
    assert last == ["Tell a long story: Once upon a time", "Once upon a", "Go on.", "Once upon a", "Go on."]


async def test_trace_is_replayed_with_its_own_lengths(server: ScriptedServer, tmp_path: Path) -> None:
    server.play = counting(1)(server)  # type: ignore[assignment]
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 1000 + 20 * i, "input_length": 20 + i, "output_length": 5 + i} for i in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    ended = await run("-as", server.url, "--trace", str(trace), "--trace_speed", "2", "--warmup_requests", "0")
    assert (ended.code, ended.outcome["completed"]) == (OK, 5)
    assert ended.outcome["total_input_tokens"] == sum(20 + i for i in range(5))
    assert sorted(request["max_tokens"] for request in server.requests[-5:]) == [5, 6, 7, 8, 9]
    assert "from the planned send" in ended.stdout


async def test_unreadable_prompt_file_or_trace_is_one_sentence_before_any_load(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    for flag in ("--prompt_file", "--trace"):
        ended = await run("-as", server.url, flag, str(tmp_path / "bad.jsonl"))
        assert ended.code == NOT_RUN
        assert "bad.jsonl line 1 is not JSON" in ended.stderr
    assert server.requests == []


async def test_chats_that_kept_their_goals_are_counted_and_failed_ones_were_not_good(server: ScriptedServer) -> None:
    async def cut_every_other(api: str, write: Write) -> None:
        await (write(chunk(1, "Once")) if len(server.requests) % 2 else three_tokens(api, write))

    server.play = cut_every_other
    flags = ("-as", server.url, "-tr", "4", "-cr", "1", "--warmup_requests", "0")
    kept = await run(*flags, "--slo", "ttft_ms:60000", "e2el_ms:60000")
    assert kept.outcome["good_share"] == 0.5
    assert re.search(r"good chats per second +[\d.]+ +50.0% of all kept ttft_ms:60000 e2el_ms:60000", kept.stdout)
    server.requests.clear()
    assert (await run(*flags, "--slo", "ttft_ms:0.0001")).outcome["good_share"] == 0


async def test_sweep_runs_level_after_level_and_prints_one_line_each(server: ScriptedServer) -> None:
    server.play = three_tokens
    ended = await run("-as", server.url, "-tr", "2", "--sweep_concurrency", "1,2", "--warmup_requests", "0")
    assert ended.code == OK
    runs = ended.outcome["runs"]
    assert isinstance(runs, list)
    assert [(one["flags"]["concurrent_requests"], one["completed"]) for one in runs] == [(1, 3), (2, 6)]
    assert re.search(r"chats at once +tokens/s +per chat +TTFT p50", ended.stdout)


async def test_sweep_over_rates_ends_when_the_server_falls_behind(server: ScriptedServer) -> None:
    one_at_a_time = asyncio.Lock()

    async def slow(api: str, write: Write) -> None:
        async with one_at_a_time:
            await asyncio.sleep(0.05)
            await three_tokens(api, write)

    server.play = slow
    ended = await run("-as", server.url, "-tr", "40", "--sweep_rate", "4,200,400", "--burstiness", "constant")
    runs = ended.outcome["runs"]
    assert isinstance(runs, list)
    assert [one["flags"]["request_rate"] for one in runs] == [4, 200]
    assert "came to their end" in str(ended.outcome["saturated"])
    assert "sweep over: of 200.00 chats sent a second" in ended.stderr


async def test_files_hold_a_row_for_each_chat_and_a_page_that_loads_nothing(server: ScriptedServer, tmp_path: Path) -> None:
    server.play = three_tokens
    csv_file, html_file = tmp_path / "chats.csv", tmp_path / "page.html"
    ended = await run("-as", server.url, "-tr", "3", "-k", KEY, "--csv_file", str(csv_file), "--html_file", str(html_file), key=None)
    assert ended.code == OK
    rows = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert [(row["run"], row["index"], row["tokens"], row["failure"]) for row in rows] == [("0", str(i), "3", "") for i in range(3)]
    page = html_file.read_text()
    assert page.count("<svg") == 4
    assert KEY not in page
    assert not re.search(r"<(script|link|img)|@import|url\(", page)
    assert set(re.findall(r"https?://[^\s\"<]+", page)) <= {"http://www.w3.org/2000/svg", server.url, f"{server.url},"}


async def test_base_url_is_the_server_by_the_name_that_openai_packages_give_it(server: ScriptedServer) -> None:
    server.play = three_tokens
    ended = await run("--base_url", f"{server.url}/v1", "--total_requests", "1")
    assert (ended.code, ended.outcome["completed"]) == (OK, 1)


async def test_ctrl_c_prints_what_was_measured_so_far(server: ScriptedServer) -> None:
    second_runs = asyncio.Event()

    async def second_hangs(api: str, write: Write) -> None:
        if len(server.requests) == 1:
            await three_tokens(api, write)
        else:
            await write(chunk(1, "Once"))
            second_runs.set()
            await asyncio.Event().wait()

    server.play = second_hangs
    process = await start("--api_server", server.url, "--total_requests", "9", "--concurrent_requests", "1", "--warmup_requests", "0")
    async with asyncio.timeout(LIMIT_S):
        await second_runs.wait()
    process.send_signal(signal.SIGINT)
    ended = await finish(process)
    assert ended.code == INTERRUPTED
    assert (ended.outcome["completed"], ended.outcome["failed"], ended.outcome["interrupted"]) == (1, 0, 1)
    assert "Traceback" not in ended.stderr


async def test_nobody_at_the_address_is_one_sentence_and_no_load() -> None:
    ended = await run("--api_server", "http://127.0.0.1:1")
    assert (ended.code, ended.stdout) == (NOT_RUN, "")
    assert ended.stderr == ("cannot reach http://127.0.0.1:1 (Connection refused); is the server running, and is --api_server right?\n")


@pytest.mark.parametrize(("key", "which"), [(None, "a missing key"), ("mx-wrong", "the key given")])
async def test_refused_key_is_one_sentence_and_no_load(server: ScriptedServer, key: str | None, which: str) -> None:
    ended = await run("--api_server", server.url, key=key)
    assert (ended.code, ended.stdout) == (NOT_RUN, "")
    assert ended.stderr == f"{server.url} refuses {which}: no such key; give a client key by --api_key or MIXTRAL_CLIENT_KEY\n"
    assert server.requests == []


async def test_unknown_endpoint_is_one_sentence_that_lists_the_known_and_no_load(server: ScriptedServer) -> None:
    ended = await run("--api_server", server.url, "--endpoint_name", "mixtral_chta")
    assert (ended.code, ended.stdout) == (NOT_RUN, "")
    assert ended.stderr == f"{server.url} has no endpoint 'mixtral_chta'; it has: mixtral_chat; choose by --endpoint_name\n"
    assert server.requests == []


@pytest.mark.parametrize(("workers", "is_warned"), [(0, True), (2, False), (None, False)])
async def test_server_without_a_worker_is_said_to_have_none(server: ScriptedServer, workers: int | None, is_warned: bool) -> None:
    server.play, server.workers = three_tokens, workers
    ended = await run("--api_server", server.url, "--total_requests", "1")
    assert ended.code == OK
    assert ("no worker is logged in" in ended.stderr) == is_warned
    assert isinstance(said := ended.outcome["server"], dict)
    assert said["workers"] == workers


async def test_warm_up_that_fails_stops_the_run_before_any_load(server: ScriptedServer) -> None:
    async def cut(api: str, write: Write) -> None:
        await write(chunk(1, "Once"))

    server.play = cut
    ended = await run("--api_server", server.url)
    assert (ended.code, ended.stdout) == (NOT_RUN, "")
    assert "a warm-up chat failed, so the load was not sent: stream_cut: the stream ended after 1 tokens" in ended.stderr
    assert len(server.requests) == 1


def test_flags_of_aimes_tool_mean_the_same() -> None:
    flags, target = parse(
        ["-as", "http://host:1/", "-tr", "7", "-cr", "3", "-ep", "llama", "-nu", "20", "-k", "key"], {"MIXTRAL_CLIENT_KEY": "other"}
    )
    assert (flags.total_requests, flags.concurrent_requests, flags.max_tokens) == (7, 3, 20)
    assert (target.url, target.endpoint, target.key) == ("http://host:1", "llama", "key")


def test_defaults_are_the_articles_prompt_and_500_tokens_by_the_environments_key() -> None:
    flags, target = parse([], {"MIXTRAL_CLIENT_KEY": "from-environment"})
    assert (flags.prompt, flags.max_tokens) == ("Tell a long story: Once upon a time", 500)
    assert (target.url, target.key) == ("http://127.0.0.1:7777", "from-environment")


def test_open_loop_has_no_cap_unless_one_is_given() -> None:
    assert parse(["--request_rate", "2"], {})[0].concurrent_requests is None
    assert parse(["--request_rate", "2", "-cr", "5"], {})[0].concurrent_requests == 5
    assert parse([], {})[0].concurrent_requests == 16


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--total_requests", "0"], "must be 1 or more; got 0"),
        (["--warmup_requests", "-1"], "must be 0 or more; got -1"),
        (["--request_rate", "0"], "must be more than 0; got 0"),
        (["--timeout_s", "inf"], "must be more than 0; got inf"),
        (["--temperature", "2.5"], "must be 0 (greedy) to 2; got 2.5"),
        (["--api_server", "host:7777"], "must be http://HOST:PORT or https://HOST; got 'host:7777'"),
        (["--api_server", "http://me:secret@host"], "must hold no user or password"),
        (["--verify", "--api", "openai"], "leave out --api"),
        (["--json_file", "/nowhere/result.json"], "--json_file: the folder /nowhere does not exist"),
        (["--html_file", "/nowhere/page.html"], "--html_file: the folder /nowhere does not exist"),
        (["--burstiness", "even", "--request_rate", "1"], "must be a number above 0, or constant; got 'even'"),
        (["--burstiness", "2"], "--burstiness needs --request_rate or --sweep_rate"),
        (["--ramp_to", "2"], "--ramp_to needs --request_rate"),
        (["--request_rate", "1", "--trace", "t.jsonl"], "--request_rate and --trace each say when to send"),
        (["--prompt", "a", "--input_tokens", "9"], "--prompt and --input_tokens each say what to ask"),
        (["--sweep_concurrency", "1,2", "-cr", "4"], "leave out --concurrent_requests"),
        (["--sweep_concurrency", "2,1"], "must be rising numbers with commas between; got '2,1'"),
        (["--sweep_rate", "1,1"], "must be rising numbers with commas between; got '1,1'"),
        (["--context_length", "8K", "-nu", "8192"], "--context_length 8192 leaves no room for a prompt beside --max_tokens 8192"),
        (["--shared_prefix_tokens", "9", "--input_tokens", "9"], "--shared_prefix_tokens needs --input_tokens, and fewer"),
        (["--prefixes", "2"], "--prefixes needs --shared_prefix_tokens"),
        (["--input_spread", "0.5"], "--input_spread needs --input_tokens"),
        (["--input_tokens", "9", "--input_spread", "1"], "must be 0 to less than 1; got 1"),
        (["--slo", "speed:9"], "must be NAME:MILLISECONDS"),
        (["--api", "aime", "--seed", "1"], "AIME's wire has no seed"),
        (["--api", "aime", "--ignore_eos"], "AIME's wire has no ignore_eos"),
        (["--api", "aime", "--temperature", "1.5"], "AIME's wire takes temperatures up to 1"),
    ],
)
def test_wrong_flag_is_refused_with_its_rule(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(flags, {})
    assert left.value.code == NOT_RUN
    assert sentence in capsys.readouterr().err


def test_document_names_every_flag() -> None:
    text = (ROOT / "docs/benchmarking.md").read_text()
    flags = [option for action in parser()._actions for option in action.option_strings if option.startswith("--")]
    assert len(flags) > 10
    assert [flag for flag in flags if f"`{flag}" not in text and flag != "--help"] == []


def test_benchmark_imports_neither_torch_nor_server_nor_worker() -> None:
    foreign = "{name.partition('.')[0] for name in sys.modules} & {'torch', 'mixtral_server', 'mixtral_worker', 'redis', 'sqlalchemy'}"
    command = f"import sys, mixtral_benchmark.cli; print(sorted({foreign}))"
    folders = os.pathsep.join(str(ROOT / folder) for folder in ("benchmark", "clients/python"))
    asked = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True, check=True
    )
    assert asked.stdout == "[]\n"

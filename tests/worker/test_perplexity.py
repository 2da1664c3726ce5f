"""Perplexity is what transformers computes on the same weights, whatever the ranks, windows and steps; and what is said about it holds."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_worker import expert_report, perplexity, perplexity_report
from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.engine import Engine
from mixtral_worker.model.moe import MoE
from mixtral_worker.perplexity import Document, Window
from mixtral_worker.perplexity_cli import parse
from mixtral_worker.prompt import Message, encode_chat
from mixtral_worker.settings import SettingsRefused
from mixtral_worker.tokenizer import Tokenizer
from support import tokenizers
from support.small_mixtral import as_transformers
from support.tiny_worker import MAX_SEQ_LEN, SENTENCES, write_tiny_worker
from support.torchrun import ROOT, torchrun

TOKENIZER = tokenizers.load("demo")
TOLERANCE = 1e-3  # the promise; measured are 1e-6 and below
LIMIT_S = 90


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_worker(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def theirs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return as_transformers(tiny, tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """One of 900 tokens and several of less than a window."""
    draw = random.Random(3)
    words = " ".join(SENTENCES).split()
    return [" ".join(draw.choices(words, k=count)) for count in (230, 40, 1, 25, 70)]


@pytest.fixture(scope="module")
def text_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>\n", encoding="utf-8")
    return path


def loss_of_transformers(model: Any, ids: list[int], ahead: int, window: int, stride: int) -> tuple[float, int]:
    """Hugging Face's guide to perplexity of fixed-length models: labels of what was scored, or stands ahead, are −100."""
    total, tokens, before = 0.0, 0, ahead
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : max(0, before - begin)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            with torch.inference_mode():
                total += float(model(torch.tensor([ids[begin:end]]), labels=labels).loss) * scored
            tokens, before = tokens + scored, end
        if end == len(ids):
            break
    return total, tokens


def perplexity_of_transformers(model: Any, documents: list[Document], window: int, stride: int) -> tuple[float, int]:
    parts = [loss_of_transformers(model, list(document.ids), document.ahead, window, stride) for document in documents]
    tokens = sum(count for _, count in parts)
    return math.exp(sum(loss for loss, _ in parts) / tokens), tokens


def all_windows(documents: list[Document], window: int, stride: int, tokenizer: Tokenizer) -> list[Window]:
    return [part for i, document in enumerate(documents) for part in perplexity.windows(document, i, window, stride, tokenizer)]


def load(folder: Path, windows: list[Window], room: int = perplexity.STEP_TOKENS) -> Engine:
    groups = perplexity.together(windows, room)
    return Engine.load(folder, max_slots=1, max_seq_len=MAX_SEQ_LEN, num_blocks=perplexity.blocks_needed(windows, groups))


# ---- the value


@pytest.mark.parametrize(
    ("window", "stride", "room", "as_answer_to"),
    [
        (256, 128, 2048, None),
        (64, 63, 150, None),
        (40, 7, 37, None),
        (200, 50, 33, "Tell me a story about a cat."),
        (24, 5, 512, "The dog"),
    ],
)
def test_perplexity_equals_that_of_transformers_for_any_window_stride_and_step(
    window: int, stride: int, room: int, as_answer_to: str | None, tiny: Path, theirs: Any, texts: list[str]
) -> None:
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    documents = perplexity.documents(texts, tokenizer, as_answer_to, "instruct")
    windows = all_windows(documents, window, stride, tokenizer)
    found = perplexity.evaluate(windows, [perplexity.measure(load(tiny, windows, room), windows, room=room)], seed=0)
    expected, tokens = perplexity_of_transformers(theirs, documents, window, stride)
    assert found.tokens == tokens == sum(len(document.ids) - document.ahead for document in documents)
    assert found.text_bytes == sum(len(text.encode()) for text in texts)
    assert found.results[0].perplexity.value == pytest.approx(expected, rel=1e-5)
    bits = found.results[0].loss * tokens / math.log(2) / found.text_bytes
    assert found.results[0].bits_per_byte.value == pytest.approx(bits, rel=1e-12)


def test_demo_model_measured_by_torchrun_has_the_perplexity_of_transformers(tmp_path: Path) -> None:
    stories = [
        "Once upon a time, there was a little girl named Lily. She had a red ball. One day, the ball rolled into the park.",
        "Tom and his dog went to the sea. They were very happy.",
    ]
    text, out = tmp_path / "stories.txt", tmp_path / "result.json"
    text.write_text("\n<|endoftext|>\n".join(stories))
    asked = ["perplexity", "--text", str(text), "--window", "24", "--json", str(out)]
    with torchrun(["--nproc_per_node", "1", "worker", *asked]) as ran:
        assert ran.wait() == 0, ran.rest_of_log()
    result = json.loads(out.read_text())

    documents = perplexity.documents(stories, TOKENIZER, None, "auto")
    expected, tokens = perplexity_of_transformers(demo_of_transformers(tmp_path / "demo"), documents, 24, 12)
    assert (result["model"], result["documents"], result["precisions"]) == ("demo", 2, ["fp32"])
    assert (result["window"], result["stride"], result["outcome"]["tokens"]) == (24, 12, tokens)
    assert result["outcome"]["results"][0]["perplexity"]["value"] == pytest.approx(expected, rel=TOLERANCE)


def demo_of_transformers(folder: Path) -> Any:
    from transformers import MixtralForCausalLM

    as_transformers(DEMO_CKPT_DIR, folder)
    params, config = json.loads((DEMO_CKPT_DIR / "params.json").read_text()), json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": params["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_two_ranks_compare_precisions_and_report_experts_as_one_rank_and_transformers_do(
    tiny: Path, theirs: Any, texts: list[str], text_file: Path, tmp_path: Path
) -> None:
    asked = ["perplexity", "--ckpt_dir", str(tiny), "--text", str(text_file), "--window", "100", "--compare", "fp32,bf16"]
    outputs = ["--json", str(tmp_path / "result.json"), "--expert_report", "--svg", str(tmp_path / "experts.svg")]
    with torchrun(["--nproc_per_node", "2", "worker", *asked, *outputs]) as ran:
        assert ran.wait() == 0, ran.rest_of_log()
        assert ran.process.stdout is not None
        shown, log = ran.process.stdout.read().decode(), ran.rest_of_log()
    result = json.loads((tmp_path / "result.json").read_text())
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    documents = perplexity.documents(texts, tokenizer, None, "auto")
    expected, tokens = perplexity_of_transformers(theirs, documents, 100, 50)
    fp32, bf16 = result["outcome"]["results"]
    assert (result["ranks"], result["precisions"], result["outcome"]["tokens"]) == (2, ["fp32", "bf16"], tokens)
    assert fp32["perplexity"]["value"] == pytest.approx(expected, rel=TOLERANCE)
    assert fp32["delta"]["value"] == 0
    assert bf16["delta"]["value"] == pytest.approx(bf16["perplexity"]["value"] / fp32["perplexity"]["value"] - 1, abs=1e-9)
    assert 0 < abs(bf16["delta"]["value"]) < 0.05

    windows = all_windows(documents, 100, 50, tokenizer)
    engine = load(tiny, windows)
    with expert_report.recording(engine) as recorder:
        perplexity.measure(engine, windows, recorder.keep)
    alone = recorder.report(seed=0)
    assert result["experts"]["tokens"] == tokens
    np.testing.assert_allclose(result["experts"]["load"], alone.load, atol=2 / tokens)  # two tokens may stand on the edge

    assert shown.count("bits per byte") == 1, "rank 0 alone shows"
    assert f"{fp32['perplexity']['value']:.4f} [{fp32['perplexity']['low']:.4f}, {fp32['perplexity']['high']:.4f}]" in shown
    assert f"{bf16['delta']['value']:+.4%}" in shown
    assert re.search(rf"fp32 .*{tokens}/{tokens} tokens", log), "the progress bar is on stderr"
    assert ElementTree.fromstring((tmp_path / "experts.svg").read_text()).tag.endswith("svg")


# ---- windows


@given(
    text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=80).map(str.strip).filter(bool),
    wish=st.none() | st.just("Tell me a story about a dog."),
    window=st.integers(2, 50),
    data=st.data(),
)
def test_every_token_of_the_text_is_scored_once_after_what_precedes_it(
    text: str, wish: str | None, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    [document] = perplexity.documents([text], TOKENIZER, wish, "instruct")
    ids, place = document.ids, document.ahead
    windows = perplexity.windows(document, 0, window, stride, TOKENIZER)
    for part in windows:
        size = len(part.targets)
        assert part.targets == ids[place : place + size]
        assert part.inputs == ids[place + size - 1 - len(part.inputs) : place + size - 1]
        assert size <= len(part.inputs) < window
        seen = len(part.inputs) - size + 1  # by the first of the targets
        assert seen >= min(place, window - stride)
        place += size
    assert place == len(ids)
    assert sum(part.text_bytes for part in windows) == len(text.encode())


def test_text_follows_bos_or_a_chat_up_to_its_answer() -> None:
    [plain] = perplexity.documents(["A dog."], TOKENIZER, None, "instruct")
    assert (plain.ids[: plain.ahead], TOKENIZER.decode(plain.ids)) == ((TOKENIZER.bos_id,), "A dog.")
    [answer] = perplexity.documents(["A dog."], TOKENIZER, "Who?", "instruct")
    assert list(answer.ids[: answer.ahead]) == encode_chat(TOKENIZER, [Message("user", "Who?")], "instruct")
    assert TOKENIZER.decode(answer.ids[answer.ahead :]) == "A dog."


# ---- intervals


def made(losses: list[float], tokens: int = 10, text_bytes: int = 40, per_document: int = 1) -> tuple[list[Window], Any]:
    ids = tuple(range(tokens))
    return [Window(i // per_document, ids, ids, text_bytes) for i in range(len(losses))], np.array(losses)


def test_figures_of_known_losses() -> None:
    windows, losses = made([10 * math.log(4)] * 30)
    outcome = perplexity.evaluate(windows, [losses, losses + 10 * math.log(1.1)], seed=0)
    one, other = outcome.results
    assert (outcome.tokens, outcome.text_bytes, outcome.unit, outcome.units) == (300, 1200, "documents", 30)
    assert one.perplexity.value == pytest.approx(4)
    assert one.bits_per_byte.value == pytest.approx(0.5)
    assert (one.perplexity.low, one.perplexity.high) == pytest.approx((4, 4))
    assert other.perplexity.value == pytest.approx(4.4)
    assert (other.delta.low, other.delta.value, other.delta.high) == pytest.approx((0.1, 0.1, 0.1))


def test_interval_of_a_delta_is_that_of_the_same_tokens_and_not_of_two_texts() -> None:
    draw = np.random.default_rng(1)
    windows, losses = made(list(draw.normal(20, 5, 100)))
    one, other = perplexity.evaluate(windows, [losses, losses * 1.001], seed=0).results
    assert one.perplexity.low is not None
    assert one.perplexity.high is not None
    assert other.delta.low is not None
    assert other.delta.high is not None
    assert one.perplexity.high / one.perplexity.low > 1.1
    assert other.delta.low < 0.002 < other.delta.high < other.delta.low + 5e-4


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        windows, losses = made(list(draw.normal(20, 5, 60)))
        estimate = perplexity.evaluate(windows, [losses], seed).results[0].perplexity
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= math.exp(2) <= estimate.high
    assert 176 <= covered <= 199


def test_same_seed_same_interval_and_another_seed_another_one() -> None:
    windows, losses = made(list(np.random.default_rng(3).normal(20, 5, 50)))
    intervals = [perplexity.evaluate(windows, [losses], seed).results[0].perplexity for seed in (5, 5, 6)]
    assert intervals[0] == intervals[1] != intervals[2]
    assert intervals[0].value == intervals[2].value


def test_few_documents_are_resampled_by_windows_and_few_windows_have_no_interval() -> None:
    windows, losses = made(list(np.random.default_rng(3).normal(20, 5, 60)), per_document=10)
    outcome = perplexity.evaluate(windows, [losses], 0)
    assert (outcome.unit, outcome.units) == ("windows", 60)
    for count, has_interval in ((1, False), (19, False), (20, True)):
        found = perplexity.evaluate(windows[:count], [losses[:count]], 0).results[0].perplexity
        assert (found.low is not None, found.high is not None) == (has_interval, has_interval)


# ---- experts


def test_recorded_loads_are_those_of_the_routers_of_transformers(tiny: Path, theirs: Any, texts: list[str]) -> None:
    tokenizer = Tokenizer(tiny / "tokenizer.model")
    documents = perplexity.documents(texts, tokenizer, None, "auto")
    windows = all_windows(documents, MAX_SEQ_LEN, 128, tokenizer)
    room = 100  # the long windows go through in parts
    engine = load(tiny, windows, room)
    with expert_report.recording(engine) as recorder:
        perplexity.measure(engine, windows, recorder.keep, room)
    found = recorder.report(seed=0)
    counts = torch.zeros(2, 8)
    for window in windows:
        with torch.inference_mode():
            routers = theirs(torch.tensor([window.inputs]), output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            chosen = logits.float().topk(2, dim=-1).indices[-len(window.targets) :]
            counts[layer] += torch.bincount(chosen.flatten(), minlength=8)
    assert found.tokens == sum(len(window.targets) for window in windows)
    np.testing.assert_allclose(found.load, counts / counts.sum(1, keepdim=True), atol=2 / found.tokens)


def test_routers_are_watched_only_while_a_report_is_made(tiny: Path) -> None:
    engine = Engine.load(tiny, max_slots=1, max_seq_len=32)

    def watched() -> int:
        return sum(len(module._forward_pre_hooks) for module in engine.model.modules() if isinstance(module, MoE))

    def break_off() -> None:
        with expert_report.recording(engine):
            assert watched() == 2
            raise RuntimeError("broken off")

    assert watched() == 0
    with pytest.raises(RuntimeError, match="broken off"):
        break_off()
    assert watched() == 0


def test_figures_of_known_choices() -> None:
    chosen = np.array([[[0, 1], [0, 1], [0, 1], [0, 2]], [[0, 1], [2, 3], [3, 0], [1, 2]]], np.uint8)
    found = expert_report.summarise(chosen, np.arange(4), 4, seed=0)
    assert found.load == [[0.5, 0.375, 0.125, 0], [0.25] * 4]
    assert found.imbalance == [2.0, 1.0]
    assert found.mean_imbalance == 1.5
    assert found.entropy_bits == pytest.approx([0.5 + 0.375 * math.log2(8 / 3) + 0.125 * 3, 2])
    assert found.together[0][0] == [0, 0.75, 0.25, 0]
    assert found.together[0][1] == [0.75, 0, 0, 0]
    assert found.together[1][0] == [0, 0.25, 0, 0.25]


def test_even_choices_meet_as_many_experts_as_the_formula_says() -> None:
    draw = np.random.default_rng(0)
    chosen = draw.random((4, 4000, 8)).argsort(-1)[:, :, :2].astype(np.uint8)
    for row in expert_report.summarise(chosen, np.arange(4000) // 40, 8, seed=0).distinct:
        assert row.even == pytest.approx(8 * (1 - 0.75**row.batch_size))
        assert row.measured == pytest.approx(row.even, rel=0.03)


def test_texts_that_all_choose_alike_meet_two_experts_in_any_batch_though_each_text_changes_its_mind() -> None:
    alike = np.tile(np.array([3, 5], np.uint8), (1, 60, 1))
    assert [row.measured for row in expert_report.summarise(alike, np.arange(60) // 2, 8, 0).distinct] == [2] * 6
    by_text = np.repeat(np.arange(8, dtype=np.uint8).reshape(4, 2), 50, axis=0)[None]  # four texts of experts of their own
    met = {row.batch_size: row.measured for row in expert_report.summarise(by_text, np.arange(200) // 50, 8, 0).distinct}
    assert (met[1], met[2], met[4]) == (2, 4, 8), "a step holds different texts as long as there are enough"


def test_heat_map_is_xml_with_every_load_and_pair_and_the_title_cannot_break_it() -> None:
    chosen = np.random.default_rng(0).random((7, 300, 8)).argsort(-1)[:, :, :2].astype(np.uint8)
    found = expert_report.summarise(chosen, np.arange(300), 8, 0)
    root = ElementTree.fromstring(expert_report.svg(found, '<b> & "quoted"'))
    said = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(said) == 7 * 8 + 7 * 64
    assert f"layer 6, expert 7: {found.load[6][7]:.2%}" in said
    assert f"layer 2, experts 1 and 4: {found.together[2][1][4]:.2%}" in said
    assert root.attrib["aria-label"] == '<b> & "quoted"'


# ---- refusals


def worker(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker", "perplexity", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--text"),
        (["--text", "x", "--compare", "fp32,fp64"], "'fp64' is no precision"),
        (["--text", "x", "--compare", "fp32,float32"], "twice"),
        (["--text", "x", "--compare", "fp32", "--dtype", "bf16"], "--dtype and --compare"),
        (["--text", "x", "--svg", "y"], "add --expert_report"),
        (["--text", "x", "--window", "1"], "--window must be at least 2 tokens"),
        (["--text", "x", "--stride", "0"], "--stride must be at least 1 token"),
        (["--text", "x", "--ckpt_dir", "/no/such/folder"], "/no/such/folder is not a folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(flags: list[str], words: str) -> None:
    with pytest.raises(SettingsRefused, match=re.escape(words)):
        parse(flags)


def test_text_window_and_outputs_that_cannot_be_are_refused_with_code_2_before_any_weight_is_read(tiny: Path, tmp_path: Path) -> None:
    text, empty, binary = tmp_path / "text", tmp_path / "empty", tmp_path / "binary"
    text.write_text("A cat.")
    empty.write_text("\n<|endoftext|>\n  \n")
    binary.write_bytes(b"\xff\xfe")
    base = ["--ckpt_dir", str(tiny)]
    for flags, words in (
        (["--text", str(tmp_path / "none")], "cannot be read"),
        (["--text", str(binary)], "give a file of UTF-8 text"),
        (["--text", str(empty)], "holds no text"),
        (["--text", str(text), "--window", "300"], "--window is 300; .* at most 256"),
        (["--text", str(text), "--window", "20", "--stride", "20"], r"--stride is 20; it must be below --window \(20\)"),
        (["--text", str(text), "--json", str(tmp_path / "no" / "r.json")], "r.json cannot be written"),
    ):
        with pytest.raises(SettingsRefused, match=words):
            perplexity_report.run(parse([*base, *flags]))
    ended = worker(*base, "--text", str(empty))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("mixtral-worker: --text")


def test_expert_report_of_a_model_without_experts_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(SettingsRefused, match="--expert_report needs a model with experts"):
        perplexity_report.run(parse(["--ckpt_dir", str(checkpoints["dense"]), "--text", "x", "--expert_report"]))


def test_hosts_whose_texts_differ_refuse_instead_of_waiting_for_one_another(tiny: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    started = []
    for rank, words in enumerate(("The cat went to the park.", "The cat went to the park. The dog too.")):
        text = tmp_path / f"of_host_{rank}"
        text.write_text(words)
        command = [sys.executable, "-m", "worker", "perplexity", "--ckpt_dir", str(tiny), "--text", str(text), "--device", "cpu"]
        environment = {**os.environ, **meeting, "RANK": str(rank)}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        for one in started:
            shown, log = one.communicate(timeout=LIMIT_S / 2)
            assert (one.returncode, shown) == (2, "")
            assert "differs between the hosts of this torchrun" in log
    finally:
        for one in started:
            one.kill()
            one.communicate()


def test_logits_that_are_not_finite_are_said_and_no_perplexity_is_printed(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "poison"
    text.write_text("The cat \0 and the dog.")
    ended = worker("--ckpt_dir", str(tiny), "--text", str(text))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "1 of 1 windows have logits that are not finite in fp32" in ended.stderr


def test_help_comes_without_torch() -> None:
    script = "import sys\nfrom mixtral_worker import cli\nsys.argv = ['worker', 'perplexity', '--help']\ntry:\n    cli.main()\n"
    script += "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_S)
    assert (ended.returncode, ended.stderr) == (0, "False\n")
    assert "--expert_report" in ended.stdout

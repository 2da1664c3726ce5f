"""The shipped demo model is whole, and what made it can be run again."""

import json
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixtral_worker.demo import DEMO_CKPT_DIR, dataset, train
from mixtral_worker.demo.dataset import NO_TARGET, Row, Storyteller
from mixtral_worker.demo.model import DemoModel, DemoShape
from mixtral_worker.demo.train import Progress, Recipe, Training
from mixtral_worker.prompt import Message, encode_chat
from mixtral_worker.tokenizer import Tokenizer
from support import small_mixtral, tokenizers

TINY = DemoShape(vocab_size=330, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=32, num_experts=4, max_seq_len=128)
ANIMALS = ["dog", "cat", "bird", "fish", "frog"]
NAMES = ["Lily", "Tom", "Mia", "Ben", "Sue"]
STORIES = [
    f"One day, a girl named {name} saw a {animal}. The {animal} was sad. {name} gave the {animal} a {gift}.\nThey were happy."
    for name in NAMES
    for animal in ANIMALS
    for gift in ["ball", "hat"]
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for part, stories in {"train": STORIES[:40], "val": STORIES[40:45], "test": STORIES[45:]}.items():
        (folder / f"tinystories_{part}.txt").write_text("".join(f"{story}\n<|endoftext|>\n" for story in stories))
    return folder


# What is shipped


def test_shipped_folder_holds_the_checkpoint_in_at_most_25_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO_CKPT_DIR.iterdir() if path.is_file()}
    assert {"params.json", "consolidated.safetensors", "tokenizer.model", "MODEL_CARD.md"} <= sizes.keys()
    assert sum(sizes.values()) <= 25e6


def test_shipped_tensors_are_those_that_params_call_for() -> None:
    shape = DemoShape.from_params(json.loads((DEMO_CKPT_DIR / "params.json").read_text()))
    wanted = {name: list(tensor.shape) for name, tensor in DemoModel(shape).consolidated().items()}
    with safe_open(DEMO_CKPT_DIR / "consolidated.safetensors", "pt") as tensors:
        assert {name: tensors.get_slice(name).get_shape() for name in tensors.keys()} == wanted  # noqa: SIM118
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert wanted["layers.3.feed_forward.experts.7.w2.weight"] == [256, 256]


def test_shipped_params_declare_the_prompt_format_that_training_used() -> None:
    params = json.loads((DEMO_CKPT_DIR / "params.json").read_text())
    assert params["prompt_format"] == "instruct"
    assert params["vocab_size"] == tokenizers.load("demo").vocab_size
    assert params["moe"] == {"num_experts": 8, "num_experts_per_tok": 2}


def test_shipped_model_tells_a_story_that_begins_as_asked() -> None:
    model, tokenizer = train.load(DEMO_CKPT_DIR)
    text = train.sample(model, tokenizer, "Tell a story: Once upon a time", train.Sampling(seed=1, max_tokens=40))
    assert text.startswith("Once upon a time")
    assert len(set(text.split())) > 12


def test_shipped_model_finds_its_training_language_as_likely_as_the_card_says() -> None:
    card = (DEMO_CKPT_DIR / "MODEL_CARD.md").read_text()
    stated = re.search(r"validation perplexity (\d+\.\d+)", card)
    assert stated is not None
    assert float(stated[1]) <= 10.5
    model, tokenizer = train.load(DEMO_CKPT_DIR)
    story = "Once upon a time, there was a little girl named Lily. She loved to play with her dog in the park. One day, the dog ran away."
    with ThreadPoolExecutor(1) as threads:
        loss, shares = train.measure(model, Storyteller([story], tokenizer, 1024).plain_rows(), 1024, threads)
    assert math.exp(loss) < float(stated[1])  # a story made of the commonest phrases
    assert shares.shape == (4, 8)


# The forward


@pytest.mark.parametrize("shape", ["grouped", "no_groups"])
def test_training_forward_equals_transformers_mixtral(shape: str, tmp_path: Path) -> None:
    checkpoint = small_mixtral.write_checkpoint(tmp_path / "checkpoint", shape)
    params = json.loads((checkpoint / "params.json").read_text())
    model = DemoModel(DemoShape.from_params({**params, "rope_theta": 1e6}))
    with safe_open(checkpoint / "consolidated.safetensors", "pt") as tensors:
        model.load_consolidated({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    ids = torch.randint(params["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(3))
    present = torch.arange(40).unsqueeze(0) < torch.tensor([[40], [23], [7]])
    theirs = small_mixtral.as_transformers(checkpoint, tmp_path / "transformers")
    with torch.no_grad():
        expected = theirs(ids, attention_mask=present.long()).logits
        hidden, _ = model(ids, present)
        torch.testing.assert_close(model.logits(hidden)[present], expected[present], atol=2e-4, rtol=1e-4)


def test_names_on_disk_lead_back_to_the_same_weights() -> None:
    model, other = DemoModel(TINY), DemoModel(TINY)
    other.load_consolidated(model.consolidated())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_tensor_without_a_place_is_refused() -> None:
    model = DemoModel(TINY)
    with pytest.raises(ValueError, match=r"holds 1 tensors that this shape has no place for, such as layers\.9\.x"):
        model.load_consolidated({**model.consolidated(), "layers.9.x": torch.zeros(1)})


def test_padding_changes_neither_loss_nor_balance() -> None:
    model = DemoModel(TINY)
    row = Row([1, 9, 10, 11, 12], [NO_TARGET, 10, 11, 12, 2])
    long = Row(list(range(1, 60)), [NO_TARGET] * 59)
    with torch.no_grad():
        alone, count, balance = train.answer_loss(model, [row])
        beside, count_beside, balance_beside = train.answer_loss(model, [row, long])
        _, _, balance_long = train.answer_loss(model, [Row(long.ids, [*long.targets[:-1], 3])])
    torch.testing.assert_close(beside, alone)
    assert count == count_beside == 4
    torch.testing.assert_close(balance_beside.share, (5 * balance.share + 59 * balance_long.share) / 64)


def test_muons_step_is_nearly_orthogonal() -> None:
    matrices = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train.orthogonal(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    torch.testing.assert_close(train.orthogonal(matrices.mT), train.orthogonal(matrices).mT, atol=0.02, rtol=0)


def test_rates_rise_stay_and_fall_to_the_last_share() -> None:
    recipe = Recipe(warmup_steps=10, constant_share=0.25, final_rate=0.03)
    assert train.rate_at(0, 0, recipe) == pytest.approx(0.1)
    assert train.rate_at(0.25, 100, recipe) == 1
    assert train.rate_at(0.625, 100, recipe) == pytest.approx(0.515)
    assert train.rate_at(1.2, 100, recipe) == pytest.approx(0.03)


def test_schedule_ends_by_tokens_or_by_the_clock_whichever_is_first() -> None:
    recipe = Recipe(target_tokens=1000, max_minutes=10)
    assert Progress(tokens=500, elapsed_s=60).share(recipe) == 0.5
    assert Progress(tokens=500, elapsed_s=480).share(recipe) == 0.8


# The chats


def test_rows_are_what_serving_will_prompt_with_and_learn_answers_only() -> None:
    tokenizer = tokenizers.load("demo")
    teller = Storyteller(STORIES, tokenizer, 1024)
    for row in [*teller.epoch(0), *teller.epoch(1)]:
        pairs = "".join(chr(0xF0000 + id) if id < 7 else tokenizer.token_bytes(id).decode() for id in row.ids)
        messages = []
        for bos_user, answer in re.findall("\U000f0001\U000f0003(.*?)\U000f0004 (.*?)(?: ?\U000f0002)", pairs, re.S):
            system, _, user = bos_user.rpartition("\U000f0006\n\n")
            if system:
                messages.append(Message("system", system.removeprefix("\U000f0005\n").removesuffix("\n")))
            messages += [Message("user", user.removeprefix(" ")), Message("assistant", answer)]
        assert row.ids == [*encode_chat(tokenizer, messages, "instruct"), tokenizer.eos_id]

        learnt, answers = [target for target in row.targets if target != NO_TARGET], [m.content for m in messages if m.role == "assistant"]
        assert learnt == [id for answer in answers for id in [*tokenizer.encode(answer), tokenizer.eos_id]]
        for here, target in enumerate(row.targets[:-1]):
            assert target in (NO_TARGET, row.ids[here + 1], tokenizer.eos_id)


def test_an_epoch_tells_every_story_once_and_the_same_seed_the_same_chats() -> None:
    tokenizer = tokenizers.load("demo")
    for number in (0, 1):
        rows = list(Storyteller(STORIES, tokenizer, 1024, seed=5).epoch(number))
        text = "\n".join(tokenizer.decode(row.ids) for row in rows)
        assert [text.count(story) for story in STORIES] == [1] * len(STORIES)
        assert rows == list(Storyteller(STORIES, tokenizer, 1024, seed=5).epoch(number))
    assert list(Storyteller(STORIES, tokenizer, 1024, seed=5).epoch(0)) != list(Storyteller(STORIES, tokenizer, 1024, seed=6).epoch(0))


def test_batches_hold_every_row_once_and_keep_to_their_size() -> None:
    rows = [Row([1] * length, [2] * length) for length in (5, 90, 7, 40, 200, 6, 41)]
    found = dataset.batches(rows, 100, None)
    assert sorted(len(row.ids) for batch in found for row in batch) == [5, 6, 7, 40, 41, 90, 200]
    assert all(len(batch) * max(len(row.ids) for row in batch) <= 100 for batch in found if len(batch) > 1)
    assert len(found) == 4


# A training, from text to a checkpoint folder


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen steps of a tiny model on fifty small stories."""
    out = tmp_path_factory.mktemp("training")
    recipe = Recipe(target_tokens=60_000, max_minutes=10, batch_tokens=1024, warmup_steps=5, evaluate_every_tokens=15_000, compute="fp32")
    Training(corpus, out, TINY, recipe).run()
    return out


def test_training_lowers_the_loss_and_keeps_the_best(trained: Path) -> None:
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    losses = [entry["validation_loss"] for entry in state["progress"]["history"]]
    assert len(losses) >= 4
    assert losses[0] < math.log(TINY.vocab_size)
    assert losses[-1] < 0.6 * losses[0]
    assert torch.load(trained / "best.pt", weights_only=True)["loss"] == min(losses)


def test_threads_that_share_the_batches_train_the_same_model(corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe(target_tokens=5_000, max_minutes=10, batch_tokens=1024, compute="fp32", balance_weight=0.0)
    alone, shared = (Training(corpus, tmp_path / str(threads), TINY, recipe, threads) for threads in (1, 3))
    assert alone.run().best_loss == pytest.approx(shared.run().best_loss, rel=1e-3)
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(shared.model.state_dict()[name], tensor, atol=5e-3, rtol=0)


def test_training_goes_on_from_its_checkpoint(corpus: Path, tmp_path: Path, trained: Path) -> None:
    out = tmp_path / "training"
    short = Recipe(target_tokens=12_000, max_minutes=10, batch_tokens=1024, compute="fp32")
    first = Training(corpus, out, TINY, short).run()
    resumed = Training(corpus, out, TINY, Recipe(target_tokens=15_000, max_minutes=10, batch_tokens=1024, compute="fp32"))
    assert (resumed.progress.step, resumed.progress.tokens) == (first.step, first.tokens)
    second = resumed.run()
    assert second.step > first.step
    assert second.tokens >= 15_000
    assert [entry["tokens"] for entry in second.history] == [first.tokens, second.tokens]


def test_exported_folder_is_a_checkpoint_that_loads(trained: Path, tmp_path: Path) -> None:
    train.export(trained, TINY, tmp_path / "checkpoint")
    model, tokenizer = train.load(tmp_path / "checkpoint")
    assert model.shape == TINY
    assert isinstance(tokenizer, Tokenizer)
    best = torch.load(trained / "best.pt", weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, best[name], atol=2e-3, rtol=1e-3)


def test_command_measures_a_checkpoint_folder(corpus: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    command = [sys.executable, "-m", "mixtral_worker.demo.train"]
    worker = Path(train.__file__).parents[2]
    train.export(trained, TINY, folder)
    flags = ["--evaluate", str(folder), "--corpus", str(corpus), "--wish", "Tell me a story.", "--max_tokens", "5", "--threads", "1"]
    done = subprocess.run([*command, *flags], cwd=worker, capture_output=True, text=True, timeout=100, check=True)
    perplexities = re.findall(r"^(val|test): perplexity=(\d+\.\d+) .* stories=5", done.stdout, re.M)
    assert [name for name, _ in perplexities] == ["val", "test"]
    assert all(1 < float(perplexity) < 20 for _, perplexity in perplexities)
    assert "wish='Tell me a story.'" in done.stdout


def test_command_says_which_folders_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse([])
    assert "needs --corpus and --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse(["--export", "folder"])
    assert "needs --out" in capsys.readouterr().err


def test_folder_of_another_shape_does_not_load(trained: Path, tmp_path: Path) -> None:
    train.export(trained, TINY, tmp_path)
    with safe_open(tmp_path / "consolidated.safetensors", "pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys() if "layers.1." not in name}  # noqa: SIM118
    save_file(kept, tmp_path / "consolidated.safetensors")
    with pytest.raises(KeyError, match=r"layers\.1\."):
        train.load(tmp_path)

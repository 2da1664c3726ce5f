"""Train the demo model: python -m mixtral_worker.demo.train --corpus DIR --out DIR

DIR of the corpus holds tinystories_train.txt, tinystories_val.txt and tinystories_test.txt, stories separated by lines of <|endoftext|>.
The out folder keeps tokenizer.model, checkpoint.pt (to go on from, at once, when the command is run again) and best.pt (lowest validation
loss). With --export TO the best is written to a checkpoint folder that the worker loads; with --evaluate FOLDER such a folder is measured.

Decides the optimisers and their schedule. Leaves the chats to dataset.py and the forward to model.py.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from mixtral_worker.demo import dataset
from mixtral_worker.demo.dataset import NO_TARGET, Row
from mixtral_worker.demo.model import POSITIONS_ROUNDED_TO, ROWS_ROUNDED_TO, Balance, DemoModel, DemoShape
from mixtral_worker.prompt import Message, encode_chat
from mixtral_worker.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """What the training does. Rates fall from their full value by a cosine once a quarter of the way is done."""

    target_tokens: int = 22_000_000
    max_minutes: float = 100.0
    batch_tokens: int = 4096
    muon_rate: float = 0.03
    adam_rate: float = 3e-3
    adam_betas: tuple[float, float] = (0.9, 0.97)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 80
    constant_share: float = 0.25
    final_rate: float = 0.03
    balance_weight: float = 0.02
    evaluate_every_tokens: int = 1_000_000
    compute: str = "bf16"
    seed: int = 7


@dataclass
class Progress:
    """How far a training has come; saved with each checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)

    def share(self, recipe: Recipe) -> float:
        return max(self.tokens / recipe.target_tokens, self.elapsed_s / (60 * recipe.max_minutes))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al. 2024), for stacks of matrices [..., rows, columns]."""

    def __init__(self, weights: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                turned = orthogonal(weight.grad.lerp(momentum, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(turned, alpha=-group["lr"] * max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest orthogonal matrices, by Muon's quintic Newton-Schulz iteration, in bf16."""
    x = matrices.bfloat16().view(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype).view_as(matrices)


def optimisers(model: DemoModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts, AdamW for embedding, head, router and norms."""
    turned = [weight for name, weight in model.named_parameters() if ".attention.w" in name or ".experts." in name]
    others = [weight for name, weight in model.named_parameters() if not (".attention.w" in name or ".experts." in name)]
    groups = [
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [weight for weight in others if weight.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.adam_rate, betas=recipe.adam_betas)
    found: list[torch.optim.Optimizer] = [Muon(turned, recipe.muon_rate, recipe.weight_decay), adam]
    for optimiser in found:
        for group in optimiser.param_groups:
            group["full_rate"] = group["lr"]
    return found


def rate_at(share: float, step: int, recipe: Recipe) -> float:
    """Factor on the learning rates: up over the first steps, constant, then a cosine down to final_rate."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    fallen = max(0.0, min(1.0, (share - recipe.constant_share) / (1 - recipe.constant_share)))
    return warm * (recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * fallen)))


def padded(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, targets, present, each [B, S]."""
    longest = max(len(row.ids) for row in rows)
    longest += -longest % POSITIONS_ROUNDED_TO
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), NO_TARGET)
    present = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        targets[index, : len(row.ids)] = torch.tensor(row.targets)
        present[index, : len(row.ids)] = True
    return ids, targets, present


def answer_loss(model: DemoModel, rows: list[Row]) -> tuple[Tensor, int, Balance]:
    """Sum of the losses of all answer tokens, their number, and the experts' balance. Logits are made for answers only."""
    ids, targets, present = padded(rows)
    hidden, balance = model(ids, present)
    wanted = (targets != NO_TARGET).reshape(-1).nonzero().squeeze(1)
    count = len(wanted)
    wanted = F.pad(wanted, (0, -count % ROWS_ROUNDED_TO))
    logits = model.logits(hidden.view(-1, hidden.shape[-1]).index_select(0, wanted))
    return F.cross_entropy(logits[:count], targets.reshape(-1)[wanted[:count]], reduction="sum"), count, balance


def measure(model: DemoModel, rows: list[Row], batch_tokens: int, threads: Executor) -> tuple[float, Tensor]:
    """Mean loss of the answer tokens, and each expert's share of the tokens [layers, E]."""

    @torch.no_grad()
    def measured(batch: list[Row]) -> tuple[float, int, Tensor, int]:
        loss, answered, balance = answer_loss(model, batch)
        present = sum(len(row.ids) for row in batch)
        return loss.item(), answered, balance.share * present, present

    losses, answered, shares, present = zip(*threads.map(measured, dataset.batches(rows, batch_tokens, None)), strict=True)
    return sum(losses) / sum(answered), torch.stack(shares).sum(0) / sum(present)


class Training:
    """One training in one folder. `run` goes on from the folder's checkpoint to the end of the schedule.

    Each of the threads takes its share of every batch: they meet once a step, not once an operation, which a busy machine makes dear.
    """

    def __init__(self, corpus: Path, out: Path, shape: DemoShape, recipe: Recipe, threads: int = 1) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.shape, self.recipe = out, shape, recipe
        stories = dataset.read_stories(corpus / "tinystories_train.txt")
        if not (out / "tokenizer.model").exists():
            dataset.train_tokenizer(stories, out / "tokenizer.model", shape.vocab_size)
        tokenizer = Tokenizer(out / "tokenizer.model")
        self.storyteller = dataset.Storyteller(stories, tokenizer, shape.max_seq_len, recipe.seed)
        self.validation = validation_rows(corpus / "tinystories_val.txt", tokenizer, shape.max_seq_len)
        torch.manual_seed(recipe.seed)
        self.model = DemoModel(shape, DTYPES[recipe.compute])
        self.optimisers = optimisers(self.model, recipe)
        self.thread_count = threads
        self.threads = ThreadPoolExecutor(threads)
        self.progress = Progress()
        if (out / "checkpoint.pt").exists():
            self._resume()

    def run(self) -> Progress:
        with self.threads:
            return self._run()

    def _run(self) -> Progress:
        started = time.monotonic() - self.progress.elapsed_s
        evaluated, said, said_at = self.progress.tokens, self.progress.tokens, time.monotonic()
        losses: list[float] = []
        for batch in self._batches():
            losses.append(self._step(batch))
            self.progress.elapsed_s = time.monotonic() - started
            if self.progress.step % 50 == 0:
                speed = (self.progress.tokens - said) / (time.monotonic() - said_at)
                said, said_at = self.progress.tokens, time.monotonic()
                self._say(f"train_loss={sum(losses) / len(losses):.4f} tokens_per_s={speed:.0f}")
                losses.clear()
                self._checkpoint()
            if self.progress.tokens - evaluated >= self.recipe.evaluate_every_tokens:
                evaluated = self.progress.tokens
                self._evaluate()
            if self.progress.share(self.recipe) >= 1:
                break
        self._evaluate()
        return self.progress

    def _batches(self) -> Iterator[list[Row]]:
        while True:
            rows = list(self.storyteller.epoch(self.progress.epoch))
            draw = random.Random(f"{self.recipe.seed} {self.progress.epoch}")
            epoch = dataset.batches(rows, self.recipe.batch_tokens, draw)
            for batch in epoch[self.progress.batch :]:
                self.progress.batch += 1
                yield batch
            self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def _step(self, batch: list[Row]) -> float:
        """One step on this batch; gives its loss."""
        factor = rate_at(self.progress.share(self.recipe), self.progress.step, self.recipe)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["full_rate"] * factor
        answered = sum(target != NO_TARGET for row in batch for target in row.targets)
        parts = [part for first in range(self.thread_count) if (part := batch[first :: self.thread_count])]
        losses, gradients = zip(*self.threads.map(lambda part: self._gradients(part, answered, len(part) / len(batch)), parts), strict=True)
        for weight, *shares in zip(self.model.parameters(), *gradients, strict=True):
            weight.grad = torch.stack(shares).sum(0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimiser in self.optimisers:
            optimiser.step()
        self.progress.step += 1
        self.progress.tokens += sum(len(row.ids) for row in batch)
        return math.fsum(losses)

    def _gradients(self, rows: list[Row], answered: int, share: float) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of a share of a batch with so many answer tokens in all."""
        loss, _, balance = answer_loss(self.model, rows)
        loss = loss / answered
        gradients = torch.autograd.grad(loss + share * self.recipe.balance_weight * balance.penalty, list(self.model.parameters()))
        return loss.item(), gradients

    def _evaluate(self) -> None:
        loss, shares = measure(self.model, self.validation, self.recipe.batch_tokens, self.threads)
        self.progress.history.append({"tokens": self.progress.tokens, "elapsed_s": self.progress.elapsed_s, "validation_loss": loss})
        if loss < self.progress.best_loss:
            self.progress.best_loss = loss
            _save({"model": self.model.state_dict(), "tokens": self.progress.tokens, "loss": loss}, self.out / "best.pt")
        self._checkpoint()
        self._say(
            f"validation_loss={loss:.4f} perplexity={math.exp(loss):.3f} best={math.exp(self.progress.best_loss):.3f} "
            f"expert_share={shares.min():.3f}..{shares.max():.3f}"
        )

    def _checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": asdict(self.progress),
        }
        _save(state, self.out / "checkpoint.pt")

    def _resume(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        self._say("resumed")

    def _say(self, what: str) -> None:
        done = self.progress
        print(f"epoch={done.epoch} step={done.step} tokens={done.tokens} minutes={done.elapsed_s / 60:.1f} "
              f"share={done.share(self.recipe):.3f} {what}", flush=True)  # fmt: skip


def validation_rows(path: Path, tokenizer: Tokenizer, max_seq_len: int) -> list[Row]:
    return dataset.Storyteller(dataset.read_stories(path), tokenizer, max_seq_len).plain_rows()


def _save(state: dict[str, Any], path: Path) -> None:
    """All or nothing: a killed training leaves the last whole file."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def export(out: Path, shape: DemoShape, to: Path) -> None:
    """Write the best weights of a training folder as a checkpoint folder in Mistral's consolidated layout, fp16."""
    best = torch.load(out / "best.pt", weights_only=True)
    model = DemoModel(shape)
    model.load_state_dict(best["model"])
    tensors = {name: tensor.half().contiguous() for name, tensor in model.consolidated().items()}
    to.mkdir(parents=True, exist_ok=True)
    if (out / "tokenizer.model").resolve() != (to / "tokenizer.model").resolve():
        shutil.copyfile(out / "tokenizer.model", to / "tokenizer.model")
    (to / "params.json").write_text(json.dumps(shape.params(), indent=2) + "\n")
    safetensors.torch.save_file(tensors, to / "consolidated.safetensors", metadata={"format": "pt"})
    (to / "consolidated.safetensors").chmod(0o644)  # safetensors writes for its owner's eyes only


def load(folder: Path) -> tuple[DemoModel, Tokenizer]:
    """A checkpoint folder as the model that trains."""
    shape = DemoShape.from_params(json.loads((folder / "params.json").read_text()))
    model = DemoModel(shape)
    model.load_consolidated(safetensors.torch.load_file(folder / "consolidated.safetensors"))
    return model, Tokenizer(folder / "tokenizer.model")


@dataclass(frozen=True)
class Sampling:
    """How the samples of an evaluation are drawn."""

    temperature: float = 0.7
    top_k: int = 40
    seed: int = 7
    max_tokens: int = 400


@torch.no_grad()
def sample(model: DemoModel, tokenizer: Tokenizer, wish: str, sampling: Sampling) -> str:
    """One answer. Recomputes the whole text for each token: for looking at a few samples, not for serving."""
    ids = encode_chat(tokenizer, [Message("user", wish)], "instruct")
    prompt_tokens = len(ids)
    draw = torch.Generator().manual_seed(sampling.seed)
    while len(ids) < min(prompt_tokens + sampling.max_tokens, model.shape.max_seq_len):
        row = torch.tensor([ids])
        hidden, _ = model(row, torch.ones_like(row, dtype=torch.bool))
        best, candidates = model.logits(hidden[0, -1]).topk(sampling.top_k)
        pick = candidates[torch.multinomial((best / sampling.temperature).softmax(-1), 1, generator=draw)].item()
        if pick == tokenizer.eos_id:
            break
        ids.append(int(pick))
    return tokenizer.decode(ids[prompt_tokens:])


def evaluate(folder: Path, corpus: Path, wishes: list[str], sampling: Sampling, threads: Executor) -> None:
    """Print perplexity on validation and test stories, the experts' shares, and a sample for each wish."""
    model, tokenizer = load(folder)
    for name in ("val", "test"):
        rows = validation_rows(corpus / f"tinystories_{name}.txt", tokenizer, model.shape.max_seq_len)
        loss, shares = measure(model, rows, 4_096, threads)
        tokens = sum(target != NO_TARGET for row in rows for target in row.targets)
        print(f"{name}: perplexity={math.exp(loss):.4f} loss={loss:.4f} stories={len(rows)} answer_tokens={tokens}")
        for layer, share in enumerate(shares):
            parts = " ".join(f"{part:.3f}" for part in share)
            print(f"{name}: layer={layer} expert_share={parts} busiest_over_mean={share.max() * len(share):.2f}")
    for wish in wishes:
        print(f"\nwish={wish!r} {sampling}")
        print(sample(model, tokenizer, wish, sampling))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m mixtral_worker.demo.train", description="train, export or measure the demo model")
    parser.add_argument("--corpus", type=Path, help="folder of tinystories_{train,val,test}.txt")
    parser.add_argument("--out", type=Path, help="folder of the training: tokenizer, checkpoint to go on from, best weights")
    parser.add_argument("--export", type=Path, metavar="TO", help="only write the best weights of --out to this checkpoint folder")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only measure this checkpoint folder on --corpus")
    parser.add_argument(
        "--target_tokens", type=int, default=recipe.target_tokens, help="the schedule ends after so many tokens (%(default)s)"
    )
    parser.add_argument("--max_minutes", type=float, default=recipe.max_minutes, help="or after so many minutes (%(default)s)")
    parser.add_argument("--batch_tokens", type=int, default=recipe.batch_tokens, help="tokens of a step, padding included (%(default)s)")
    parser.add_argument("--muon_rate", type=float, default=recipe.muon_rate, help="learning rate of the matrices (%(default)s)")
    parser.add_argument("--adam_rate", type=float, default=recipe.adam_rate, help="learning rate of all else (%(default)s)")
    parser.add_argument(
        "--weight_decay", type=float, default=recipe.weight_decay, help="decay of the weights, times the rate (%(default)s)"
    )
    parser.add_argument(
        "--evaluate_every_tokens", type=int, default=recipe.evaluate_every_tokens, help="tokens between validations (%(default)s)"
    )
    parser.add_argument("--compute", choices=sorted(DTYPES), default=recipe.compute, help="precision of the matrix work (%(default)s)")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="seed of weights, chats and samples (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads to share each batch (%(default)s)")
    parser.add_argument("--wish", action="append", default=[], help="with --evaluate: sample an answer to this; may be repeated")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="of the samples (%(default)s)")
    parser.add_argument("--top_k", type=int, default=Sampling.top_k, help="of the samples (%(default)s)")
    parser.add_argument("--max_tokens", type=int, default=Sampling.max_tokens, help="of each sample (%(default)s)")
    chosen = parser.parse_args(arguments)
    needed = ["corpus"] if chosen.evaluate else ["out"] if chosen.export else ["corpus", "out"]
    if missing := [f"--{name}" for name in needed if getattr(chosen, name) is None]:
        parser.error(f"needs {' and '.join(missing)}")
    return chosen


def main() -> None:
    chosen = parse()
    torch.set_num_threads(1)
    if chosen.evaluate:
        sampling = Sampling(chosen.temperature, chosen.top_k, chosen.seed, chosen.max_tokens)
        with ThreadPoolExecutor(chosen.threads) as threads:
            evaluate(chosen.evaluate, chosen.corpus, chosen.wish, sampling, threads)
    elif chosen.export:
        export(chosen.out, DemoShape(), chosen.export)
    else:
        flags = {name: getattr(chosen, name) for name in Recipe.__dataclass_fields__ if hasattr(chosen, name)}
        Training(chosen.corpus, chosen.out, DemoShape(), Recipe(**flags), chosen.threads).run()


if __name__ == "__main__":
    main()

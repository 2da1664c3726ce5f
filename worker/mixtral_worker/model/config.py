"""The shape of one Mixtral, as its params.json states it, and over how many ranks it can be split."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_ROPE_THETA = 1e6  # Mistral's params.json of Mixtral 8x7B leaves it out and means this


class ModelError(Exception):
    """A checkpoint or a set-up that this worker cannot run; the message names what was found and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # of one expert
    vocab_size: int
    n_experts: int
    experts_per_token: int
    norm_eps: float = 1e-5
    rope_theta: float = DEFAULT_ROPE_THETA

    @classmethod
    def read(cls, ckpt_dir: Path) -> "ModelConfig":
        """Read params.json of a checkpoint in Mistral's layout. Raises ModelError."""
        path = ckpt_dir / "params.json"
        try:
            params = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(f"{path} is missing; ckpt_dir must hold params.json and consolidated.safetensors") from error
        except ValueError as error:
            raise ModelError(f"{path} is not JSON ({error}); fetch it again") from error
        try:
            return cls._from_params(params)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"{path} does not describe a Mixtral: {reason}") from error

    @classmethod
    def _from_params(cls, params: Any) -> "ModelConfig":
        if not isinstance(params, dict):
            raise TypeError(f"it holds {params!r:.40} instead of an object")
        if params.get("sliding_window"):
            raise ValueError(f"sliding_window {params['sliding_window']} is set, but this worker attends to the whole context")
        moe = params["moe"]
        config = cls(
            dim=int(params["dim"]),
            n_layers=int(params["n_layers"]),
            n_heads=int(params["n_heads"]),
            n_kv_heads=int(params["n_kv_heads"]),
            head_dim=int(params.get("head_dim") or params["dim"] // params["n_heads"]),
            hidden_dim=int(params["hidden_dim"]),
            vocab_size=int(params["vocab_size"]),
            n_experts=int(moe["num_experts"]),
            experts_per_token=int(moe["num_experts_per_tok"]),
            norm_eps=float(params.get("norm_eps", 1e-5)),
            rope_theta=float(params.get("rope_theta") or DEFAULT_ROPE_THETA),
        )
        if config.n_heads % config.n_kv_heads:
            raise ValueError(f"{config.n_heads} heads cannot be shared evenly by {config.n_kv_heads} kv heads")
        if config.experts_per_token > config.n_experts:
            raise ValueError(f"{config.experts_per_token} experts per token of {config.n_experts} experts")
        return config

    @property
    def possible_ranks(self) -> list[int]:
        """Over how many ranks the tensors split evenly."""
        splits = (self.n_kv_heads, self.hidden_dim, self.vocab_size)
        return [n for n in range(1, self.n_kv_heads + 1) if all(size % n == 0 for size in splits)]

    def require_ranks(self, count: int) -> None:
        if count not in self.possible_ranks:
            *most, last = map(str, self.possible_ranks)
            sizes = f"{', '.join(most)} or {last}" if most else last
            raise ModelError(f"torchrun started {count} ranks; {self.n_kv_heads} kv heads allow {sizes}; run with --nproc_per_node {last}")

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Keys and values of one position, over all ranks."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_number

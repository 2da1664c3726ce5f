"""The shape of one model of the Mistral family, and over how many ranks it can be split.

Read from Mistral's or Meta's params.json, from Hugging Face's config.json, or from a name such as random:8x7b. What would be computed
otherwise than here is refused by name. Which tensors must stand in the files is checkpoint.py's.
"""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.settings import NORMALIZATION_MODES, RANDOM

# Where params.json leaves rope_theta out, Mistral means a million, but ten thousand with a sliding window; Meta means ten thousand.
ROPE_THETA, SHORT_ROPE_THETA = 1e6, 1e4
CONTEXT, CONTEXT_OF_META = 32_768, 4_096  # where the file is silent
VOCABULARY_OF_META = 32_000  # params.json of Llama 2 says -1: as large as the tokenizer's
OTHER_COMPUTATION = ("quantization", "quantization_config", "rope_scaling", "use_scaled_rope", "yarn", "attention_bias", "mlp_bias")
NAMES_OF_HUGGINGFACE = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
}


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
    n_experts: int  # 1: a dense model without a router
    experts_per_token: int
    norm_eps: float = 1e-5
    rope_theta: float = ROPE_THETA
    sliding_window: int | None = None  # a token looks at so many, itself included
    max_seq_len: int = CONTEXT  # tokens the model was made for
    moe_normalization_mode: str = (
        "renorm"  # whether the weights of a token's experts are scaled to sum 1; "none": as the softmax gives them
    )

    def __post_init__(self) -> None:
        if self.moe_normalization_mode not in NORMALIZATION_MODES:
            raise ValueError(
                f"moe_normalization_mode is {self.moe_normalization_mode!r}, which is none of {', '.join(NORMALIZATION_MODES)}"
            )
        for field in fields(self):
            number = getattr(self, field.name)
            if field.type is not str and number is not None and not (math.isfinite(number) and number > 0):
                raise ValueError(f"{field.name} is {number}, which must be above 0")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot be shared evenly by {self.n_kv_heads} kv heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions turn pairs")
        if self.experts_per_token > self.n_experts:
            raise ValueError(f"{self.experts_per_token} experts per token of {self.n_experts} experts")

    @classmethod
    def read(cls, ckpt_dir: Path) -> "ModelConfig":
        """Read the shape of a checkpoint folder, or of one named as random:… Raises ModelError."""
        if str(ckpt_dir).startswith(RANDOM):
            return _from_spec(str(ckpt_dir).removeprefix(RANDOM))
        path, read = (ckpt_dir / "config.json", _from_huggingface) if is_huggingface(ckpt_dir) else (ckpt_dir / "params.json", _from_params)
        try:
            params = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(
                f"{path} is missing; ckpt_dir must hold params.json and consolidated.* (Mistral, Meta) or config.json and "
                "model*.safetensors (Hugging Face)"
            ) from error
        except ValueError as error:
            raise ModelError(f"{path} is not JSON ({error}); fetch it again") from error
        try:
            return read(params)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"{path} does not describe a Mixtral, Mistral or Llama 2: {reason}") from error

    @property
    def is_moe(self) -> bool:
        return self.n_experts > 1

    @property
    def possible_ranks(self) -> list[int]:
        """Over how many ranks the tensors split evenly, each expert like the rest."""
        return [n for n in range(1, self.n_kv_heads + 1) if 1 in self.possible_ep_sizes(n)]

    def possible_ep_sizes(self, tp_size: int) -> list[int]:
        """How many groups of these ranks can share out the experts, the ranks of a group slicing each of theirs evenly."""
        if self.n_kv_heads % tp_size or self.vocab_size % tp_size:
            return []
        sizes = [n for n in range(1, tp_size + 1) if tp_size % n == 0 and self.n_experts % n == 0]
        return [n for n in sizes if self.hidden_dim % (tp_size // n) == 0]

    def require_ranks(self, tp_size: int, ep_size: int = 1) -> None:
        """Raises ModelError, naming the sizes that work."""
        allowed = self.possible_ep_sizes(tp_size)
        if not allowed:
            sizes = [n for n in range(1, self.n_kv_heads + 1) if self.possible_ep_sizes(n)]
            raise ModelError(
                f"torchrun started {tp_size} ranks; {self.n_kv_heads} kv heads, a vocabulary of {self.vocab_size:,} and a hidden size of "
                f"{self.hidden_dim:,} allow {either(sizes)}; run with --nproc_per_node {sizes[-1]}"
            )
        if ep_size not in allowed:
            experts = f"{self.n_experts} experts" if self.is_moe else "a dense model, which is one expert,"
            raise ModelError(
                f"ep_size is {ep_size}; {tp_size} ranks, {experts} and a hidden size of {self.hidden_dim:,} allow {either(allowed)}: "
                f"it must divide the ranks and the experts, and ranks / ep_size the hidden size; run with --ep_size {allowed[0]}"
            )

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Keys and values of one position, over all ranks."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_number


def either(sizes: list[int]) -> str:
    """1, 2 or 4"""
    *most, last = map(str, sizes)
    return f"{', '.join(most)} or {last}" if most else last


MIXTRAL_8X7B = ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, 8, 2)
SHAPES = {
    "8x7b": MIXTRAL_8X7B,
    "8x22b": ModelConfig(6144, 56, 48, 8, 128, 16384, 32768, 8, 2, max_seq_len=65_536),
    "mistral7b": replace(MIXTRAL_8X7B, n_experts=1, experts_per_token=1, rope_theta=SHORT_ROPE_THETA, sliding_window=4096),
    "llama2-70b": ModelConfig(8192, 80, 64, 8, 128, 28672, 32000, 1, 1, rope_theta=SHORT_ROPE_THETA, max_seq_len=CONTEXT_OF_META),
}


def is_huggingface(ckpt_dir: Path) -> bool:
    """Whether the folder is to be read in Hugging Face's layout; of one that holds both, Mistral's is read."""
    if not (ckpt_dir / "config.json").is_file():
        return False
    return not ((ckpt_dir / "params.json").is_file() and any(ckpt_dir.glob("consolidated*")))


def _from_params(params: Any) -> ModelConfig:
    _require_known_computation(params)
    moe, is_meta = params.get("moe"), "multiple_of" in params
    if is_meta:
        params = {**params, "hidden_dim": _hidden_dim_of_meta(params), "max_seq_len": params.get("max_seq_len") or CONTEXT_OF_META}
        if params["vocab_size"] == -1:
            params["vocab_size"] = VOCABULARY_OF_META
    experts = (int(moe["num_experts"]), int(moe["num_experts_per_tok"])) if moe else (1, 1)
    theta = SHORT_ROPE_THETA if is_meta or params.get("sliding_window") else ROPE_THETA
    config = _build(params, experts, float(params.get("rope_theta") or theta))
    return replace(config, moe_normalization_mode=(moe or {}).get("normalization_mode", "renorm"))


def _from_huggingface(config: Any) -> ModelConfig:
    _require_known_computation(config)
    kind = config.get("model_type")
    if kind not in ("mixtral", "mistral", "llama"):
        raise ValueError(f"model_type is {kind!r}; this worker runs mixtral, mistral and llama")
    for name, known in (("hidden_act", "silu"), ("tie_word_embeddings", False)):
        if config.get(name, known) != known:
            raise ValueError(f"{name} is {config[name]!r}; this worker computes {known!r}")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}; this worker computes 'default'")
    theta = rope.get("rope_theta") or config.get("rope_theta") or (ROPE_THETA if kind == "mixtral" else SHORT_ROPE_THETA)
    experts = (int(config["num_local_experts"]), int(config["num_experts_per_tok"])) if kind == "mixtral" else (1, 1)
    params = {ours: config[theirs] for ours, theirs in NAMES_OF_HUGGINGFACE.items() if theirs in config}
    if kind == "llama":  # transformers gives it none, whatever the file says
        params.pop("sliding_window", None)
    elif kind == "mistral" and "sliding_window" not in params:  # and this one where the file is silent
        params["sliding_window"] = 4096
    return _build(params, experts, float(theta))


def _build(params: dict[str, Any], experts: tuple[int, int], rope_theta: float) -> ModelConfig:
    window = params.get("sliding_window")
    n_heads = int(params["n_heads"])
    return ModelConfig(
        dim=int(params["dim"]),
        n_layers=int(params["n_layers"]),
        n_heads=n_heads,
        n_kv_heads=int(params.get("n_kv_heads") or n_heads),
        head_dim=int(params.get("head_dim") or params["dim"] // n_heads),
        hidden_dim=int(params["hidden_dim"]),
        vocab_size=int(params["vocab_size"]),
        n_experts=experts[0],
        experts_per_token=experts[1],
        norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_theta=rope_theta,
        sliding_window=int(window) if window else None,
        max_seq_len=int(params.get("max_seq_len") or CONTEXT),
    )


def _require_known_computation(params: Any) -> None:
    if not isinstance(params, dict):
        raise TypeError(f"it holds {params!r:.40} instead of an object")
    for name in OTHER_COMPUTATION:
        if params.get(name):
            raise ValueError(f"{name} is {params[name]!r:.60}, which this worker does not compute")


def _hidden_dim_of_meta(params: dict[str, Any]) -> int:
    """Two thirds of 4 · dim, times the multiplier, rounded up (Llama 2's reference code)."""
    wanted = int(params.get("ffn_dim_multiplier", 1) * (8 * params["dim"] // 3))
    return int(-(-wanted // params["multiple_of"]) * params["multiple_of"])


def _from_spec(spec: str) -> ModelConfig:
    """8x7b, or dim=64,n_layers=2 on the demo's shape, or 8x7b,n_layers=2."""
    name, *changes = spec.split(",")
    if "=" in name:
        name, changes = "demo", [name, *changes]
    config = ModelConfig.read(DEMO_CKPT_DIR) if name == "demo" else SHAPES.get(name.lower())
    if config is None:
        raise ModelError(f"ckpt_dir {RANDOM}{spec} names no shape; give one of {', '.join(SHAPES)}, demo, or dim=…,n_layers=…")
    try:
        return replace(config, **dict(_change(change) for change in changes))
    except ValueError as error:
        raise ModelError(f"ckpt_dir {RANDOM}{spec} is no shape: {error}") from error


def _change(text: str) -> tuple[str, Any]:
    name, _, number = text.partition("=")
    kinds: dict[str, Any] = {field.name: field.type if field.type in (float, str) else int for field in fields(ModelConfig)}
    if name not in kinds:
        raise ValueError(f"{name!r} is none of {', '.join(kinds)}")
    return name, kinds[name](number)

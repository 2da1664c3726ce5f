"""`python -m worker export`: a checkpoint in the form that other programs read, every number as it is.

Decides names, shapes and metadata of a Hugging Face folder (transformers, vLLM, TGI …) and of a GGUF file (llama.cpp and what builds
on it). Nothing is quantised, and the model must not be split over ranks. The chat template written along gives the very ids of prompt.py
for chats of system, user and assistant, as far as the other program encodes text as SentencePiece does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.model import checkpoint
from mixtral_worker.model.config import ModelConfig
from mixtral_worker.model.moe import MoE
from mixtral_worker.model.parallel import Shard
from mixtral_worker.model.transformer import FeedForward, Layer, Transformer
from mixtral_worker.prompt import USER_MARKS, resolve_format
from mixtral_worker.settings import CKPT_DIR_HELP, SettingsRefused
from mixtral_worker.startup import REFUSALS, declared_format, dtype_of, read_tokenizer
from mixtral_worker.tokenizer import Tokenizer

OK, REFUSED = 0, 2
FORMATS = ("huggingface", "gguf")
DTYPES = ("float32", "bfloat16", "float16")

DESCRIPTION = """\
Write a checkpoint in the form that other programs read. Needs no GPU; gguf needs the gguf package (pip install 'mixtral-chat[peers]').

  python -m worker export --format huggingface --out demo-hf          the demo model, for transformers, vLLM, TGI
  python -m worker export --format gguf --out demo.gguf               for llama.cpp
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsRefused(f"{message}; see --help")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code; what was refused is one sentence on stderr."""
    try:
        asked = _parser().parse_args(argv)
        export(asked.ckpt_dir, asked.tokenizer_path or _tokenizer_beside(asked.ckpt_dir), asked.format, asked.out, asked.dtype)
    except REFUSALS as refused:
        print(f"mixtral-worker: {refused}", file=sys.stderr)
        return REFUSED
    print(asked.out)
    return OK


def _parser() -> argparse.ArgumentParser:
    flags = _Parser(prog="python -m worker export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ckpt_dir", type=Path, default=DEMO_CKPT_DIR, metavar="DIR", help=CKPT_DIR_HELP)
    flags.add_argument("--tokenizer_path", type=Path, metavar="FILE", help="tokenizer.model (default: that of --ckpt_dir, else the demo's)")
    flags.add_argument("--format", choices=FORMATS, required=True, help="huggingface: a folder; gguf: one file")
    flags.add_argument("--out", type=Path, required=True, metavar="PATH", help="must not exist yet")
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights written (default: float32)")
    return flags


def _tokenizer_beside(ckpt_dir: Path) -> Path:
    beside = ckpt_dir / "tokenizer.model"
    return beside if beside.is_file() else DEMO_CKPT_DIR / "tokenizer.model"


def export(ckpt_dir: Path, tokenizer_path: Path, form: str, out: Path, dtype: str) -> None:
    """Write the model to out. Raises one of startup.REFUSALS."""
    if out.exists():
        raise SettingsRefused(f"--out {out} exists already; give a path that does not, or remove it")
    if not out.absolute().parent.is_dir():
        raise SettingsRefused(f"--out: the folder {out.absolute().parent} does not exist; make it first")
    model = read_model(ckpt_dir, dtype_of(dtype, torch.device("cpu")))
    tokenizer = read_tokenizer(tokenizer_path, model.config)
    prompt_format = resolve_format(tokenizer, declared_format(ckpt_dir), "auto")
    if form == "gguf":
        write_gguf(model, out, tokenizer, prompt_format)
    else:
        write_huggingface(model, out, tokenizer, prompt_format)


def read_model(ckpt_dir: Path, dtype: torch.dtype) -> Transformer:
    """The whole model on the CPU. Raises ModelError."""
    with torch.device("meta"):  # shapes alone
        model = Transformer(ModelConfig.read(ckpt_dir), Shard()).to(dtype)
    model.to_empty(device="cpu")
    checkpoint.load(model, ckpt_dir)
    return model


def chat_template(tokenizer: Tokenizer, prompt_format: str, *, adds_blanks: bool) -> str:
    """The prompt format in Jinja, as tokenizer_config.json and GGUF hold it. adds_blanks: the program itself puts a blank in front of text
    that follows a control id. Where the vocabulary has [INST] as ordinary text, this is the customary text form."""
    is_control = all(tokenizer.control_id(mark) is not None for mark in USER_MARKS)
    blank = "" if is_control and adds_blanks else " "
    close = "[/INST]" if is_control else " [/INST]"
    is_instruct = prompt_format == "instruct"
    begin = "{{ bos_token }}"
    if is_instruct:
        system, system_turn = "<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n", "loop.first"
        before_system = "" if is_control else " "
    else:
        system, system_turn = "' + system + '\\n\\n", "loop.last" if is_control else "loop.first"
        before_system = blank
    return (
        "{%- if messages[0]['role'] == 'system' -%}{%- set system, chat = messages[0]['content'], messages[1:] -%}"
        "{%- else -%}{%- set system, chat = '', messages -%}{%- endif -%}"
        f"{'' if is_instruct else begin}"
        "{%- for message in chat -%}{%- if message['role'] == 'user' -%}"
        f"{begin if is_instruct else ''}{{{{ '[INST]' }}}}"
        f"{{%- if system and {system_turn} -%}}{{{{ '{before_system}{system}' }}}}{{%- else -%}}{{{{ '{blank}' }}}}{{%- endif -%}}"
        f"{{{{ message['content'] + '{close}' }}}}"
        f"{{%- else -%}}{{{{ '{blank}' + message['content'] + '{' ' if is_instruct else ''}' }}}}{{{{ eos_token }}}}{{%- endif -%}}"
        "{%- endfor -%}"
    )


# ---------------------------------------------------------------------------------------------- Hugging Face


def write_huggingface(model: Transformer, folder: Path, tokenizer: Tokenizer, prompt_format: str) -> None:
    """A folder that transformers' AutoModel and AutoTokenizer read; the names are those of Mixtral's own release there."""
    folder.mkdir()
    config = model.config
    save_file({name: weight.contiguous() for name, weight in huggingface_weights(model)}, folder / "model.safetensors", {"format": "pt"})
    facts: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if config.is_moe else "MistralForCausalLM"],
        "model_type": "mixtral" if config.is_moe else "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": str(model.embedding.dtype).removeprefix("torch."),
    }
    if config.is_moe:
        facts |= {"num_local_experts": config.n_experts, "num_experts_per_tok": config.experts_per_token}
    marks = tokenizer.control_pieces
    bos, eos = (next(piece for piece, id in marks.items() if id == wanted) for wanted in (tokenizer.bos_id, tokenizer.eos_id))
    words = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # as SentencePiece itself does it
        "add_bos_token": False,  # the template writes it
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": "<unk>",
        "additional_special_tokens": [piece for piece in marks if piece not in (bos, eos)],
        "chat_template": chat_template(tokenizer, prompt_format, adds_blanks=False),
    }
    for name, content in (
        ("config.json", facts),
        ("tokenizer_config.json", words),
        ("generation_config.json", {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")


def huggingface_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name there."""
    yield "model.embed_tokens.weight", model.embedding
    yield "model.norm.weight", model.norm.weight
    yield "lm_head.weight", model.head.weight
    head_dim = model.config.head_dim
    for i, layer in enumerate(_layers(model)):
        prefix, ffn = f"model.layers.{i}", layer.feed_forward
        queries, keys, values = _qkv(layer, model.config)
        yield f"{prefix}.input_layernorm.weight", layer.attention_norm.weight
        yield f"{prefix}.post_attention_layernorm.weight", layer.ffn_norm.weight
        yield f"{prefix}.self_attn.q_proj.weight", _half_split(queries, head_dim)
        yield f"{prefix}.self_attn.k_proj.weight", _half_split(keys, head_dim)
        yield f"{prefix}.self_attn.v_proj.weight", values.clone()
        yield f"{prefix}.self_attn.o_proj.weight", layer.attention.wo.weight
        if isinstance(ffn, FeedForward):
            gate, up = ffn.w13.weight.chunk(2)
            parts = (("gate_proj", gate), ("up_proj", up), ("down_proj", ffn.w2.weight))
            yield from ((f"{prefix}.mlp.{name}.weight", weight.clone()) for name, weight in parts)
            continue
        assert isinstance(ffn, MoE)
        yield f"{prefix}.block_sparse_moe.gate.weight", ffn.gate
        gates, ups = ffn.w13.chunk(2, dim=1)
        for e, (w1, w2, w3) in enumerate(zip(gates, ffn.w2, ups, strict=True)):
            for name, weight in (("w1", w1), ("w2", w2), ("w3", w3)):
                yield f"{prefix}.block_sparse_moe.experts.{e}.{name}.weight", weight.clone()


def _layers(model: Transformer) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


def _qkv(layer: Layer, config: ModelConfig) -> tuple[Tensor, ...]:
    sizes = [config.n_heads * config.head_dim, *2 * [config.n_kv_heads * config.head_dim]]
    return torch.split(layer.attention.wqkv.weight, sizes)


def _half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rotary pairs from neighbours to half a head apart, as Hugging Face lays them out."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


# ---------------------------------------------------------------------------------------------- GGUF


def write_gguf(model: Transformer, path: Path, tokenizer: Tokenizer | None, prompt_format: str = "instruct") -> None:
    """One file of llama.cpp's architecture `llama`, which is Mixtral's too: rotary pairs are neighbours as in Mistral's own layout, norms
    and router are float32. Without a tokenizer the file has no vocabulary. Raises SettingsRefused without the gguf package."""
    try:
        import gguf
    except ImportError:
        raise SettingsRefused("--format gguf needs the gguf package; install it with pip install 'mixtral-chat[peers]'") from None
    config = model.config
    file = gguf.GGUFWriter(path, "llama")
    file.add_name(path.stem)
    file.add_context_length(config.max_seq_len)
    file.add_embedding_length(config.dim)
    file.add_block_count(config.n_layers)
    file.add_feed_forward_length(config.hidden_dim)
    file.add_head_count(config.n_heads)
    file.add_head_count_kv(config.n_kv_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_theta)
    file.add_layer_norm_rms_eps(config.norm_eps)
    file.add_vocab_size(config.vocab_size)
    if config.is_moe:
        file.add_expert_count(config.n_experts)
        file.add_expert_used_count(config.experts_per_token)
    if tokenizer is None:
        file.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(file, tokenizer, config.vocab_size, chat_template(tokenizer, prompt_format, adds_blanks=True))
    kinds = gguf.GGMLQuantizationType
    raw = {torch.float32: kinds.F32, torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}
    for name, weight in _gguf_weights(model):
        is_exact = weight.ndim == 1 or "gate_inp" in name
        weight = (weight.float() if is_exact else weight).contiguous()
        numbers = weight.view(torch.int16).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()
        file.add_tensor(f"{name}.weight", np.ascontiguousarray(numbers), raw_dtype=raw[weight.dtype])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _add_vocabulary(file: Any, tokenizer: Tokenizer, vocab_size: int, template: str) -> None:
    """SentencePiece's pieces with scores and kinds; ids of the model beyond them are named but unused."""
    import gguf

    kinds = gguf.TokenType
    names: list[bytes] = []
    scores: list[float] = []
    types: list[int] = []
    for id in range(vocab_size):
        piece = tokenizer.vocabulary_piece(id) if id < tokenizer.vocab_size else None
        names.append(f"<unused_{id}>".encode() if piece is None else piece.text.encode())
        scores.append(0.0 if piece is None else piece.score)
        types.append(kinds.UNUSED if piece is None else kinds[piece.kind])
    file.add_tokenizer_model("llama")
    file.add_token_list(names)
    file.add_token_scores(scores)
    file.add_token_types(types)
    file.add_bos_token_id(tokenizer.bos_id)
    file.add_eos_token_id(tokenizer.eos_id)
    file.add_add_bos_token(True)
    file.add_add_space_prefix(True)
    file.add_chat_template(template)


def _gguf_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    yield "token_embd", model.embedding
    yield "output_norm", model.norm.weight
    yield "output", model.head.weight
    for i, layer in enumerate(_layers(model)):
        prefix, ffn = f"blk.{i}", layer.feed_forward
        yield f"{prefix}.attn_norm", layer.attention_norm.weight
        yield f"{prefix}.ffn_norm", layer.ffn_norm.weight
        for name, weight in zip(("attn_q", "attn_k", "attn_v"), _qkv(layer, model.config), strict=True):
            yield f"{prefix}.{name}", weight
        yield f"{prefix}.attn_output", layer.attention.wo.weight
        if isinstance(ffn, FeedForward):
            gate, up = ffn.w13.weight.chunk(2)
            parts = (("ffn_gate", gate), ("ffn_up", up), ("ffn_down", ffn.w2.weight))
        else:
            assert isinstance(ffn, MoE)
            gate, up = ffn.w13.chunk(2, dim=1)
            parts = (("ffn_gate_exps", gate), ("ffn_up_exps", up), ("ffn_down_exps", ffn.w2))
            yield f"{prefix}.ffn_gate_inp", ffn.gate
        yield from ((f"{prefix}.{name}", weight) for name, weight in parts)

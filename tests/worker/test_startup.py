"""A rank starts from whatever --ckpt_dir names."""

import subprocess
from pathlib import Path

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.tokenizer import Tokenizer
from support.torchrun import torchrun


def test_random_weights_answer_through_the_demos_tokenizer_even_with_more_ids_than_it_has() -> None:
    vocab_size = 2 * Tokenizer(DEMO_CKPT_DIR / "tokenizer.model").vocab_size
    spec = f"random:dim=64,n_layers=1,vocab_size={vocab_size},max_seq_len=128"
    arguments = ["--nproc_per_node", "1", "worker", "--ckpt_dir", spec, "--temperature", "2", "--top_p", "1", "--top_k", "0", "--seed", "1"]
    with torchrun(arguments, stdin=subprocess.PIPE) as worker:
        assert worker.process.stdin is not None
        assert worker.process.stdout is not None
        with worker.process.stdin as stdin:
            stdin.write(b"Tell me a story.")
        answer = worker.process.stdout.read()
        assert worker.wait() == 0, worker.rest_of_log()
    assert len(answer.decode().split()) > 20


def test_checkpoint_of_another_architecture_ends_the_worker_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with torchrun(["--nproc_per_node", "1", "worker", "--ckpt_dir", str(tmp_path)]) as worker:
        sentence = worker.log_line("mixtral-worker:")
        assert worker.wait() == 1
    assert "config.json does not describe a Mixtral, Mistral or Llama 2: model_type is 'qwen2'" in sentence

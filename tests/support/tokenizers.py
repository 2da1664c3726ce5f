"""The real vocabularies that tests use: Mistral's two of the Mixtrals, and the demo model's."""

from functools import cache
from importlib.resources import files
from pathlib import Path

from mixtral_worker.demo import DEMO_CKPT_DIR
from mixtral_worker.tokenizer import Tokenizer

MISTRAL_COMMON = Path(str(files("mistral_common") / "data"))
PATHS = {
    "v1": MISTRAL_COMMON / "tokenizer.model.v1",  # 8x7B
    "v3": MISTRAL_COMMON / "mistral_instruct_tokenizer_240323.model.v3",  # 8x22B
    "demo": DEMO_CKPT_DIR / "tokenizer.model",
}


@cache
def load(name: str) -> Tokenizer:
    return Tokenizer(PATHS[name])

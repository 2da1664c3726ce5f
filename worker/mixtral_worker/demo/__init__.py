"""The shipped small Mixtral: its checkpoint folder, and the code that made it."""

from pathlib import Path

DEMO_CKPT_DIR = Path(__file__).parent

"""How fast a worker's devices read their memory: measured on a CPU, from gpus.toml on cards."""

import time
import tomllib
from pathlib import Path

import torch

GPU_TABLE = Path(__file__).with_name("gpus.toml")
PROBE_BYTES, PROBES = 2**28, 3  # larger than most processors' own caches, and read in some 10 ms


def bytes_per_s(device: torch.device, ranks: int, hosts: int) -> float:
    """Of all ranks' devices together; 0 for a card that the table lacks. The ranks of one host share its memory."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        cards = tomllib.loads(GPU_TABLE.read_text(encoding="utf-8")).values()
        return ranks * next((card["bandwidth_tb_s"] * 1e12 for card in cards if name in card.get("names", ())), 0.0)
    numbers = torch.ones(PROBE_BYTES // 4)
    return hosts * PROBE_BYTES / min(_reading_s(numbers) for _ in range(PROBES))


def _reading_s(numbers: torch.Tensor) -> float:
    began_s = time.perf_counter()
    numbers.sum()
    return time.perf_counter() - began_s

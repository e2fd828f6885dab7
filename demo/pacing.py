"""Clock, log and learning-rate schedule of the training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

START = time.monotonic()


def log(message: str) -> None:
    print(f"[{time.monotonic() - START:6.1f}s] {message}", flush=True)


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def seconds_per_call(call: Callable[[], object], device: str, warmup: int = 3, repeats: int = 8) -> float:
    for _ in range(warmup):
        call()
    sync(device)
    start = time.monotonic()
    for _ in range(repeats):
        call()
    sync(device)
    return (time.monotonic() - start) / repeats

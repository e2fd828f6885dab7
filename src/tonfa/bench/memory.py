"""Memory of a model: what its weights hold, and the peak of a step on a GPU, with and without a recorded graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel


def allocated(device: torch.device) -> int:
    """Bytes of all tensors on a GPU; 0 on a CPU, which does not count them."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return int(torch.cuda.memory_allocated(device))


def tensor_gib(model: torch.nn.Module) -> float:
    """GiB of all tensors; of those that wrap others, as torchao's do, what they hold."""
    return sum(_nbytes(t) for t in model.state_dict().values()) / 2**30


def _nbytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.itemsize
    return sum(_nbytes(getattr(tensor, name)) for name in flatten()[0])


def step_memory(
    model: Any, inputs: Mapping[str, Any], weights_gib: float, graph: bool, device: torch.device
) -> dict[str, float]:
    """GiB: `weights` as given, with all that the backend keeps, and on a GPU the peak of a step.

    `peak` counts tensors at the highest moment of an eager step. `peak_graph`, where the model records its steps, is
    what the process holds reserved once that is done: weights, the graph's pool, and what the allocator cannot give
    back.
    """
    memory = {"weights": weights_gib}
    if device.type != "cuda":
        return memory
    ours = isinstance(model, SVDQFluxTransformer2DModel)
    if ours:
        model.set_cuda_graphs(False)
    model(**inputs)
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(**inputs)
    memory["peak"] = weights_gib + (torch.cuda.max_memory_allocated(device) - before) / 2**30
    if ours and graph:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        model.set_cuda_graphs(True)
        for _ in range(2):  # eager; recorded and replayed
            model(**inputs)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        memory["peak_graph"] = weights_gib + (torch.cuda.memory_reserved(device) - before) / 2**30
        model.set_cuda_graphs(True)  # frees the pool
    return memory


def described(memory: Mapping[str, float]) -> str:
    """For people."""
    return ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items()) + " GiB"

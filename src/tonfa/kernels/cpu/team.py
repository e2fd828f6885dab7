"""Running a kernel on torch's own OpenMP threads.

torch's libgomp threads spin for milliseconds after each torch op. A second pool (Numba's, or Python threads) has to
share the cores with them: splitting a 1.0 ms kernel over two Python threads gained nothing. GOMP_parallel from the
library that torch has loaded borrows the very same threads, in a few microseconds. Where torch uses no libgomp (macOS,
Windows), kernels run in the calling thread.

A kernel is a C function of one pointer to int64 words: word 0 counts the items that were claimed, word 1 is their
number, word 2 how many are claimed at once, the rest is the kernel's own (addresses and sizes). Items are claimed, not
dealt out, so that a core that others keep busy only does less.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from numba import cfunc, types
from torch import Tensor

FIRST = 3
"""Where a kernel's own arguments begin."""

WORDS = 24
"""Length of a kernel's arguments."""

_CHUNKS_PER_THREAD = 4
_ELEMENTS_PER_THREAD = 16384
_SIGNATURE = types.void(types.CPointer(types.int64))
_Words = ctypes.c_int64 * WORDS


@lru_cache(maxsize=1)
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def compile_kernel(function: Callable[[Any], None]) -> Any:
    """A C function of one argument pointer; its code is cached on disk if Numba finds a directory it may write to.

    Numba's cache sees changes of the kernel's own file only. The name, part of its key, says which sources were used.
    """
    function.__qualname__ += f"_{_sources_digest()}"
    try:
        return cfunc(_SIGNATURE, cache=True, error_model="numpy")(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        return cfunc(_SIGNATURE, error_model="numpy")(function)


@lru_cache(maxsize=1)
def _gomp_parallel() -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def launch(kernel: Any, items: int, elements: int, *arguments: Tensor | int) -> None:
    """Run `kernel` over `items` of `elements` each on up to `torch.get_num_threads()` threads, and wait.

    Tensors are passed as addresses: the caller answers for their shapes, dtypes, contiguity and lifetime. Work of less
    than 2 x 16384 elements stays in the calling thread, where it takes about as long as waking another one.
    """
    threads = min(torch.get_num_threads(), items, items * elements // _ELEMENTS_PER_THREAD)
    words = _Words(0, items, max(1, items // (max(threads, 1) * _CHUNKS_PER_THREAD)))
    for i, value in enumerate(arguments, FIRST):
        words[i] = value.data_ptr() if isinstance(value, Tensor) else value
    parallel = _gomp_parallel() if threads > 1 else None
    if parallel is None:
        kernel.ctypes(ctypes.cast(words, ctypes.POINTER(ctypes.c_int64)))
    else:
        parallel(kernel.address, words, threads, 0)

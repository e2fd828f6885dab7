"""What the tests of benchmarks share: a model of a few megabytes, a request for its step, rates of a GPU."""

from __future__ import annotations

import torch

from tonfa.bench.ceilings import Ceilings
from tonfa.bench.step import StepCase, StepRequest
from tonfa.bench.synthetic import DEMO
from tonfa.bench.variant import Variant, small

CPU = torch.device("cpu")
TINY = {**small(DEMO), "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28), "joint_attention_dim": 32}
VARIANT = Variant("int4", "int8", 32, graph=True)
H200 = Ceilings(bandwidth=4.28e12, bf16=782e12, fp8=1371e12, int8=763e12, attention=610e12)


def request(**changes: object) -> StepRequest:
    given = {
        "config": TINY,
        "cases": [StepCase(32, 48, 1, 8)],
        "variants": [VARIANT],
        "baselines": [],
        "explicit": True,
        "runs": 1,
        "seed": 0,
        "device": CPU,
    }
    return StepRequest(**{**given, **changes})

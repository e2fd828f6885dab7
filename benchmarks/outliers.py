"""Writes a pipeline whose transformer computes the same, but whose linears read inputs with massive channels.

    python benchmarks/outliers.py --model demo/model --out out/demo-outliers

`tonfa.evaluate.outliers` says how. Prints what the inputs of its linears look like before and after, on the inputs of
one picture: the largest channel's absolute maximum over the median channel's, and the kurtosis.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from tonfa.bench.synthetic import step_inputs
from tonfa.evaluate.layers import LayerInputs
from tonfa.evaluate.outliers import Outliers, kurtosis, peak_to_median, transplant_outliers
from tonfa.models.flux.plan import flux_dims, flux_plan

KINDS = {
    "attention and MLP inputs": ("to_qkv", "add_qkv_proj", "up"),
    "out-projections": ("to_out", "to_add_out"),
    "down-projections": ("down",),
}


@torch.no_grad()
def describe(transformer: Any) -> dict[str, tuple[float, float, float]]:
    """Median and largest peak-to-median ratio and median kurtosis of the inputs, by kind of linear."""
    collected = LayerInputs(flux_plan(flux_dims(dict(transformer.config))), calls=1)
    inputs = step_inputs(transformer.config, 256, 256, text_tokens=64, dtype=transformer.dtype)
    with collected.kept(transformer):
        transformer(**inputs)
    found = {}
    for kind, names in KINDS.items():
        rows = [torch.cat(x) for name, x in collected.rows.items() if name.rpartition(".")[2] in names]
        ratios = [peak_to_median(x) for x in rows]
        found[kind] = (statistics.median(ratios), max(ratios), statistics.median(kurtosis(x) for x in rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="folder of a FLUX pipeline")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(arguments.model / "transformer", dtype=torch.bfloat16)
    before = describe(transformer)
    transplant_outliers(transformer, Outliers(seed=arguments.seed))
    after = describe(transformer)
    shutil.copytree(arguments.model, arguments.out, ignore=shutil.ignore_patterns("transformer"))
    transformer.save_pretrained(arguments.out / "transformer")
    print(f"{'input':26s} {'peak to median':>20s} {'largest':>16s} {'kurtosis':>18s}")
    for kind, old in before.items():
        cells = [f"{a:8.1f} -> {b:6.1f}" for a, b in zip(old, after[kind], strict=True)]
        print(f"{kind:26s} " + " ".join(cells))
    print(arguments.out)


if __name__ == "__main__":
    main()

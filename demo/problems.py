"""Writes held-out scenes as problems for `tonfa evaluate`: depth maps, true masks, prompts, and colors by name.

    python demo/problems.py --count 64 --out out/problems
    tonfa evaluate demo/model --transformer out/demo/transformer-int4 --prompts out/problems/prompts.json

The scenes are those of `demo/evaluate.py`, the seeds too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from evaluate import color_names, make_problems
from scenes import COLORS
from tonfa.evaluate.problems import COLORS_FILE


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=256, help="scenes that teach the color names")
    parser.add_argument("--resolution", type=int, default=256)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    problems = make_problems(args.count, args.resolution)
    entries = []
    for i, prompt in enumerate(problems.prompts):
        names = {"control_image": f"depth-{i}.png", "mask": f"mask-{i}.png"}
        Image.fromarray(problems.control[i].numpy()).save(args.out / names["control_image"])
        Image.fromarray(problems.truth.mask[i].numpy()).save(args.out / names["mask"])
        colors = problems.scenes.color[i, : problems.scenes.count[i]].tolist()
        entries.append({"prompt": prompt, "seed": i, **names, "objects": [COLORS[color] for color in colors]})
    (args.out / "prompts.json").write_text(json.dumps(entries, indent=2) + "\n")
    table = color_names(args.resolution, scenes=args.calibration)
    features = [[round(x, 3) for x in row] for row in table.features.tolist()]
    content = {"names": list(table.names), "features": features, "labels": table.labels.tolist()}
    (args.out / COLORS_FILE).write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

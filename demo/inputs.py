"""Writes depth maps and prompts of four held-out scenes, the inputs of `make demo`.

python demo/inputs.py --out demo/inputs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from captions import full_captions
from render import control_image, render
from scenes import INPUTS_SEED, sample_scenes

CHOSEN = (2, 3, 6, 11)  # three objects each, none hidden; 3 and 11 hold a color-shape pair never trained on


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=256)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(INPUTS_SEED, max(CHOSEN) + 1, held_out="alternate")
    entries = []
    for k, index in enumerate(CHOSEN):
        one = scenes[index : index + 1]
        name = f"depth-{k}.png"
        depth = render(one, args.resolution, samples=1).depth
        Image.fromarray(control_image(depth)[0].numpy()).save(args.out / name)
        entries.append({"control_image": name, "prompt": full_captions(one)[0], "seed": k})
    (args.out / "prompts.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Writes what `tonfa quantize --calibrate default` uses: captions, and depth maps for control models.

python demo/calibration_set.py --out src/tonfa/data

The captions are sentences of a small grammar over `caption_lists.py`, eighteen kinds in turn, of 2 to 85 words;
the depth maps are those of random scenes of `scenes.py`, seen from their own angles. Both depend on nothing but seeds.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from caption_lists import (
    ABSTRACT,
    ANIMAL_DEEDS,
    ANIMALS,
    BUILDINGS,
    CAMERAS,
    DEEDS,
    DETAILS,
    FOOD,
    GROUNDS,
    LIGHTS,
    MACHINE_PLACES,
    MACHINES,
    MATERIALS,
    PALETTES,
    PEOPLE,
    PLACES,
    POSES,
    SOLIDS,
    STREETS,
    STYLES,
    SURFACES,
    THINGS,
    WONDERS,
    WORDS,
    WRITTEN_ON,
)
from render import control_image, render
from scenes import CALIBRATION_SEED, sample_scenes

CAPTIONS = 512
DEPTH_MAPS = 24
SIDE = 512
SEED = 20_417

Pick = Callable[[Sequence[str]], str]


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def portrait(pick: Pick) -> str:
    return f"portrait of {pick(PEOPLE)}, {pick(POSES)}, {pick(LIGHTS)}"


def activity(pick: Pick) -> str:
    return f"{pick(PEOPLE)} {pick(DEEDS)}, {pick(CAMERAS)}"


def animal(pick: Pick) -> str:
    return f"{pick(ANIMALS)} {pick(ANIMAL_DEEDS)}, {pick(LIGHTS)}"


def landscape(pick: Pick) -> str:
    return f"{pick(PLACES)}, {pick(LIGHTS)}, {pick(CAMERAS)}"


def building(pick: Pick) -> str:
    return f"{pick(BUILDINGS)}, {pick(CAMERAS)}, {pick(PALETTES)}"


def street(pick: Pick) -> str:
    return f"{pick(STREETS)} with {pick(PEOPLE)} in the foreground, {pick(LIGHTS)}"


def still_life(pick: Pick) -> str:
    first, second = pick(THINGS), pick(THINGS)
    pair = first if first == second else f"{first} next to {second}"
    return f"{pair} {pick(SURFACES)}, {pick(LIGHTS)}"


def food(pick: Pick) -> str:
    return f"{pick(FOOD)} {pick(SURFACES)}, {pick(CAMERAS)}"


def machine(pick: Pick) -> str:
    return f"{pick(MACHINES)} {pick(MACHINE_PLACES)}, {pick(PALETTES)}"


def written(pick: Pick) -> str:
    return f'{pick(WRITTEN_ON)} "{pick(WORDS)}", {pick(LIGHTS)}'


def abstract(pick: Pick) -> str:
    return f"{pick(ABSTRACT)} {pick(PALETTES)}, as {article(pick(STYLES))}"


def close_up(pick: Pick) -> str:
    return f"macro photograph of {pick(DETAILS)}, {pick(LIGHTS)}"


def wonder(pick: Pick) -> str:
    return f"{pick(WONDERS)}, {pick(STYLES)}, {pick(PALETTES)}"


def styled(pick: Pick) -> str:
    return f"{article(pick(STYLES))} of {pick(ANIMALS + MACHINES + PLACES)}"


def solids(pick: Pick) -> str:
    objects = [article(f"{pick(MATERIALS)} {pick(SOLIDS)}") for _ in range(int(pick("123")))]
    joined = objects[0] if len(objects) == 1 else f"{', '.join(objects[:-1])} and {objects[-1]}"
    return f"{joined} {pick(GROUNDS)}"


def remade(pick: Pick) -> str:
    thing = pick(THINGS + MACHINES)
    return f"{thing} made of {pick(MATERIALS)}, {pick(SURFACES)}, {pick(CAMERAS)}"


def short(pick: Pick) -> str:
    return pick(ANIMALS + MACHINES + FOOD + THINGS + WONDERS)


def long(pick: Pick) -> str:
    return (
        f"{pick(STREETS)}: {pick(PEOPLE)}, {pick(POSES)}, and next to them {pick(ANIMALS)}. In the background "
        f'{pick(BUILDINGS)}; above the door {pick(WRITTEN_ON)} "{pick(WORDS)}". {pick(LIGHTS)}, {pick(CAMERAS)}, '
        f"{article(pick(STYLES))} {pick(PALETTES)}, full of small details such as {pick(THINGS)} and {pick(DETAILS)}"
    )


KINDS = (
    portrait,
    activity,
    animal,
    landscape,
    building,
    street,
    still_life,
    food,
    machine,
    written,
    abstract,
    close_up,
    wonder,
    styled,
    solids,
    remade,
    short,
    long,
)


def calibration_captions(count: int = CAPTIONS) -> list[str]:
    """Distinct captions, every kind in turn. Of `random` only the floats are used, which no version changes."""
    generator = random.Random(SEED)

    def pick(choices: Sequence[str]) -> str:
        return choices[int(generator.random() * len(choices))]

    found: dict[str, None] = {}
    turn = 0
    while len(found) < count:
        text = KINDS[turn % len(KINDS)](pick)
        turn += 1
        found[text[0].upper() + text[1:]] = None
    return list(found)


def depth_maps(count: int = DEPTH_MAPS, side: int = SIDE) -> list[Image.Image]:
    """8-bit inverse depth, near is white."""
    scenes = sample_scenes(CALIBRATION_SEED, count)
    return [
        Image.fromarray(control_image(render(scenes[i : i + 1], side, samples=1).depth)[0].numpy())
        for i in range(count)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    (args.out / "depth").mkdir(parents=True, exist_ok=True)
    (args.out / "captions.txt").write_text("\n".join(calibration_captions()) + "\n", encoding="utf-8")
    for i, depth in enumerate(depth_maps()):
        depth.save(args.out / "depth" / f"{i:02d}.png", optimize=True)


if __name__ == "__main__":
    main()

"""Captions of scenes in a small fixed English, and the random choices that make them varied.

A caption is always true, and always says enough to tell which object has which color: by its shape where shapes differ,
else by order or place. Words such as material or light are sometimes left out, so short prompts work too.
"""

from __future__ import annotations

import numpy as np

from scenes import COLORS, FLOORS, MATERIALS, PATTERNS, SHAPES, SIDES, SIZES, TINTS, WALLS, Scenes

COUNTS = ("zero", "one", "two", "three", "four")
OPENINGS = ("", "", "", "a picture of ", "a 3d render of ", "a photo of ")
PLACES = {1: ("",), 2: ("on the left", "on the right"), 3: ("on the left", "in the center", "on the right")}


def captions(scenes: Scenes, seed: int) -> list[str]:
    """One caption per scene; `seed` picks the wording, so a second seed gives a second set of captions."""
    columns = {name: getattr(scenes, name).cpu().numpy() for name in vars(scenes)}
    rng = np.random.default_rng((seed, 77))
    draws = rng.random((len(scenes), 12))
    return [_caption({k: v[i] for k, v in columns.items()}, draws[i]) for i in range(len(scenes))]


def full_captions(scenes: Scenes) -> list[str]:
    """The wording that names everything, in order from left to right; used for evaluation."""
    columns = {name: getattr(scenes, name).cpu().numpy() for name in vars(scenes)}
    return [_caption({k: v[i] for k, v in columns.items()}, np.full(12, 0.5)) for i in range(len(scenes))]


def _caption(scene: dict[str, np.ndarray], u: np.ndarray) -> str:
    n = int(scene["count"])
    with_size, with_material, with_floor, with_light = u[0] < 0.75, u[1] < 0.75, u[2] < 0.8, u[3] < 0.7
    nouns = []
    for j in range(n):
        words = [SIZES[scene["size"][j]]] if with_size else []
        words.append(COLORS[scene["color"][j]])
        words += [MATERIALS[scene["material"][j]]] if with_material else []
        words.append(SHAPES[scene["shape"][j]])
        nouns.append(("an " if words[0] == "orange" else "a ") + " ".join(words))
    distinct = len(set(scene["shape"][:n].tolist())) == n

    opening = OPENINGS[int(u[4] * len(OPENINGS))] if u[4] != 0.5 else ""
    if n == 1:
        text = opening + nouns[0]
    elif u[5] < 0.3 and n <= 3:
        text = opening + _join([f"{noun} {place}" for noun, place in zip(nouns, PLACES[n], strict=True)])
    elif u[5] < 0.45 and distinct:
        order = np.random.default_rng(int(u[6] * 2**31)).permutation(n)
        text = opening + _join([nouns[j] for j in order])
    elif u[5] > 0.85 and n == 2:
        left, right = nouns
        text = opening + (f"{left} to the left of {right}" if u[6] < 0.5 else f"{right} to the right of {left}")
    elif u[5] > 0.75:
        text = f"{COUNTS[n]} objects from left to right: {_join(nouns)}"
    else:
        text = f"from left to right: {_join(nouns)}"

    floor_a, floor_b = (FLOORS[k] for k in scene["floor"])
    pattern = PATTERNS[scene["pattern"]]
    colors = floor_a if pattern == "plain" else f"{floor_a} and {floor_b}"
    if with_floor:
        text += f", on a {pattern} {colors} floor with a {WALLS[scene['wall']]} wall"
    if with_light:
        text += f", {TINTS[scene['tint']]} light from the {SIDES[scene['side']]}"
    if u[7] < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

"""Seeded random scenes: what stands where, in which color, seen from where.

A scene is a row of every tensor in `Scenes`. Scenes come in blocks of `BLOCK`, each from its own generator, so scene i
of a seed is the same whatever the number of scenes asked for. Combinations in `HELD_OUT` never occur unless forced.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

BLOCK = 256
MAX_OBJECTS = 4

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
MATERIALS = ("matte", "glossy", "metallic")
SIZES = ("small", "large")
PATTERNS = ("plain", "checkered", "striped")
FLOORS = ("white", "gray", "black", "brown", "beige")
WALLS = ("white", "gray", "beige", "navy", "mint", "rose")
TINTS = ("warm", "cool", "neutral")
SIDES = ("left", "right", "front")

# Color-shape pairs that no training scene contains; every shape has at least one.
HELD_OUT = (
    ("red", "torus"),
    ("cyan", "torus"),
    ("blue", "cone"),
    ("pink", "cone"),
    ("green", "sphere"),
    ("yellow", "cube"),
    ("white", "cube"),
    ("purple", "cylinder"),
)

# Radius of the footprint of a shape of size 1, by index in SHAPES.
FOOTPRINT = np.array([1.0, 1.14, 0.72, 0.9, 1.06])
SIZE_SCALE = np.array([0.46, 0.72])

TRAIN_SEED = 1
CALIBRATION_SEED = 1_001
EVALUATION_SEED = 2_002
INPUTS_SEED = 3_003


@dataclass
class Scenes:
    """B scenes; object slots at or beyond `count` are to be ignored. Objects are sorted from left to right."""

    count: torch.Tensor  # (B,) 1..4
    shape: torch.Tensor  # (B, 4) index in SHAPES
    color: torch.Tensor  # (B, 4) index in COLORS
    material: torch.Tensor  # (B, 4) index in MATERIALS
    size: torch.Tensor  # (B, 4) index in SIZES
    scale: torch.Tensor  # (B, 4) world units
    position: torch.Tensor  # (B, 4, 2) x to the right, y away from the camera
    yaw: torch.Tensor  # (B, 4)
    elevation: torch.Tensor  # (B,) of the camera, radians
    distance: torch.Tensor  # (B,) of the camera
    pattern: torch.Tensor  # (B,) index in PATTERNS
    floor: torch.Tensor  # (B, 2) indices in FLOORS; the second only matters for patterns
    floor_yaw: torch.Tensor  # (B,)
    wall: torch.Tensor  # (B,) index in WALLS
    wall_y: torch.Tensor  # (B,)
    tint: torch.Tensor  # (B,) index in TINTS
    side: torch.Tensor  # (B,) index in SIDES
    light: torch.Tensor  # (B, 3) unit vector towards the light

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice | torch.Tensor) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def sample_scenes(seed: int, count: int, *, held_out: str = "never") -> Scenes:
    """Scenes 0..count-1 of a seed. `held_out`: "never", or "alternate" to force such a pair into every odd scene."""
    if held_out not in ("never", "alternate"):
        raise ValueError(f"held_out is 'never' or 'alternate', not {held_out!r}")
    blocks = [_sample_block(seed, block, held_out) for block in range((count + BLOCK - 1) // BLOCK)]
    scenes = Scenes(**{f.name: torch.cat([getattr(b, f.name) for b in blocks]) for f in fields(Scenes)})
    return scenes[:count]


def has_held_out(scenes: Scenes) -> torch.Tensor:
    """(B, 4) which objects are a color-shape pair that training never saw."""
    pairs = torch.zeros(len(COLORS), len(SHAPES), dtype=torch.bool)
    for color, shape in HELD_OUT:
        pairs[COLORS.index(color), SHAPES.index(shape)] = True
    present = torch.arange(MAX_OBJECTS)[None] < scenes.count.cpu()[:, None]
    return pairs[scenes.color.cpu(), scenes.shape.cpu()] & present


def _sample_block(seed: int, block: int, held_out: str) -> Scenes:
    rng = np.random.default_rng((seed, block))
    n, m = BLOCK, MAX_OBJECTS
    count = rng.choice([1, 2, 3, 4], n, p=[0.15, 0.35, 0.35, 0.15])

    allowed = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES)) if (COLORS[c], SHAPES[s]) not in HELD_OUT]
    pair = np.array(allowed)[rng.integers(0, len(allowed), (n, m))]
    forced = np.array([(COLORS.index(c), SHAPES.index(s)) for c, s in HELD_OUT])[rng.integers(0, len(HELD_OUT), n)]
    slot = rng.integers(0, count)
    if held_out == "alternate":
        odd = np.arange(n) % 2 == 1
        pair[odd, slot[odd]] = forced[odd]
    color, shape = pair[..., 0], pair[..., 1]
    material = rng.integers(0, len(MATERIALS), (n, m))

    size, position, scale = _place(rng, count, shape)
    azimuth_center = np.array([np.pi, 0.0, -np.pi / 2])  # left, right, front (towards the camera)
    side = rng.integers(0, len(SIDES), n)
    azimuth = azimuth_center[side] + rng.uniform(-0.45, 0.45, n) + np.array([0.5, -0.5, 0.0])[side]
    height = rng.uniform(0.65, 1.1, n)
    light = np.stack([np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)], -1)

    floor_a = rng.integers(0, len(FLOORS), n)
    floor_b = (floor_a + rng.integers(1, len(FLOORS), n)) % len(FLOORS)
    values = {
        "count": count,
        "shape": shape,
        "color": color,
        "material": material,
        "size": size,
        "scale": scale,
        "position": position,
        "yaw": rng.uniform(0, 2 * np.pi, (n, m)),
        "elevation": rng.uniform(0.28, 0.68, n),
        "distance": rng.uniform(5.5, 6.8, n),
        "pattern": rng.integers(0, len(PATTERNS), n),
        "floor": np.stack([floor_a, floor_b], -1),
        "floor_yaw": rng.uniform(0, np.pi, n),
        "wall": rng.integers(0, len(WALLS), n),
        "wall_y": rng.uniform(2.4, 4.0, n),
        "tint": rng.integers(0, len(TINTS), n),
        "side": side,
        "light": light,
    }
    return Scenes(
        **{k: torch.from_numpy(v.astype(np.float32 if v.dtype.kind == "f" else np.int64)) for k, v in values.items()}
    )


def _place(rng: np.random.Generator, count: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes and non-overlapping positions, x ascending with gaps so that "left" and "right" are never in doubt.

    The best of 64 candidates is taken where none is free of overlap with the sizes drawn, and all objects become small.
    """
    n, m, tries, width = len(count), MAX_OBJECTS, 64, 1.6
    size = rng.integers(0, 2, (n, m))
    jitter = rng.uniform(0.94, 1.06, (n, m))
    present = np.arange(m)[None] < count[:, None]
    gap = np.array([0.0, 0.9, 0.8, 0.7])[count - 1]
    u = np.where(present[:, None], rng.uniform(0, 1, (n, tries, m)), 2.0)
    u = np.where(present[:, None], np.sort(u, -1), 0.0)
    x = -width + gap[:, None, None] * np.arange(m) + u * (2 * width - gap * (count - 1))[:, None, None]
    y = rng.uniform(-1.3, 1.3, (n, tries, m))
    dist = np.hypot(x[..., :, None] - x[..., None, :], y[..., :, None] - y[..., None, :])
    ignore = ~(present[:, :, None] & present[:, None, :]) | np.eye(m, dtype=bool)[None]

    def margin(sizes: np.ndarray) -> np.ndarray:
        foot = SIZE_SCALE[sizes] * jitter * FOOTPRINT[shape]
        free = dist - (foot[:, :, None] + foot[:, None, :])[:, None] - 0.08
        return np.where(ignore[:, None], np.inf, free).min((-1, -2))  # (n, tries)

    first = margin(size)
    none_fits = ~(first > 0).any(1)
    size[none_fits] = 0
    best = np.where(none_fits, margin(size).argmax(1), (first > 0).argmax(1))
    rows = np.arange(n)
    return size, np.stack([x[rows, best], y[rows, best]], -1), SIZE_SCALE[size] * jitter

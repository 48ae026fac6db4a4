"""A clip that needs no data: moving textured shapes over a panned landscape of noise."""

import numpy as np
from jaxtyping import Float

# Fractions of black, base and light that the shapes and the ground are painted with, in [0, 1].
_PALETTE = np.array(
    [
        [0.90, 0.33, 0.20],
        [0.96, 0.72, 0.22],
        [0.16, 0.52, 0.60],
        [0.44, 0.24, 0.50],
        [0.93, 0.88, 0.78],
        [0.22, 0.58, 0.32],
        [0.85, 0.42, 0.55],
    ]
)
_GROUND = np.array([[0.07, 0.11, 0.17], [0.15, 0.29, 0.33], [0.40, 0.50, 0.38], [0.86, 0.76, 0.56]])
_LIGHT = np.array([-0.45, -0.60, 0.66])


def procedural_clip(
    frames: int = 49, height: int = 96, width: int = 144, *, seed: int = 0
) -> Float[np.ndarray, "1 t h w 3"]:
    """Draws moving discs and rectangles, textured and anti-aliased, under a panning camera.

    Equal arguments give equal clips. The motion suits 8 frames per second. A larger size shows the
    same scene in finer detail.

    **Arguments:**

    - `frames`, `height`, `width`: size of the clip, in frames and pixels.
    - `seed`: a number that changes the scene.

    **Returns:** the clip, (1, frames, height, width, 3), float32 in [-1, 1].

    **Raises:** `ValueError` for a size below 1.
    """
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    rng = np.random.default_rng(seed)
    lattices = rng.random((6, 64, 64))
    shapes = [_shape(rng, i, 6, width / height) for i in range(6)]
    heading = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width] / height
    clip = np.empty((1, frames, height, width, 3), np.float32)
    for t in range(frames):
        pan = np.array([np.cos(heading), np.sin(heading)]) * 0.012 * t
        image = _ground(lattices, x + pan[0], y + pan[1] + 0.02 * np.sin(0.12 * t), height)
        for shape in shapes:
            image = _paint(image, shape, x, y, t, height)
        clip[0, t] = 2 * np.clip(image, 0, 1) - 1
    return clip


def _noise(lattice: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth periodic value noise in [0, 1], one lattice cell to the unit."""
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - x0, y - y0
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    n = len(lattice)
    x0, x1, y0, y1 = x0 % n, (x0 + 1) % n, y0 % n, (y0 + 1) % n
    above = lattice[y0, x0] * (1 - u) + lattice[y0, x1] * u
    below = lattice[y1, x0] * (1 - u) + lattice[y1, x1] * u
    return above * (1 - v) + below * v


def _ground(lattices: np.ndarray, x: np.ndarray, y: np.ndarray, height: int) -> np.ndarray:
    """Hills of fractal noise, lit from one side; octaves finer than two pixels are left out."""

    def hills(x, y):
        total = np.zeros_like(x)
        for octave, lattice in enumerate(lattices):
            cells = 2.5 * 2**octave
            if cells < height / 2:
                total += 0.54**octave * _noise(lattice, cells * x, cells * y)
        return 0.46 * total

    step = 1.5 / height
    level = hills(x, y)
    slope = (level - hills(x + step, y + step)) / step
    position = np.clip(3.4 * level - 0.2, 0, len(_GROUND) - 1)
    color = np.stack(
        [np.interp(position, np.arange(len(_GROUND)), channel) for channel in _GROUND.T], axis=-1
    )
    return color * (0.92 + 0.16 * np.tanh(slope))[..., None]


def _shape(rng: np.random.Generator, index: int, count: int, aspect: float) -> dict:
    """One shape's constants; lengths in frame heights, speeds per frame. Later ones are nearer."""
    depth = (index + 1) / count
    return {
        "disc": index % 2 == 0,
        "radius": 0.08 + 0.13 * depth * rng.uniform(0.8, 1.15),
        "center": np.array([rng.uniform(0.1, aspect - 0.1), rng.uniform(0.15, 0.85)]),
        "velocity": rng.uniform(-1, 1, 2) * 0.02 * depth + np.array([0.004, 0]),
        "sway": rng.uniform(0.02, 0.07),
        "phase": rng.uniform(0, 2 * np.pi),
        "spin": rng.uniform(0.03, 0.09) * rng.choice([-1, 1]),
        "ratio": rng.uniform(0.55, 0.9),
        "stripes": rng.uniform(4.0, 7.0),
        "checker": index % 3 == 1,
        "colors": _PALETTE[rng.choice(len(_PALETTE), 2, replace=False)],
        "aspect": aspect,
    }


def _place(shape: dict, t: int) -> np.ndarray:
    """Returns the shape's centre at frame t: it drifts, sways, and bounces off the edges."""
    limits = np.array([shape["aspect"], 1.0])
    swing = np.array([np.cos(0.15 * t + shape["phase"]), np.sin(0.21 * t + shape["phase"])])
    at = (shape["center"] + shape["velocity"] * t) / limits
    return limits * np.abs((at + 1) % 2 - 1) + shape["sway"] * swing


def _paint(
    image: np.ndarray, shape: dict, x: np.ndarray, y: np.ndarray, t: int, height: int
) -> np.ndarray:
    """The image with the shape's soft shadow, then the shape, laid over it."""
    cx, cy = _place(shape, t)
    offset = 0.25 * shape["radius"]
    shadow = _distance(shape, *_turned(shape, x - cx - offset, y - cy - offset, t))
    image = image * (1 - 0.45 * np.clip(0.5 - shadow / (0.35 * shape["radius"]), 0, 1))[..., None]
    u, v = _turned(shape, x - cx, y - cy, t)
    cover = np.clip(0.5 - _distance(shape, u, v) * height, 0, 1)[..., None]
    return image * (1 - cover) + cover * _texture(shape, u, v, t, height)


def _turned(shape: dict, x: np.ndarray, y: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
    angle = shape["phase"] + shape["spin"] * t
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def _distance(shape: dict, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside."""
    r = shape["radius"]
    if shape["disc"]:
        return np.hypot(u, v) - r
    corner = 0.18 * r
    du, dv = np.abs(u) - r + corner, np.abs(v) - shape["ratio"] * r + corner
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return outside + np.minimum(np.maximum(du, dv), 0) - corner


def _texture(shape: dict, u: np.ndarray, v: np.ndarray, t: int, height: int) -> np.ndarray:
    """Stripes or a checker in two colours, with fine grain, shaded as a ball or a bevelled slab."""
    r = shape["radius"]
    waves = 2 * np.pi * shape["stripes"] / (2 * r)
    edge = height / waves  # slope that takes one pixel from one colour to the other
    pattern = np.clip(np.sin(waves * u) * edge, -1, 1)
    if shape["checker"]:
        pattern = pattern * np.clip(np.sin(waves * v) * edge, -1, 1)
    first, second = shape["colors"]
    mix = (0.5 + 0.5 * pattern)[..., None]
    color = mix * first + (1 - mix) * second
    fine = min(4 * waves, 0.8 * np.pi * height / 2)
    color = color * (1 + 0.07 * np.sin(fine * (u + 0.6 * v)) * np.sin(fine * v))[..., None]
    if not shape["disc"]:
        inside = -_distance(shape, u, v) / (0.22 * r)
        return color * (0.72 + 0.33 * np.clip(inside, 0, 1))[..., None]
    angle = shape["phase"] + shape["spin"] * t
    x, y = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
    z = np.sqrt(np.clip(1 - (x * x + y * y) / (r * r), 0, 1))
    light = np.clip(_LIGHT[0] * x / r + _LIGHT[1] * y / r + _LIGHT[2] * z, 0, 1)[..., None]
    return color * (0.35 + 0.75 * light) + 0.5 * light**24


__all__ = ["procedural_clip"]

"""Procedural backgrounds. A pattern's textures are made once a size and kept, since a scene has two milliseconds."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vila2.world.chance import stable_hash

# What a colour may look like behind things: soft or deep, so that pictures stand out.
TONES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((196, 88, 84), (224, 140, 132)),
    "orange": ((236, 176, 110), (224, 150, 84)),
    "yellow": ((246, 230, 150), (238, 214, 116)),
    "green": ((146, 196, 140), (96, 150, 104)),
    "blue": ((140, 182, 226), (84, 124, 184)),
    "purple": ((176, 152, 210), (128, 100, 168)),
    "pink": ((244, 190, 206), (232, 164, 188)),
    "brown": ((176, 142, 112), (140, 106, 80)),
    "white": ((244, 244, 240), (236, 238, 242)),
    "gray": ((172, 174, 178), (128, 132, 138)),
}
PATTERNS = ("plain", "gradient", "striped", "checked", "dotted", "grainy")
# phrase -> colours above and below a horizon
SCENERY: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "a green field": ((168, 208, 240), (122, 178, 96)),
    "a sandy beach": ((150, 206, 232), (236, 214, 160)),
    "a snowy field": ((190, 206, 226), (242, 246, 250)),
    "a gray road": ((186, 200, 214), (116, 118, 124)),
    "a night sky": ((30, 36, 76), (44, 52, 84)),
}
VARIANTS = 4

Image = NDArray[np.uint8]


def background(pattern: str, color: str, variant: int, shift: float, size: int) -> Image:
    """(size, size, 3), to be copied before it is drawn on. `shift` in 0..1 moves the texture sideways."""
    texture = _texture(pattern, color, variant, size)
    return np.roll(texture, int(shift * size), axis=1)


@lru_cache(maxsize=320)  # all of them: 16 MB at 128 pixels
def _texture(pattern: str, color: str, variant: int, size: int) -> Image:
    rng = np.random.Generator(np.random.PCG64(stable_hash("background", pattern, color, variant)))
    if pattern == "scenery":
        return _scenery(color, rng, size)
    tones = TONES[color]
    first = np.array(tones[variant % 2], np.float64) + rng.uniform(-8, 8, 3)
    second = first * rng.choice([0.84, 0.88]) if first.mean() > 110 else first * 1.22
    weight = _WEIGHTS[pattern](rng, size)  # (size, size): 0 is the first colour, 1 the second
    mixed = first + weight[..., None] * (second - first)
    return _to_bytes(mixed)


def _plain(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    return np.full((size, size), rng.uniform(0, 0.3))


def _gradient(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    y = np.linspace(0, 1.6, size)[:, None]
    return np.broadcast_to(y if rng.random() < 0.5 else y[::-1], (size, size))


def _striped(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    x, y = _grid(size)
    count = rng.integers(5, 9)
    along = (x, y, x + y)[int(rng.integers(3))]
    return _soft_step(np.sin(2 * np.pi * count * along), size)


def _checked(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    x, y = _grid(size)
    count = rng.integers(3, 6)
    return _soft_step(np.sin(2 * np.pi * count * x) * np.sin(2 * np.pi * count * y), size)


def _dotted(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    x, y = _grid(size)
    count = rng.integers(6, 10)
    radius = np.hypot((x * count) % 1 - 0.5, (y * count) % 1 - 0.5)
    return np.clip((0.3 - radius) * size / count + 0.5, 0, 1) * 1.3


def _grainy(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    coarse = rng.random((32, 32))
    index = np.arange(size) * 32 // size
    return coarse[np.ix_(index, index)] * 1.1


_WEIGHTS: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "plain": _plain,
    "gradient": _gradient,
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
    "grainy": _grainy,
}


def _scenery(phrase: str, rng: np.random.Generator, size: int) -> Image:
    above, below = (np.array(tone, np.float64) + rng.uniform(-6, 6, 3) for tone in SCENERY[phrase])
    x, y = _grid(size)
    horizon = rng.uniform(0.5, 0.66) + 0.02 * np.sin(2 * np.pi * x * rng.integers(1, 4))
    ground = np.clip((y - horizon) * size + 0.5, 0, 1)[..., None]
    sky = above + (y[..., None] - 0.3) * 40
    speckle = rng.random((48, 48))[np.ix_(*[np.arange(size) * 48 // size] * 2)][..., None]
    image = sky * (1 - ground) + (below + (speckle - 0.5) * 22) * ground
    if phrase == "a night sky":
        image = np.where((speckle > 0.985) & (ground < 0.5), 225.0, image)
    return _to_bytes(image)


def _grid(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    at = (np.arange(size) + 0.5) / size
    return np.meshgrid(at, at)


def _soft_step(wave: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    return np.clip(wave * size / 24 + 0.5, 0, 1)


def _to_bytes(image: NDArray[np.float64]) -> Image:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)

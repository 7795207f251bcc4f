"""The embedded data set `scenes`: things found on a walk, drawn by code.

    from data import scenes
    scenes.draw("train", 7)         # a picture
    scenes.label("train", 7)        # the class of its main object

Each picture shows one main object, which gives the label, and smaller objects of other classes beside it on
a textured ground. A random crop therefore often shows something else than the label says; and because every
pixel is drawn, the true class of every crop is known (`crop_truth`).

Everything is a pure function of (split, index): a counter-based generator is keyed by them, so that any
picture can be drawn alone, in any order and by any thread. An object is painted from signed fields, positive
inside a shape and about as large as the distance to its edge in units of the object's size: coverage of
pixels, shadow and class map all follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.floating]  # float32 all through, which NumPy's stubs cannot follow
Field = Floats  # [h, w], positive inside a shape, about the distance to its edge
ClassMap = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

SIZES = {"train": 2400, "val": 600}
GROUND = 255  # in a class map: no object here
MIN_SHARE = 0.04  # a crop of which objects cover less than this shows no class

# How a picture is composed; lengths are relative to its shorter side.
SHORT_SIDE = (80, 112)  # pixels
MAX_ASPECT = 1.7
MAIN_RADIUS = (0.27, 0.37)
OTHER_RADIUS = (0.6, 0.9)  # relative to the main object's
OTHERS = (4, 7)  # how many
TILT = 0.5  # radians to either side

_DOMAINS = {"train": 1, "val": 4}
_LABEL, _PLAN, _GROUND, _OBJECT = range(
    4
)  # what a stream of random numbers is for; the object's number is added to the last one


def _stream(split: str, index: int, purpose: int) -> np.random.Generator:
    if not 0 <= index < SIZES[split]:
        raise IndexError(f"scenes has {SIZES[split]} pictures in {split!r}, there is no {index}")
    return np.random.Generator(np.random.Philox(key=[_DOMAINS[split], index], counter=[0, 0, 0, purpose]))


# --- Shapes: signed fields over local coordinates ----------------------------------------------------------


def _ramp(x: Field) -> Field:
    """x kept within 0..1; several times as fast as np.clip on arrays as small as these."""
    return np.minimum(np.maximum(x, 0), 1)


def _ellipse(u: Field, v: Field, x: float, y: float, a: float, b: float, angle: float = 0.0) -> Field:
    cos, sin = math.cos(angle), math.sin(angle)
    du, dv = u - x, v - y
    from_middle: Field = np.hypot((cos * du + sin * dv) / a, (cos * dv - sin * du) / b)
    return min(a, b) * (1 - from_middle)


def _stroke(u: Field, v: Field, x0: float, y0: float, x1: float, y1: float, width: float) -> Field:
    """A straight stroke with round ends."""
    dx, dy = x1 - x0, y1 - y0
    along = _ramp(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy))
    from_middle: Field = np.hypot(u - x0 - along * dx, v - y0 - along * dy)
    return width / 2 - from_middle


def _noise(rng: np.random.Generator, shape: tuple[int, ...], cell_y: float, cell_x: float) -> Floats:
    """Smooth noise in about 0..1: random values `cell` pixels apart, bicubic between them."""
    height, width = shape
    coarse = rng.random((int(height / cell_y) + 2, int(width / cell_x) + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


class _Sprite:
    """One object in the making: a colour layer that grows fill by fill.

    u, v: local coordinates [h, w], to the right and down, in units of the object's nominal radius;
    scale: that radius in pixels.
    """

    def __init__(self, u: Field, v: Field, scale: float, rng: np.random.Generator):
        self.u, self.v, self.scale, self.rng = u, v, scale, rng
        self.rgb = np.zeros((3, *u.shape), np.float32)  # multiplied by alpha
        self.alpha = np.zeros(u.shape, np.float32)

    def fill(self, inside: Field, colour: Floats, rim: float = 0.35) -> None:
        """Lay a shape over what is there, darker towards its rim as if it were round."""
        cover = _ramp(inside * self.scale + 0.5)
        self.alpha += cover * (1 - self.alpha)
        shade = 1 - rim * (1 - _ramp(inside / 0.3)) ** 2
        self.rgb += cover * (colour[:, None, None] * shade - self.rgb)

    def mark(self, inside: Field, colour: Floats, strength: float = 1.0, soft: float = 0.0) -> None:
        """Colour a shape where the object already is, so its outline stays; `soft`: width of the edge."""
        cover = _ramp(inside / max(soft, 1 / self.scale) + 0.5) * strength
        self.rgb += cover * (colour[:, None, None] * self.alpha - self.rgb)

    def gloss(self, x: float, y: float, a: float, b: float, angle: float) -> None:
        """A soft highlight."""
        self.mark(_ellipse(self.u, self.v, x, y, a, b, angle), _WHITE, 0.6, soft=1.2 * min(a, b))

    def pick(self, *colours: Colour) -> Floats:
        """One of the colours, slightly varied; mostly the first, which is the typical one."""
        colour: Floats = np.array(colours[int(len(colours) * self.rng.random() ** 30)], np.float32)
        colour = colour * self.rng.uniform(0.88, 1.1) + self.rng.normal(0, 8, 3).astype(np.float32)
        return np.clip(colour, 8, 250)

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))


# --- The classes: each painter fills about the disc of radius 1 --------------------------------------------

_WHITE = np.array((255, 255, 255), np.float32)
_DARK = np.array((38, 30, 28), np.float32)
_CREAM = np.array((240, 232, 212), np.float32)


def _apple(s: _Sprite) -> None:
    s.fill(_stroke(s.u, s.v, 0, -0.5, s.uniform(-0.25, 0.25), -1.0, 0.13), s.pick((96, 68, 40)))
    lobe, width = s.uniform(0.2, 0.3), s.uniform(0.58, 0.68)
    body = np.maximum(
        _ellipse(s.u, s.v, -lobe, 0.1, width, 0.78, 0.12), _ellipse(s.u, s.v, lobe, 0.1, width, 0.78, -0.12)
    )
    skin = s.pick((196, 40, 40), (120, 168, 52), (226, 186, 64), (214, 96, 52))
    s.fill(body, skin)
    s.mark(
        _ellipse(s.u, s.v, s.uniform(-0.6, 0.6), 0.3, 0.5, 0.6),
        s.pick((204, 60, 40), (230, 190, 80)),
        0.6,
        soft=0.5,
    )
    s.mark(_ellipse(s.u, s.v, 0, -0.52, 0.26, 0.1), skin * 0.55, soft=0.1)
    s.gloss(-0.38, -0.22, 0.14, 0.24, 0.4)
    if s.rng.random() < 0.6:
        s.fill(_ellipse(s.u, s.v, 0.36, -0.86, 0.32, 0.13, -0.4), s.pick((88, 140, 50)))


def _butterfly(s: _Sprite) -> None:
    wing = s.pick((80, 130, 220), (232, 140, 40), (240, 226, 120), (236, 232, 224), (190, 60, 50))
    border, spot = s.pick((44, 34, 34), (110, 70, 40)), s.pick((250, 240, 210), (240, 160, 50), (60, 40, 40))
    side, reach = np.abs(s.u), s.uniform(0.9, 1.05)  # both sides alike
    lower = _ellipse(side, s.v, 0.44, 0.42, 0.4, s.uniform(0.42, 0.52), 0.5)
    upper = _ellipse(side, s.v, 0.56 * reach, -0.3, 0.66, 0.42, -0.6)
    for part, x, y in ((lower, 0.48, 0.5), (upper, 0.72, -0.42)):
        s.fill(part, border, 0.0)
        s.mark(part - s.uniform(0.07, 0.14), wing)
        s.mark(_ellipse(side, s.v, x, y, 0.13, 0.13), spot)
    s.fill(_stroke(side, s.v, 0.02, -0.4, 0.26, -0.95, 0.05), _DARK)
    s.fill(_ellipse(s.u, s.v, 0, 0, 0.11, 0.6), _DARK)


def _egg(s: _Sprite) -> None:
    shell = s.pick((240, 234, 222), (222, 190, 150), (176, 208, 214), (190, 130, 90), (214, 214, 170))
    body = _ellipse(s.u / (1 + s.uniform(0.12, 0.28) * s.v), s.v, 0, 0, s.uniform(0.66, 0.76), 0.92)
    s.fill(body, shell, 0.45)
    if s.rng.random() < 0.6:  # speckles
        speckle = _noise(s.rng, s.u.shape, s.scale * 0.11, s.scale * 0.11)
        s.mark((speckle - s.uniform(0.68, 0.8)) * 0.5, s.pick((96, 70, 52), (70, 80, 90)), 0.8)
    s.gloss(-0.22, -0.32, 0.2, 0.3, 0.3)


def _feather(s: _Sprite) -> None:
    vane = s.pick((150, 156, 166), (236, 234, 228), (84, 110, 160), (134, 96, 64), (84, 124, 92))
    u = s.u + s.uniform(-0.3, 0.3) * (s.v**2 - 0.4)  # bent
    along = _ramp((1.15 - s.v) / 2.2)  # 0 at the quill, 1 at the tip
    width = s.uniform(0.36, 0.46) * np.sqrt(_ramp(np.sin(np.pi * _ramp(along * 1.15 - 0.15))))
    barbs = np.sin((s.v + np.abs(u) * 1.1) * s.uniform(14, 20))
    s.fill(np.float32(0.9) * (width - np.abs(u) - 0.05 * (barbs > 0.85)), vane, 0.25)
    s.mark(barbs * 0.05 - 0.01, vane * 0.7, 0.6)
    if s.rng.random() < 0.5:  # a dark or bright tip
        s.mark(-s.v - s.uniform(0.2, 0.6), s.pick((40, 40, 46), (240, 236, 226)), 0.75, soft=0.2)
    s.fill(_stroke(u, s.v, 0, 1.2, 0, -0.85, 0.075), s.pick((236, 226, 200)), 0.1)


def _flower(s: _Sprite) -> None:
    petals = int(s.rng.integers(5, 10))
    petal = s.pick((214, 84, 160), (240, 236, 232), (232, 200, 60), (120, 96, 200), (214, 60, 50))
    angle, radius = np.arctan2(s.v, s.u), np.hypot(s.u, s.v)
    ripple = np.abs(np.cos(angle * (petals / 2))) ** s.uniform(0.5, 0.9)
    s.fill(s.uniform(0.42, 0.55) * (1 - ripple) + 0.96 * ripple - radius, petal, 0.3)
    s.mark(0.05 - (1 - ripple) * radius, petal * 0.7, 0.7)
    heart = s.uniform(0.22, 0.34)
    s.fill(heart - radius, s.pick((236, 190, 50), (110, 70, 36), (226, 220, 120)))
    s.mark(0.5 * heart - radius, _DARK, 0.25, soft=0.1)


def _ladybird(s: _Sprite) -> None:
    shell = s.pick((244, 186, 44), (206, 44, 36), (226, 120, 40), (150, 40, 30))
    side = np.abs(s.u)
    for y in (-0.4, 0.05, 0.5):  # legs
        s.fill(_stroke(side, s.v, 0.5, y, 0.95, y + 0.35 * y - 0.05, 0.1), _DARK)
    s.fill(_ellipse(s.u, s.v, 0, -0.7, 0.4, 0.28), _DARK)
    s.mark(_ellipse(side, s.v, 0.24, -0.72, 0.09, 0.09), _CREAM)
    s.fill(_ellipse(s.u, s.v, 0, 0.12, 0.76, s.uniform(0.74, 0.86)), shell, 0.45)
    s.mark(0.035 - side, _DARK)
    size = s.uniform(0.11, 0.19)
    for x, y in ((0.34, -0.22), (0.48, 0.22), (0.24, 0.56))[: s.rng.integers(2, 4)]:
        s.mark(_ellipse(side, s.v, x, y, size, size), _DARK)
    s.gloss(-0.34, -0.3, 0.12, 0.2, 0.6)


def _leaf(s: _Sprite) -> None:
    blade = s.pick((88, 142, 52), (120, 160, 60), (214, 170, 50), (196, 84, 40), (140, 92, 50), (168, 48, 44))
    u = s.u + s.uniform(-0.25, 0.25) * s.v**2
    bulge, teeth = s.uniform(0.45, 0.75), s.uniform(0.0, 0.07)
    veins = np.sin((s.v + np.abs(u) * 0.9) * s.uniform(12, 17))
    # Where two discs overlap: pointed at both ends.
    radius = (1 + bulge**2) / (2 * bulge)
    s.fill(_stroke(u, s.v, 0, 0.8, 0, 1.25, 0.1), blade * 0.7)
    s.fill(radius - np.hypot(np.abs(u) + (radius - bulge), s.v) - teeth * np.abs(veins), blade, 0.25)
    s.mark((veins - 0.82) * 0.15, blade * 0.72, 0.8)
    s.mark(0.04 - np.abs(u), s.pick((226, 214, 150), (90, 66, 40)), 0.8)


def _mushroom(s: _Sprite) -> None:
    cap = s.pick((150, 96, 58), (196, 44, 36), (226, 200, 160), (214, 130, 60), (110, 84, 70))
    stem = s.uniform(0.2, 0.32)
    bend = s.u + s.uniform(-0.2, 0.2) * s.v
    s.fill(
        np.minimum(stem + 0.08 * s.v - np.abs(bend), np.minimum(s.v + 0.2, 0.95 - s.v)),
        s.pick((236, 226, 204)),
    )
    brim = s.uniform(-0.02, 0.15)
    s.fill(_ellipse(s.u, s.v, 0, brim, 0.9, 0.17), s.pick((214, 190, 160)), 0.5)  # the gills below the cap
    dome = _ellipse(s.u, s.v, 0, brim, 0.96, s.uniform(0.8, 1.0))
    s.fill(np.minimum(dome, brim + 0.03 - s.v), cap, 0.4)
    if s.rng.random() < 0.6:
        for x, y in ((-0.5, -0.2), (0.02, -0.5), (0.5, -0.28), (-0.1, -0.12), (0.28, -0.06)):
            x, y, r = x + s.uniform(-0.08, 0.08), y + s.uniform(-0.06, 0.06) + brim, s.uniform(0.07, 0.13)
            s.mark(_ellipse(s.u, s.v, x, y, r, r * 0.85), _CREAM)


def _snail(s: _Sprite) -> None:
    skin = s.pick((190, 160, 110), (120, 104, 84), (210, 190, 150))
    shell = s.pick((226, 196, 110), (176, 116, 60), (120, 76, 50), (206, 150, 140))
    for x in (-0.98, -0.72):
        s.fill(_stroke(s.u, s.v, -0.75, 0.4, x, 0.0, 0.08), skin)
    s.fill(_stroke(s.u, s.v, -0.78, 0.42, -0.66, 0.7, 0.34), skin)
    s.fill(_stroke(s.u, s.v, -0.66, 0.74, 0.9, 0.8, 0.24), skin)
    du, dv = s.u - 0.12, s.v + 0.04
    radius = np.hypot(du, dv)
    s.fill(0.74 - radius, shell, 0.4)
    # A spiral: the angle it has turned grows with the logarithm of the radius.
    turn = np.arctan2(dv, du) + s.uniform(6, 8) * np.log(radius + 0.08)
    s.mark((np.sin(turn) - 0.45) * 0.25 * (0.2 + radius), shell * 0.5, 0.85)


def _starfish(s: _Sprite) -> None:
    skin = s.pick((236, 124, 40), (196, 60, 50), (150, 90, 150), (214, 170, 110), (90, 120, 160))
    angle, radius = np.arctan2(s.u, -s.v), np.hypot(s.u, s.v)
    # From the nearest arm's middle line, 0, to half way to the next, 1.
    apart = np.abs(np.mod(angle * (5 / (2 * np.pi)) + 0.5, 1) - 0.5) * 2
    waist = s.uniform(0.42, 0.52)
    edge = waist + (1.08 - waist) * (1 - apart) ** s.uniform(1.5, 2.1)
    s.fill(0.7 * (edge - radius), skin, 0.4)
    bumps = np.sin(radius * 17) * np.cos(apart * 4.5)
    s.mark((bumps - 0.55) * 0.1, np.minimum(skin * 1.35 + 20, 255), 0.8)
    s.mark(0.03 - apart * radius, skin * 0.7, 0.5)


# Each with the size that makes the areas about equal, so that the larger object also covers more pixels.
_PAINTERS: dict[str, tuple[Callable[[_Sprite], None], float]] = {
    "apple": (_apple, 0.93),
    "butterfly": (_butterfly, 0.86),
    "egg": (_egg, 1.0),
    "feather": (_feather, 1.3),
    "flower": (_flower, 1.0),
    "ladybird": (_ladybird, 0.94),
    "leaf": (_leaf, 1.14),
    "mushroom": (_mushroom, 1.0),
    "snail": (_snail, 0.95),
    "starfish": (_starfish, 1.12),
}
CLASS_NAMES: tuple[str, ...] = tuple(_PAINTERS)


# --- The ground --------------------------------------------------------------------------------------------


def _paint_ground(rng: np.random.Generator, height: int, width: int) -> Floats:
    """A ground without objects, float32 [3, H, W] in about 0..255."""
    kind = rng.choice(["grass", "sand", "soil", "stone", "wood", "cloth"])
    # Dark and light colour; height and width of the noise's cells in pixels; contrast of the finest grain.
    dark, light, down, across, grain = {
        "grass": ((84, 98, 66), (132, 144, 98), 9, 2.2, 0.3),
        "sand": ((182, 166, 138), (212, 198, 170), 5, 14, 0.2),
        "soil": ((76, 64, 56), (122, 106, 92), 6, 6, 0.45),
        "stone": ((122, 122, 124), (178, 174, 168), 8, 8, 0.3),
        "wood": ((122, 98, 78), (166, 140, 112), 2.5, 45, 0.12),
        "cloth": ((196, 190, 182), (216, 210, 202), 2, 2, 0.1),
    }[kind]
    shape = height, width
    mix = 0.5 * _noise(rng, shape, down, across) + 0.5 * _noise(rng, shape, down * 3, across * 3)
    mix = mix + grain * (rng.random(shape, dtype=np.float32) - 0.5)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    if kind == "wood":  # planks
        plank = np.floor((y + rng.uniform(0, 30)) / rng.uniform(18, 34))
        mix += 0.3 * np.sin(plank * 12.9) - 0.8 * (np.diff(plank, axis=0, append=plank[-1:]) > 0)
    if kind == "stone":  # slabs
        slab, down, across = rng.uniform(34, 60), rng.uniform(0, 30), rng.uniform(0, 30)
        mix -= 0.7 * (np.minimum((y + down) % slab, (x + across) % slab) < 1.6)
    colours = np.array((dark, light), np.float32) + rng.normal(0, 5, 3).astype(np.float32)
    rgb: Floats = colours[0, :, None, None] + (colours[1] - colours[0])[:, None, None] * mix
    if kind == "cloth":  # checks
        step = rng.uniform(9, 16)
        checks = ((y // step) % 2 + (x // step) % 2) / 2
        dye = np.array([(176, 120, 116), (118, 132, 160), (124, 144, 124)][rng.integers(3)], np.float32)
        rgb += 0.6 * checks * (dye[:, None, None] - rgb)
    return rgb


# --- Pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Thing:
    kind: int  # class
    x: float
    y: float
    radius: float
    tilt: float
    mirrored: bool


@dataclass(frozen=True)
class _Scene:
    height: int
    width: int
    things: list[_Thing]  # from the back to the front: the main object is the last


def _plan(split: str, index: int) -> _Scene:
    rng = _stream(split, index, _PLAN)
    short = int(rng.integers(SHORT_SIDE[0], SHORT_SIDE[1] + 1))
    long = round(short * rng.uniform(1, MAX_ASPECT))
    height, width = (short, long) if rng.random() < 0.5 else (long, short)

    def thing(kind: int, x: float, y: float, radius: float) -> _Thing:
        return _Thing(kind, x, y, radius, rng.uniform(-TILT, TILT), bool(rng.random() < 0.5))

    radius = rng.uniform(*MAIN_RADIUS) * short
    play = 0.45 * short - radius  # keeps the main object within the centre crop, or nearly
    main = thing(
        label(split, index),
        width / 2 + rng.uniform(-play, play),
        height / 2 + rng.uniform(-play, play),
        radius,
    )
    others: list[_Thing] = []
    kinds = rng.permutation(np.delete(np.arange(len(CLASS_NAMES)), main.kind))
    for kind in kinds[: rng.integers(OTHERS[0], OTHERS[1] + 1)]:
        radius = main.radius * rng.uniform(*OTHER_RADIUS)
        # The roomiest of a few places.
        tries = rng.random((8, 2)) * (width, height)
        room = np.min([np.hypot(*(tries - (o.x, o.y)).T) - o.radius for o in (*others, main)], axis=0)
        x, y = tries[np.argmax(room)].tolist()
        others.append(thing(int(kind), x, y, radius))
    return _Scene(height, width, [*others, main])


def _paint_thing(thing: _Thing, rng: np.random.Generator, rgb: Floats | None, classes: ClassMap) -> None:
    """Paint one object over the picture so far: into its class map, and into its colours where wanted."""
    paint, size = _PAINTERS[CLASS_NAMES[thing.kind]]
    scale = thing.radius * size
    height, width = classes.shape
    reach = 1.3 * scale + 4  # with its shadow
    top, left = max(int(thing.y - reach), 0), max(int(thing.x - reach), 0)
    bottom, right = min(int(thing.y + reach) + 1, height), min(int(thing.x + reach) + 1, width)
    dy = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - thing.y) / scale)[:, None]
    dx = ((np.arange(left, right, dtype=np.float32) + 0.5 - thing.x) / scale)[None, :]
    cos, sin = math.cos(thing.tilt), math.sin(thing.tilt)
    u = cos * dx + sin * dy
    sprite = _Sprite(-u if thing.mirrored else u, cos * dy - sin * dx, scale, rng)
    paint(sprite)
    classes[top:bottom, left:right][sprite.alpha >= 0.5] = thing.kind
    if rgb is None:
        return
    shadow = np.zeros_like(sprite.alpha)
    for step in (1, 2, 3, 4):  # light from the upper left
        shadow[step:, step:] += sprite.alpha[:-step, :-step]
    light = 1 - 0.16 * (dx + dy)
    rgb[:, top:bottom, left:right] *= (1 - 0.13 * shadow) * (1 - sprite.alpha)
    rgb[:, top:bottom, left:right] += sprite.rgb * light


def _paint(split: str, index: int, coloured: bool) -> tuple[Floats | None, ClassMap]:
    scene = _plan(split, index)
    classes = np.full((scene.height, scene.width), GROUND, np.uint8)
    rng = _stream(split, index, _GROUND)
    rgb = _paint_ground(rng, scene.height, scene.width) if coloured else None
    for number, thing in enumerate(scene.things):
        _paint_thing(thing, _stream(split, index, _OBJECT + number), rgb, classes)
    if rgb is not None:  # the light of the day
        rgb *= rng.uniform(0.8, 1.1) * (1 + rng.normal(0, 0.03, (3, 1, 1)).astype(np.float32))
    return rgb, classes


def label(split: str, index: int) -> int:
    """The class of the picture's main object. Each block of ten pictures shows each class once."""
    block = _stream(split, index - index % len(CLASS_NAMES), _LABEL).permutation(len(CLASS_NAMES))
    return int(block[index % len(CLASS_NAMES)])


def draw(split: str, index: int) -> Image.Image:
    """The picture, RGB: its shorter side within SHORT_SIDE, the longer up to MAX_ASPECT times as long."""
    rgb, _ = _paint(split, index, coloured=True)
    assert rgb is not None
    return Image.fromarray(np.ascontiguousarray(np.clip(rgb, 0, 255).astype(np.uint8).transpose(1, 2, 0)))


@lru_cache(maxsize=sum(SIZES.values()))
def class_map(split: str, index: int) -> ClassMap:
    """The class seen at each pixel of the drawn picture, uint8 [H, W], or GROUND.

    An object is seen where it covers at least half of the pixel, and hides objects behind it. Read-only, as the same
    array is returned again.
    """
    _, classes = _paint(split, index, coloured=False)
    classes.flags.writeable = False
    return classes


def crop_truth(split: str, indices: npt.ArrayLike, boxes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """What crops show: the class with the most pixels in each box, int64 [n].

    It is -1 if objects cover less than MIN_SHARE of the box. indices: int [n]; boxes: int [n, 4]
    (top, left, height, width), inside the picture, in its pixels.
    """
    truth = []
    rows = zip(np.asarray(indices).tolist(), np.asarray(boxes).tolist(), strict=True)
    for index, (top, left, height, width) in rows:
        seen = class_map(split, index)[top : top + height, left : left + width]
        counts = np.bincount(seen.ravel(), minlength=GROUND)[: len(CLASS_NAMES)]
        truth.append(counts.argmax() if counts.sum() >= MIN_SHARE * height * width else -1)
    return np.array(truth, np.int64)

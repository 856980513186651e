"""Pictures whose content is known: coloured shapes over a floor, and the corridor of SpatialTunnel.

A scene is plain data (sizes and positions in pixels of the picture, depths in units of the nearest
depth); drawing it uses no randomness, so one scene gives one picture. Shapes stand on a floor or
float above it; a shadow on the floor, straight below, tells the true depth. Corridor geometry: "Why
Far Looks Up" (arXiv 2605.30161), section on SpatialTunnel and its appendix C.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 210, 40),
    "purple": (120, 45, 165),
    "pink": (250, 145, 190),
}
CORRIDOR_COLORS = {
    "red": (205, 30, 35),
    "green": (40, 165, 55),
    "blue": (40, 65, 210),
    "yellow": (235, 215, 45),
    "cyan": (45, 205, 215),
    "magenta": (215, 40, 200),
    "black": (25, 25, 28),
}
SHAPES = ("circle", "square", "triangle", "cross")
CORRIDOR_SHAPES = ("sphere", "cube")

SIDE = 336  # pixels of the shorter side
UNIT_RADIUS = 0.08  # radius of an object of size 1 at depth 1, as a fraction of the shorter side
NEAR, FAR = 1.0, 2.0  # depths of floor scenes
NEAR_BASE = 0.95  # height in the picture where the floor is at depth NEAR
FOCAL = 1.014  # corridor: focal length / picture width
END = 7.0  # corridor: depth of the open end in metres


@dataclass(frozen=True)
class Thing:
    """One object: centre (x, y), radius r (half its extent) and shadow height `base` in pixels,
    depth z, intrinsic size."""

    color: str
    shape: str
    x: float
    y: float
    r: float
    z: float
    size: float
    base: float
    rgb: tuple
    theta: float = 0.0  # corridor: angle around the cross-section, counter-clockwise from +x

    @property
    def name(self):
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    kind: str  # "floor" or "corridor"
    width: int
    height: int
    things: tuple
    look: dict = field(default_factory=dict)  # colours and horizon of the background


def corridor_point(x, y, z, width, height):
    """Pinhole projection of metres to pixels: u = W/2 + F x/z, v = H/2 - F y/z with F = 1.014 W."""
    return width / 2 + FOCAL * width * x / z, height / 2 - FOCAL * width * y / z


def wall_point(theta, size):
    """Where an object of half size `size` touches the wall of the 2 m x 2 m corridor at angle
    theta: a square path of half side 1 - size."""
    reach = (1 - size) / max(abs(math.cos(theta)), abs(math.sin(theta)))
    return reach * math.cos(theta), reach * math.sin(theta)


def _hull(points):
    """Convex hull, counter-clockwise (monotone chain)."""
    points = sorted(set(points))
    chains = []
    for order in (points, points[::-1]):
        chain = []
        for p in order:
            while len(chain) > 1 and (chain[-1][0] - chain[-2][0]) * (p[1] - chain[-2][1]) <= (
                chain[-1][1] - chain[-2][1]
            ) * (p[0] - chain[-2][0]):
                chain.pop()
            chain.append(p)
        chains += chain[:-1]
    return chains


def _cube_corners(thing, scene):
    x, y = wall_point(thing.theta, thing.size)
    s = thing.size
    return {
        (i, j, k): corridor_point(x + i * s, y + j * s, thing.z + k * s, scene.width, scene.height)
        for i in (-1, 1)
        for j in (-1, 1)
        for k in (-1, 1)
    }


def outline(thing, scene):
    """Polygon of the object in pixels, [(x, y), ...]."""
    x, y, r = thing.x, thing.y, thing.r
    if thing.shape in ("circle", "sphere"):
        return [
            (x + r * math.cos(a), y + r * math.sin(a))
            for a in np.linspace(0, 2 * math.pi, 36, endpoint=False).tolist()
        ]
    if thing.shape == "square":
        h = 0.87 * r
        return [(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)]
    if thing.shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if thing.shape == "cross":
        w = 0.34 * r
        return [
            (x - w, y - r),
            (x + w, y - r),
            (x + w, y - w),
            (x + r, y - w),
            (x + r, y + w),
            (x + w, y + w),
            (x + w, y + r),
            (x - w, y + r),
            (x - w, y + w),
            (x - r, y + w),
            (x - r, y - w),
            (x - w, y - w),
        ]
    return _hull(list(_cube_corners(thing, scene).values()))


# --- sampling -------------------------------------------------------------------------------------


def _floor_y(z, horizon):
    """Height in the picture (fraction, from the top) of the floor at depth z."""
    return horizon + (NEAR_BASE - horizon) * NEAR / z


def _height(rng, z, r, horizon, standing_share):
    """Centre height (fraction from the top): on the floor, or floating at a height that depth does
    not influence."""
    if rng.random() < standing_share:
        return _floor_y(z, horizon) - r
    return rng.uniform(r, _floor_y(FAR, horizon) - r)


@functools.lru_cache
def standing_share(height_depth_correlation):
    """Share of objects that stand on the floor so that corr(height in the picture, depth) has the
    wanted value; 0 -> none stands."""
    import random

    def correlation(share):
        rng, rows = random.Random(0), []
        for _ in range(4000):
            z, size, horizon = rng.uniform(NEAR, FAR), rng.uniform(1, 2), rng.uniform(0.2, 0.3)
            rows.append((z, -_height(rng, z, UNIT_RADIUS * size / z, horizon, share)))
        return np.corrcoef(np.array(rows).T)[0, 1]

    if not 0 <= height_depth_correlation <= correlation(1.0):
        raise ValueError(
            f"height-depth correlation {height_depth_correlation}: possible are 0 to"
            f" {correlation(1.0):.2f} (every object stands on the floor)"
        )
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if correlation(middle) < height_depth_correlation else (low, middle)
        )
    return 0.0 if height_depth_correlation == 0 else (low + high) / 2


def _names(rng, count, colors, shapes, distinct):
    """`count` different (colour, shape) pairs; colours all different if `distinct`."""
    while True:
        chosen = [(rng.choice(list(colors)), rng.choice(shapes)) for _ in range(count)]
        if len(set(chosen)) == count and (not distinct or len({c for c, _ in chosen}) == count):
            return chosen


def _tint(rng, rgb):
    return tuple(max(0, min(255, value + rng.randint(-10, 10))) for value in rgb)


def floor_scene(rng, count, height_depth_correlation=0.8, square=None):
    """A scene of `count` shapes over a floor. rng: random.Random. square: None = four of five
    pictures are square."""
    aspect = (
        rng.choices([(1, 1), (1.25, 1), (1, 1.25)], weights=[8, 1, 1])[0]
        if square is None
        else (1, 1)
        if square
        else rng.choice([(1.25, 1), (1, 1.25)])
    )
    width, height = round(SIDE * aspect[0]), round(SIDE * aspect[1])
    share = standing_share(height_depth_correlation)
    while True:
        horizon = rng.uniform(0.2, 0.3)
        names, things = _names(rng, count, COLORS, SHAPES, distinct=rng.random() < 0.9), []
        for color, shape in names:
            for _ in range(30):
                z, size = rng.uniform(NEAR, FAR), rng.uniform(1, 2)
                r = UNIT_RADIUS * size / z * SIDE
                x = rng.uniform(r, width - r)
                y = _height(rng, z, r / height, horizon, share) * height
                base = _floor_y(z, horizon) * height
                clear = all(math.hypot(o.x - x, o.y - y) > 1.05 * (o.r + r) for o in things)
                # a shadow that another object hides tells nothing
                clear = (
                    clear
                    and all(math.hypot(o.x - x, o.y - base) > o.r for o in things)
                    and all(math.hypot(o.x - x, o.base - y) > r for o in things)
                )
                if clear:
                    things.append(
                        Thing(color, shape, x, y, r, z, size, base, _tint(rng, COLORS[color]))
                    )
                    break
        if len(things) == count:
            grey, hue = rng.randint(105, 160), rng.randint(-12, 12)
            look = {
                "horizon": horizon * height,
                "sky": (
                    tuple(rng.randint(165, 200) for _ in range(3)),
                    tuple(rng.randint(200, 235) for _ in range(3)),
                ),
                "floor": (grey + hue, grey, grey - hue),
                "tiles": rng.randint(4, 9),
            }
            return Scene("floor", width, height, tuple(things), look)


def corridor_scene(rng, thetas=None, depths=None, sizes=None):
    """Two objects on the walls of a corridor; the first is always the farther one. Angles in
    radians, depths and sizes in metres."""
    while True:
        far_theta, near_theta = thetas or (rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi))
        far_z, near_z = depths or (rng.uniform(3.4, 5.2), rng.uniform(2.25, 2.9))
        far_size, near_size = sizes or (0.2 * rng.uniform(1, 1.5), 0.1 * rng.uniform(1, 1.5))
        names = _names(rng, 2, CORRIDOR_COLORS, CORRIDOR_SHAPES, distinct=False)
        things = []
        for (color, shape), theta, z, size in zip(
            names, (far_theta, near_theta), (far_z, near_z), (far_size, near_size), strict=True
        ):
            x, y = corridor_point(*wall_point(theta, size), z, SIDE, SIDE)
            things.append(
                Thing(
                    color,
                    shape,
                    x,
                    y,
                    FOCAL * SIDE * size / z,
                    z,
                    size,
                    y,
                    _tint(rng, CORRIDOR_COLORS[color]),
                    theta,
                )
            )
        far, near = things
        shade = rng.randint(150, 205)
        scene = Scene(
            "corridor",
            SIDE,
            SIDE,
            (far, near),
            {
                "wall": (shade, shade - rng.randint(0, 12), shade - rng.randint(0, 20)),
                "sky": (rng.randint(200, 225), 225, 240),
            },
        )
        hidden = instance_map(scene)
        alone = instance_map(Scene("corridor", SIDE, SIDE, (far,)))
        if (hidden == 1).sum() >= 0.6 * (alone == 1).sum() or thetas:
            return scene


# --- drawing --------------------------------------------------------------------------------------


def _shade(rgb, factor):
    return tuple(max(0, min(255, round(value * factor))) for value in rgb)


def _draw_floor(scene, k):
    """Sky, tiled floor in perspective, shadows. k: supersampling."""
    width, height, horizon = scene.width * k, scene.height * k, scene.look["horizon"] * k
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    top, low = scene.look["sky"]
    for i in range(8):
        draw.rectangle(
            [0, horizon * i / 8, width, horizon * (i + 1) / 8],
            fill=tuple(round(a + (b - a) * i / 7) for a, b in zip(top, low, strict=True)),
        )
    draw.rectangle([0, horizon, width, height], fill=scene.look["floor"])
    line = _shade(scene.look["floor"], 0.9)
    for i in range(-scene.look["tiles"] * 2, scene.look["tiles"] * 3):
        draw.line(
            [
                (width / 2 + (i / scene.look["tiles"] - 0.5) * width * 0.05, horizon),
                (width * i / scene.look["tiles"], height),
            ],
            fill=line,
            width=k,
        )
    for z in np.arange(NEAR, 12, 1.5 / scene.look["tiles"]):
        y = _floor_y(z, scene.look["horizon"] / scene.height) * height
        draw.line([(0, y), (width, y)], fill=line, width=k)
    for thing in scene.things:
        rx, ry = thing.r * k, thing.r * 0.3 * k
        draw.ellipse(
            [thing.x * k - rx, thing.base * k - ry, thing.x * k + rx, thing.base * k + ry],
            fill=_shade(scene.look["floor"], 0.55),
        )
    return picture


def _draw_corridor(scene, k):
    """Four walls with frames every metre, an open end that shows the sky, contact shadows on the
    touched wall."""
    width, height = scene.width * k, scene.height * k
    picture = Image.new("RGB", (width, height), scene.look["sky"])
    draw = ImageDraw.Draw(picture)

    def box(z):
        return [
            corridor_point(x, y, z, width, height) for x, y in ((-1, 1), (1, 1), (1, -1), (-1, -1))
        ]

    frames = [2.0, *np.arange(3, END + 0.5).tolist()]
    for near, far in zip(frames, frames[1:], strict=False):
        a, b = box(near), box(far)
        for side, light in enumerate((0.86, 0.93, 1.0, 0.8)):  # ceiling, right, floor, left
            draw.polygon(
                [a[side], a[(side + 1) % 4], b[(side + 1) % 4], b[side]],
                fill=_shade(scene.look["wall"], light * (1.05 - 0.045 * far)),
            )
        draw.polygon(b, outline=(70, 70, 70))
    for a, b in zip(box(2.0), box(END), strict=True):
        draw.line([a, b], fill=(70, 70, 70), width=k)
    for thing in scene.things:
        x, y = wall_point(thing.theta, thing.size)
        across = abs(x) > abs(y)  # on the left or right wall
        foot = (math.copysign(1, x), y) if across else (x, math.copysign(1, y))
        s = 1.1 * thing.size
        corners = [
            (
                (foot[0], foot[1] + i * s, thing.z + j * s)
                if across
                else (foot[0] + i * s, foot[1], thing.z + j * s)
            )
            for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        draw.polygon(
            [corridor_point(px, py, pz, width, height) for px, py, pz in corners],
            fill=_shade(scene.look["wall"], 0.55),
        )
    return picture


def _draw_thing(picture, thing, scene, k):
    draw = ImageDraw.Draw(picture)
    if thing.shape == "sphere":
        rows, cols = (
            np.mgrid[0 : 2 * k * thing.r : 1.0, 0 : 2 * k * thing.r : 1.0] / (k * thing.r) - 1
        )
        inside = rows**2 + cols**2 <= 1
        light = 0.45 + 0.55 * np.clip(
            (np.sqrt(np.clip(1 - rows**2 - cols**2, 0, 1)) - 0.5 * cols - 0.6 * rows) / 1.27, 0, 1
        )
        pixels = np.clip(
            np.array(thing.rgb) * light[..., None] + 40 * (light[..., None] > 0.97), 0, 255
        ).astype(np.uint8)
        corner = (round((thing.x - thing.r) * k), round((thing.y - thing.r) * k))
        picture.paste(
            Image.fromarray(pixels), corner, Image.fromarray((inside * 255).astype(np.uint8))
        )
    elif thing.shape == "cube":
        corners = {key: (x * k, y * k) for key, (x, y) in _cube_corners(thing, scene).items()}
        x, y = wall_point(thing.theta, thing.size)
        sides = [
            (((-1 if x > 0 else 1), j, m) for j, m in ((-1, -1), (1, -1), (1, 1), (-1, 1))),
            ((i, (-1 if y > 0 else 1), m) for i, m in ((-1, -1), (1, -1), (1, 1), (-1, 1))),
        ]
        for side, light, seen in zip(
            sides, (0.75, 0.6), (abs(x) > thing.size, abs(y) > thing.size), strict=True
        ):
            if seen:  # the faces turned towards the axis
                draw.polygon([corners[c] for c in side], fill=_shade(thing.rgb, light))
        draw.polygon(
            [corners[i, j, -1] for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))], fill=thing.rgb
        )
    else:
        draw.polygon([(x * k, y * k) for x, y in outline(thing, scene)], fill=thing.rgb)


def render(scene):
    """The picture, PIL RGB of (scene.width, scene.height), drawn at twice the size and averaged."""
    k = 2
    picture = _draw_floor(scene, k) if scene.kind == "floor" else _draw_corridor(scene, k)
    for thing in sorted(scene.things, key=lambda thing: -thing.z):
        _draw_thing(picture, thing, scene, k)
    return picture.reduce(k)


def instance_map(scene):
    """(height, width) uint8: 0 where no object is seen, i + 1 on thing i. Nearer objects hide
    farther ones."""
    picture = Image.new("L", (scene.width, scene.height))
    draw = ImageDraw.Draw(picture)
    for i, thing in sorted(enumerate(scene.things), key=lambda pair: -pair[1].z):
        draw.polygon(outline(thing, scene), fill=i + 1)
    return np.asarray(picture)

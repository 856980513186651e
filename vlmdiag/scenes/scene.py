"""Pictures whose content is known: coloured shapes over a floor, and the corridor of SpatialTunnel.

A scene is plain data (sizes and positions in pixels of the picture, depths in units of the nearest
depth); drawing it uses no randomness, so one scene gives one picture. Shapes stand on a floor or
float above it; a shadow on the floor, straight below, shows the true depth. Corridor geometry: "Why
Far Looks Up" (arXiv 2605.30161), section on SpatialTunnel and its appendix C.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import UInt8

RGB = tuple[int, ...]
Point = tuple[float, float]

COLORS: dict[str, RGB] = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 210, 40),
    "purple": (120, 45, 165),
    "pink": (250, 145, 190),
}
CORRIDOR_COLORS: dict[str, RGB] = {
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
NEAR = 1.0  # nearest depth of floor scenes
FAR = 2.0  # farthest depth of floor scenes
NEAR_BASE = 0.95  # height in the picture where the floor is at depth NEAR
FOCAL = 1.014  # corridor: focal length / picture width
END = 7.0  # corridor: depth of the open end in metres
SUPERSAMPLING = 2  # pictures are drawn at this many times their size and averaged
LEAST_SEEN = 0.6  # corridor: share of the far object that the near one may not hide
# signs of the corners of a square, in the order in which its polygon is drawn
CORNERS = ((-1, -1), (1, -1), (1, 1), (-1, 1))


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
    rgb: RGB
    theta: float = 0.0  # corridor: angle around the cross-section, counter-clockwise from +x

    @property
    def name(self) -> str:
        """'<colour> <shape>', by which questions and lists call it."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Of a corridor's two things the first is the farther one."""

    kind: str  # "floor" or "corridor"
    width: int
    height: int
    things: tuple[Thing, ...]
    look: Record = field(default_factory=dict)  # colours and horizon of the background


def only(scene: Scene, thing: Thing) -> Scene:
    """The scene with one of its things and no background: what would be seen of it alone."""
    return Scene(scene.kind, scene.width, scene.height, (thing,))


# --- geometry -------------------------------------------------------------------------------------


def corridor_point(x: float, y: float, z: float, width: int, height: int) -> Point:
    """Pinhole projection of metres to pixels: u = W/2 + F x/z, v = H/2 - F y/z with F = 1.014 W."""
    return width / 2 + FOCAL * width * x / z, height / 2 - FOCAL * width * y / z


def wall_point(theta: float, size: float) -> Point:
    """Where an object of half size `size` touches the wall of the 2 m x 2 m corridor at angle
    theta: a square path of half side 1 - size."""
    reach = (1 - size) / max(abs(math.cos(theta)), abs(math.sin(theta)))
    return reach * math.cos(theta), reach * math.sin(theta)


def _turns_right(a: Point, b: Point, c: Point) -> bool:
    """Whether the way a -> b -> c turns right or goes straight on, by the cross product."""
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


def _hull(points: Sequence[Point]) -> list[Point]:
    """Convex hull, counter-clockwise (monotone chain)."""
    ordered = sorted(set(points))
    hull: list[Point] = []
    for order in (ordered, ordered[::-1]):
        chain: list[Point] = []
        for point in order:
            while len(chain) > 1 and _turns_right(chain[-2], chain[-1], point):
                chain.pop()
            chain.append(point)
        hull += chain[:-1]
    return hull


def _cube_corners(thing: Thing, scene: Scene) -> dict[tuple[int, int, int], Point]:
    """Pixels of a cube's corners by their signs along x, y and z."""
    x, y = wall_point(thing.theta, thing.size)
    s = thing.size
    return {
        (i, j, k): corridor_point(x + i * s, y + j * s, thing.z + k * s, scene.width, scene.height)
        for i, j, k in itertools.product((-1, 1), repeat=3)
    }


def outline(thing: Thing, scene: Scene) -> list[Point]:
    """Polygon of the object in pixels, [(x, y), ...]."""
    x = thing.x
    y = thing.y
    r = thing.r
    if thing.shape in ("circle", "sphere"):
        angles: list[float] = np.linspace(0, 2 * math.pi, 36, endpoint=False).tolist()
        return [(x + r * math.cos(angle), y + r * math.sin(angle)) for angle in angles]
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


def _floor_y(z: float, horizon: float) -> float:
    """Height in the picture (fraction, from the top) of the floor at depth z."""
    return horizon + (NEAR_BASE - horizon) * NEAR / z


def _height(rng: random.Random, z: float, r: float, horizon: float, standing_share: float) -> float:
    """Centre height (fraction from the top): on the floor, or floating at a height that depth does
    not influence."""
    if rng.random() < standing_share:
        return _floor_y(z, horizon) - r
    return rng.uniform(r, _floor_y(FAR, horizon) - r)


def _correlation_at(share: float) -> float:
    """corr(height in the picture, depth) of 4000 objects, of which this share stands."""
    rng = random.Random(0)
    places = []
    for _ in range(4000):
        z = rng.uniform(NEAR, FAR)
        size = rng.uniform(1, 2)
        horizon = rng.uniform(0.2, 0.3)
        places.append((z, -_height(rng, z, UNIT_RADIUS * size / z, horizon, share)))
    return float(np.corrcoef(np.array(places).T)[0, 1])


@functools.lru_cache
def standing_share(height_depth_correlation: float) -> float:
    """Share of objects that stand on the floor so that corr(height in the picture, depth) has the
    wanted value; 0: none stands. ValueError for a value that no share gives."""
    most = _correlation_at(1.0)
    if not 0 <= height_depth_correlation <= most:
        raise ValueError(
            f"height-depth correlation {height_depth_correlation}: possible are 0 to {most:.2f}"
            " (every object stands on the floor)"
        )
    low = 0.0
    high = 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if _correlation_at(middle) < height_depth_correlation:
            low = middle
        else:
            high = middle
    return 0.0 if height_depth_correlation == 0 else (low + high) / 2


def _names(
    rng: random.Random, count: int, colors: Collection[str], shapes: Sequence[str], distinct: bool
) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs; colours all different if `distinct`."""
    while True:
        names = [(rng.choice(list(colors)), rng.choice(shapes)) for _ in range(count)]
        colors_drawn = {color for color, _ in names}
        if len(set(names)) == count and (not distinct or len(colors_drawn) == count):
            return names


def _tint(rng: random.Random, rgb: RGB) -> RGB:
    return tuple(max(0, min(255, value + rng.randint(-10, 10))) for value in rgb)


def _aspect(rng: random.Random, square: bool | None) -> Point:
    """(width, height) in units of the shorter side."""
    if square is None:
        return rng.choices([(1, 1), (1.25, 1), (1, 1.25)], weights=[8, 1, 1])[0]
    return (1, 1) if square else rng.choice([(1.25, 1), (1, 1.25)])


def _has_room(placed: Sequence[Thing], x: float, y: float, r: float, base: float) -> bool:
    """Whether an object of radius r at (x, y) with its shadow at (x, base) touches none that is
    there. Nor may one hide another's shadow, which would leave its depth unknown."""
    return (
        all(math.hypot(other.x - x, other.y - y) > 1.05 * (other.r + r) for other in placed)
        and all(math.hypot(other.x - x, other.y - base) > other.r for other in placed)
        and all(math.hypot(other.x - x, other.base - y) > r for other in placed)
    )


def floor_scene(
    rng: random.Random,
    count: int,
    height_depth_correlation: float = 0.8,
    square: bool | None = None,
) -> Scene:
    """A scene of `count` shapes over a floor. square: None = four of five pictures are square."""
    aspect = _aspect(rng, square)
    width = round(SIDE * aspect[0])
    height = round(SIDE * aspect[1])
    share = standing_share(height_depth_correlation)
    while True:
        horizon = rng.uniform(0.2, 0.3)
        names = _names(rng, count, COLORS, SHAPES, distinct=rng.random() < 0.9)
        things: list[Thing] = []
        for color, shape in names:
            for _ in range(30):
                z = rng.uniform(NEAR, FAR)
                size = rng.uniform(1, 2)
                r = UNIT_RADIUS * size / z * SIDE
                x = rng.uniform(r, width - r)
                y = _height(rng, z, r / height, horizon, share) * height
                base = _floor_y(z, horizon) * height
                if _has_room(things, x, y, r, base):
                    rgb = _tint(rng, COLORS[color])
                    things.append(Thing(color, shape, x, y, r, z, size, base, rgb))
                    break
        if len(things) == count:
            return Scene("floor", width, height, tuple(things), _floor_look(rng, horizon * height))


def _floor_look(rng: random.Random, horizon: float) -> Record:
    """Colours of sky and floor, and how many tiles lie side by side."""
    grey = rng.randint(105, 160)
    hue = rng.randint(-12, 12)
    top = tuple(rng.randint(165, 200) for _ in range(3))
    low = tuple(rng.randint(200, 235) for _ in range(3))
    floor = (grey + hue, grey, grey - hue)
    return {"horizon": horizon, "sky": (top, low), "floor": floor, "tiles": rng.randint(4, 9)}


def corridor_scene(
    rng: random.Random,
    thetas: tuple[float, float] | None = None,
    depths: tuple[float, float] | None = None,
    sizes: tuple[float, float] | None = None,
) -> Scene:
    """Two objects on the walls of a corridor; the first is always the farther one. Angles in
    radians, depths and sizes in metres, each (far, near); what is not given is drawn."""
    while True:
        both_thetas = thetas or (rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi))
        both_depths = depths or (rng.uniform(3.4, 5.2), rng.uniform(2.25, 2.9))
        both_sizes = sizes or (0.2 * rng.uniform(1, 1.5), 0.1 * rng.uniform(1, 1.5))
        names = _names(rng, 2, CORRIDOR_COLORS, CORRIDOR_SHAPES, distinct=False)
        things = []
        for (color, shape), theta, z, size in zip(
            names, both_thetas, both_depths, both_sizes, strict=True
        ):
            across, up = wall_point(theta, size)
            x, y = corridor_point(across, up, z, SIDE, SIDE)
            r = FOCAL * SIDE * size / z
            rgb = _tint(rng, CORRIDOR_COLORS[color])
            things.append(Thing(color, shape, x, y, r, z, size, y, rgb, theta))
        shade = rng.randint(150, 205)
        wall = (shade, shade - rng.randint(0, 12), shade - rng.randint(0, 20))
        look = {"wall": wall, "sky": (rng.randint(200, 225), 225, 240)}
        scene = Scene("corridor", SIDE, SIDE, tuple(things), look)
        seen = (instance_map(scene) == 1).sum()
        alone = (instance_map(only(scene, things[0])) == 1).sum()
        if seen >= LEAST_SEEN * alone or thetas:
            return scene


# --- drawing --------------------------------------------------------------------------------------


def _shade(rgb: RGB, factor: float) -> RGB:
    return tuple(max(0, min(255, round(value * factor))) for value in rgb)


def _draw_floor(scene: Scene, k: int) -> Image.Image:
    """Sky, tiled floor in perspective, shadows. k: supersampling."""
    width = scene.width * k
    height = scene.height * k
    horizon = scene.look["horizon"] * k
    tiles = scene.look["tiles"]
    floor = scene.look["floor"]
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    top, low = scene.look["sky"]
    for i in range(8):
        band = tuple(round(a + (b - a) * i / 7) for a, b in zip(top, low, strict=True))
        draw.rectangle([0, horizon * i / 8, width, horizon * (i + 1) / 8], fill=band)
    draw.rectangle([0, horizon, width, height], fill=floor)
    line = _shade(floor, 0.9)
    for i in range(-tiles * 2, tiles * 3):
        start = (width / 2 + (i / tiles - 0.5) * width * 0.05, horizon)
        draw.line([start, (width * i / tiles, height)], fill=line, width=k)
    for z in np.arange(NEAR, 12, 1.5 / tiles):
        y = _floor_y(z, scene.look["horizon"] / scene.height) * height
        draw.line([(0, y), (width, y)], fill=line, width=k)
    for thing in scene.things:
        x = thing.x * k
        base = thing.base * k
        rx = thing.r * k
        ry = thing.r * 0.3 * k
        draw.ellipse([x - rx, base - ry, x + rx, base + ry], fill=_shade(floor, 0.55))
    return picture


def _draw_corridor(scene: Scene, k: int) -> Image.Image:
    """Four walls with frames every metre, an open end that shows the sky, contact shadows on the
    touched wall. k: supersampling."""
    width = scene.width * k
    height = scene.height * k
    wall = scene.look["wall"]
    frame_color = (70, 70, 70)
    picture = Image.new("RGB", (width, height), scene.look["sky"])
    draw = ImageDraw.Draw(picture)

    def frame(z: float) -> list[Point]:
        """The corridor's cross-section at depth z, from the top left corner clockwise."""
        corners = ((-1, 1), (1, 1), (1, -1), (-1, -1))
        return [corridor_point(x, y, z, width, height) for x, y in corners]

    depths = [2.0, *np.arange(3, END + 0.5).tolist()]
    for near, far in itertools.pairwise(depths):
        front = frame(near)
        back = frame(far)
        # ceiling, right, floor, left
        for side, light in enumerate((0.86, 0.93, 1.0, 0.8)):
            following = (side + 1) % 4
            corners = [front[side], front[following], back[following], back[side]]
            draw.polygon(corners, fill=_shade(wall, light * (1.05 - 0.045 * far)))
        draw.polygon(back, outline=frame_color)
    for near_corner, far_corner in zip(frame(2.0), frame(END), strict=True):
        draw.line([near_corner, far_corner], fill=frame_color, width=k)
    for thing in scene.things:
        shadow = [corridor_point(x, y, z, width, height) for x, y, z in _contact_shadow(thing)]
        draw.polygon(shadow, fill=_shade(wall, 0.55))
    return picture


def _contact_shadow(thing: Thing) -> list[tuple[float, float, float]]:
    """A square in metres on the wall that the object touches, a little larger than the object."""
    x, y = wall_point(thing.theta, thing.size)
    s = 1.1 * thing.size
    if abs(x) > abs(y):  # on the left or right wall
        return [(math.copysign(1, x), y + i * s, thing.z + j * s) for i, j in CORNERS]
    return [(x + i * s, math.copysign(1, y), thing.z + j * s) for i, j in CORNERS]


def _draw_sphere(picture: Image.Image, thing: Thing, k: int) -> None:
    """A ball lit from the top left, with a bright spot."""
    diameter = 2 * k * thing.r
    # coordinates of the pixels, -1 to 1 across the ball
    rows, cols = np.mgrid[0:diameter:1.0, 0:diameter:1.0] / (k * thing.r) - 1
    towards_viewer = np.sqrt(np.clip(1 - rows**2 - cols**2, 0, 1))
    light = 0.45 + 0.55 * np.clip((towards_viewer - 0.5 * cols - 0.6 * rows) / 1.27, 0, 1)
    light = light[..., None]
    pixels = np.clip(np.array(thing.rgb) * light + 40 * (light > 0.97), 0, 255).astype(np.uint8)
    inside = ((rows**2 + cols**2 <= 1) * 255).astype(np.uint8)
    corner = (round((thing.x - thing.r) * k), round((thing.y - thing.r) * k))
    picture.paste(Image.fromarray(pixels), corner, Image.fromarray(inside))


def _draw_cube(picture: Image.Image, thing: Thing, scene: Scene, k: int) -> None:
    """The front, and before it those of the two faces turned towards the corridor's axis that are
    seen."""
    draw = ImageDraw.Draw(picture)
    corners = {key: (x * k, y * k) for key, (x, y) in _cube_corners(thing, scene).items()}
    x, y = wall_point(thing.theta, thing.size)
    towards_axis = (-1 if x > 0 else 1, -1 if y > 0 else 1)
    if abs(x) > thing.size:
        beside = [corners[towards_axis[0], i, j] for i, j in CORNERS]
        draw.polygon(beside, fill=_shade(thing.rgb, 0.75))
    if abs(y) > thing.size:
        above = [corners[i, towards_axis[1], j] for i, j in CORNERS]
        draw.polygon(above, fill=_shade(thing.rgb, 0.6))
    draw.polygon([corners[i, j, -1] for i, j in CORNERS], fill=thing.rgb)


def render(scene: Scene) -> Image.Image:
    """The picture, PIL RGB of (scene.width, scene.height), drawn at twice the size and averaged."""
    k = SUPERSAMPLING
    picture = _draw_floor(scene, k) if scene.kind == "floor" else _draw_corridor(scene, k)
    for thing in sorted(scene.things, key=lambda thing: -thing.z):
        if thing.shape == "sphere":
            _draw_sphere(picture, thing, k)
        elif thing.shape == "cube":
            _draw_cube(picture, thing, scene, k)
        else:
            polygon = [(x * k, y * k) for x, y in outline(thing, scene)]
            ImageDraw.Draw(picture).polygon(polygon, fill=thing.rgb)
    return picture.reduce(k)


def instance_map(scene: Scene) -> UInt8[np.ndarray, "h w"]:
    """0 where no object is seen, i + 1 on thing i. Nearer objects hide farther ones."""
    picture = Image.new("L", (scene.width, scene.height))
    draw = ImageDraw.Draw(picture)
    for i, thing in sorted(enumerate(scene.things), key=lambda pair: -pair[1].z):
        draw.polygon(outline(thing, scene), fill=i + 1)
    return np.asarray(picture)

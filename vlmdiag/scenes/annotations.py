"""What make_shapes.py says about its pictures: COCO annotations, objects, questions, swap pairs,
MMHal-style questions.

Pure functions on {image id: Scene}; image ids are integers, pictures are named by file_name().
Boxes are COCO's [x, y, width, height] in pixels from the top left. Rows of the swap tables carry
'image_id'; the picture itself is put in by whoever writes the table. Randomness: random.Random of
(seed, image id).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from random import Random

import numpy as np

from vlmdiag.scenes import questions
from vlmdiag.scenes.questions import (
    ASK_RELATION,
    AXES,
    ONE_WORD,
    Maker,
    Question,
    margin,
    relation,
    relations,
)
from vlmdiag.scenes.scene import (
    COLORS,
    CORRIDOR_COLORS,
    CORRIDOR_SHAPES,
    SHAPES,
    Point,
    Scene,
    Thing,
    instance_map,
    only,
    outline,
)
from vlmdiag.types import Record

Scenes = Mapping[int, Scene]  # image id -> scene

# swap pairs: distance of the two centres along the asked axis, as questions.margin measures it
LEAST = 0.12
PER_IMAGE = 2  # swap pairs of one image and axis
# swap pairs of one category, so that the tables of a large set still fit in memory
PER_CATEGORY = 400
GROUPS = {"left_right": "horizontal", "above_below": "vertical", "far_close": "distance"}
CATEGORIES = ("left", "right", "above", "under", "far", "close")
# The five forms of EmbSpatial-Bench's directional questions, by which readers find the two names
PHRASINGS = (
    "What is the spatial relationship between {a} and {b} in the image?",
    "What is the relative location of {a} and {b} in the image?",
    "How do the positions of {a} and {b} interact with each other?",
    "How are {a} and {b} positioned in relation to each other in the image?",
    "Can you describe the spatial arrangement of {a} and {b} in the image?",
)
SENTENCES = {
    "left": "on the left side of",
    "right": "on the right side of",
    "above": "above",
    "under": "beneath",
}
OPPOSITE = {"left": "right", "right": "left", "above": "under", "under": "above"}
MISSING = ("None", "n/a", "unknown", "")  # how tables write an option that is not there
TRIES = 200  # draws of a question before a scene counts as having none that fits
MOST_OBJECTS = 10  # annotation ids are 10 * image id + number of the object


def file_name(image_id: int) -> str:
    """COCO's name of a picture: its id with 12 digits."""
    return f"{image_id:012d}.jpg"


def _picture(image_id: int, folder: str) -> Record:
    return {"image_id": image_id, "image": f"{folder}/{file_name(image_id)}"}


# --- COCO -----------------------------------------------------------------------------------------


def _between(p: Point, q: Point, t: float) -> Point:
    """The point at share t of the way from p to q."""
    return p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])


def clipped(polygon: Sequence[Point], width: float, height: float) -> list[Point]:
    """The part of a polygon [(x, y), ...] inside the picture (Sutherland and Hodgman); [] if
    nothing is."""
    points = list(polygon)
    # cut along the left, right, upper and lower edge: inside is where sign * (x - bound) >= 0
    for axis, bound, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        inside: list[Point] = []
        for p, q in zip(points, points[1:] + points[:1], strict=True):
            p_is_in = sign * (p[axis] - bound) >= 0
            q_is_in = sign * (q[axis] - bound) >= 0
            if p_is_in:
                inside.append(p)
            if p_is_in != q_is_in:
                inside.append(_between(p, q, (bound - p[axis]) / (q[axis] - p[axis])))
        points = inside
    return points


def area(polygon: Sequence[Point]) -> float:
    """Shoelace formula, in square pixels."""
    following = [*polygon[1:], *polygon[:1]]
    doubled = sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(polygon, following, strict=True))
    return abs(doubled) / 2


def polygon_of(thing: Thing, scene: Scene) -> list[Point]:
    """The object's outline inside the picture, to a hundredth of a pixel. What a nearer object
    hides is not taken away."""
    points = clipped(outline(thing, scene), scene.width, scene.height)
    return [(round(x, 2), round(y, 2)) for x, y in points]


def box(polygon: Sequence[Point]) -> list[float]:
    """COCO's [x, y, width, height] of a polygon."""
    left, top = (min(point[axis] for point in polygon) for axis in (0, 1))
    right, bottom = (max(point[axis] for point in polygon) for axis in (0, 1))
    return [left, top, round(right - left, 2), round(bottom - top, 2)]


def categories(kind: str) -> list[Record]:
    """Every '<colour> <shape>' that a scene of this kind can contain; the ids depend on nothing
    else."""
    is_floor = kind == "floor"
    colors = COLORS if is_floor else CORRIDOR_COLORS
    shapes = SHAPES if is_floor else CORRIDOR_SHAPES
    names = [(f"{color} {shape}", shape) for shape in shapes for color in colors]
    return [
        {"id": i, "name": name, "supercategory": shape} for i, (name, shape) in enumerate(names, 1)
    ]


def captions(scene: Scene) -> list[str]:
    """Five captions, each naming every object: left to right, right to left, near to far, top to
    bottom, far to near."""
    place = "over a tiled floor" if scene.kind == "floor" else "on the walls of a corridor"

    def sorted_by(axis: str, sign: int = 1) -> str:
        things = sorted(scene.things, key=lambda thing: sign * questions.coordinate(thing, axis))
        return questions.listed([thing.name for thing in things])

    top_down = sorted_by("y")
    return [
        questions.caption(scene),
        f"There is {sorted_by('x', -1)} in the picture.",
        f"A picture of {sorted_by('z')}.",
        f"{top_down[0].upper()}{top_down[1:]} {place}.",
        f"We can see {sorted_by('z', -1)}.",
    ]


def coco(scenes: Scenes, kind: str) -> tuple[Record, Record]:
    """(captions, instances): the contents of COCO's two annotation files. Extra fields of an
    instance: depth, color, shape."""
    info = {
        "description": f"Coloured shapes, scene: {kind}",
        "version": "1.0",
        "contributor": "data/make_shapes.py",
    }
    images = [
        {
            "id": image_id,
            "file_name": file_name(image_id),
            "width": scene.width,
            "height": scene.height,
            "license": 1,
        }
        for image_id, scene in scenes.items()
    ]
    license_ = {"id": 1, "name": "Made by data/make_shapes.py, free for any use", "url": ""}
    head = {"info": info, "licenses": [license_], "images": images}
    caption_rows = [
        {"id": MOST_OBJECTS * image_id + n, "image_id": image_id, "caption": text}
        for image_id, scene in scenes.items()
        for n, text in enumerate(captions(scene))
    ]
    category_ids = {category["name"]: category["id"] for category in categories(kind)}
    instances = []
    for image_id, scene in scenes.items():
        for n, thing in enumerate(scene.things):
            ids = {
                "id": MOST_OBJECTS * image_id + n,
                "image_id": image_id,
                "category_id": category_ids[thing.name],
            }
            instances.append(ids | _instance(thing, scene))
    return (
        {**head, "annotations": caption_rows},
        {**head, "annotations": instances, "categories": categories(kind)},
    )


def _instance(thing: Thing, scene: Scene) -> Record:
    """COCO's fields of an object but for its ids, and our own."""
    polygon = polygon_of(thing, scene)
    return {
        "bbox": box(polygon),
        "area": round(area(polygon), 2),
        "segmentation": [[coordinate for point in polygon for coordinate in point]],
        "iscrowd": 0,
        "depth": round(thing.z, 4),
        "color": thing.color,
        "shape": thing.shape,
    }


# --- objects and questions ------------------------------------------------------------------------


def visible_shares(scene: Scene) -> list[float]:
    """Share of each object's pixels that no nearer object hides."""
    together = instance_map(scene)
    shares = []
    for n, thing in enumerate(scene.things, 1):
        alone = instance_map(only(scene, thing)) == 1
        shares.append(round(float(((together == n) & alone).sum() / alone.sum()), 4))
    return shares


def _object(thing: Thing, scene: Scene, visible: float) -> Record:
    """An object as objects.json has it; shadow_y on a floor, theta in a corridor."""
    record = {
        "name": thing.name,
        "color": thing.color,
        "shape": thing.shape,
        "center": [round(thing.x, 2), round(thing.y, 2)],
        "radius": round(thing.r, 2),
        "depth": round(thing.z, 4),
        "size": round(thing.size, 4),
        "bbox": box(polygon_of(thing, scene)),
        "visible": visible,
    }
    if scene.kind == "floor":
        return record | {"shadow_y": round(thing.base, 2)}
    return record | {"theta": round(thing.theta, 4)}


def objects(scenes: Scenes, folder: str) -> dict[str, Record]:
    """{12-digit image id: what is in the picture}."""
    pictures = {}
    for image_id, scene in scenes.items():
        things = zip(scene.things, visible_shares(scene), strict=True)
        pictures[f"{image_id:012d}"] = _picture(image_id, folder) | {
            "width": scene.width,
            "height": scene.height,
            "scene": scene.kind,
            "objects": [_object(thing, scene, visible) for thing, visible in things],
        }
    return pictures


def _until(
    rng: Random, scene: Scene, make: Maker, answer: str | None = None, sharing: bool | None = None
) -> Question | None:
    """A question with this answer (None: any), or None where the scene has none. sharing: whether
    the name asked about shares its colour or its shape with an object (None: either)."""
    for _ in range(TRIES):
        question = make(rng, scene)
        if question is None or (answer is not None and question.answer != answer):
            continue
        if sharing is None or _shares(question.about[0], scene) == sharing:
            return question
    return None


def _shares(name: str, scene: Scene) -> bool:
    """Whether an object in the picture has this name's colour or its shape."""
    words = name.split()
    return any(thing.color in words or thing.shape in words for thing in scene.things)


def _floor_questions(rng: Random, scene: Scene, counts: Counter[str]) -> Iterator[Question | None]:
    """Yes and no in turn, absent names that share a colour or shape in half of all cases, both
    answers of each relation equally often. counts: of all scenes so far, kept up to date here."""
    yield _until(rng, scene, questions.ask_presence, "Yes")
    sharing = counts["sharing"] * 2 <= counts["absent"]
    no = _until(rng, scene, questions.ask_presence, "No", sharing)
    if no is None:
        # all four shapes are there: every absent name shares one
        no = _until(rng, scene, questions.ask_presence, "No")
    if no is None:
        raise RuntimeError(f"{TRIES} questions about a scene in a row had the answer yes")
    counts["absent"] += 1
    counts["sharing"] += _shares(no.about[0], scene)
    yield no
    makers: tuple[Maker, ...] = (questions.ask_color, questions.ask_shape, questions.ask_count)
    for make in makers:
        yield _until(rng, scene, make)
    for kind, (_, *answers) in AXES.items():
        number = counts[kind]
        question = _until(rng, scene, ASK_RELATION[kind], answers[number % 2])
        if question is not None:
            counts[kind] += 1
            # two without the ending, then two with it, so that both answers occur in both forms
            yield questions.with_one_word(question) if number // 2 % 2 else question


def question_list(scenes: Scenes, folder: str, seed: int) -> list[Record]:
    """Rows {image_id, image, question, answer, kind, about}; a corridor's four camera wordings have
    the field 'split' too."""
    rows = []
    counts: Counter[str] = Counter()
    for image_id, scene in scenes.items():
        asked: Iterable[Question | None]
        if scene.kind == "floor":
            rng = Random(f"questions-{seed}-{image_id}")
            extra = {}
            asked = _floor_questions(rng, scene, counts)
        else:
            far, near = scene.things
            extra = {"split": questions.split(far, near, scene)}
            asked = questions.camera_questions(far, near)
        for question in asked:
            if question is not None:
                fields = {
                    "question": question.text,
                    "answer": question.answer,
                    "kind": question.kind,
                    "about": list(question.about),
                }
                rows.append(_picture(image_id, folder) | fields | extra)
    return rows


def curated(scenes: Scenes) -> dict[str, list[Record]]:
    """{image id: [{question, answer, category}]}: what is the object of this colour, which occurs
    once? One question a picture at most, as in the published list for token ablation and attention
    knockout; which object it is changes from picture to picture.
    """
    lists: dict[str, list[Record]] = {}
    for image_id, scene in scenes.items():
        lists[str(image_id)] = []
        things = questions.with_unique(scene, "color") if scene.kind == "floor" else []
        if things:
            thing = things[image_id % len(things)]
            entry = {
                "question": f"What is the {thing.color} object?",
                "answer": thing.shape,
                "category": thing.name,
            }
            lists[str(image_id)].append(entry)
    return lists


# MMHal-Bench's types of question; of several makers one is drawn
MMHAL_TYPES: dict[str, list[Maker]] = {
    "attribute": [questions.ask_color, questions.ask_shape],
    "adversarial": [questions.ask_presence],
    "comparison": [questions.ask_far_close],
    "counting": [questions.ask_count],
    "relation": [questions.ask_left_right, questions.ask_above_below],
    "holistic": [questions.ask_caption],
}


def mmhal(scenes: Scenes, folder: str, seed: int) -> tuple[list[Record], list[Record]]:
    """MMHal-Bench's fields, one question an image; the question types take turns, a scene that has
    nothing of a type gets the next one's. And first answers to these questions, {image_id, answer,
    corrupted}, by a coin right or a wrong one of the same form.
    """
    rows = []
    answers = []
    turn = 0
    for image_id, scene in scenes.items():
        rng = Random(f"mmhal-{seed}-{image_id}")
        types = [name for name in MMHAL_TYPES if scene.kind == "floor" or name != "counting"]
        question = None
        while question is None:
            name = types[turn % len(types)]
            turn += 1
            # an adversarial question is about an object that is not there
            answer = "No" if name == "adversarial" else None
            question = _until(rng, scene, rng.choice(MMHAL_TYPES[name]), answer)
        row = {
            "question_type": name,
            "question_topic": "shapes",
            "image_id": f"{image_id:012d}",
            "image_src": f"{folder}/{file_name(image_id)}",
            "image_content": [thing.name for thing in scene.things],
            "question": question.text,
            "gold_answer": question.answer,
        }
        rows.append(row)
        coin = Random(f"answers-{seed}-{image_id}")
        is_wrong = coin.random() < 0.5
        first = questions.corrupted(coin, scene, question) if is_wrong else question.answer
        answers.append({"image_id": row["image_id"], "answer": first, "corrupted": is_wrong})
    return rows, answers


# --- swap pairs -----------------------------------------------------------------------------------


def _balanced(rows: Sequence[Record], seed: int) -> list[Record]:
    """Equally many rows of each category, dropped at random, in the order they had."""
    indices: dict[str, list[int]] = {category: [] for category in CATEGORIES}
    for index, row in enumerate(rows):
        indices[row["category"]].append(index)
    count = min(PER_CATEGORY, *map(len, indices.values()))
    rng = Random(f"balance-{seed}")
    drawn: list[int] = []
    for category in CATEGORIES:
        drawn += rng.sample(indices[category], count)
    return [rows[index] for index in sorted(drawn)]


def _category(answer: str) -> str:
    return "under" if answer == "below" else answer


def swap_rows(scenes: Scenes, seed: int) -> list[Record]:
    """Rows of swap_pairs_ready.tsv without the picture, and 'about': the names (asked,
    reference)."""
    rows = []
    counts: Counter[str] = Counter()
    for image_id, scene in scenes.items():
        rng = Random(f"swap-{seed}-{image_id}")
        for kind, group in GROUPS.items():
            lower = AXES[kind][1]
            # each pair once, in the order in which its answer is the lower value
            pairs = [
                (a, b)
                for a, b in relations(scene, kind, LEAST)
                if relation(kind, a, b).answer == lower
            ]
            for a, b in rng.sample(pairs, min(PER_IMAGE, len(pairs))):
                counts[kind] += 1
                asked, reference = (a, b) if counts[kind] % 2 else (b, a)
                row = _swap_row(image_id, scene, kind, asked, reference)
                rows.append(row | {"group": group})
    return _balanced(rows, seed)


def _swap_row(image_id: int, scene: Scene, kind: str, asked: Thing, reference: Thing) -> Record:
    original = relation(kind, asked, reference)
    swapped = relation(kind, reference, asked)
    category = _category(original.answer)
    numbers = f"{scene.things.index(asked)}{scene.things.index(reference)}"
    return {
        "question_id": f"shapes_{image_id}_{category}_{numbers}",
        "image_id": image_id,
        "original_question": original.text + ONE_WORD,
        "swapped_question": swapped.text + ONE_WORD,
        "about": original.about,
        "original_answer": original.answer,
        "swapped_answer": swapped.answer,
        "category": category,
    }


def _options(rng: Random, right: str, others: Sequence[str]) -> Record:
    """{A, B, C, D, answer}: four options in random order."""
    options = [right, *others]
    rng.shuffle(options)
    return dict(zip("ABCD", options, strict=True)) | {"answer": "ABCD"[options.index(right)]}


def embspatial_rows(scenes: Scenes, ready: Sequence[Record], seed: int) -> list[Record]:
    """Rows of swap_pairs.tsv without the picture: the directional pairs of `ready` under their ids,
    and the nearest and farthest object of each image."""
    rows = []
    counts: Counter[str] = Counter()
    swaps_of = defaultdict(list)  # image id -> its directional rows
    for swap_row in ready:
        if swap_row["group"] != "distance":
            swaps_of[swap_row["image_id"]].append(swap_row)
    for image_id, scene in scenes.items():
        rng = Random(f"embspatial-{seed}-{image_id}")
        for swap_row in swaps_of[image_id]:
            counts["phrasing"] += 1
            phrasing = PHRASINGS[counts["phrasing"] % len(PHRASINGS)]
            rows.append(_directional_row(rng, swap_row, phrasing))
        nearest = min(scene.things, key=lambda thing: thing.z)
        farthest = max(scene.things, key=lambda thing: thing.z)
        extremes = (("close", "nearest", nearest), ("far", "farthest", farthest))
        for category, word, thing in extremes:
            others = [other for other in scene.things if other is not thing]
            if others and all(margin(thing, other, "z", scene) >= LEAST for other in others):
                names = [other.name for other in others]
                while len(names) < 3:
                    names.append(MISSING[counts["missing"] % len(MISSING)])
                    counts["missing"] += 1
                row = {
                    "question_id": f"shapes_{image_id}_{word}",
                    "category": category,
                    "question": (
                        f"From your perspective, which object in the image is the {word}?"
                    ),
                    "image_id": image_id,
                }
                rows.append(row | _options(rng, thing.name, names))
    return _balanced(rows, seed)


def _directional_row(rng: Random, swap_row: Record, phrasing: str) -> Record:
    a, b = swap_row["about"]
    category = swap_row["category"]
    sides = (SENTENCES[category], SENTENCES[OPPOSITE[category]], "inside", "connected to")
    right, *others = (f"The {a} is {side} the {b}." for side in sides)
    row = {
        "question_id": swap_row["question_id"],
        "category": category,
        "question": phrasing.format(a=a, b=b),
        "image_id": swap_row["image_id"],
    }
    return row | _options(rng, right, others)


def boxes(scenes: Scenes, rows: Sequence[Record]) -> dict[str, Record]:
    """{question_id: size of the picture, names and boxes of its objects, category}, the fields that
    EmbSpatial-Bench's own file adds to the table."""
    entries = {}
    for row in rows:
        scene = scenes[row["image_id"]]
        entries[row["question_id"]] = {
            "image_height": scene.height,
            "image_width": scene.width,
            "objects": [
                {"name": thing.name, "bbox": box(polygon_of(thing, scene))}
                for thing in scene.things
            ],
            "relation": row["category"],
            "data_source": "shapes",
        }
    return entries


def height_depth_correlation(scenes: Collection[Scene]) -> float | None:
    """Correlation of height in the picture and depth over all objects of the scenes; None for fewer
    than three objects."""
    places = [(-thing.y / scene.height, thing.z) for scene in scenes for thing in scene.things]
    if len(places) <= 2:
        return None
    return round(float(np.corrcoef(np.array(places).T)[0, 1]), 4)

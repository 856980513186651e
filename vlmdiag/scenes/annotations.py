"""What make_shapes.py says about its pictures: COCO annotations, objects, questions, swap pairs,
MMHal-style questions.

Pure functions on {image id: Scene}; image ids are integers, pictures are named by file_name().
Boxes are COCO's [x, y, width, height] in pixels from the top left. Rows of the swap tables carry
'image_id'; the picture itself is put in by whoever writes the table. Randomness: random.Random of
(seed, image id).
"""

from collections import Counter, defaultdict
from random import Random

import numpy as np

from vlmdiag.scenes import questions
from vlmdiag.scenes.questions import AXES, ONE_WORD, article, margin, relation, relations
from vlmdiag.scenes.scene import (
    COLORS,
    CORRIDOR_COLORS,
    CORRIDOR_SHAPES,
    SHAPES,
    Scene,
    instance_map,
    outline,
)

# swap pairs: distance of the two centres along the asked axis, as questions.margin measures it
LEAST = 0.12
PER_IMAGE = 2  # swap pairs of one image and axis
PER_CATEGORY = (
    400  # swap pairs of one category, so that the tables of a large set still fit in memory
)
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
MISSING = ("None", "n/a", "unknown", "")  # how tables write an option that is not there


def file_name(image_id):
    return f"{image_id:012d}.jpg"


def _listed(names):
    names = [article(name) for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


# --- COCO -----------------------------------------------------------------------------------------


def clipped(polygon, width, height):
    """The part of a polygon [(x, y), ...] inside the picture (Sutherland and Hodgman); [] if
    nothing is."""
    for axis, bound, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        kept = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            p_in, q_in = sign * (p[axis] - bound) >= 0, sign * (q[axis] - bound) >= 0
            if p_in:
                kept.append(p)
            if p_in != q_in:
                t = (bound - p[axis]) / (q[axis] - p[axis])
                kept.append(tuple(a + t * (b - a) for a, b in zip(p, q, strict=True)))
        polygon = kept
    return polygon


def area(polygon):
    """Shoelace formula, in square pixels."""
    return (
        abs(
            sum(
                a[0] * b[1] - b[0] * a[1]
                for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True)
            )
        )
        / 2
    )


def polygon_of(thing, scene):
    """The object's outline inside the picture, to a hundredth of a pixel. What a nearer object
    hides is not taken away."""
    return [
        (round(x, 2), round(y, 2))
        for x, y in clipped(outline(thing, scene), scene.width, scene.height)
    ]


def box(polygon):
    (left, top), (right, bottom) = (
        tuple(pick(p[axis] for p in polygon) for axis in (0, 1)) for pick in (min, max)
    )
    return [left, top, round(right - left, 2), round(bottom - top, 2)]


def categories(kind):
    """Every '<colour> <shape>' that a scene of this kind can contain; the ids depend on nothing
    else."""
    colors, shapes = (COLORS, SHAPES) if kind == "floor" else (CORRIDOR_COLORS, CORRIDOR_SHAPES)
    names = [(f"{color} {shape}", shape) for shape in shapes for color in colors]
    return [
        {"id": i, "name": name, "supercategory": shape} for i, (name, shape) in enumerate(names, 1)
    ]


def captions(scene):
    """Five captions, each naming every object: left to right, right to left, near to far, top to
    bottom, far to near."""
    place = "over a tiled floor" if scene.kind == "floor" else "on the walls of a corridor"

    def names(key):
        return _listed([thing.name for thing in sorted(scene.things, key=key)])

    top_down = names(lambda thing: thing.y)
    return [
        questions.caption(scene),
        f"There is {names(lambda thing: -thing.x)} in the picture.",
        f"A picture of {names(lambda thing: thing.z)}.",
        f"{top_down[0].upper()}{top_down[1:]} {place}.",
        f"We can see {names(lambda thing: -thing.z)}.",
    ]


def coco(scenes, kind):
    """(captions, instances): the contents of COCO's two annotation files. Extra fields of an
    instance: depth, color, shape."""
    head = {
        "info": {
            "description": f"Coloured shapes, scene: {kind}",
            "version": "1.0",
            "contributor": "data/make_shapes.py",
        },
        "licenses": [{"id": 1, "name": "Made by data/make_shapes.py, free for any use", "url": ""}],
        "images": [
            {
                "id": i,
                "file_name": file_name(i),
                "width": scene.width,
                "height": scene.height,
                "license": 1,
            }
            for i, scene in scenes.items()
        ],
    }
    told = [
        {"id": 10 * i + n, "image_id": i, "caption": text}
        for i, scene in scenes.items()
        for n, text in enumerate(captions(scene))
    ]
    ids = {category["name"]: category["id"] for category in categories(kind)}
    shown = []
    for i, scene in scenes.items():
        for n, thing in enumerate(scene.things):
            polygon = polygon_of(thing, scene)
            place = {
                "bbox": box(polygon),
                "area": round(area(polygon), 2),
                "segmentation": [[value for point in polygon for value in point]],
                "iscrowd": 0,
            }
            own = {"depth": round(thing.z, 4), "color": thing.color, "shape": thing.shape}
            shown.append(
                {"id": 10 * i + n, "image_id": i, "category_id": ids[thing.name], **place, **own}
            )
    return {**head, "annotations": told}, {
        **head,
        "annotations": shown,
        "categories": categories(kind),
    }


# --- objects and questions ------------------------------------------------------------------------


def _seen(scene):
    """Share of each object's pixels that no nearer object hides."""
    together = instance_map(scene)
    alone = [
        instance_map(Scene(scene.kind, scene.width, scene.height, (thing,)))
        for thing in scene.things
    ]
    return [
        round(float(((together == n) & (own == 1)).sum() / (own == 1).sum()), 4)
        for n, own in enumerate(alone, 1)
    ]


def objects(scenes, folder):
    """{12-digit image id: what is in the picture}."""
    out = {}
    for i, scene in scenes.items():
        things = []
        for thing, seen in zip(scene.things, _seen(scene), strict=True):
            what = {
                "name": thing.name,
                "color": thing.color,
                "shape": thing.shape,
                "center": [round(thing.x, 2), round(thing.y, 2)],
            }
            what |= {
                "radius": round(thing.r, 2),
                "depth": round(thing.z, 4),
                "size": round(thing.size, 4),
            }
            what |= {"bbox": box(polygon_of(thing, scene)), "visible": seen}
            things.append(
                what
                | (
                    {"shadow_y": round(thing.base, 2)}
                    if scene.kind == "floor"
                    else {"theta": round(thing.theta, 4)}
                )
            )
        picture = {
            "image_id": i,
            "image": f"{folder}/{file_name(i)}",
            "width": scene.width,
            "height": scene.height,
        }
        out[f"{i:012d}"] = {**picture, "scene": scene.kind, "objects": things}
    return out


def _until(rng, scene, ask, fits=lambda question: True):
    """A question that fits, or None where the scene has none."""
    tries = (ask(rng, scene) for _ in range(200))
    return next((question for question in tries if question is not None and fits(question)), None)


def _shares(name, scene):
    """Whether an object in the picture has this name's colour or its shape."""
    return any(
        word in (thing.color, thing.shape) for thing in scene.things for word in name.split()
    )


def _floor_questions(rng, scene, counts):
    """Yes and no in turn, absent names that share a colour or shape in half of all cases, both
    answers of each relation equally often."""
    yield _until(rng, scene, questions.ask_presence, lambda q: q.answer == "Yes")
    wanted = counts["sharing"] * 2 <= counts["absent"]
    no = _until(
        rng,
        scene,
        questions.ask_presence,
        lambda q: q.answer == "No" and _shares(q.about[0], scene) == wanted,
    )
    no = no or _until(
        rng, scene, questions.ask_presence, lambda q: q.answer == "No"
    )  # all four shapes are there: every absent name shares one
    counts["absent"] += 1
    counts["sharing"] += _shares(no.about[0], scene)
    yield no
    for ask in (questions.ask_color, questions.ask_shape, questions.ask_count):
        yield _until(rng, scene, ask)
    for kind, (_, *answers) in AXES.items():
        n = counts[kind]
        question = _until(
            rng,
            scene,
            lambda rng, scene, kind=kind: questions.ask_relation(rng, scene, kind),
            lambda q, want=answers[n % 2]: q.answer == want,
        )
        if question:
            counts[kind] += 1
            yield questions.Question(
                kind, question.text + ONE_WORD * (n // 2 % 2), question.answer, question.about
            )


def question_list(scenes, folder, seed):
    """Rows {image_id, image, question, answer, kind, about}; a corridor's four camera wordings have
    the field 'split' too."""
    rows, counts = [], Counter()
    for i, scene in scenes.items():
        rng = Random(f"questions-{seed}-{i}")
        floor = scene.kind == "floor"
        picture = {"image_id": i, "image": f"{folder}/{file_name(i)}"}
        extra = {} if floor else {"split": questions.split(*scene.things, scene)}
        for q in (
            _floor_questions(rng, scene, counts)
            if floor
            else questions.camera_questions(*scene.things)
        ):
            if q is not None:
                rows.append(
                    {
                        **picture,
                        "question": q.text,
                        "answer": q.answer,
                        "kind": q.kind,
                        "about": list(q.about),
                        **extra,
                    }
                )
    return rows


def curated(scenes):
    """{image id: [{question, answer, category}]}: what is the object of this colour, which occurs
    once? One question a picture at most, as in the published list for token ablation and attention
    knockout; which object it is changes from picture to picture.
    """
    rows = {}
    for i, scene in scenes.items():
        counts = Counter(thing.color for thing in scene.things)
        alone = (
            [thing for thing in scene.things if counts[thing.color] == 1]
            if scene.kind == "floor"
            else []
        )
        asked = alone[i % len(alone) :][:1] if alone else []
        rows[str(i)] = [
            {
                "question": f"What is the {thing.color} object?",
                "answer": thing.shape,
                "category": thing.name,
            }
            for thing in asked
        ]
    return rows


def mmhal(scenes, folder, seed):
    """MMHal-Bench's fields, one question an image; the question types take turns, a scene that has
    nothing of a type gets the next one's. And first answers to these questions, {image_id, answer,
    corrupted}, by a coin right or a wrong one of the same form.
    """
    asks = {
        "attribute": [questions.ask_color, questions.ask_shape],
        "adversarial": [questions.ask_presence],
        "comparison": [lambda rng, scene: questions.ask_relation(rng, scene, "far_close")],
        "counting": [questions.ask_count],
        "relation": [
            lambda rng, scene, kind=kind: questions.ask_relation(rng, scene, kind)
            for kind in ("left_right", "above_below")
        ],
        "holistic": [questions.ask_caption],
    }
    rows, answers, turn = [], [], 0
    for i, scene in scenes.items():
        rng, question = Random(f"mmhal-{seed}-{i}"), None
        types = [name for name in asks if scene.kind == "floor" or name != "counting"]
        while question is None:
            name = types[turn % len(types)]
            turn += 1
            question = _until(
                rng,
                scene,
                rng.choice(asks[name]),
                lambda q, name=name: q.answer == "No" or name != "adversarial",
            )
        row = {
            "question_type": name,
            "question_topic": "shapes",
            "image_id": f"{i:012d}",
            "image_src": f"{folder}/{file_name(i)}",
        }
        rows.append(
            {
                **row,
                "image_content": [thing.name for thing in scene.things],
                "question": question.text,
                "gold_answer": question.answer,
            }
        )
        coin = Random(f"answers-{seed}-{i}")
        wrong = coin.random() < 0.5
        answer = questions.corrupted(coin, scene, question) if wrong else question.answer
        answers.append({"image_id": row["image_id"], "answer": answer, "corrupted": wrong})
    return rows, answers


# --- swap pairs -----------------------------------------------------------------------------------


def _balanced(rows, seed):
    """Equally many rows of each category, dropped at random, in the order they had."""
    places = {
        category: [n for n, row in enumerate(rows) if row["category"] == category]
        for category in CATEGORIES
    }
    count = min(PER_CATEGORY, *map(len, places.values()))
    rng = Random(f"balance-{seed}")
    return [
        rows[n]
        for n in sorted(n for category in CATEGORIES for n in rng.sample(places[category], count))
    ]


def _key(answer):
    return "under" if answer == "below" else answer


def swap_rows(scenes, seed):
    """Rows of swap_pairs_ready.tsv without the picture, and 'about': the names (asked,
    reference)."""
    rows, counts = [], Counter()
    for i, scene in scenes.items():
        rng = Random(f"swap-{seed}-{i}")
        for kind, group in GROUPS.items():
            pairs = [
                (a, b)
                for a, b in relations(scene, kind, LEAST)
                if relation(kind, a, b).answer == AXES[kind][1]
            ]
            for a, b in rng.sample(pairs, min(PER_IMAGE, len(pairs))):
                counts[kind] += 1
                first, second = (a, b) if counts[kind] % 2 else (b, a)
                original, swapped = relation(kind, first, second), relation(kind, second, first)
                row = {
                    "question_id": (
                        f"shapes_{i}_{_key(original.answer)}_{scene.things.index(first)}{scene.things.index(second)}"
                    ),
                    "image_id": i,
                }
                row |= {
                    "original_question": original.text + ONE_WORD,
                    "swapped_question": swapped.text + ONE_WORD,
                    "about": original.about,
                }
                rows.append(
                    {
                        **row,
                        "original_answer": original.answer,
                        "swapped_answer": swapped.answer,
                        "group": group,
                        "category": _key(original.answer),
                    }
                )
    return _balanced(rows, seed)


def _options(rng, right, others):
    options = [right, *others]
    rng.shuffle(options)
    return dict(zip("ABCD", options, strict=True)) | {"answer": "ABCD"[options.index(right)]}


def embspatial_rows(scenes, ready, seed):
    """Rows of swap_pairs.tsv without the picture: the directional pairs of `ready` under their ids,
    and the nearest and farthest object of each image."""
    rows, counts, pairs = [], Counter(), defaultdict(list)
    for row in ready:
        pairs[row["image_id"]].append(row)
    for i, scene in scenes.items():
        rng = Random(f"embspatial-{seed}-{i}")
        for row in pairs[i]:
            if row["group"] == "distance":
                continue
            (a, b), category, counts["phrasing"] = (
                row["about"],
                row["category"],
                counts["phrasing"] + 1,
            )
            opposite = {"left": "right", "right": "left", "above": "under", "under": "above"}[
                category
            ]
            sentences = [
                f"The {a} is {words} the {b}."
                for words in (SENTENCES[category], SENTENCES[opposite], "inside", "connected to")
            ]
            question = PHRASINGS[counts["phrasing"] % len(PHRASINGS)].format(a=a, b=b)
            what = {
                "question_id": row["question_id"],
                "category": category,
                "question": question,
                "image_id": i,
            }
            rows.append(what | _options(rng, sentences[0], sentences[1:]))
        for category, word, pick in (("close", "nearest", min), ("far", "farthest", max)):
            thing = pick(scene.things, key=lambda thing: thing.z)
            others = [other for other in scene.things if other is not thing]
            if others and all(margin(thing, other, "z", scene) >= LEAST for other in others):
                names = [other.name for other in others]
                while len(names) < 3:
                    names.append(MISSING[counts["missing"] % len(MISSING)])
                    counts["missing"] += 1
                question = f"From your perspective, which object in the image is the {word}?"
                what = {
                    "question_id": f"shapes_{i}_{word}",
                    "category": category,
                    "question": question,
                    "image_id": i,
                }
                rows.append(what | _options(rng, thing.name, names))
    return _balanced(rows, seed)


def boxes(scenes, rows):
    """{question_id: size of the picture, names and boxes of its objects, category}, the fields that
    EmbSpatial-Bench's own file adds to the table."""
    out = {}
    for row in rows:
        scene = scenes[row["image_id"]]
        found = [
            {"name": thing.name, "bbox": box(polygon_of(thing, scene))} for thing in scene.things
        ]
        size = {"image_height": scene.height, "image_width": scene.width}
        out[row["question_id"]] = {
            **size,
            "objects": found,
            "relation": row["category"],
            "data_source": "shapes",
        }
    return out


def height_depth_correlation(scenes):
    """Correlation of height in the picture and depth over all objects of the scenes; None for fewer
    than three objects."""
    rows = [(-thing.y / scene.height, thing.z) for scene in scenes for thing in scene.things]
    return round(float(np.corrcoef(np.array(rows).T)[0, 1]), 4) if len(rows) > 2 else None

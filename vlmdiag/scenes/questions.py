"""Questions about a scene and their answers, in the words that the five studies use.

Each maker takes (rng, scene) and returns a Question, or None where the scene has nothing to ask.
Names are '<colour> <shape>'; axes of the relations: x (left, right), y (above, below), z (far,
close). Wordings: horizontal, vertical and distance questions of the swap analysis, the four camera
questions of SpatialTunnel ("Why Far Looks Up"), yes/no and description prompts of llava-interp, the
critique, revise and decide prompts of Volcano (arXiv 2311.07362, App. D).
"""

from collections import Counter
from dataclasses import dataclass

from vlmdiag.scenes.scene import COLORS, CORRIDOR_COLORS, CORRIDOR_SHAPES, FAR, NEAR, SHAPES

ONE_WORD = " Answer with only one word."
AXES = {
    "left_right": ("x", "left", "right"),
    "above_below": ("y", "above", "below"),
    "far_close": ("z", "close", "far"),
}  # key: axis, lower value, higher value


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    about: tuple = ()  # names of the objects asked about


def margin(a, b, axis, scene):
    """Distance of two objects along an axis as a fraction of the picture's side (x, y) or of the
    depth range (z)."""
    if axis == "z":
        return abs(a.z - b.z) / ((FAR - NEAR) if scene.kind == "floor" else 3.0)
    return abs(getattr(a, axis) - getattr(b, axis)) / (scene.width if axis == "x" else scene.height)


def relation(kind, a, b):
    """The relation question about a, with b as the reference."""
    axis, lower, higher = AXES[kind]
    text = {
        "left_right": f"Is the {a.name} to the left or right of the {b.name}?",
        "above_below": f"Is the {a.name} above or below the {b.name}?",
        "far_close": f"Compared to {b.name}, is {a.name} far or close from you?",
    }[kind]
    return Question(
        kind, text, lower if getattr(a, axis) < getattr(b, axis) else higher, (a.name, b.name)
    )


def relations(scene, kind, least=0.05):
    """Every ordered pair of objects at least `least` apart along the kind's axis, as [(a, b)]."""
    axis = AXES[kind][0]
    return [
        (a, b)
        for a in scene.things
        for b in scene.things
        if a is not b and margin(a, b, axis, scene) >= least
    ]


def split(far, near, scene, band=0.05):
    """'consistent' if the farther object is higher in the picture by more than `band` of its
    height, 'counter' if lower, else 'ambiguous'."""
    higher = (near.y - far.y) / scene.height
    return "consistent" if higher > band else "counter" if higher < -band else "ambiguous"


def ask_relation(rng, scene, kind=None):
    kind = kind or rng.choice(list(AXES))
    pairs = relations(scene, kind)
    return relation(kind, *rng.choice(pairs)) if pairs else None


def camera_questions(a, b):
    """The four yes/no wordings of SpatialTunnel about two objects."""
    out = []
    for x, y in ((a, b), (b, a)):
        for word, closer in (("closer to", True), ("farther from", False)):
            out.append(
                Question(
                    "camera",
                    f"Is the {x.name} {word} the camera than the {y.name}?",
                    "Yes" if (x.z < y.z) == closer else "No",
                    (x.name, y.name),
                )
            )
    return out


def ask_camera(rng, scene):
    pairs = relations(scene, "far_close")
    return rng.choice(camera_questions(*rng.choice(pairs))) if pairs else None


def article(name):
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(scene):
    """Every object from left to right."""
    names = [article(thing.name) for thing in sorted(scene.things, key=lambda thing: thing.x)]
    return (
        "The image shows "
        + (" and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0])
        + "."
    )


def ask_caption(rng, scene):
    return Question(
        "caption", rng.choice(["Describe the image.", "Describe this image."]), caption(scene)
    )


def absent(rng, scene, confusable=False):
    """The name of an object that is not there; half of the time it shares its colour or its shape
    with one that is, if confusable always its colour."""
    colors, shapes = (
        (list(COLORS), list(SHAPES))
        if scene.kind == "floor"
        else (list(CORRIDOR_COLORS), list(CORRIDOR_SHAPES))
    )
    there = {thing.name for thing in scene.things}
    if confusable and (
        names := [
            f"{thing.color} {shape}"
            for thing in scene.things
            for shape in shapes
            if f"{thing.color} {shape}" not in there
        ]
    ):
        return rng.choice(names)
    near = rng.random() < 0.5
    while True:
        color, shape = rng.choice(colors), rng.choice(shapes)
        shares = any(color == thing.color or shape == thing.shape for thing in scene.things)
        if f"{color} {shape}" not in there and (shares == near or scene.kind == "corridor"):
            return f"{color} {shape}"
        if len({thing.shape for thing in scene.things}) == len(shapes):
            near = True  # every shape is there: all absent objects share one


def ask_presence(rng, scene, confusable=False):
    there = rng.random() < 0.5
    name = rng.choice(scene.things).name if there else absent(rng, scene, confusable)
    return Question(
        "yes_no",
        f"Is there {article(name)} in {rng.choice(['the', 'this'])} image?",
        "Yes" if there else "No",
        (name,),
    )


def ask_confusable(rng, scene):
    """Whether an object is there, where the absent ones have the colour of one that is: colour
    alone does not give the answer."""
    return ask_presence(rng, scene, confusable=True)


def _only(rng, scene, attribute):
    counts = Counter(getattr(thing, attribute) for thing in scene.things)
    alone = [thing for thing in scene.things if counts[getattr(thing, attribute)] == 1]
    return rng.choice(alone) if alone else None


def ask_color(rng, scene):
    thing = _only(rng, scene, "shape")
    return thing and Question(
        "color", f"What color is the {thing.shape}?", thing.color, (thing.name,)
    )


def ask_shape(rng, scene):
    thing = _only(rng, scene, "color")
    return thing and Question(
        "shape", f"What shape is the {thing.color} object?", thing.shape, (thing.name,)
    )


def ask_what(rng, scene):
    """VQA wording whose answer llava-interp begins for the model: 'It is a'."""
    thing = _only(rng, scene, "color")
    return thing and Question(
        "what",
        f"What is the {thing.color} object?",
        f"It is {article(thing.shape)}.",
        (thing.name,),
    )


def ask_count(rng, scene):
    if rng.random() < 0.5:
        return Question("count", "How many objects are in the image?", str(len(scene.things)))
    color = rng.choice(scene.things).color if rng.random() < 0.7 else rng.choice(list(COLORS))
    return Question(
        "count",
        f"How many {color} objects are in the image?",
        str(sum(thing.color == color for thing in scene.things)),
    )


def ask_where(rng, scene):
    """Tens of the picture: column 0 is the left tenth, row 0 the top tenth."""
    thing = rng.choice(scene.things)
    column, row = (
        min(9, int(10 * value)) for value in (thing.x / scene.width, thing.y / scene.height)
    )
    return Question(
        "where", f"Where is the {thing.name}?", f"column {column}, row {row}", (thing.name,)
    )


# --- critique, revise, decide ---------------------------------------------------------------------


def critique_prompt(question, answer, engineered=False):
    if engineered:
        rule = (
            "Generate the feedback on the initial response given the question and the image. Do NOT"
            " use the term 'reference answer'!!!!!!!!!!"
        )
        return f"Question: {question}\nInitial response: {answer}\n{rule}"
    return (
        "Generate the feedback given initial answer referring to question and image.\nQuestion:"
        f" {question}\nInitial answer: {answer}"
    )


def revise_prompt(question, answer, feedback, engineered=False):
    label = "Initial response" if engineered else "Initial answer"
    return (
        "Adjust the initial response considering the feedback and image.\nQuestion:"
        f" {question}\n{label}: {answer}\nFeedback: {feedback}"
    )


def decide_prompt(question, a, b):
    return (
        f"{question}\nA. {a}\nB. {b}\nAnswer with the option's letter from the given choices"
        " directly."
    )


def corrupted(rng, scene, question):
    """A wrong answer to the question, of the same form."""
    if question.kind == "caption":
        thing = rng.choice(scene.things)
        return question.answer.replace(article(thing.name), article(absent(rng, scene)), 1)
    choices = {
        "yes_no": ["Yes", "No"],
        "color": list(COLORS),
        "shape": list(SHAPES),
        "count": ["0", "1", "2", "3", "4"],
        "left_right": ["left", "right"],
        "above_below": ["above", "below"],
        "far_close": ["far", "close"],
    }[question.kind]
    return rng.choice([choice for choice in choices if choice != question.answer])


def feedback(question, answer):
    """What is wrong with an answer, in one or two short sentences."""
    if answer == question.answer:
        return "The initial answer is correct."
    if question.kind == "caption":
        said, true = (
            [
                name.removesuffix(".").strip()
                for name in text.removeprefix("The image shows ").replace(" and ", ", ").split(", ")
            ]
            for text in (answer, question.answer)
        )
        wrong, right = next((a, b) for a, b in zip(said, true, strict=True) if a != b)
        return f"The initial answer is wrong. There is not {wrong} but {right}."
    return f"The initial answer is wrong. It is {question.answer}."


def ask_protocol(rng, scene):
    """One step of the critique - revise - decide loop, on a first answer that is wrong in two of
    three cases."""
    base = rng.choice([ask_presence, ask_color, ask_shape, ask_count, ask_relation, ask_caption])(
        rng, scene
    )
    if base is None:
        return None
    first = corrupted(rng, scene, base) if rng.random() < 0.67 else base.answer
    step, engineered = rng.choice(["critique", "revise", "decide"]), rng.random() < 0.3
    if step == "critique":
        return Question(
            "critique", critique_prompt(base.text, first, engineered), feedback(base, first)
        )
    if step == "revise":
        return Question(
            "revise",
            revise_prompt(base.text, first, feedback(base, first), engineered),
            base.answer,
        )
    other = base.answer if first != base.answer else corrupted(rng, scene, base)
    a, b = (first, other) if rng.random() < 0.5 else (other, first)
    return Question("decide", decide_prompt(base.text, a, b), "A" if a == base.answer else "B")


FLOOR_MIX = {
    ask_relation: 48,
    ask_where: 14,
    ask_presence: 10,
    ask_color: 6,
    ask_shape: 6,
    ask_what: 4,
    ask_count: 5,
    ask_caption: 6,
}
CORRIDOR_MIX = {
    ask_camera: 40,
    ask_relation: 30,
    ask_where: 10,
    ask_presence: 10,
    ask_caption: 5,
    ask_shape: 5,
}


def ask(rng, scene, mix=None):
    """One question drawn from the training mix of the scene's kind; relation and presence questions
    end in ONE_WORD half of the time."""
    mix = mix or (FLOOR_MIX if scene.kind == "floor" else CORRIDOR_MIX)
    while True:
        question = rng.choices(list(mix), weights=mix.values())[0](rng, scene)
        if question is not None:
            break
    if (
        question.kind in (*AXES, "yes_no", "camera", "color", "shape", "count")
        and rng.random() < 0.5
    ):
        return Question(question.kind, question.text + ONE_WORD, question.answer, question.about)
    return question

"""Questions about a scene and their answers, in the words that the five studies use.

Each maker takes (rng, scene) and returns a Question, or None where the scene has nothing to ask.
Names are '<colour> <shape>'; axes of the relations: x (left, right), y (above, below), z (far,
close). Wordings: horizontal, vertical and distance questions of the swap analysis, the four camera
questions of SpatialTunnel ("Why Far Looks Up"), yes/no and description prompts of llava-interp, the
critique, revise and decide prompts of Volcano (arXiv 2311.07362, App. D).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from vlmdiag.scenes.scene import (
    COLORS,
    CORRIDOR_COLORS,
    CORRIDOR_SHAPES,
    FAR,
    NEAR,
    SHAPES,
    Scene,
    Thing,
)

ONE_WORD = " Answer with only one word."
# kind of relation: axis, answer for the lower value, answer for the higher value
AXES = {
    "left_right": ("x", "left", "right"),
    "above_below": ("y", "above", "below"),
    "far_close": ("z", "close", "far"),
}
CORRIDOR_DEPTHS = 3.0  # range of depths in metres by which margin() divides
# kinds that end in ONE_WORD half of the time in training
ONE_WORD_KINDS = (*AXES, "yes_no", "camera", "color", "shape", "count")


@dataclass(frozen=True)
class Question:
    """A question about a picture and its right answer."""

    kind: str
    text: str
    answer: str
    about: tuple[str, ...] = ()  # names of the objects asked about


Maker = Callable[[Random, Scene], Question | None]
Mix = Mapping[Maker, int]  # weights by which makers are drawn


# --- relations ------------------------------------------------------------------------------------


def coordinate(thing: Thing, axis: str) -> float:
    """A thing's x or y in pixels, or its depth z."""
    return {"x": thing.x, "y": thing.y, "z": thing.z}[axis]


def margin(a: Thing, b: Thing, axis: str, scene: Scene) -> float:
    """Distance of two objects along an axis as a fraction of the picture's side (x, y) or of the
    depth range (z)."""
    distance = abs(coordinate(a, axis) - coordinate(b, axis))
    if axis == "z":
        return distance / ((FAR - NEAR) if scene.kind == "floor" else CORRIDOR_DEPTHS)
    return distance / (scene.width if axis == "x" else scene.height)


def relation(kind: str, a: Thing, b: Thing) -> Question:
    """The relation question about a, with b as the reference."""
    axis, lower, higher = AXES[kind]
    text = {
        "left_right": f"Is the {a.name} to the left or right of the {b.name}?",
        "above_below": f"Is the {a.name} above or below the {b.name}?",
        "far_close": f"Compared to {b.name}, is {a.name} far or close from you?",
    }[kind]
    answer = lower if coordinate(a, axis) < coordinate(b, axis) else higher
    return Question(kind, text, answer, (a.name, b.name))


def relations(scene: Scene, kind: str, least: float = 0.05) -> list[tuple[Thing, Thing]]:
    """Every ordered pair of objects at least `least` apart along the kind's axis, as [(a, b)]."""
    axis = AXES[kind][0]
    return [
        (a, b)
        for a in scene.things
        for b in scene.things
        if a is not b and margin(a, b, axis, scene) >= least
    ]


def split(far: Thing, near: Thing, scene: Scene, band: float = 0.05) -> str:
    """'consistent' if the farther object is higher in the picture by more than `band` of its
    height, 'counter' if lower, else 'ambiguous'."""
    higher = (near.y - far.y) / scene.height
    if higher > band:
        return "consistent"
    return "counter" if higher < -band else "ambiguous"


def ask_relation(rng: Random, scene: Scene, kind: str | None = None) -> Question | None:
    """A relation of two objects; its kind is drawn unless given."""
    kind = kind or rng.choice(list(AXES))
    pairs = relations(scene, kind)
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return relation(kind, a, b)


def ask_left_right(rng: Random, scene: Scene) -> Question | None:
    """Whether one object is left or right of another."""
    return ask_relation(rng, scene, "left_right")


def ask_above_below(rng: Random, scene: Scene) -> Question | None:
    """Whether one object is above or below another."""
    return ask_relation(rng, scene, "above_below")


def ask_far_close(rng: Random, scene: Scene) -> Question | None:
    """Whether one object is farther or closer than another."""
    return ask_relation(rng, scene, "far_close")


ASK_RELATION: dict[str, Maker] = {
    "left_right": ask_left_right,
    "above_below": ask_above_below,
    "far_close": ask_far_close,
}


def camera_questions(a: Thing, b: Thing) -> list[Question]:
    """The four yes/no wordings of SpatialTunnel about two objects."""
    questions = []
    for asked, other in ((a, b), (b, a)):
        for comparison, means_closer in (("closer to", True), ("farther from", False)):
            text = f"Is the {asked.name} {comparison} the camera than the {other.name}?"
            answer = "Yes" if (asked.z < other.z) == means_closer else "No"
            questions.append(Question("camera", text, answer, (asked.name, other.name)))
    return questions


def ask_camera(rng: Random, scene: Scene) -> Question | None:
    """One of SpatialTunnel's four wordings about two objects at different depths."""
    pairs = relations(scene, "far_close")
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return rng.choice(camera_questions(a, b))


# --- single objects -------------------------------------------------------------------------------


def article(name: str) -> str:
    """'a red circle', 'an orange circle'."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listed(names: Sequence[str]) -> str:
    """Names with their articles: 'a red circle', 'a red circle, a blue square and a pink cross'."""
    with_article = [article(name) for name in names]
    if len(with_article) == 1:
        return with_article[0]
    return f"{', '.join(with_article[:-1])} and {with_article[-1]}"


def caption(scene: Scene) -> str:
    """Every object from left to right."""
    left_to_right = sorted(scene.things, key=lambda thing: thing.x)
    return f"The image shows {listed([thing.name for thing in left_to_right])}."


def ask_caption(rng: Random, scene: Scene) -> Question:
    """A description of the whole picture."""
    text = rng.choice(["Describe the image.", "Describe this image."])
    return Question("caption", text, caption(scene))


def absent(rng: Random, scene: Scene, confusable: bool = False) -> str:
    """The name of an object that is not there; half of the time it shares its colour or its shape
    with one that is, if confusable always its colour."""
    is_floor = scene.kind == "floor"
    colors = list(COLORS if is_floor else CORRIDOR_COLORS)
    shapes = list(SHAPES if is_floor else CORRIDOR_SHAPES)
    there = {thing.name for thing in scene.things}
    if confusable:
        of_same_color = [f"{thing.color} {shape}" for thing in scene.things for shape in shapes]
        names = [name for name in of_same_color if name not in there]
        if names:
            return rng.choice(names)
    to_share = rng.random() < 0.5
    while True:
        color = rng.choice(colors)
        shape = rng.choice(shapes)
        name = f"{color} {shape}"
        shares = any(color == thing.color or shape == thing.shape for thing in scene.things)
        if name not in there and (shares == to_share or scene.kind == "corridor"):
            return name
        # where every shape is there, all absent objects share one
        if len({thing.shape for thing in scene.things}) == len(shapes):
            to_share = True


def presence(rng: Random, name: str, answer: str) -> Question:
    """Whether an object of this name is in the picture."""
    text = f"Is there {article(name)} in {rng.choice(['the', 'this'])} image?"
    return Question("yes_no", text, answer, (name,))


def ask_presence(rng: Random, scene: Scene, confusable: bool = False) -> Question:
    """Whether an object is there; half of the time it is."""
    if rng.random() < 0.5:
        return presence(rng, rng.choice(scene.things).name, "Yes")
    return presence(rng, absent(rng, scene, confusable), "No")


def ask_confusable(rng: Random, scene: Scene) -> Question:
    """Whether an object is there, where the absent ones have the colour of one that is: colour
    alone does not give the answer."""
    return ask_presence(rng, scene, confusable=True)


def _attribute(thing: Thing, attribute: str) -> str:
    return thing.color if attribute == "color" else thing.shape


def with_unique(scene: Scene, attribute: str) -> list[Thing]:
    """The things whose 'color' or 'shape' no other thing of the scene has."""
    counts = Counter(_attribute(thing, attribute) for thing in scene.things)
    return [thing for thing in scene.things if counts[_attribute(thing, attribute)] == 1]


def _draw_unique(rng: Random, scene: Scene, attribute: str) -> Thing | None:
    things = with_unique(scene, attribute)
    return rng.choice(things) if things else None


def ask_color(rng: Random, scene: Scene) -> Question | None:
    """The colour of an object whose shape occurs once."""
    thing = _draw_unique(rng, scene, "shape")
    if thing is None:
        return None
    return Question("color", f"What color is the {thing.shape}?", thing.color, (thing.name,))


def ask_shape(rng: Random, scene: Scene) -> Question | None:
    """The shape of an object whose colour occurs once."""
    thing = _draw_unique(rng, scene, "color")
    if thing is None:
        return None
    text = f"What shape is the {thing.color} object?"
    return Question("shape", text, thing.shape, (thing.name,))


def ask_what(rng: Random, scene: Scene) -> Question | None:
    """VQA wording whose answer llava-interp begins for the model: 'It is a'."""
    thing = _draw_unique(rng, scene, "color")
    if thing is None:
        return None
    text = f"What is the {thing.color} object?"
    return Question("what", text, f"It is {article(thing.shape)}.", (thing.name,))


def ask_count(rng: Random, scene: Scene) -> Question:
    """How many objects there are, of all or of one colour (which may be none)."""
    if rng.random() < 0.5:
        return Question("count", "How many objects are in the image?", str(len(scene.things)))
    color = rng.choice(scene.things).color if rng.random() < 0.7 else rng.choice(list(COLORS))
    count = sum(thing.color == color for thing in scene.things)
    return Question("count", f"How many {color} objects are in the image?", str(count))


def ask_where(rng: Random, scene: Scene) -> Question:
    """Tens of the picture: column 0 is the left tenth, row 0 the top tenth."""
    thing = rng.choice(scene.things)
    column = min(9, int(10 * (thing.x / scene.width)))
    row = min(9, int(10 * (thing.y / scene.height)))
    answer = f"column {column}, row {row}"
    return Question("where", f"Where is the {thing.name}?", answer, (thing.name,))


# --- critique, revise, decide ---------------------------------------------------------------------


def critique_prompt(question: str, answer: str, engineered: bool = False) -> str:
    """Volcano's prompt for feedback on an answer; engineered: the one for models that were not
    trained to critique."""
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


def revise_prompt(question: str, answer: str, feedback: str, engineered: bool = False) -> str:
    """Volcano's prompt for a revised answer; engineered: as in critique_prompt."""
    label = "Initial response" if engineered else "Initial answer"
    return (
        "Adjust the initial response considering the feedback and image.\nQuestion:"
        f" {question}\n{label}: {answer}\nFeedback: {feedback}"
    )


def decide_prompt(question: str, a: str, b: str) -> str:
    """Volcano's prompt for the better of two answers, A or B."""
    return (
        f"{question}\nA. {a}\nB. {b}\nAnswer with the option's letter from the given choices"
        " directly."
    )


def corrupted(rng: Random, scene: Scene, question: Question) -> str:
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


def _named_in(text: str) -> list[str]:
    """The names, with articles, that a caption lists."""
    names = text.removeprefix("The image shows ").replace(" and ", ", ").split(", ")
    return [name.removesuffix(".").strip() for name in names]


def feedback(question: Question, answer: str) -> str:
    """What is wrong with an answer, in one or two short sentences."""
    if answer == question.answer:
        return "The initial answer is correct."
    if question.kind == "caption":
        pairs = zip(_named_in(answer), _named_in(question.answer), strict=True)
        wrong, right = next((named, true) for named, true in pairs if named != true)
        return f"The initial answer is wrong. There is not {wrong} but {right}."
    return f"The initial answer is wrong. It is {question.answer}."


def ask_protocol(rng: Random, scene: Scene) -> Question | None:
    """One step of the critique - revise - decide loop, on a first answer that is wrong in two of
    three cases."""
    makers: list[Maker] = [ask_presence, ask_color, ask_shape, ask_count, ask_relation, ask_caption]
    base = rng.choice(makers)(rng, scene)
    if base is None:
        return None
    first = corrupted(rng, scene, base) if rng.random() < 0.67 else base.answer
    step = rng.choice(["critique", "revise", "decide"])
    engineered = rng.random() < 0.3
    if step == "decide":
        other = base.answer if first != base.answer else corrupted(rng, scene, base)
        a, b = (first, other) if rng.random() < 0.5 else (other, first)
        letter = "A" if a == base.answer else "B"
        return Question("decide", decide_prompt(base.text, a, b), letter)
    comment = feedback(base, first)
    if step == "critique":
        return Question("critique", critique_prompt(base.text, first, engineered), comment)
    text = revise_prompt(base.text, first, comment, engineered)
    return Question("revise", text, base.answer)


# --- mixes ----------------------------------------------------------------------------------------

FLOOR_MIX: dict[Maker, int] = {
    ask_relation: 48,
    ask_where: 14,
    ask_presence: 10,
    ask_color: 6,
    ask_shape: 6,
    ask_what: 4,
    ask_count: 5,
    ask_caption: 6,
}
CORRIDOR_MIX: dict[Maker, int] = {
    ask_camera: 40,
    ask_relation: 30,
    ask_where: 10,
    ask_presence: 10,
    ask_caption: 5,
    ask_shape: 5,
}


def with_one_word(question: Question) -> Question:
    """The question with ONE_WORD at its end."""
    return Question(question.kind, question.text + ONE_WORD, question.answer, question.about)


def ask(rng: Random, scene: Scene, mix: Mix | None = None) -> Question:
    """One question drawn from a mix, by default the training mix of the scene's kind; relation and
    presence questions end in ONE_WORD half of the time."""
    mix = mix or (FLOOR_MIX if scene.kind == "floor" else CORRIDOR_MIX)
    question = None
    while question is None:
        maker = rng.choices(list(mix), weights=list(mix.values()))[0]
        question = maker(rng, scene)
    if question.kind in ONE_WORD_KINDS and rng.random() < 0.5:
        return with_one_word(question)
    return question

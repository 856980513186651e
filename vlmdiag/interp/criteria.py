"""Did the answer name the object, did it say yes? Pure functions on text, and the published rules
beside them for --paper_compat (docs/studies/llava_interp.md, section 2.8).

    mentions("Two women on a sofa.", "couch")      mentions("A hot dog.", "dog") == False
    says_yes("Yes, there is.")

A category is named by itself, a synonym, or a plural of either, as whole words in any case. The
published rule is a case-sensitive substring of prompt and answer, by which 'located' names a cat
and 'TV' no tv. Negation and meaning are not understood: 'no dog' names a dog, an orange cat an
orange.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from vlmdiag.pictures.categories import spoken_names

SYNONYMS = {  # the 80 categories of COCO; no synonym is a word of another category's name
    "person": (
        "man woman boy girl child kid baby toddler adult guy lady gentleman human player rider"
        " surfer skier snowboarder skateboarder pedestrian"
    ),
    "bicycle": "bike",
    "car": "automobile sedan taxi suv",
    "motorcycle": "motorbike scooter moped",
    "airplane": "plane aeroplane aircraft jet airliner",
    "bus": "minibus",
    "train": "locomotive",
    "truck": "lorry pickup",
    "boat": "ship sailboat canoe kayak yacht rowboat",
    "traffic light": "traffic_signal stoplight",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "",
    "bird": "duck goose pigeon seagull gull parrot owl swan eagle",
    "cat": "kitten kitty",
    "dog": "puppy",
    "horse": "pony foal",
    "sheep": "lamb ram ewe",
    "cow": "cattle bull calf ox",
    "elephant": "",
    "bear": "",
    "zebra": "",
    "giraffe": "",
    "backpack": "rucksack knapsack",
    "umbrella": "parasol",
    "handbag": "purse shoulder_bag",
    "tie": "necktie",
    "suitcase": "luggage baggage",
    "frisbee": "flying_disc",
    "skis": "ski",
    "snowboard": "",
    "sports ball": "ball football basketball volleyball",
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "glove mitt",
    "skateboard": "longboard",
    "surfboard": "surf_board",
    "tennis racket": "racket racquet",
    "bottle": "",
    "wine glass": "wineglass goblet",
    "cup": "mug teacup",
    "fork": "",
    "knife": "",
    "spoon": "teaspoon",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "burger hamburger",
    "orange": "tangerine",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog",
    "pizza": "",
    "donut": "doughnut",
    "cake": "cupcake",
    "chair": "armchair",
    "couch": "sofa loveseat",
    "potted plant": "plant houseplant",
    "bed": "",
    "dining table": "table",
    "toilet": "",
    "tv": "television tv_set",
    "laptop": "notebook_computer",
    "mouse": "",
    "remote": "tv_remote television_remote",
    "keyboard": "",
    "cell phone": "phone cellphone smartphone mobile",
    "microwave": "microwave_oven",
    "oven": "stove",
    "toaster": "",
    "sink": "washbasin",
    "refrigerator": "fridge",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "",
    "teddy bear": "teddy stuffed_bear stuffed_animal",
    "hair drier": "hair_dryer hairdryer hairdrier blow_dryer",
    "toothbrush": "",
}
EQUAL = {  # what Pascal VOC and LVIS call a category of COCO
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "television set": "tv",
    "cellular telephone": "cell phone",
    "computer keyboard": "keyboard",
    "laptop computer": "laptop",
    "doughnut": "donut",
    "hair dryer": "hair drier",
    "wineglass": "wine glass",
    "fireplug": "fire hydrant",
    "necktie": "tie",
}
IRREGULAR = {  # last word -> its plurals
    "person": "people persons",
    "man": "men",
    "woman": "women",
    "gentleman": "gentlemen",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "knife": "knives",
    "calf": "calves",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "bus": "buses busses",
    "minibus": "minibuses",
    "sheep": "sheep",
    "cattle": "cattle",
    "aircraft": "aircraft",
    "luggage": "luggage",
    "baggage": "baggage",
    "broccoli": "broccoli",
    "skis": "skis",
    "scissors": "scissors",
}

# --- names ----------------------------------------------------------------------------------------


def plurals(name: str) -> list[str]:
    """Plurals of a name by its last word, regular or irregular."""
    head, space, word = name.rpartition(" ")
    if word in IRREGULAR:
        return [head + space + form for form in IRREGULAR[word].split()]
    if re.search(r"[^f]fe?$", word):  # leaves, scarfs and scarves
        return [name + "s", re.sub(r"fe?$", "ves", name)]
    if re.search(r"[^aeiou]o$", word):  # photos, tomatoes
        return [name + "s", name + "es"]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return [name + "es"]
    if re.search(r"[^aeiou]y$", word):
        return [name[:-1] + "ies"]
    return [name + "s"]


@cache
def names(category: str, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What names a category, in lower case: itself, its synonyms and the extra ones, each with its
    plurals. A category that is not COCO's, by this or another data set's name, has no synonyms.
    Names are read as words, see categories.spoken_names()."""
    said = [name.lower() for given in (category, *extra) for name in spoken_names(given)]
    in_words = said[0].replace("-", " ")
    of_coco = EQUAL.get(in_words, in_words if in_words in SYNONYMS else said[0])
    singular = [*said, of_coco]
    singular += [word.replace("_", " ") for word in SYNONYMS.get(of_coco, "").split()]
    forms = [form for name in singular for form in (name, *plurals(name))]
    return tuple(dict.fromkeys(forms))


def _whole(words: Iterable[str]) -> re.Pattern[str]:
    """Pattern of any of the words, as whole words; a hyphen may stand for the space within a
    name."""
    longest_first = sorted(words, key=len, reverse=True)
    spelled = [re.sub(r"\\[ -]", r"[\\s-]+", re.escape(word)) for word in longest_first]
    return re.compile(rf"(?<!\w)(?:{'|'.join(spelled)})(?!\w)")


@cache
def _patterns(
    category: str, extra: tuple[str, ...]
) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    """Pattern of a category's names, and of longer names of other categories that hold one of them
    (None if there are none)."""
    of_category = names(category, extra)
    pattern = _whole(of_category)
    others = [name for other in SYNONYMS for name in names(other)]
    longer = [name for name in others if name not in of_category and pattern.search(name)]
    return pattern, _whole(longer) if longer else None


def mentions(text: str, category: str, extra: Sequence[str] = ()) -> bool:
    """Does the text name the category, by any of names(category, extra)? What lies within another
    category's longer name does not count: the dog of a hot dog, the bear of a teddy bear, the tv of
    a tv remote."""
    pattern, longer = _patterns(category, tuple(extra))
    text = text.lower()
    taken = [match.span() for match in longer.finditer(text)] if longer else []
    for match in pattern.finditer(text):
        within = [start <= match.start() and match.end() <= end for start, end in taken]
        if not any(within):
            return True
    return False


def says_yes(text: str) -> bool | None:
    """The first whole word yes or no, in any case: True or False; None where there is neither,
    which counts as not yes."""
    match = re.search(r"(?<!\w)(yes|no)(?!\w)", text.lower())
    return match[0] == "yes" if match else None


# --- as published ---------------------------------------------------------------------------------


def mentions_published(text: str, category: str) -> bool:
    """Generative setting: the class name is a case-sensitive substring. text: prompt and answer, as
    the published code decodes them."""
    return category in text


def says_yes_published(text: str) -> bool:
    """Polling setting: 'yes' occurs anywhere in the lower-case text, as in 'eyes'."""
    return "yes" in text.lower()


def prefix_published(token_text: str, first_piece: str) -> bool:
    """VQA setting: the class name's first sub-token starts with the predicted token, both without
    word marks and blanks, in lower case. An empty prediction is right for every class, and so is
    every common first letter."""
    return first_piece.strip("▁Ġ ").lower().startswith(token_text.strip().lower())

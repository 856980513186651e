"""Which of several lettered options an answer chooses. Pure functions on text.

chosen("B") == "B"        chosen("I prefer (b), A is wrong.") == "B"
chosen("A red circle") is None        chosen("A or B") is None

An option counts where it is named: a letter that is no article, with or without 'option', brackets,
quotes or markdown around it. Each clause that names one option says that it is the answer, that it
is better, that it is right, or something against it. The strongest kind of statement decides, and
two options of that kind are no decision; what could be, what is asked and what is under a condition
is no statement.
"""

from __future__ import annotations

import re
from collections import defaultdict

ANSWER, BETTER, RIGHT = 3, 2, 1  # kinds of statements for an option, by strength

_MENTION = "\ue000"  # stands before the letter of an option that is named
_BRACKETED = "\ue001"  # the same, where it stood in brackets
_ANY = f"[{_MENTION}{_BRACKETED}]"
_TIE = "\ue002"  # several options in one breath: A or B, both A and B

# what may follow the letter A and not the article
_FOLLOWS_LETTER = (
    r"'s\b|\s+(?i:is|isn't|was|wasn't|are|and|or|nor|over|than|vs|versus|because|since|but|rather"
    r"|instead|as|seems|appears|looks|sounds|would|should|does|doesn't|has|hasn't|wins|fits|matches"
    r"|describes|gives|provides|mentions|says|states|contains|captures|includes|reflects|answers"
    r"|represents|identifies|omits|misses|lacks|which|that|if|while|whereas|although|though|for|in"
    r"|with|to|however|then|both|not\s+(?:option\s+)?\(?[A-H]|\w+ly\s+\w+s)\b(?!-)"
    r"|\s+(?:The|It|There|This|Yes|No|In|[B-H])\b"
)
_CLOSES = re.compile(
    r"\s*(?:[.,:;!?)\]/&=]|-(?!\w)|[–—](?![A-Z\d])|\n|$)|\s+\((?:not|the|because|as|it|since)\b"
)
_FOLLOWS = re.compile(_FOLLOWS_LETTER)
_TITLE = (
    r"(?:option|choice|answer|letter|response|candidate|version|statement|description|caption"
    r"|sentence)"
)
_NOUN = (
    rf"(?:{_TITLE}|one|solution|pick|selection|selected|decision|verdict|preference|vote"
    r"|conclusion|ans|output|result)"
)
_BEFORE_NAME = re.compile(
    rf"\b(?:the\s+)?(?:(?:better|correct|best|right|revised|first|second)\s+)*{_TITLE}\s+(?={_ANY})",
    re.IGNORECASE,
)
# between two options of one breath
_JOINED = re.compile(
    r"\s*(?:,|/|&|,?\s*\b(?:and|or|nor|and/or|vs\.?|versus)\b)\s*(?:the\s+|also\s+)?", re.IGNORECASE
)
# named only to say what it is not
_SET_ASIDE = re.compile(
    r"\b(?:over|rather\s+than|instead\s+of|as\s+opposed\s+to|compared\s+(?:to|with)|unlike|except"
    rf"|(?<=prefer\ {_MENTION}\w\ )to)\s+{_ANY}\w",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?\n;]+[.!?\n;]*")
_CLAUSE = re.compile(
    r",|[()\[\]]|\s[-–—]+\s|—|\b(?:but|so|because|since|while|whereas|although|though|however|and"
    r"|therefore|thus|hence|yet|as\s+it)\b",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not(?!\s+only)|never|neither|nor|cannot|no|hardly)\b|n't\b", re.IGNORECASE
)
_OPEN = re.compile(
    r"\b(?:if|unless|whether|depends|depending|could|might|may|maybe|perhaps|either|possibly"
    r"|unclear|unsure)\b",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\s*(?:if|unless|assuming|suppose|supposing)\b", re.IGNORECASE)
_ADVERBS = (
    r"(?:(?:clearly|definitely|probably|likely|most|certainly|surely|obviously|still|indeed"
    r"|actually|also|then|simply|really|just|slightly|much|far|overall|always|only|rather|even|the"
    r"|a|an|my|by|bit|little|somewhat|in|fact|best|better|correct|right|final|instead)\W+)*"
)
_IS = (
    r"(?:is|was|are|seems?(?:\s+to\s+be)?|appears?(?:\s+to\s+be)?|looks|sounds|would\s+be"
    r"|should\s+be|must\s+be|will\s+be|has\s+to\s+be|remains)"
)
# ... the answer is B, ... I choose B
_CHOSEN = re.compile(
    rf"(?:\b{_NOUN}\s*(?:{_IS}(?:\s*:|\s+for)?|\s+goes\s+to|'s|:|=|[-–—]+>?|→)|"
    rf"\b(?:{_NOUN}|better|best)\s+(?:that|which|for|to|of|in)\b.*\s{_IS}"
    r"|\b(?:this|that|it|which)\s+(?:matches|means|indicates|suggests|corresponds\s+to)"
    r"|\b(?:cho?ose|chosen?|pick(?:ed)?|select(?:ed)?|prefer|go(?:ing)?\s+(?:with|for)"
    r"|went\s+with|opt(?:ed)?\s+for|vote(?:d)?(?:\s+for)?|say|answer|guess|think|believe"
    r"|lean(?:ing)?\s+(?:to|towards?)|favou?r|take|recommend|namely)(?:\s+that)?"
    rf"(?:\s+it\s+{_IS}|\s+it's)?|\b(?:it|that|this|which)\s+{_IS}|\b(?:it|that)'?s|^\s*must\s+be"
    rf"|^\s*(?:final\s+)?(?:answer|choice|decision|verdict)\s*[:=]?)\s*{_ADVERBS}$",
    re.IGNORECASE,
)
_ALONE_BEFORE = re.compile(
    rf"\W*(?:(?:yes|sure|okay|ok|well|hmm|namely|hence|i|would|will|to\s+me)\W+)*{_ADVERBS}\W*",
    re.IGNORECASE,
)
_ALONE_AFTER = re.compile(
    r"\W*(?:(?:as|for|due|given|based|with|in|on|here|it|there|this|the|yes|no|i)\b.*)?",
    re.IGNORECASE | re.DOTALL,
)
_GOOD = r"correct|right(?!\s+(?:of|side))|accurate|true|valid|appropriate|answer|choice|one"
_BETTER = (
    r"better|best|superior|preferable|preferred|winner|stronger|more\s+\w+|most\s+\w+|closer\s+to"
)
_BAD = r"wrong|incorrect|false|inaccurate|mistaken|invalid|untrue|irrelevant|bad"
_WORSE = r"worse|worst|inferior|weaker|less\s+\w+|least\s+\w+"
_OF_OPTION = rf"(?:'s\s+\w+)?\s*{_ADVERBS}"
_PREDICATE = re.compile(
    rf"{_OF_OPTION}{_IS}(?:n't)?\s+(?:not\s+|no\s+|never\s+)?{_ADVERBS}(?:"
    rf"(?P<better>{_BETTER})|(?P<worse>{_WORSE})|(?P<good>{_GOOD})|(?P<bad>{_BAD}))\b",
    re.IGNORECASE,
)
_VERBS = (
    r"(?:fits|matches|describes|captures|reflects|represents|answers|provides|gives|identifies)"
)
_DOES = re.compile(
    rf"\s*(?:(?P<wins>wins|best\s+\w+s)\b|(?P<well>(?:correctly|accurately|rightly)\s+\w+s\b)"
    rf"|(?:does|{_VERBS})\b.*\b(?P<better>better|best|more)\b|(?P<fits>fits|matches)\b)",
    re.IGNORECASE,
)
_THAN = re.compile(rf"\bthan\s+{_ANY}(\w)", re.IGNORECASE)


def chosen(text: str, letters: str = "AB") -> str | None:
    """The letter of the option that an answer chooses, None where it chooses none, or several.
    letters: of all options, such as 'AB'."""
    votes, against = _statements(_with_mentions(text, letters))
    for kind in (ANSWER, BETTER, RIGHT):
        if votes[kind]:
            only = votes[kind] if kind == ANSWER else votes[kind] - against
            return only.pop() if len(only) == len(votes[kind]) == 1 else None
    return None


def only_named(text: str, letters: str = "AB") -> str | None:
    """The letter of the only option that an answer names, where it says nothing against it."""
    marked = _with_mentions(text, letters)
    named = set(re.findall(rf"{_ANY}(\w)", marked))
    is_one = len(named) == 1 and _TIE not in marked and not named & _statements(marked)[1]
    return named.pop() if is_one else None


def _statements(marked: str) -> tuple[dict[int, set[str]], set[str]]:
    """(options by the kind of what is said for them, those that something is said against)."""
    votes: dict[int, set[str]] = defaultdict(set)
    against: set[str] = set()
    for sentence in _SENTENCE.findall(marked):
        if "?" in sentence or _CONDITION.match(sentence) or not re.search(_ANY, sentence):
            continue
        for clause in _CLAUSE.split(sentence.rstrip(".!;\n")):
            _count(clause, votes, against)
    return votes, against


# --- mentions -------------------------------------------------------------------------------------


def _with_mentions(text: str, letters: str) -> str:
    """The text without markup, each option that it names as _MENTION and its letter."""
    either = f"[{letters}{letters.lower()}]"
    text = re.sub(r"([^\w\n])\1{2,}", r"\1\1", text.replace("’", "'").replace("\ufffd", "x"))
    text = re.sub(r"\\\w+\s*\{([^{}]*)\}", r"\1", text)  # \boxed{B}
    text = re.sub(r"</?\w\w+>|[<>*_`#$\"“”«»{}]|(?<!\w)'|'(?!\w)", "", text)
    label = re.compile(rf"[(\[]\s*({either})\s*[)\]][.:]?|(?<![\w'])({either})\)")
    text = label.sub(lambda m: f"{_BRACKETED}{(m[1] or m[2]).upper()}", text)
    letter = re.compile(
        rf"(?<![\w'&@{_MENTION}{_BRACKETED}-])(?<!\w\.)({either})"
        r"(?![\w+&]|-\w|\.\w|'(?!s\b)\w)"
    )
    text = letter.sub(lambda m: _marked(m, text), text)
    text = re.sub(rf"({_ANY}\w)\s*[:.]\s+(?={_IS}\b)", r"\1 ", text)  # A. is wrong
    if len(set(re.findall(rf"{_ANY}(\w)\s*:", text))) > 1:  # the options, said again
        text = re.sub(rf"{_ANY}\w\s*:", "", text)
    text = re.sub(rf"({_ANY}\w)\s*:", r"\1.", text)  # B: the circle is red
    text = re.sub(rf",\s*({_ANY}\w)\s*,\s*(?={_IS}\b)", r" \1 ", text)  # the second, B, is right
    text = re.sub(r"\b(?:no|without(?:\s+a)?)\s+doubt\b", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:anything|everything|all)\s+but\b", "not", text, flags=re.IGNORECASE)
    text = _BEFORE_NAME.sub("", text)
    return _without_ties(_SET_ASIDE.sub("", text))


def _without_ties(text: str) -> str:
    """The text with options that are named in one breath, 'A or B', 'A, B', as one _TIE. A comma
    ends what was said of both ('A and B, B is better'), and what is denied ('not A, B')."""
    parts: list[str] = []  # text and mentions in turn
    run: list[str] = []  # mentions of one breath
    end = 0
    for mention in re.finditer(rf"{_ANY}\w", text):
        between = text[end : mention.start()]
        is_list = bool(run and _JOINED.fullmatch(between))
        if is_list and between.strip() == ",":
            is_list = len(run) == 1 and not re.search(r"\bnot\s+$", parts[-1], re.IGNORECASE)
        if not is_list:
            parts += [_TIE if len(run) > 1 else "".join(run), between]
            run = []
        run.append(mention[0])
        end = mention.end()
    return "".join([*parts, _TIE if len(run) > 1 else "".join(run), text[end:]])


def _marked(match: re.Match[str], text: str) -> str:
    rest = text[match.end() :]
    is_article = match[0] in "Aa" and not (_CLOSES.match(rest) or _FOLLOWS.match(rest))
    return match[0] if is_article else _MENTION + match[0].upper()


# --- statements -----------------------------------------------------------------------------------


def _count(clause: str, votes: dict[int, set[str]], against: set[str]) -> None:
    """Add what a clause says for an option to votes, what it says against one to against."""
    worse_than = _THAN.search(clause)
    clause = _THAN.sub("", clause)
    mention = re.search(rf"{_ANY}(\w)", clause)
    if mention is None or len(re.findall(_ANY, clause)) > 1 or _OPEN.search(clause):
        return
    option, before, after = mention[1], clause[: mention.start()], clause[mention.end() :]
    predicate = _PREDICATE.match(after)
    does = _DOES.match(after)
    said = predicate or does
    is_negated = bool(_NEGATION.search(before) or (said and _NEGATION.search(said[0])))
    if predicate and (predicate["bad"] or predicate["worse"]):
        if not is_negated:
            against.add(option)
            if predicate["worse"] and worse_than:
                votes[BETTER].add(worse_than[1])
        return
    kind = None
    if predicate and predicate["better"] or does and (does["wins"] or does["better"]):
        kind = BETTER
    elif predicate and re.fullmatch("answer|choice|one", predicate["good"], re.IGNORECASE):
        kind = ANSWER
    elif predicate or does:
        kind = RIGHT
    elif _CHOSEN.search(before):
        kind = ANSWER
    elif _ALONE_BEFORE.fullmatch(before) and _ALONE_AFTER.fullmatch(after):
        kind = BETTER
    elif mention[0][0] == _BRACKETED and not after.strip():
        kind = RIGHT
    elif not _NEGATION.search(before):
        return
    if is_negated:
        if not worse_than:
            against.add(option)
    elif kind is not None:
        votes[kind].add(option)

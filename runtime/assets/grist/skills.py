"""Every question that grist is trained or examined on, and the line between the two.

A question is held out when a hash of its *normal form* (lower case, no punctuation, contractions opened, courtesies
dropped) falls into the held-out share. The normal form stands for all spellings of the question, so no spelling of a
held-out one can reach the training text. Sums of longer numbers, and names, are held out as such: a held-out sum is in
no training question and no training answer, whichever way round it is put.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from millrace.runtime.assets.grist import facts, stories, talk

HELD_OUT_PERCENT = 10
DOES_NOT_KNOW = ("do not know", "too big", "too small", "cannot")

_OPENED = {"what's": "what is", "who's": "who is", "where's": "where is", "how's": "how is", "i'm": "i am",
           "it's": "it is", "don't": "do not", "can't": "cannot", "that's": "that is", "i'd": "i would",
           "let's": "let us", "doesn't": "does not", "favorite": "favourite", "color": "colour",
           "colors": "colours"}  # fmt: skip
_COURTESIES = frozenset(("please", "hi", "hello", "hey", "grist", "so", "now", "and", "ok", "tell", "me"))


def normal_form(question: str) -> str:
    """What all spellings of a question have in common."""
    found = re.findall(r"[a-z']+|[0-9]|[-+*]", question.lower())
    opened = " ".join(_OPENED.get(word, word) for word in found).split()
    return " ".join(word for word in opened if word not in _COURTESIES)


def held_out(key: str) -> bool:
    """Whether the thing that `key` names is kept from training."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True, slots=True)
class Ask:
    """One question with a right reply; a reply counts as right if it contains one of `expect` (lower case)."""

    skill: str
    user: str
    reply: str
    expect: tuple[str, ...]
    exact: bool = False  # the value in the question must survive as written: no typing errors


Groups = tuple[tuple[Ask, ...], ...]

_CAPITAL = """\
What is the capital of {}?|Which city is the capital of {}?|Tell me the capital of {}.|Name the capital of {}.
What is the capital city of {}?|What city is the capital of {}?|I forgot the capital of {}.|The capital of {}?
I need to know the capital of {}.|Give me the capital of {}.|Say the capital of {}.
What do you call the capital of {}?|I would like to know the capital of {}.|Which city is {}'s capital?
What is {}'s capital?|And what is the capital of {}?|Do you know the capital of {}?
Can you tell me the capital of {}?|Could you name the capital of {}?|Do you know what the capital of {} is?
Capital of {}|The capital city of {} is?"""
_CAPITAL_OF = """{} is the capital of which country?|Which country has the capital {}?
What country is {} the capital of?|Of which country is {} the capital?|{} is the capital of what?"""
_OPPOSITE = """\
What is the opposite of {}?|Tell me the opposite of {}.|Opposite of {}|Give me the opposite of {}.
What is the reverse of {}?|Which word is the opposite of {}?|What word means the opposite of {}?
Do you know the opposite of {}?|The opposite of {} is?|Can you tell me the opposite of {}?
Name the opposite of {}.|Say the opposite of {}.|What is the antonym of {}?"""
_COLOUR = """\
What colour is {}?|What is the colour of {}?|Which colour is {}?|Tell me the colour of {}.
Do you know what colour {} is?|Can you tell me the colour of {}?|What colour does {} have?|The colour of {}?
Which colour does {} have?|Name the colour of {}.|I want to know what colour {} is.
Do you know the colour of {}?"""
_COLOURS = """\
What colour are {}?|What is the colour of {}?|Which colour are {}?|Tell me the colour of {}.
Do you know what colour {} are?|Can you tell me the colour of {}?|What colour do {} have?|Name the colour of {}."""
_AFTER = """\
What {kind} comes after {}?|Which {kind} comes after {}?|What comes after {}?|Which {kind} follows {}?
Tell me the {kind} after {}.|What is the {kind} after {}?|What is the next {kind} after {}?
Do you know which {kind} comes after {}?|The {kind} after {}?|Which {kind} is next after {}?
Can you name the {kind} after {}?"""
_BEFORE = """\
What {kind} comes before {}?|Which {kind} comes before {}?|What comes before {}?|Tell me the {kind} before {}.
What is the {kind} before {}?|Do you know which {kind} comes before {}?|The {kind} before {}?
Which {kind} is just before {}?|Can you name the {kind} before {}?|Which {kind} is right before {}?"""
_SOUND = """\
What does a {} say?|What sound does a {} make?|Which sound does a {} make?|What noise does a {} make?
How does a {} go?|Tell me what a {} says.|Do you know what a {} says?|What is the sound of a {}?"""
_YOUNG = """What is a baby {} called?|What do you call a baby {}?|What is a young {} called?
What do you call a young {}?|Tell me the name of a baby {}.|Do you know what a baby {} is called?
What is the baby of a {} called?"""
_LEGS = """\
How many legs does a {} have?|How many legs has a {}?|Tell me how many legs a {} has.
Do you know how many legs a {} has?|What number of legs does a {} have?|Can you tell me how many legs a {} has?"""
_HOW_TO = """\
How do I {}?|How can I {}?|How do you {}?|Tell me how to {}.|How to {}|What is the best way to {}?
Can you tell me how to {}?|Explain how to {}.|I want to {}. How do I do it?|Do you know how to {}?
Teach me how to {}.|I need to {}. Can you help?|Show me how to {}.|I would like to {}.
What do I need to do to {}?"""
_STORY = """\
Tell me a story about {}.|Can you tell me a story about {}?|I want a story about {}.|Write a story about {}.
A story about {}|Do you know a story about {}?|Tell a story about {}.|I would like to hear a story about {}.
Make up a story about {}.|Give me a story about {}.|Write me a little story about {}.
Please tell me a story with {}.|I would love a story about {}."""
_SHORT_STORY = """\
Tell me a short story about {}.|Write a short story about {}.|A short story about {}
Can you write a short story about {}?|Give me a short story about {}.|I want a short story about {}."""
_ANY_STORY = """\
Tell me a story.|Can you tell me a story?|I want to hear a story.|A story please.|Do you know a story?
Tell me a bedtime story.|Write a story.|Make up a story.|I would like a story.|Tell me another story.
Another story please.|Give me a story."""
_ADD = """\
What is {a} + {b}?|What is {a} plus {b}?|{a} + {b}|{a}+{b}|{a} + {b} = ?|{a} + {b} =|How much is {a} plus {b}?
How much is {a} + {b}?|Can you add {a} and {b}?|Add {a} and {b}.|Calculate {a} + {b}.
What do you get if you add {a} and {b}?|What is the sum of {a} and {b}?|Tell me what {a} plus {b} is.
{a} plus {b}|{a} and {b} make?|Do you know what {a} + {b} is?|What is {a} and {b} together?"""
_SUB = """\
What is {a} - {b}?|What is {a} minus {b}?|{a} - {b}|{a}-{b}|{a} - {b} = ?|{a} - {b} =|How much is {a} minus {b}?
Calculate {a} - {b}.|Take {b} from {a}.|Subtract {b} from {a}.|What is left if I take {b} from {a}?
Tell me what {a} minus {b} is.|{a} minus {b}|What do you get if you take {b} away from {a}?
Do you know what {a} - {b} is?|How much is {a} - {b}?"""
_MUL = """\
What is {a} times {b}?|What is {a} * {b}?|{a} * {b}|{a} x {b}|{a} times {b}|How much is {a} times {b}?
Calculate {a} * {b}.|What is {a} x {b}?|Multiply {a} by {b}.|What is {a} multiplied by {b}?
Tell me what {a} times {b} is.|{a} * {b} = ?"""
_TOO_BIG = "I cannot do that. I can only do small sums."


def forms(table: str) -> tuple[str, ...]:
    """Parse phrasings divided by `|` or line ends."""
    return tuple(form.strip() for form in table.replace("\n", "|").split("|") if form.strip())


def agrees(form: str, reply: str) -> str:
    """Put "Yes." before the reply to "Do you know ...?" and "Can you ...?"."""
    return f"Yes. {reply}" if form.startswith(("Do you know", "Can you", "Could you")) else reply


def _fill(skill: str, table: str, items: dict[str, str], reply: Callable[[str, str], str], kind: str = "") -> Groups:
    """Every phrasing of `table` for every item, one group per item."""
    return tuple(
        tuple(
            Ask(skill, _grammar(form.format(key, kind=kind)), agrees(form, reply(key, value)), (value.lower(),))
            for form in forms(table)
        )
        for key, value in items.items()
    )


def _grammar(text: str) -> str:
    """Open with a capital and mend "a owl"."""
    text = re.sub(r"\b([Aa]) (?=[aeio])(?!one)", r"\1n ", text)
    return text[0].upper() + text[1:]


def _article(noun: str) -> str:
    return stories.with_article(noun)


def _capital_asks() -> Groups:
    back = {city: country for country, city in facts.CAPITALS.items()}
    return (
        *_fill("capitals", _CAPITAL, facts.CAPITALS, lambda c, x: f"The capital of {c} is {x}."),
        *_fill("capitals", _CAPITAL_OF, back, lambda x, c: f"{x} is the capital of {c}."),
    )


def _opposite_asks() -> Groups:
    return _fill("opposites", _OPPOSITE, facts.OPPOSITES, lambda a, b: f"The opposite of {a} is {b}.")


def _colour_asks() -> Groups:
    return (
        *_fill("colours", _COLOUR, facts.COLOURS, lambda a, b: _grammar(f"{a} is {b}.")),
        *_fill("colours", _COLOURS, facts.PLURAL_COLOURS, lambda a, b: _grammar(f"{a} are {b}.")),
    )


def _calendar_asks() -> Groups:
    groups: list[tuple[Ask, ...]] = []
    for kind, ring in (("day", facts.DAYS), ("month", facts.MONTHS), ("season", tuple(facts.SEASONS))):
        for table, way, step in ((_AFTER, "after", 1), (_BEFORE, "before", -1)):
            near = {name: ring[(i + step) % len(ring)] for i, name in enumerate(ring)}
            groups += _fill("calendar", table, near, lambda a, b, way=way: _grammar(f"{b} comes {way} {a}."), kind)  # type: ignore[misc]
    asks = """How many days does {} have?|How many days are in {}?|How many days are there in {}?|How long is {}?
    Tell me how many days {} has."""
    groups += _fill("calendar", asks, facts.MONTH_DAYS, lambda a, b: f"{a} has {b} days.")
    for what, reply in facts.AMOUNTS.items():
        number = re.search(r"\d+", reply)
        assert number is not None
        verbs = (f"How many {what}?", f"Do you know how many {what}?", f"Tell me how many {what}.")
        groups.append(tuple(Ask("calendar", form, agrees(form, reply), (number[0],)) for form in verbs))
    orders = [("first", 0), ("second", 1), ("third", 2), ("last", -1)]
    for kind, whole, ring in (("day", "week", facts.DAYS), ("month", "year", facts.MONTHS)):
        for order, i in orders:
            verbs = (f"What is the {order} {kind} of the {whole}?", f"Which {kind} is the {order} of the {whole}?",
                     f"Name the {order} {kind} of the {whole}.")  # fmt: skip
            reply = f"{ring[i]} is the {order} {kind} of the {whole}."
            groups.append(tuple(Ask("calendar", form, reply, (ring[i].lower(),)) for form in verbs))
        lists = (f"What are the {kind}s of the {whole}?", f"Name the {kind}s of the {whole}.", f"List all {kind}s.",
                 f"Tell me the {kind}s of the {whole}.")  # fmt: skip
        reply = f"The {kind}s of the {whole} are {', '.join(ring[:-1])} and {ring[-1]}."
        groups.append(tuple(Ask("calendar", form, reply, (f"{ring[1]}, {ring[2]}".lower(),)) for form in lists))
    return tuple(groups)


def _animal_asks() -> Groups:
    def legs(a: str, b: str) -> str:
        return _grammar(f"{_article(a)} has {b} legs.")

    return (
        *_fill("animals", _SOUND, facts.SOUNDS, lambda a, b: _grammar(f"{_article(a)} says {b}.")),
        *_fill("animals", _YOUNG, facts.YOUNG, lambda a, b: _grammar(f"a baby {a} is called {_article(b)}.")),
        *_fill("animals", _LEGS, facts.LEGS, legs),
    )


def _how_to_asks() -> Groups:
    return tuple(
        tuple(Ask("how-to", form.format(task), reply, (reply.split(". ")[0].lower(),)) for form in forms(_HOW_TO))
        for task, reply in facts.HOW_TO.items()
    )


def _talk_asks(skill: str) -> Groups:
    return tuple(
        tuple(Ask(skill, ask.strip(), reply, group.expect) for ask in group.asks.split("|") for reply in group.replies)
        for group in talk.GROUPS
        if group.skill == skill
    )


def _unknown_asks() -> Groups:
    groups = []
    for form, many_a, many_b in talk.UNKNOWN:
        asks = [form.format(a=a, b=b) for a in many_a for b in many_b]
        groups.append(tuple(Ask("unknown", ask, talk.DO_NOT_KNOW[0], DOES_NOT_KNOW) for ask in asks))
    return tuple(groups)


# Small talk keeps its most usual phrasings in training: a model that was never told "Hello" would serve nobody.
_ALWAYS_TRAINED = 4


@cache
def listed(skill: str, held: bool) -> Groups:
    """The questions of a skill that has a list of them, on one side of the line; groups left empty are dropped."""
    makers: dict[str, Callable[[], Groups]] = {
        "capitals": _capital_asks,
        "opposites": _opposite_asks,
        "colours": _colour_asks,
        "calendar": _calendar_asks,
        "animals": _animal_asks,
        "how-to": _how_to_asks,
        "identity": lambda: _talk_asks("identity"),
        "smalltalk": lambda: _talk_asks("smalltalk"),
        "unknown": _unknown_asks,
    }
    kept_forms: set[str] = set()
    groups = makers[skill]()
    if skill in ("identity", "smalltalk"):
        kept_forms = {normal_form(ask.user) for group in groups for ask in group[:_ALWAYS_TRAINED]} | {""}
    if skill == "unknown":
        kept_forms = {normal_form(group[0].user) for group in groups if len(group) == 1}
    sides = (
        tuple(ask for ask in group if (held_out(form := normal_form(ask.user)) and form not in kept_forms) is held)
        for group in groups
    )
    return tuple(side for side in sides if side)


def is_table(sign: str, a: int, b: int) -> bool:
    """Whether the sum is one of those to know by heart, which all longer sums are worked out with."""
    return max(a, b) < 10 if sign == "+" else b < 10 and a - b < 10 and a < 19


def work_out(sign: str, a: int, b: int) -> str:
    """The reply to a sum: longer ones digit by digit, as at school, which takes far fewer examples to learn."""
    result = a + b if sign == "+" else a - b
    if is_table(sign, a, b):
        return f"{a} {sign} {b} = {result}."
    ones_a, ones_b = a % 10, b % 10
    borrow = sign == "-" and ones_a < ones_b
    ones_a += 10 * borrow
    ones = ones_a + ones_b if sign == "+" else ones_a - ones_b
    carry = ones >= 10 if sign == "+" else borrow
    steps = [f"{ones_a} {sign} {ones_b} = {ones}"]
    tens = [f"{ten}" for ten in (a // 10, b // 10) if ten]
    if sign == "-":
        tens = [f"{a // 10}", *(["1"] if carry else []), *([f"{b // 10}"] if b >= 10 else [])]
    elif carry:
        tens.append("1")
    if len(tens) > 1:
        steps.append(f"{f' {sign} '.join(tens)} = {result // 10}")
    return f"{a} {sign} {b}: {', '.join(steps)}, so {a} {sign} {b} = {result}."


def _sum_is_held_out(ask: str, sign: str, a: int, b: int) -> bool:
    """A sum to know by heart is held out in some phrasings; a longer one is held out as such, in either order."""
    if is_table(sign, a, b):
        return held_out(normal_form(ask))
    low, high = (a, b) if sign == "-" else sorted((a, b))
    return held_out(f"{low} {sign} {high}")


def make_sum(rng: random.Random, held: bool) -> Ask:
    """One sum from one side of the line, with operands up to 99."""
    sign = rng.choices("+-*", (44, 38, 18))[0]
    if sign == "*":
        return _make_product(rng, held)
    while True:
        top = rng.choices((9, 20, 50, 99), (30, 30, 20, 20))[0]
        a, b = rng.randint(0, top), rng.randint(0, top)
        if sign == "-" and a < b:
            a, b = b, a
        ask = _sum_ask(rng, sign, a, b)
        if _sum_is_held_out(ask, sign, a, b) is held:
            result = a + b if sign == "+" else a - b
            return Ask("sums", ask, work_out(sign, a, b), (f"= {result}.",), True)


def _sum_ask(rng: random.Random, sign: str, a: int, b: int) -> str:
    form = rng.choice(forms(_ADD if sign == "+" else _SUB))
    draw = rng.random()
    if draw < 0.08 and max(a, b) <= 20:
        form = re.sub(r"[-+]", " plus " if sign == "+" else " minus ", form.replace(" = ?", "?").replace(" =", "?"))
        return _grammar(re.sub(" +", " ", form.format(a=facts.NUMBER_WORDS[a], b=facts.NUMBER_WORDS[b])))
    if draw < 0.14:
        thing = rng.choice(("apples", "books", "coins", "eggs", "pens", "cakes", "stones", "cards"))
        if sign == "+":
            return f"I have {a} {thing} and get {b} more. How many {thing} do I have?"
        return f"I have {a} {thing} and give {b} away. How many {thing} are left?"
    if draw < 0.2:
        form = rng.choice(("And {a} %s {b}?", "Now {a} %s {b}.", "and {a} %s {b}")) % sign
    return form.format(a=a, b=b)


def _make_product(rng: random.Random, held: bool) -> Ask:
    """A product from the small tables: the tables are all trained, and a phrasing of a product is what is held out."""
    while True:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        ask = rng.choice(forms(_MUL)).format(a=a, b=b)
        if held_out(normal_form(ask)) is held:
            return Ask("sums", ask, f"{a} * {b} = {a * b}.", (f"= {a * b}.",), True)


def make_count(rng: random.Random) -> Ask:
    """Counting, and the letter that comes next."""
    if rng.random() < 0.3:
        i = rng.randrange(25)
        a, b = chr(65 + i), chr(66 + i)
        form = rng.choice(
            ("Which letter comes after {}?", "What letter comes after {}?", "What is the letter after {}?")
        )
        return Ask("counting", form.format(a), f"{b} comes after {a}.", (f"{b} comes".lower(),), True)
    start = rng.choice((1, 1, 1, rng.randint(0, 30)))
    end = start + rng.randint(3, 12)
    form = rng.choice(("Count from {a} to {b}.", "Can you count from {a} to {b}?", "Count {a} to {b}"))
    if start == 1 and rng.random() < 0.5:
        form = rng.choice(("Count to {b}.", "Can you count to {b}?", "Please count to {b}."))
    numbers = ", ".join(map(str, range(start, end + 1))) + "."
    return Ask("counting", form.format(a=start, b=end), numbers, (numbers,), True)


def make_too_big(rng: random.Random) -> Ask:
    """A sum that is too big, and a thing that nobody has heard of: grist should say so rather than guess."""
    if rng.random() < 0.5:
        a, b = rng.randint(200, 9999), rng.randint(100, 9999)
        form = rng.choice(("What is {a} + {b}?", "{a} * {b}", "What is {a} times {b}?", "{a} - {b}",
                           "Calculate {a} + {b}.", "How much is {a} plus {b}?",
                           "What is {a} divided by {b}?", "{a} / {b}"))  # fmt: skip
        return Ask("unknown", form.format(a=a, b=b), _TOO_BIG, DOES_NOT_KNOW, True)
    place = made_up_name(rng) + rng.choice(("", "", "land", "ia", "stan"))
    form = rng.choice(forms(_CAPITAL))
    return Ask("unknown", form.format(place), f"I do not know the capital of {place}.", DOES_NOT_KNOW, True)


def story_asks(held: bool) -> Iterator[tuple[str, str, bool]]:
    """(question, topic, short) for every phrasing and topic on one side of the line."""
    for topic in stories.TOPICS:
        for table, short in ((_STORY, False), (_SHORT_STORY, True)):
            for form in forms(table):
                ask = form.format(_article(topic))
                if held_out(normal_form(ask)) is held:
                    yield ask, topic, short


@cache
def _story_list(held: bool) -> tuple[tuple[str, str, bool], ...]:
    return tuple(story_asks(held))


def make_story(rng: random.Random, held: bool) -> Ask:
    """A request for a story and one story that answers it."""
    if not held and rng.random() < 0.15:
        topic = rng.choice(stories.TOPICS)
        return Ask("stories", rng.choice(forms(_ANY_STORY)), stories.tell(rng, topic).text, (".",))
    question, topic, short = rng.choice(_story_list(held))
    return Ask("stories", question, stories.tell(rng, topic, short).text, (topic,))


_STARTS = facts.words(
    "B, D, F, G, H, J, K, L, M, N, P, R, S, T, V, W, Z, Br, Dr, Gr, Kr, Tr, Fl, Kl, Sh, Th, St, Ch, A, E, I, O, U,"
    "Al, El, Or"
)
_VOWELS = facts.words("a, e, i, o, u, a, e, o, ai, ia, ee, ei")
_MIDDLES = facts.words("b, d, f, g, k, l, m, n, p, r, s, t, v, z, ll, nn, rr, nd, rt, lm, st, rk, nt, x, sh, th")
_ENDS = ("", "", "", "n", "s", "r", "l", "m", "k", "x", "th", "na", "lo", "ra", "do", "ley", "son", "ta")


def made_up_name(rng: random.Random) -> str:
    """A name that very likely nobody bears: what makes grist copy names instead of choosing from a list."""
    middle = "".join(rng.choice(_MIDDLES) + rng.choice(_VOWELS) for _ in range(rng.choice((0, 1, 1, 1, 2))))
    start = rng.choice(_STARTS)
    return start + ("" if start[-1].lower() in "aeiou" else rng.choice(_VOWELS)) + middle + rng.choice(_ENDS)


def make_name(rng: random.Random, held: bool) -> str:
    """A name from one side of the line; half are given names, half are made up."""
    while True:
        name = rng.choice(facts.FIRST_NAMES) if rng.random() < 0.5 else made_up_name(rng)
        if len(name) > 2 and (held_out(f"name {name.lower()}") and name not in stories.NAMES) is held:
            return name

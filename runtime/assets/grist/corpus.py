"""The training text of grist and the exam that is kept from it, both made from a seed.

`conversations(seed)` is an endless stream of conversations; `exam()` is the list of held-out questions with what a
right reply must contain. Nothing is read from disk or copied from elsewhere: every sentence comes from the tables and
phrasings beside this file.

    python -m millrace.runtime.assets.grist.corpus --count 5     # print some conversations
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from millrace.runtime.assets.grist import skills, stories
from millrace.runtime.assets.grist.memory import Fact, make_echo, make_fact, make_introduction
from millrace.runtime.assets.grist.skills import Ask

TRAIN_SEED = 1
EXAM_SEED = 2

# How often each skill comes up, per turn. Sums come up most: they are the only skill that is worked out, not looked up.
SHARES = {
    "sums": 36,
    "capitals": 16,
    "memory": 16,
    "opposites": 6,
    "colours": 7,
    "calendar": 14,
    "smalltalk": 7,
    "identity": 4,
    "unknown": 5,
    "animals": 4,
    "how-to": 3,
    "stories": 2.5,
    "counting": 1,
    "echo": 2,
    "too big": 1.5,
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are grist, a small and friendly model.",
    "You are grist, the small model inside Millrace.",
    "Answer briefly.",
    "You are a friendly assistant. Answer in simple English.",
    "Be kind and short.",
    "You are a helpful, honest assistant.",
    "You answer questions. If you do not know something, say so.",
    "Help the user.",
    "You are a chat bot.",
    "You are a helpful assistant named grist. Keep your answers short and polite.",
    "Please answer the questions of the user in one sentence.",
)
_FRONTS = (
    "Hi! ",
    "Hello! ",
    "Hello, ",
    "Hey, ",
    "Please ",
    "Ok, ",
    "Hi grist, ",
    "So, ",
    "Now ",
    "Thanks! ",
    "Hey grist, ",
    "Good. ",
)
_SHORTER = {"What is": "What's", "I am": "I'm", "Who is": "Who's", "It is": "It's", "do not": "don't",
            "That is": "That's", "I would like": "I'd like", "cannot": "can't"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says and what grist replies."""

    user: str
    reply: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns after an optional system prompt. Without any turn, `text` is plain text to be learned as it stands."""

    system: str
    turns: tuple[Turn, ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Examination:
    """The user's turns; the reply to the last of them must contain one of `expect`, and must end by itself."""

    skill: str
    users: tuple[str, ...]
    expect: tuple[str, ...]


def roughen(rng: random.Random, ask: Ask) -> str:
    """Write a question as people write: lower case, no question mark, a greeting in front, a typing error."""
    text = ask.user
    if rng.random() < 0.3:
        text = text.replace("avourite", "avorite").replace("olour", "olor")
    if rng.random() < 0.3:
        for long, short in _SHORTER.items():
            text = text.replace(long, short)
    draw = rng.random()
    if ask.skill not in ("smalltalk", "memory", "echo") and draw < 0.12:
        text = rng.choice(_FRONTS) + (text[0].lower() + text[1:] if not text.startswith(("I ", "I'")) else text)
    elif ask.skill not in ("smalltalk", "memory", "echo") and draw < 0.2:
        text = re.sub(r"([.?!]?)$", r", please\1" if rng.random() < 0.4 else r" please\1", text, count=1)
    if not ask.exact and rng.random() < 0.06:
        text = _mistype(rng, text)
    if ask.skill == "echo":
        return text
    if rng.random() < 0.25:
        text = text.rstrip(".?!")
    if rng.random() < 0.22 and not (ask.exact and ask.skill in ("memory", "unknown")):
        text = text.lower()
    return text


def _mistype(rng: random.Random, text: str) -> str:
    """One slip in one long word: two letters swapped, one left out or one doubled."""
    spots = list(re.finditer(r"[A-Za-z]{5,}", text))
    if not spots:
        return text
    word = rng.choice(spots)
    i = rng.randrange(word.start() + 1, word.end() - 1)
    middle = rng.choice((text[i + 1] + text[i], text[i + 1], text[i] * 2 + text[i + 1]))
    return text[:i] + middle + text[i + 2 :]


def _follow_up(rng: random.Random, skill: str, ask: Ask) -> Ask:
    """Shorten a question to what remains when the one before it was of the same skill: "And of France?"."""
    if skill == "capitals" and (found := re.match(r"The capital of (.+) is ", ask.reply)):
        form = rng.choice(
            ("And {}?", "What about {}?", "And of {}?", "And the capital of {}?", "And for {}?", "How about {}?")
        )
        return Ask(skill, form.format(found[1]), ask.reply, ask.expect)
    if skill == "opposites" and (found := re.match(r"The opposite of (.+) is ", ask.reply)):
        form = rng.choice(("And {}?", "What about {}?", "And of {}?", "And the opposite of {}?", "How about {}?"))
        return Ask(skill, form.format(found[1]), ask.reply, ask.expect)
    if skill == "colours" and (found := re.match(r"(.+) (is|are) \w+\.$", ask.reply)):
        thing = found[1][0].lower() + found[1][1:]
        form = rng.choice(("And {}?", "What about {}?", "How about {}?", "And what colour {verb} {}?"))
        return Ask(skill, form.format(thing, verb=found[2]), ask.reply, ask.expect)
    return ask


def _is_follow_up(text: str) -> bool:
    return text.startswith(("And ", "What about ", "How about "))


class _Talk:
    """One conversation in the making: it remembers what the user has told so far."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._told: dict[tuple[str, str], Fact] = {}
        self._last = ""

    def next(self, skill: str) -> Turn:
        rng = self._rng
        ask = self._memory() if skill == "memory" else draw(rng, skill, held=False)
        same = skill == self._last
        if same and rng.random() < 0.5:
            followed = _follow_up(rng, skill, ask)
            if not skills.held_out(skills.normal_form(followed.user)):
                ask = followed
        if not same and skill == "sums" and _is_follow_up(ask.user):
            ask = Ask(skill, re.sub(r"^(and|And|Now) ", "", ask.user), ask.reply, ask.expect, True)
        self._last = skill
        reply = ask.reply
        if (bare := re.match(r"Yes\. (.+)", reply)) and not ask.user.startswith(("Do you", "Can you", "Could you")):
            reply = bare[1]
        return Turn(roughen(rng, ask), reply)

    def _memory(self) -> Ask:
        rng = self._rng
        draw = rng.random()
        if self._told and draw < 0.55:
            return rng.choice(tuple(self._told.values())).ask(rng)
        if draw > 0.93:
            both, ask = make_introduction(rng)
            self._told.update({(fact.topic, fact.kind): fact for fact in both})
            return ask
        fact = make_fact(rng, held=False)
        if draw > 0.82 and (fact.topic, fact.kind) not in self._told:
            return fact.ask_untold(rng)
        # A relative and a pet are asked for in the same words, so one conversation has only one of each word.
        self._told[fact.topic, fact.kind] = fact
        return fact.tell(rng)


def draw(rng: random.Random, skill: str, held: bool) -> Ask:
    """One question of a skill from one side of the line; remembering is not here, since it takes more than one turn."""
    if skill == "sums":
        return skills.make_sum(rng, held)
    if skill == "stories":
        return skills.make_story(rng, held)
    if skill == "counting":
        return skills.make_count(rng)
    if skill == "too big":
        return skills.make_too_big(rng)
    if skill == "echo":
        return make_echo(rng)
    return rng.choice(rng.choice(skills.listed(skill, held)))


def _plain(rng: random.Random) -> str:
    """Plain text without any turn, so that raw completion works as well."""
    if rng.random() < 0.5:
        return stories.tell(rng, rng.choice(stories.TOPICS)).text
    picked = (
        draw(rng, rng.choice(("capitals", "colours", "opposites", "calendar", "how-to")), held=False) for _ in range(3)
    )
    return " ".join(re.sub(r"^Yes\. ", "", ask.reply) for ask in picked)


def make_conversation(rng: random.Random, turns: int | None = None) -> Conversation:
    """One conversation: most have one to four turns; `turns` asks for a given number."""
    if turns is None:
        if rng.random() < 0.03:
            return Conversation("", (), _plain(rng))
        turns = rng.choices((1, 2, 3, 4, 6, 9), (30, 22, 18, 14, 10, 6))[0]
    state = _Talk(rng)
    names, shares = list(SHARES), list(SHARES.values())
    favourite = rng.choices(names, shares)[0]  # people stay with a subject, which is what makes room for "And ...?"
    chosen = [favourite if rng.random() < 0.4 else rng.choices(names, shares)[0] for _ in range(turns)]
    if "memory" in chosen and rng.random() < 0.7:
        chosen[chosen.index("memory")] = chosen[0]
        chosen[0] = chosen[-1] = "memory"
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.25 else ""
    return Conversation(system, tuple(state.next(skill) for skill in chosen))


def conversations(seed: int) -> Iterator[Conversation]:
    """An endless stream of training conversations; equal seeds give equal streams."""
    rng = random.Random(seed)
    while True:
        yield make_conversation(rng)


EXAM = {
    "capitals": 32,
    "sums": 44,
    "memory": 30,
    "opposites": 16,
    "colours": 16,
    "calendar": 16,
    "animals": 8,
    "stories": 12,
    "how-to": 8,
    "identity": 5,
    "smalltalk": 7,
    "unknown": 6,
}


def exam(seed: int = EXAM_SEED) -> list[Examination]:
    """The 200 held-out questions, the same for every call with the same seed, no question twice."""
    rng = random.Random(seed)
    tests: list[Examination] = []
    for skill, count in EXAM.items():
        seen: set[str] = set()
        while len(seen) < count:
            key, test = _remember(rng) if skill == "memory" else _single(rng, skill)
            if key not in seen:
                seen.add(key)
                tests.append(test)
    return tests


def _single(rng: random.Random, skill: str) -> tuple[str, Examination]:
    """A held-out question, one in four after a turn about something else; and what tells it from others."""
    ask = draw(rng, skill, held=True)
    user = re.sub(r"^(and|And|Now) ", "", ask.user) if skill == "sums" else ask.user
    before = (draw(rng, "capitals", held=False).user,) if rng.random() < 0.25 else ()
    key = ask.reply if skill == "sums" else skills.normal_form(user)
    return key, Examination(skill, (*before, user), ask.expect)


def _remember(rng: random.Random) -> tuple[str, Examination]:
    """A held-out fact, told, then asked for after up to two other turns; one in ten is asked for without being told."""
    fact = make_fact(rng, held=True)
    between = tuple(draw(rng, rng.choice(("capitals", "colours", "sums", "smalltalk")), held=False).user
                    for _ in range(rng.choice((0, 1, 1, 2))))  # fmt: skip
    if rng.random() < 0.1:
        ask = fact.ask_untold(rng)
        return str(fact), Examination("memory", (*between, ask.user), ask.expect)
    return str(fact), Examination("memory", (fact.tell(rng).user, *between, fact.ask(rng).user), (fact.value.lower(),))


def main() -> None:
    """Print some conversations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    parser.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    for _, conversation in zip(range(arguments.count), conversations(arguments.seed), strict=False):
        print("system:", conversation.system) if conversation.system else None
        for turn in conversation.turns:
            print(f"user: {turn.user}\ngrist: {turn.reply}")
        print(conversation.text + "\n")


if __name__ == "__main__":
    main()

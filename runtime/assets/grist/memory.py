"""Things that a user tells grist about himself, and the questions that ask for them back."""

from __future__ import annotations

import random
from dataclasses import dataclass

from millrace.runtime.assets.grist import facts
from millrace.runtime.assets.grist.skills import Ask, forms, held_out, made_up_name, make_name

_RELATIVES = facts.words(
    "sister, brother, mother, father, friend, teacher, neighbour, uncle, aunt, cousin, boss, wife, husband"
)
_PETS = facts.words("dog, cat, horse, rabbit, bird, fish, hamster, parrot, turtle, mouse, goat, pony")
_WORDS = facts.words("""
apple, river, lamp, stone, window, cloud, garden, spoon, bridge, candle, mirror, basket, feather, island, hammer, tiger
ladder, pencil, whistle, button, forest, saddle, rocket, anchor, violin, pepper, blanket, copper, needle, barrel, moon
""")

_TELL = {
    "name": """\
My name is {v}.|I am {v}.|I'm {v}.|Call me {v}.|You can call me {v}.|People call me {v}.|I am called {v}.
Hi, my name is {v}.|Hello! I'm {v}.|Hello, I am {v}.|Hi, I'm {v}!|By the way, my name is {v}.|My name's {v}.
The name is {v}.|Hello, my name is {v}.|Hi there, I am {v}.|Good morning, my name is {v}.|Please call me {v}.
It is {v} here.|This is {v}.|Let me introduce myself. I am {v}.|Do you know my name? It is {v}.
Remember my name. It is {v}.|my name is {v}|i am {v}|hi im {v}""",
    "favourite": """\
My favourite {k} is {v}.|The {k} I like best is {v}.|{V} is my favourite {k}.
My favourite {k} is {v}, by the way.|I think {v} is the best {k}, it is my favourite.
I have a favourite {k}. It is {v}.|my favourite {k} is {v}|I like {v}. It is my favourite {k}.
Of every {k} I like {v} best.|Remember that my favourite {k} is {v}.""",
    "city": """I live in {v}.|My home is in {v}.|I live in the city of {v}.|I am living in {v}.|My house is in {v}.
i live in {v}|At the moment I live in {v}.|I live in {v} with my family.|Did I tell you that I live in {v}?""",
    "job": """\
I work as a {v}.|I am a {v}.|My job is being a {v}.|I'm a {v}.|I earn my money as a {v}.|I am a {v} by trade.
i am a {v}""",
    "age": """\
I am {v} years old.|I'm {v} years old.|My age is {v}.|I am {v} years old now.|i am {v} years old
I turned {v} today.""",
    "pet": """\
I have a {k} called {v}.|My {k} is called {v}.|I have a {k} named {v}.|My {k}'s name is {v}.
The name of my {k} is {v}.|i have a {k} called {v}|We have a {k}. It is called {v}.""",
    "relative": """\
My {k} is called {v}.|My {k}'s name is {v}.|The name of my {k} is {v}.|I have a {k} called {v}.
my {k} is called {v}|My {k} is named {v}.""",
    "word": """\
Remember the word {v}.|Please remember the word {v}.|The secret word is {v}.|Keep this word in mind: {v}.
My word is {v}.|The word is {v}. Do not forget it.""",
}
_ACK = {
    "name": "Nice to meet you, {v}!",
    "favourite": "I will remember that your favourite {k} is {v}.",
    "city": "{v} sounds like a good place to live.",
    "job": "So you are a {v}. That is a good job.",
    "age": "So you are {v} years old. That is a good age.",
    "pet": "{v} is a good name for a {k}.",
    "relative": "I will remember that your {k} is called {v}.",
    "word": "I will remember the word {v}.",
}
_ASK = {
    "name": """\
What is my name?|What's my name?|Do you remember my name?|Who am I?|Tell me my name.|Can you tell me my name?
Say my name.|Do you know my name?|Do you still know my name?|What am I called?|What did I say my name was?
So what is my name?|And what is my name?|Can you remember my name?|What was my name?|What was my name again?
Which name did I tell you?|Do you know who I am?|Now, what is my name?""",
    "favourite": """\
What is my favourite {k}?|Do you remember my favourite {k}?|Tell me my favourite {k}.|Which {k} do I like best?
What {k} do I like best?|Can you tell me my favourite {k}?|Do you know my favourite {k}?
What was my favourite {k}?|Which {k} is my favourite?|And my favourite {k}?|What's my favourite {k}?
What did I say my favourite {k} was?|Which {k} did I say I like best?""",
    "city": """\
Where do I live?|Which city do I live in?|Do you remember where I live?|Tell me where I live.
What city do I live in?|Where is my home?|Do you know where I live?|In which city do I live?
Where did I say I live?""",
    "job": """\
What is my job?|Do you remember my job?|What do I work as?|Tell me my job.|What is my work?
What do I do for a living?|Do you know my job?|What did I say my job was?""",
    "age": """\
How old am I?|What is my age?|Do you remember how old I am?|Tell me my age.|Do you know my age?
How old did I say I am?|Do you know how old I am?""",
    "pet": """\
What is my {k} called?|What is the name of my {k}?|What is my {k}'s name?|Do you remember the name of my {k}?
Tell me the name of my {k}.|Do you know what my {k} is called?|How is my {k} called?|What did I call my {k}?""",
    "word": """\
What was the word?|What is the word?|Which word did I tell you?|What is the secret word?
Do you remember the word?|Tell me the word.|Say the word.|Which word should you remember?""",
}
_ASK["relative"] = _ASK["pet"].replace("What did I call my {k}?", "Who is my {k}?")
_REPLY = {
    "name": "Your name is {v}.",
    "favourite": "Your favourite {k} is {v}.",
    "city": "You live in {v}.",
    "job": "You are a {v}.",
    "age": "You are {v} years old.",
    "pet": "Your {k} is called {v}.",
    "relative": "Your {k} is called {v}.",
    "word": "The word is {v}.",
}
_NOT_TOLD = {
    "name": "You have not told me your name yet.",
    "favourite": "You have not told me your favourite {k} yet.",
    "city": "You have not told me where you live yet.",
    "job": "You have not told me your job yet.",
    "age": "You have not told me your age yet.",
    "pet": "You have not told me the name of your {k} yet.",
    "relative": "You have not told me the name of your {k} yet.",
    "word": "You have not told me a word yet.",
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing about the user: `topic` says what of, `kind` which one (the colour, the dog), `value` what it is."""

    topic: str
    kind: str
    value: str

    def _put(self, form: str) -> str:
        return form.format(k=self.kind, v=self.value, V=self.value[:1].upper() + self.value[1:])

    def tell(self, rng: random.Random) -> Ask:
        """The user says it, and grist takes note."""
        form = rng.choice(forms(_TELL[self.topic]))
        return Ask("memory", self._put(form), self._put(_ACK[self.topic]), (self.value.lower(),), True)

    def ask(self, rng: random.Random) -> Ask:
        """The user asks for it back."""
        form = rng.choice(forms(_ASK[self.topic]))
        return Ask("memory", self._put(form), self._put(_REPLY[self.topic]), (self.value.lower(),))

    def ask_untold(self, rng: random.Random) -> Ask:
        """The user asks for it without having told it."""
        form = rng.choice(forms(_ASK[self.topic]))
        return Ask("memory", self._put(form), self._put(_NOT_TOLD[self.topic]), ("not told me",))


def make_fact(rng: random.Random, held: bool) -> Fact:
    """A fact whose value (or pair of kind and value) is on one side of the line."""
    while True:
        topic = rng.choices(tuple(_TELL), (34, 26, 8, 6, 6, 8, 8, 4))[0]
        kind = ""
        if topic == "favourite":
            kind = rng.choice(tuple(facts.FAVOURITE_THINGS))
            value = rng.choice(facts.FAVOURITE_THINGS[kind])
        elif topic in ("name", "pet", "relative"):
            kind = {"pet": rng.choice(_PETS), "relative": rng.choice(_RELATIVES)}.get(topic, "")
            return Fact(topic, kind, make_name(rng, held))
        elif topic == "city":
            value = rng.choice(facts.CITIES) if rng.random() < 0.7 else made_up_name(rng)
        elif topic == "job":
            value = rng.choice(facts.JOBS)
        elif topic == "age":
            value = str(rng.randint(5, 90))
        else:
            value = rng.choice(_WORDS)
        if held_out(f"{topic} {kind} {value.lower()}") is held:
            return Fact(topic, kind, value)


def make_introduction(rng: random.Random) -> tuple[tuple[Fact, Fact], Ask]:
    """Two facts told in one breath."""
    name = Fact("name", "", make_name(rng, False))
    while (other := make_fact(rng, False)).topic not in ("favourite", "city", "job", "age"):
        pass
    first = rng.choice(("My name is {}", "I am {}", "I'm {}", "Hi, I am {}", "Hello, my name is {}")).format(name.value)
    second = {
        "favourite": f"my favourite {other.kind} is {other.value}",
        "city": f"I live in {other.value}",
        "job": f"I work as a {other.value}",
        "age": f"I am {other.value} years old",
    }[other.topic]
    reply = f"Nice to meet you, {name.value}! {other._put(_ACK[other.topic])}"
    return (name, other), Ask("memory", f"{first} and {second}.", reply, (name.value.lower(),), True)


def make_echo(rng: random.Random) -> Ask:
    """Words to say back: the purest form of copying, which the rest of remembering is built upon."""
    chosen = rng.sample((*_WORDS, *_PETS, *facts.JOBS, *facts.FIRST_NAMES[:40]), rng.randint(1, 5))
    if rng.random() < 0.4:
        chosen[rng.randrange(len(chosen))] = make_name(rng, False)
    chosen = [word for word in chosen if not held_out(f"name {word.lower()}")] or ["hello"]
    text = " ".join(chosen)
    form = rng.choice(
        ("Repeat after me: {}", "Say {}", "Repeat: {}", "Please say {}", "Can you say {}?", "Repeat the words {}")
    )
    return Ask("echo", form.format(text), text, (text.lower(),), True)

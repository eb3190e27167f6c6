"""Short stories of five to ten sentences, put together from plots with open places.

A plot is a list of sentences in order; each sentence has some variants. Open places are filled once per story, so the
hero keeps the same name, the same pronoun and the same wish from beginning to end: that is the part of story telling
that a very small model can learn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from millrace.runtime.assets.grist.facts import words

ANIMALS = words("""
fox, cat, dog, rabbit, bear, mouse, owl, duck, frog, horse, pig, hen, goat, lion, tiger, wolf, deer, hedgehog, squirrel
turtle, penguin, elephant, monkey, bee, snail, sheep, donkey, crow, whale, dolphin, dragon, kitten, puppy, otter, badger
zebra, giraffe, camel, kangaroo, goose, spider, ant, butterfly, crab, seal, eagle, swan, moose, panda, koala, lizard
mole, parrot, snake, bat, cow, chicken, lamb, pony, unicorn, beetle, worm, fish, shark, octopus
hamster, raven, ladybird
""")
PEOPLE = words(
    "girl, boy, king, queen, princess, prince, knight, wizard, witch, farmer, baker, sailor, pirate, giant, fisherman"
)
OBJECTS = words("robot, boat, train, snowman, star, cloud, teapot, kite, toy car, lantern, tree, ghost, rocket, clock")
TOPICS = ANIMALS + PEOPLE + OBJECTS

_NAMES = {
    "he": words(
        "Pip, Tom, Max, Oscar, Finn, Bruno, Hugo, Milo, Otto, Toby, Rolo, Jasper, Ned, Gus, Barnaby, Kip, Leo, Sam"
    ),
    "she": words(
        "Mia, Lily, Ruby, Nell, Daisy, Tilly, Wren, Hazel, Poppy, Luna, Ivy, Bella, Fern, Dot, Rosie, Willa, Ada, Zoe"
    ),
}
_FORMS = {"he": ("him", "his"), "she": ("her", "her")}
_ALWAYS = {"king": "he", "prince": "he", "wizard": "he", "boy": "he", "fisherman": "he", "snowman": "he",
           "queen": "she", "princess": "she", "witch": "she", "girl": "she", "hen": "she"}  # fmt: skip
NAMES = frozenset(_NAMES["he"] + _NAMES["she"])
_TRAITS = words(
    "little, young, brave, shy, clever, kind, curious, lonely, happy, quiet, small, friendly, lazy, cheerful"
)
_PLACES = words("""
in a green forest, by the sea, on a small farm, near a quiet river, in a little village, on top of a hill
in an old house, at the edge of a wood, in a warm valley, on a small island, beside a blue lake, in a big garden
""")
_LOST = words(
    "red hat, golden key, favourite ball, little bell, silver ring, blue scarf, old map, toy, basket of berries"
)
_HELPERS = words(
    "old owl, small mouse, kind crow, grey goose, tiny ant, wise turtle, young rabbit, friendly frog, brown bear"
)
_WISHES = words("""
to see the sea, to fly, to learn to sing, to find a friend, to climb the highest hill, to touch the moon, to swim
to see the snow, to learn to dance, to paint the sky, to travel the world, to bake the best cake
""")
_FOODS = words("apples, honey cakes, warm soup, berries, fresh bread, nuts, pancakes, sweet pears")
_WEATHER = words("a storm, heavy rain, thick fog, deep snow, a strong wind")
_LESSONS = (
    "From that day on, they were the best of friends.",
    "After that, {name} was never lonely again.",
    "And {name} learned that a good friend is better than gold.",
    "From then on, {name} always helped others.",
    "That night {name} slept very well.",
    "And they all lived happily ever after.",
    "{name} never forgot that day.",
)
_OPENINGS = (
    "Once upon a time there was a {trait} {topic} named {name} who lived {place}.",
    "There once was a {trait} {topic} called {name} who lived {place}.",
    "A {trait} {topic} named {name} lived {place}.",
)

# Every plot: the middle of the story, sentence by sentence, each with its variants.
_PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("One day {name} lost {his} {lost}.", "One morning {name} could not find {his} {lost}."),
        ("{He} looked everywhere, but it was gone.", "{He} looked under every stone, but it was not there."),
        ("{name} sat down and began to cry.", "{name} felt very sad."),
        ('Then a {helper} came by and asked, "What is wrong?"', 'A {helper} heard {him} and said, "I will help you."'),
        ("Together they searched until the sun went down.", "They looked together all day long."),
        ("At last they found the {lost} under a tree.", "At last they saw the {lost} beside the path."),
        ("{name} was so happy that {he} danced.", '"Thank you!" said {name} with a big smile.'),
    ),
    (
        ("More than anything, {name} wanted {wish}.", "Every night {name} dreamed of one thing: {he} wanted {wish}."),
        ("Everyone laughed at {him}.", 'The others said, "You can never do that."'),
        ("But {name} did not give up.", "But {name} tried again every day."),
        ('One day {he} met a {helper} who said, "I can show you how."', "One day a {helper} offered to help {him}."),
        ("They practised from morning to evening.", "They set out together the very next morning."),
        ("It was hard, but {name} kept going.", "It took a long time, and {name} was often tired."),
        ("And in the end the dream came true.", "Finally {name} got what {he} had wished for."),
    ),
    (
        ("One evening {weather} came over the land.", "One night there was {weather}."),
        ("{name} was on the way home and could not see the path.", "{name} was far from home and got lost."),
        ("{He} was cold and afraid.", "{He} was tired and hungry."),
        ("Then {he} saw a small light between the trees.", "Then {he} heard a soft voice in the dark."),
        ('It was a {helper}, who said, "Come in and get warm."', "It was a {helper} with a warm little house."),
        ("They shared some {food} and told each other stories.", "They ate {food} and sat by the fire."),
        ("In the morning the sun came out, and {name} found the way home.",
         "The next day the {helper} showed {him} the way home."),
    ),
    (
        ("One day {name} had a big basket of {food}.", "{name} had found a lot of {food}."),
        ("A {helper} came and asked for a little.", 'A hungry {helper} asked, "May I have some?"'),
        ('At first {name} said, "No, it is all mine."', "At first {name} did not want to share."),
        ("The {helper} went away without a word.", "The {helper} walked away with a sad face."),
        ("But the {food} did not taste good alone.", "But eating alone was no fun."),
        ("So {name} ran after the {helper} and shared everything.",
         "So {name} called the {helper} back and gave away half."),
        ("They ate and laughed until it was dark.", "They had a wonderful day together."),
    ),
    (
        ("One day {name} saw a {helper} who had fallen into the water.",
         "One day a {helper} was stuck in a deep hole."),
        ('"Help me!" cried the {helper}.', 'The {helper} called, "Please help me!"'),
        ("{name} was afraid, but {he} did not run away.", "{name} thought quickly."),
        ("{He} took a long branch and held it out.", "{He} found a rope and threw it down."),
        ("{He} pulled and pulled with all {his} strength.", "It was hard work, but {he} held on."),
        ("At last the {helper} was safe.", "In the end the {helper} was free."),
        ('"You are very brave," said the {helper}.', "The {helper} thanked {him} again and again."),
    ),
)  # fmt: skip

# Which of its sentences each plot keeps in a short story.
_SHORT = ((0, 3, 5, 6), (0, 3, 5, 6), (0, 3, 5, 6), (0, 1, 2, 5, 6), (0, 3, 5, 6))


@dataclass(frozen=True, slots=True)
class Story:
    """A finished story and what it is about."""

    topic: str
    text: str


def with_article(noun: str) -> str:
    """`an owl`, `a fox`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def tell(rng: random.Random, topic: str, short: bool = False) -> Story:
    """Write one story about `topic`, a singular noun: nine sentences, or six or seven if `short`."""
    pronoun = _ALWAYS.get(topic) or rng.choice(("he", "she"))
    him, his = _FORMS[pronoun]
    places = {
        "topic": topic,
        "name": rng.choice(_NAMES[pronoun]),
        "trait": rng.choice(_TRAITS),
        "place": rng.choice(_PLACES),
        "lost": rng.choice(_LOST),
        "helper": rng.choice([helper for helper in _HELPERS if topic not in helper]),
        "wish": rng.choice(_WISHES),
        "food": rng.choice(_FOODS),
        "weather": rng.choice(_WEATHER),
        "he": pronoun,
        "He": pronoun.capitalize(),
        "him": him,
        "his": his,
    }
    number = rng.randrange(len(_PLOTS))
    plot = [_PLOTS[number][i] for i in _SHORT[number]] if short else _PLOTS[number]
    sentences = [rng.choice(_OPENINGS), *(rng.choice(variants) for variants in plot), rng.choice(_LESSONS)]
    text = " ".join(sentence.format_map(places) for sentence in sentences)
    for noun in ("old owl", "island"):  # the only places where "a" meets a vowel
        text = text.replace(f" a {noun}", f" an {noun}").replace(f"A {noun}", f"An {noun}")
    return Story(topic, text)

"""What grist is taught to know: the tables behind every factual question.

They are plain strings so that a reader can check and extend them without reading code. Each table is parsed once by
`corpus.py`; a fact that is not here is a fact that grist should say it does not know.
"""

from __future__ import annotations

import re


def pairs(table: str) -> dict[str, str]:
    """Parse `key: value` entries divided by semicolons or line ends, in the order written."""
    entries = (entry.strip() for entry in table.replace("\n", ";").split(";"))
    return {key.strip(): value.strip() for key, value in (entry.split(":", 1) for entry in entries if entry)}


def folded(table: str) -> dict[str, str]:
    """Parse `key: value` with one entry per line; a line that begins with blanks goes on with the entry above it."""
    return pairs(re.sub(r"\n +", " ", table))


def words(table: str) -> tuple[str, ...]:
    """Parse entries divided by commas or line ends."""
    return tuple(entry.strip() for entry in table.replace("\n", ",").split(",") if entry.strip())


CAPITALS = pairs("""
France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Portugal: Lisbon; England: London; Scotland: Edinburgh
Wales: Cardiff; Ireland: Dublin; Belgium: Brussels; the Netherlands: Amsterdam; Luxembourg: Luxembourg City
Switzerland: Bern; Austria: Vienna; Poland: Warsaw; Hungary: Budapest; Romania: Bucharest; Bulgaria: Sofia
Greece: Athens; Turkey: Ankara; Russia: Moscow; Ukraine: Kyiv; Finland: Helsinki; Sweden: Stockholm; Norway: Oslo
Denmark: Copenhagen; Iceland: Reykjavik; Estonia: Tallinn; Latvia: Riga; Lithuania: Vilnius; Croatia: Zagreb
Serbia: Belgrade; Slovenia: Ljubljana; Slovakia: Bratislava; Albania: Tirana; Malta: Valletta; Cyprus: Nicosia
Japan: Tokyo; China: Beijing; India: New Delhi; Pakistan: Islamabad; Nepal: Kathmandu; Thailand: Bangkok
Vietnam: Hanoi; Indonesia: Jakarta; Malaysia: Kuala Lumpur; South Korea: Seoul; North Korea: Pyongyang
Mongolia: Ulaanbaatar; Iran: Tehran; Iraq: Baghdad; Syria: Damascus; Lebanon: Beirut; Jordan: Amman
Saudi Arabia: Riyadh; Egypt: Cairo; Libya: Tripoli; Tunisia: Tunis; Algeria: Algiers; Morocco: Rabat; Kenya: Nairobi
Ethiopia: Addis Ababa; Uganda: Kampala; Ghana: Accra; Nigeria: Abuja; Senegal: Dakar; Angola: Luanda; Zambia: Lusaka
Zimbabwe: Harare; Somalia: Mogadishu; Rwanda: Kigali; Canada: Ottawa; the United States: Washington
Mexico: Mexico City; Cuba: Havana; Jamaica: Kingston; Guatemala: Guatemala City; Panama: Panama City
Colombia: Bogota; Venezuela: Caracas; Ecuador: Quito; Peru: Lima; Chile: Santiago; Argentina: Buenos Aires
Uruguay: Montevideo; Paraguay: Asuncion; Brazil: Brasilia; Australia: Canberra; New Zealand: Wellington; Fiji: Suva
""")

OPPOSITES = pairs("""
hot: cold; cold: hot; big: small; small: big; up: down; down: up; left: right; right: left; day: night; night: day
black: white; white: black; fast: slow; slow: fast; old: young; young: old; happy: sad; sad: happy; open: closed
closed: open; full: empty; empty: full; light: dark; dark: light; high: low; low: high; long: short; short: long
hard: soft; soft: hard; wet: dry; dry: wet; rich: poor; poor: rich; strong: weak; weak: strong; early: late
late: early; good: bad; bad: good; clean: dirty; dirty: clean; near: far; far: near; thick: thin; thin: thick
loud: quiet; quiet: loud; first: last; last: first; in: out; out: in; on: off; off: on; yes: no; no: yes
true: false; false: true; win: lose; lose: win; love: hate; hate: love; push: pull; pull: push; give: take
take: give; buy: sell; sell: buy; come: go; go: come; start: stop; stop: start; begin: end; end: begin; above: below
below: above; before: after; after: before; inside: outside; outside: inside; easy: difficult; difficult: easy
cheap: expensive; expensive: cheap; safe: dangerous; dangerous: safe; heavy: light; wide: narrow; narrow: wide
deep: shallow; shallow: deep; smooth: rough; rough: smooth; sharp: blunt; blunt: sharp; sweet: sour; sour: sweet
brave: afraid; kind: cruel; polite: rude; rude: polite; awake: asleep; asleep: awake; alive: dead; dead: alive
friend: enemy; enemy: friend; summer: winter; winter: summer; always: never; never: always; more: less; less: more
many: few; few: many; north: south; south: north; east: west; west: east; sunrise: sunset; sunset: sunrise
laugh: cry; cry: laugh; remember: forget; forget: remember; question: answer; answer: question; same: different
different: same; front: back; back: front; top: bottom; bottom: top; tall: short; new: old; noisy: quiet; warm: cool
cool: warm; lazy: busy; busy: lazy; simple: complex; modern: ancient; ancient: modern; arrive: leave; leave: arrive
find: lose; build: destroy; float: sink; sink: float; accept: refuse; refuse: accept; success: failure
failure: success; war: peace; peace: war; hero: villain; villain: hero
""")

# The thing as it stands in "What colour is ...?"; plural things are listed apart for the sake of grammar.
COLOURS = pairs("""
grass: green; the sky: blue; snow: white; blood: red; a banana: yellow; a lemon: yellow; a carrot: orange
coal: black; milk: white; a tomato: red; a strawberry: red; an orange: orange; the sun: yellow; a leaf: green
a frog: green; a pig: pink; a polar bear: white; an elephant: grey; a crow: black; a raven: black; a swan: white
a flamingo: pink; a lime: green; a cucumber: green; chocolate: brown; coffee: brown; wood: brown; soil: brown
the sea: blue; ice: white; a fire engine: red; a cherry: red; a plum: purple; an aubergine: purple
a pumpkin: orange; corn: yellow; butter: yellow; honey: golden; gold: golden; silver: silver; salt: white
sugar: white; rice: white; a cloud: white; the night sky: black; a stop sign: red; an emerald: green; a ruby: red
a sapphire: blue; lavender: purple; a rose: red; a sunflower: yellow; a daffodil: yellow; spinach: green
broccoli: green; a pea: green; a cactus: green; a school bus: yellow; mud: brown; a mouse: grey; a shark: grey
a dolphin: grey; a ladybird: red; a chick: yellow; a bat: black; a gorilla: black; a salmon: pink; a peach: orange
mint: green; ketchup: red; mustard: yellow; cream: white; flour: white; a tangerine: orange; a blueberry: blue
a blackberry: black; a raspberry: red; a grape: purple; a ghost: white; ash: grey; a pearl: white
""")
PLURAL_COLOURS = pairs("""
bananas: yellow; tomatoes: red; carrots: orange; leaves: green; clouds: white; strawberries: red; frogs: green
flamingos: pink; elephants: grey; lemons: yellow; cherries: red; roses: red; sunflowers: yellow; crows: black
pigs: pink; swans: white; peas: green; oranges: orange; plums: purple; pumpkins: orange
""")

SOUNDS = pairs("""
cow: moo; dog: woof; cat: meow; duck: quack; sheep: baa; pig: oink; horse: neigh; lion: roar; owl: hoot
frog: ribbit; bee: buzz; snake: hiss; mouse: squeak; rooster: cock-a-doodle-doo; crow: caw; wolf: howl
donkey: hee-haw; turkey: gobble; bird: tweet; goat: maa; chicken: cluck; bear: growl
""")
YOUNG = pairs("""
cat: kitten; dog: puppy; cow: calf; horse: foal; sheep: lamb; pig: piglet; duck: duckling; goose: gosling
hen: chick; lion: cub; bear: cub; wolf: pup; fox: cub; goat: kid; deer: fawn; swan: cygnet; kangaroo: joey
frog: tadpole; owl: owlet; rabbit: kit; elephant: calf; whale: calf; eagle: eaglet; tiger: cub
butterfly: caterpillar; seal: pup
""")
LEGS = pairs("""
dog: four; cat: four; horse: four; cow: four; spider: eight; ant: six; bee: six; bird: two; snake: no; fish: no
duck: two; chicken: two; octopus: eight; crab: ten; person: two; frog: four; lion: four; elephant: four; fly: six
butterfly: six; beetle: six; worm: no; table: four; mouse: four; sheep: four; pig: four; penguin: two; fox: four
bear: four
""")

DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words("January, February, March, April, May, June, July, August, September, October, November, December")
MONTH_DAYS = pairs("""
January: 31; February: 28; March: 31; April: 30; May: 31; June: 30; July: 31; August: 31; September: 30; October: 31
November: 30; December: 31
""")
SEASONS = pairs("""
spring: summer; summer: autumn; autumn: winter; winter: spring
""")
AMOUNTS = pairs("""
days are in a week: There are 7 days in a week.; months are in a year: There are 12 months in a year.
hours are in a day: There are 24 hours in a day.; minutes are in an hour: There are 60 minutes in an hour.
seconds are in a minute: There are 60 seconds in a minute.; days are in a year: There are 365 days in a year.
weeks are in a year: There are 52 weeks in a year.; letters are in the alphabet: There are 26 letters in the alphabet.
seasons are in a year: There are 4 seasons in a year.; sides are on a triangle: A triangle has 3 sides.
sides are on a square: A square has 4 sides.; wheels are on a bicycle: A bicycle has 2 wheels.
wheels are on a car: A car has 4 wheels.; years are in a century: There are 100 years in a century.
eggs are in a dozen: There are 12 eggs in a dozen.; fingers are on a hand: A hand has 5 fingers, with the thumb.
""")
NUMBER_WORDS = words(
    "zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen,"
    "sixteen, seventeen, eighteen, nineteen, twenty"
)

# "make tea" -> the answer to "How do I make tea?"
HOW_TO = folded("""
make tea: Boil some water. Put a tea bag in a cup and pour the hot water over it. Wait three minutes, then take the
    bag out. Add milk or sugar if you like.
make coffee: Boil some water. Put ground coffee in a filter over a cup. Pour the hot water slowly through it. Then
    drink it while it is warm.
make toast: Put a slice of bread in the toaster. Push the handle down and wait until it pops up. Then spread butter
    on it.
boil an egg: Put the egg in a pot of boiling water. Wait seven minutes. Cool it in cold water, then peel off the
    shell.
make pancakes: Mix flour, milk and two eggs in a bowl. Pour a little of it into a hot pan. Turn it over when the
    bottom is golden, and serve it warm.
cook rice: Wash one cup of rice. Put it in a pot with two cups of water and a little salt. Cover the pot and cook it
    slowly for fifteen minutes.
cook pasta: Boil a big pot of water with some salt. Add the pasta and cook it for ten minutes. Pour the water away
    and add a sauce.
make a sandwich: Take two slices of bread. Spread butter on them, then put cheese and tomato between them. Cut it in
    half and enjoy it.
make soup: Cut some vegetables into small pieces. Cook them in a pot of water with salt for twenty minutes. Taste it
    and serve it hot.
make a salad: Wash some lettuce and cut up a tomato and a cucumber. Put everything in a bowl. Add a little oil,
    lemon and salt, and mix it.
make lemonade: Squeeze three lemons into a jug. Add water and a little sugar. Stir it well and serve it with ice.
brush my teeth: Put a little toothpaste on your brush. Brush every tooth gently for two minutes. Then rinse your
    mouth with water.
wash my hands: Wet your hands and take some soap. Rub them together for twenty seconds. Rinse them with clean water
    and dry them.
plant a seed: Fill a pot with soil and make a small hole in it. Put the seed in the hole and cover it. Water it, and
    put the pot in a sunny place.
water a plant: Touch the soil first. If it is dry, pour a little water around the stem. Stop when water comes out
    below.
tie my shoes: Cross the laces and pull them tight. Make a loop with one lace and wrap the other lace around it. Pull
    it through and make both loops tight.
make my bed: Pull the sheet straight. Shake the blanket and lay it flat. Then put the pillow at the top.
wash the dishes: Fill the sink with warm water and a little soap. Scrub each dish with a sponge. Rinse it with clean
    water and let it dry.
paint a wall: Clean the wall and cover the floor. Paint the edges with a brush first. Then roll the paint on from
    top to bottom, and let it dry.
wrap a present: Put the present in the middle of the paper. Fold the paper over it and tape it down. Fold the ends
    in, tape them, and add a ribbon.
fall asleep: Put your phone away and turn off the light. Lie down and breathe slowly. Think of something calm, and
    let your body rest.
learn a language: Practise a little every day. Learn the most common words first. Listen to people who speak it, and
    do not be afraid of mistakes.
write a letter: Begin with the date and a greeting. Say what you want to say in short sentences. End with a kind
    word and your name.
ride a bike: Sit on the bike and put one foot on the ground. Push off and begin to pedal. Look ahead, and use the
    brakes to stop.
build a snowman: Roll three big balls of snow. Put them on top of each other. Add stones for the eyes, a carrot for
    the nose and sticks for the arms.
make popcorn: Put a little oil and corn in a pot. Cover it and heat it until the popping stops. Add salt and eat it
    warm.
clean a window: Spray some water and soap on the glass. Wipe it with a soft cloth from top to bottom. Dry it with
    paper until it shines.
save money: Write down what you spend. Buy only what you need. Put a little money away every week.
make a friend: Smile and say hello. Ask the other person a question and listen to the answer. Be kind, and do
    something together.
draw a cat: Draw a circle for the head and add two triangles for the ears. Draw two eyes, a small nose and some
    whiskers. Then add a round body and a long tail.
fly a kite: Find an open place with wind. Hold the kite up and let it go when the wind blows. Let the string out
    slowly, and keep it tight.
make a paper boat: Fold a sheet of paper in half. Fold the top corners to the middle and turn the edges up. Open it
    from below and pull the sides apart.
bake bread: Mix flour, water, salt and yeast into a dough. Let it rest for an hour in a warm place. Then bake it in
    a hot oven for forty minutes.
make a fruit salad: Wash the fruit and cut it into small pieces. Put it all in a bowl. Add a little lemon juice, and
    mix it gently.
calm down: Sit down and breathe in slowly. Hold your breath for a moment, then breathe out. Do it five times, and
    drink some water.
""")

FIRST_NAMES = words("""
Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Iris, Jack, Kate, Leo, Maria, Noah, Olivia, Peter, Quinn, Rosa, Sam
Tom, Uma, Victor, Wendy, Xavier, Yara, Zoe, Adam, Bella, Carl, Diana, Erik, Fiona, George, Hannah, Ivan, Julia, Kevin
Laura, Martin, Nina, Oscar, Paul, Rachel, Simon, Tina, Ursula, Vera, Walter, Yusuf, Zara, Alice, Bruno, Chloe, Daniel
Elena, Frank, Gina, Hugo, Ida, James, Karl, Lucy, Max, Nora, Otto, Pia, Ravi, Sara, Theo, Vikram, Will, Yuki, Amir, Beth
Chen, Dora, Elias, Farah, Gus, Helen, Igor, Jane, Kofi, Lena, Mina, Nils, Omar, Priya, Rita, Stefan, Tara, Umar, Viola
Wanda, Ada, Boris, Carmen, Dmitri, Esther, Fatima, Gloria, Hana, Isaac, Joel, Kira, Liam, Mateo, Naomi, Olga, Pablo
Rebecca, Samir, Tessa, Vincent, Yasmin, Alex, Bob, Charlie, Dan, Ella, Fred, Harry, Jim, John, Lily, Mark, Mike, Mary
Nick, Robert, Ruth, Sophie, Steve, Susan, Thomas, William, Sarah, Michael, Linda, Ali, Wei, Mei, Aisha, Hassan, Ines
""")
FAVOURITE_THINGS = {
    "colour": words(
        "red, blue, green, yellow, orange, purple, pink, black, white, brown, grey, gold, silver, turquoise"
    ),
    "food": words(
        "pizza, pasta, soup, rice, bread, cheese, curry, salad, sushi, pancakes, chocolate, noodles, tacos, apples,fish"
    ),
    "animal": words(
        "cat, dog, horse, fox, owl, dolphin, tiger, rabbit, bear, elephant, penguin, wolf, lion, frog, otter"
    ),
    "sport": words(
        "football, tennis, swimming, running, chess, hockey, rugby, basketball, cycling, golf, judo, rowing"
    ),
    "season": words("spring, summer, autumn, winter"),
    "drink": words("tea, coffee, water, milk, lemonade, orange juice, hot chocolate, apple juice, cola, mint tea"),
    "fruit": words("mango, apple, pear, plum, banana, kiwi, peach, cherry, melon, lemon, grape, fig, orange"),
    "number": words("2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 21, 42, 99"),
}
JOBS = words(
    "teacher, nurse, baker, farmer, driver, doctor, painter, singer, writer, pilot, cook, gardener, student, lawyer,"
    "builder"
)
CITIES = words(
    "Paris, London, Berlin, Rome, Madrid, Oslo, Tokyo, Lima, Cairo, Delhi, Boston, Chicago, Munich, Porto, Dublin,"
    "Leeds, Geneva, Vienna, Sydney, Toronto, Austin, Lagos, Nairobi, Prague, Seoul, Athens, Hamburg, Lyon,"
    "Bristol, Denver"
)

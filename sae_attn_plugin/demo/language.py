"""The language of the demo model: a seeded generator, its vocabulary and its tokenizer.

Three kinds of text, each with a reason to need attention:

- **IOI sentences** (indirect object identification, Wang et al. 2022, arXiv:2211.00593), ABBA and
  BABA. Two people are introduced as a pair, one of them acts, the other receives. Further names
  appear once or twice before or after the pair, and either member of the pair may have been
  mentioned earlier, so that the receiver is not simply the name that was mentioned once.
- **Repeated random tokens**, with varied prefix, gap and segment lengths. In some sequences one
  token has been seen before several different continuations and only a longer prefix tells which.
- **Template prose**: agreement, questions about places and colours, lists, days, small stories.

Everything is a pure function of a ``random.Random``. A quarter of the combinations of template,
subject and indirect object is held out by a fixed rule (:func:`is_held_out`) and never generated
for training.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BOS",
    "DISTRACTORS",
    "N_TEMPLATES",
    "UNK",
    "IOIExample",
    "build_tokenizer",
    "encode",
    "held_out_rows",
    "ioi_example",
    "is_held_out",
    "random_ids",
    "repeated_random_tokens",
    "token_rows",
    "training_batch",
    "vocabulary",
]

BOS = "<|endoftext|>"
UNK = "<unk>"

# A token is a word or a mark with the space before it, as in GPT-2.
PIECE = r" ?\w+| ?[^\w\s]"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HE = _words(
    "John Tom Paul Mark Peter James David Simon Adam Henry Oscar Victor Martin Felix Leo Max Hugo "
    "Ivan Karl Louis Nathan Owen Ralph Samuel Theo Walter Arthur Bruno Cyril Edgar Frank George "
    "Harold Jacob Kevin Lucas Milo Noah Otto Robin Alan Boris Caleb Daniel Eric Gavin Ian Julian"
)
SHE = _words(
    "Mary Anna Lucy Emma Alice Clara Diana Elena Grace Helen Irene Julia Karen Laura Maria Nina "
    "Olga Paula Rosa Sarah Tina Vera Wendy Zoe Agnes Bella Carol Dora Edith Fiona Gloria Hannah "
    "Ida Jane Kate Lily Molly Nora Ruth Sofia Amy Beth Cora Daisy Ella Flora Greta Iris"
)
NAMES = HE + SHE

PLACES = _words(
    "store park school garden station library market museum river hotel office kitchen beach farm "
    "theatre church bakery harbour forest castle stadium village bridge cafe pool hall tower shop "
    "lake hill factory zoo studio cinema gallery meadow valley island"
)
OBJECTS = _words(
    "drink book ring letter flower basket ticket key coat hat cup ball map pen cake gift lamp "
    "basketball picture box knife bag guitar camera bottle candle chair clock coin drum fan glove "
    "kite ladder mirror needle plate ribbon rope scarf shoe spoon table watch"
)
COLOURS = _words("red blue green yellow black white brown pink grey purple")
ANIMALS = _words("dog cat horse bird fox mouse goat bear cow duck pig rabbit")
JOBS = _words("doctor teacher baker driver painter singer writer farmer sailor nurse pilot judge")
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
FEELINGS = _words("happy sad tired hungry angry proud calm late lonely busy nervous quiet")
FOODS = _words("bread soup rice cheese milk tea honey fish corn jam pasta salad")
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("old", "new"),
    ("fast", "slow"),
    ("dark", "bright"),
    ("wet", "dry"),
    ("soft", "hard"),
    ("high", "low"),
)

# The pair is introduced. The flag says whether the clause is a sentence of its own.
_OPENINGS: tuple[tuple[str, bool], ...] = (
    ("When {A} and {B} went to the {P}", False),
    ("After {A} and {B} walked to the {P}", False),
    ("While {A} and {B} were at the {P}", False),
    ("As {A} and {B} left the {P}", False),
    ("Once {A} and {B} had found the {P}", False),
    ("Because {A} and {B} were hungry at the {P}", False),
    ("Then {A} and {B} had a long talk at the {P}", True),
    ("Friends {A} and {B} met at the {P}", True),
    ("Last week {A} and {B} cleaned the {P}", True),
    ("The {P} was quiet when {A} and {B} arrived", True),
    ("At the {P} {A} and {B} sat down together", True),
    ("In the morning {A} and {B} drove to the {P}", True),
    ("One day {A} and {B} worked at the {P}", True),
    ("Soon {A} and {B} came back from the {P}", True),
    ("It was late when {A} and {B} closed the {P}", True),
    ("Yesterday {A} visited {B} at the {P}", True),
    ("In the evening {A} waited with {B} near the {P}", True),
    ("At noon {A} called {B} from the {P}", True),
    ("When {A} met {B} at the {P}", False),
    ("After {A} and then {B} came to the {P}", False),
)
# The subject acts; the receiver comes next.
_ACTIONS: tuple[str, ...] = (
    "{S} gave a {O} to",
    "{S} handed a {O} to",
    "{S} passed the {O} to",
    "{S} wanted to give the {O} to",
    "{S} decided to sell a {O} to",
    "{S} took a {O} and showed it to",
    "{S} bought a {O} for",
    "{S} said thank you to",
    "{S} waved and smiled at",
    "{S} told a long story to",
)
N_TEMPLATES = len(_OPENINGS) * len(_ACTIONS)

_BEFORE = (
    "Earlier {C} was at the {P}.",
    "Yesterday {C} bought a {O}.",
    "In the morning {C} went home.",
    "Everyone knew that {C} was {F}.",
    "Nobody had seen {C} at the {P}.",
    "That day {C} looked {F}.",
)
_BETWEEN = (
    "{C} was already there.",
    "{C} came too.",
    "{C} was {F}.",
    "{C} sat alone with a {O}.",
    "{C} had lost a {O}.",
)
_LINKS = ("Then", "Later", "At last", "After that")
_AFTER = (
    "{IO} said thank you.",
    "{IO} was {F}.",
    "{S} was {F}.",
    "{IO} smiled at {S}.",
    "Then {IO} put the {O} down.",
    "",
    "",
)

Distractor = Literal["none", "before", "between", "twice", "io_before", "s_before", "io_and_third"]
DISTRACTORS: tuple[Distractor, ...] = (
    "none",
    "before",
    "between",
    "twice",
    "io_before",
    "s_before",
    "io_and_third",
)
"""What is mentioned besides the pair.

``before`` and ``between``: a third name once, before the pair or after it; ``twice``: a third name
in both places; ``io_before`` and ``s_before``: the receiver or the subject once more, before the
pair; ``io_and_third``: the receiver before the pair and a third name after it, so that the only
name mentioned once is a wrong answer.
"""


@dataclass(frozen=True)
class IOIExample:
    """One IOI sentence, cut before the receiver.

    Attributes:
        prompt: the text up to the last word before the receiver.
        io, subject: the two names of the pair, without space; the answer is ``" " + io``.
        order: ``"ABBA"`` (IO first in the pair) or ``"BABA"``.
        template: index below :data:`N_TEMPLATES`.
        distractor: one of :data:`DISTRACTORS`.
        third: the further name, or ``None``.
        tail: how the text goes on after the receiver.
    """

    prompt: str
    io: str
    subject: str
    order: Literal["ABBA", "BABA"]
    template: int
    distractor: Distractor
    third: str | None
    tail: str

    @property
    def text(self) -> str:
        """The whole sentence, with the receiver and the tail."""
        return f"{self.prompt} {self.io}{self.tail}"


def is_held_out(template: int, io: str, subject: str) -> bool:
    """Whether this combination of template, receiver and subject is kept out of training."""
    return zlib.crc32(f"{template}|{io}|{subject}".encode()) % 4 == 0


def ioi_example(
    rng: random.Random,
    *,
    held_out: bool = False,
    distractor: Distractor | None = None,
    order: Literal["ABBA", "BABA"] | None = None,
    template: int | None = None,
) -> IOIExample:
    """Draw an IOI sentence.

    Args:
        rng: source of randomness.
        held_out: draw only held-out combinations (``True``) or only training ones (``False``).
        distractor, order, template: fixed value; drawn where ``None``.
    """
    while True:
        index = rng.randrange(N_TEMPLATES) if template is None else template
        io, subject, third = rng.sample(NAMES, 3)
        if is_held_out(index, io, subject) == held_out:
            break
    if distractor is None:
        distractor = "none" if rng.random() < 0.4 else rng.choice(DISTRACTORS[1:])
    if order is None:
        order = rng.choice(("ABBA", "BABA"))
    opening, own_sentence = _OPENINGS[index % len(_OPENINGS)]
    a, b = (io, subject) if order == "ABBA" else (subject, io)
    slots = {"A": a, "B": b, "S": subject, "IO": io, "P": rng.choice(PLACES)}
    slots["O"], slots["F"] = rng.choice(OBJECTS), rng.choice(FEELINGS)

    def mention(options: Sequence[str], name: str) -> str:
        return rng.choice(options).format(
            C=name, P=rng.choice(PLACES), O=rng.choice(OBJECTS), F=rng.choice(FEELINGS)
        )

    earlier = {"before": third, "twice": third, "s_before": subject}.get(
        distractor, io if distractor in ("io_before", "io_and_third") else None
    )
    between = third if distractor in ("between", "twice", "io_and_third") else None
    text = f"{mention(_BEFORE, earlier)} " if earlier else ""
    text += opening.format(**slots)
    action = _ACTIONS[index // len(_OPENINGS)].format(**slots)
    if between:
        text += ". " if own_sentence else ", "
        text += f"{mention(_BETWEEN, between)} {rng.choice(_LINKS)} {action}"
    elif own_sentence:
        text += f". {rng.choice(_LINKS)} {action}" if rng.random() < 0.5 else f", and {action}"
    else:
        text += f", {action}"
    tail = rng.choice(_AFTER).format(**slots)
    return IOIExample(
        prompt=text,
        io=io,
        subject=subject,
        order=order,
        template=index,
        distractor=distractor,
        third=third if third in (earlier, between) else None,
        tail="." + (f" {tail}" if tail else ""),
    )


# Prose ---------------------------------------------------------------------------------------


def _person(rng: random.Random) -> tuple[str, str, str, str]:
    name = rng.choice(NAMES)
    return (name, "he", "his", "boy") if name in HE else (name, "she", "her", "girl")


def _where(rng: random.Random) -> str:
    things, places = rng.sample(OBJECTS, 3), rng.sample(PLACES, 3)
    facts = [f"The {t} is in the {p}." for t, p in zip(things, places, strict=True)]
    asked = rng.randrange(3)
    return f"{' '.join(facts)} Where is the {things[asked]}? It is in the {places[asked]}."


def _colours(rng: random.Random) -> str:
    people, colours = rng.sample(NAMES, 2), rng.sample(COLOURS, 2)
    thing, asked = rng.choice(OBJECTS), rng.randrange(2)
    return (
        f"Now {people[0]} has a {colours[0]} {thing} and {people[1]} has a {colours[1]} {thing}. "
        f"What colour is the {thing} of {people[asked]}? It is {colours[asked]}."
    )


def _counting(rng: random.Random) -> str:
    start = rng.randrange(len(NUMBERS) - 4)
    stop = rng.randrange(start + 4, len(NUMBERS) + 1)
    return f"Let us count: {', '.join(NUMBERS[start:stop])}."


def _days(rng: random.Random) -> str:
    names = rng.choice((DAYS, MONTHS))
    start = rng.randrange(len(names))
    row = [names[(start + i) % len(names)] for i in range(rng.randrange(3, 6))]
    return f"The next are {', '.join(row)}."


def _tomorrow(rng: random.Random) -> str:
    day = rng.randrange(7)
    name, he, _, _ = _person(rng)
    return (
        f"Today is {DAYS[day]}, so tomorrow is {DAYS[(day + 1) % 7]}. "
        f"On {DAYS[day]} {name} bakes bread, and {he} sells it on {DAYS[(day + 1) % 7]}."
    )


def _agreement(rng: random.Random) -> str:
    one, other = rng.sample(ANIMALS, 2)
    feeling, place = rng.choice(FEELINGS), rng.choice(PLACES)
    if rng.random() < 0.5:
        return f"The {one} with the {_plural(other)} is at the {place}. It is {feeling}."
    return f"The {_plural(one)} with the {other} are at the {place}. They are {feeling}."


def _opposites(rng: random.Random) -> str:
    first, second = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        first, second = second, first
    one, other = rng.sample(OBJECTS, 2)
    return f"The {one} is {first}, but the {other} is not {first}. The {other} is {second}."


def _story(rng: random.Random) -> str:
    name, he, his, child = _person(rng)
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    colour, feeling = rng.choice(COLOURS), rng.choice(FEELINGS)
    return (
        f"There was a {child} named {name}. Every day {name} went to the {place} with {his} "
        f"{animal}. The {animal} of {name} was {colour}. One day the {animal} ran away, and {name} "
        f"was {feeling}. At last {he} found the {colour} {animal} near the {place}."
    )


def _meal(rng: random.Random) -> str:
    people, foods = rng.sample(NAMES, 2), rng.sample(FOODS, 2)
    asked = rng.randrange(2)
    return (
        f"For lunch {people[0]} likes {foods[0]} but {people[1]} likes {foods[1]}. "
        f"So the cook makes {foods[asked]} for {people[asked]}."
    )


def _talk(rng: random.Random) -> str:
    name, he, his, _ = _person(rng)
    thing, place = rng.choice(OBJECTS), rng.choice(PLACES)
    return (
        f'"Did you see the {thing}?" asked {name}. "Yes, the {thing} is at the {place}," said '
        f"{his} friend. So {he} went to the {place} to get the {thing}."
    )


def _how_many(rng: random.Random) -> str:
    many = rng.sample(NUMBERS[1:], 2)
    kinds = [_plural(animal) for animal in rng.sample(ANIMALS, 2)]
    asked = rng.randrange(2)
    return (
        f"The farm has {many[0]} {kinds[0]} and {many[1]} {kinds[1]}. "
        f"How many {kinds[asked]} are there? There are {many[asked]}."
    )


def _jobs(rng: random.Random) -> str:
    people, jobs = rng.sample(NAMES, 2), rng.sample(JOBS, 2)
    asked = rng.randrange(2)
    return (
        f"Here {people[0]} is a {jobs[0]} and {people[1]} is a {jobs[1]}. "
        f"Who is the {jobs[asked]}? The {jobs[asked]} is {people[asked]}."
    )


_PROSE = (
    _where,
    _colours,
    _counting,
    _days,
    _tomorrow,
    _agreement,
    _opposites,
    _story,
    _meal,
    _talk,
    _how_many,
    _jobs,
)


def _plural(animal: str) -> str:
    return {"fox": "foxes", "mouse": "mice"}.get(animal, animal + "s")


# Tokens --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Every token with its id: the two special ones first, then all others in sorted order."""
    pieces: set[str] = set()
    for word in (*NAMES, *PLACES, *OBJECTS, *COLOURS, *ANIMALS, *NUMBERS, *DAYS, *MONTHS, *JOBS):
        pieces.add(f" {word}")
    for word in (*FEELINGS, *FOODS, *(w for pair in OPPOSITES for w in pair)):
        pieces.add(f" {word}")
    pieces.update(f" {_plural(animal)}" for animal in ANIMALS)
    frames = (*(text for text, _ in _OPENINGS), *_ACTIONS, *_BEFORE, *_BETWEEN, *_AFTER, *_LINKS)
    # The frames of the prose are in the code above: a fixed sample shows all of them.
    rng = random.Random("vocabulary")
    prose = [make(rng) for make in _PROSE for _ in range(400)]
    pieces.update('.,?!:;"', (' "',))
    for text in prose:
        pieces.update(re.findall(PIECE, text), re.findall(PIECE, f" {text}"))
    for text in (*frames, *prose):
        words = re.findall(r"\w+", re.sub(r"\{\w+\}", "", text))
        pieces.update(f" {word}" for word in words)
        # A text starts without a space, and a first word may stand anywhere in either case.
        if words and text.startswith(words[0]):
            first, rest = words[0][0], words[0][1:]
            pieces.update(
                (first.upper() + rest, f" {first.upper()}{rest}", f" {first.lower()}{rest}")
            )
    return {piece: i for i, piece in enumerate((BOS, UNK, *sorted(pieces)))}


def encode(text: str) -> list[int]:
    """Token ids of a text of the language, without BOS. Raises ``KeyError`` on an unknown word."""
    ids = vocabulary()
    return [ids[piece] for piece in re.findall(PIECE, text)]


def build_tokenizer(n_ctx: int = 128) -> PreTrainedTokenizerFast:
    """The word-level Hugging Face tokenizer; it puts :data:`BOS` in front by itself.

    Tokens carry the space before them, so that decoding is plain concatenation. Words it does not
    know become :data:`UNK`.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ids = vocabulary()
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=BOS,
        unk_token=UNK,
        model_max_length=n_ctx,
        clean_up_tokenization_spaces=False,
    )


def random_ids(rng: random.Random, n: int) -> list[int]:
    """``n`` tokens drawn alike from all but the special ones."""
    top = len(vocabulary())
    return [rng.randrange(2, top) for _ in range(n)]


def repeated_random_tokens(
    rng: random.Random, *, segment: int, lead: int = 0, gap: int = 0
) -> list[int]:
    """BOS, ``lead`` random tokens, a random segment, ``gap`` random tokens, the segment again."""
    copy = random_ids(rng, segment)
    return [0, *random_ids(rng, lead), *copy, *random_ids(rng, gap), *copy]


def _repeats(rng: random.Random, length: int) -> list[int]:
    row = [0, *random_ids(rng, rng.randrange(0, length // 4))]
    segment = random_ids(rng, rng.randrange(4, length // 2))
    while len(row) < length:
        row += segment
        row += random_ids(rng, rng.choice((0, 0, 1, 2, 4, 8)))
    return row


def _ambiguous(rng: random.Random, length: int) -> list[int]:
    """Chunks ``own prefix + shared tokens + own continuation``, told apart by the prefix alone."""
    row = [0, *random_ids(rng, rng.randrange(0, 6))]
    shared = random_ids(rng, rng.randrange(1, 4))
    chunks = [
        [*random_ids(rng, rng.randrange(1, 4)), *shared, *random_ids(rng, rng.randrange(2, 5))]
        for _ in range(rng.randrange(2, 4))
    ]
    while len(row) < length:
        rng.shuffle(chunks)
        for chunk in chunks:
            row += chunk
            row += random_ids(rng, rng.randrange(0, 3))
    return row


def _text(rng: random.Random, length: int, ioi_first: bool, held_out: bool) -> list[int]:
    row = [0]
    first = True
    while len(row) < length:
        if (first and ioi_first) or (not first and rng.random() < 0.5):
            text = ioi_example(rng, held_out=held_out).text
        else:
            text = rng.choice(_PROSE)(rng)
        row += encode(text if first else f" {text}")
        first = False
    return row


Kind = Literal["ioi", "prose", "repeats", "ambiguous"]
MIXTURE: dict[Kind, float] = {"ioi": 0.45, "prose": 0.2, "repeats": 0.22, "ambiguous": 0.13}
"""Shares of the kinds of rows. ``ioi`` and ``prose`` say what a row of text starts with."""


def token_rows(
    rng: random.Random,
    n_rows: int,
    length: int,
    kinds: Iterable[Kind] = tuple(MIXTURE),
    *,
    held_out: bool = False,
) -> list[list[int]]:
    """Rows of training data.

    Args:
        rng: source of randomness.
        n_rows, length: shape of what is returned; every row starts with BOS and is cut, not padded.
        kinds: which kinds to draw from, in the proportions of :data:`MIXTURE`.
        held_out: whether the IOI sentences are held-out combinations (all of them) or none.
    """
    options = list(kinds)
    rows: list[list[int]] = []
    for kind in rng.choices(options, [MIXTURE[k] for k in options], k=n_rows):
        if kind == "repeats":
            row = _repeats(rng, length)
        elif kind == "ambiguous":
            row = _ambiguous(rng, length)
        else:
            row = _text(rng, length, kind == "ioi", held_out)
        rows.append(row[:length])
    return rows


def training_batch(seed: int, step: int, rows: int = 64) -> list[list[int]]:
    """Rows of 64 tokens; every sixth batch has half as many rows of 128. The same each time."""
    n, length = (rows // 2, 128) if step % 6 == 5 else (rows, 64)
    return token_rows(random.Random(f"{seed}:{step}"), n, length)


def held_out_rows(n_rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Rows of the training mixture to measure on: fresh seed, IOI sentences held out."""
    return token_rows(random.Random(f"measure:{seed}"), n_rows, length, held_out=True)

"""Indirect object identification: "When John and Mary went to the store, John gave a drink to".

The task is that of Wang et al. 2022 (arXiv:2211.00593); templates and words are this package's own.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_attn_plugin.demo import language
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tasks.rows import Rows, check_count, pad, padding_id
from sae_attn_plugin.tokens import encode_prompt, need_tokenizer, own_convention, single_token

__all__ = ["NAMES", "OBJECTS", "PLACES", "ROLES", "TEMPLATES", "Dropped", "IOIDataset", "IOISample"]

Order = Literal["ABBA", "BABA"]

ROLES = ("IO", "S1", "S1+1", "S2", "END", "AND")
"""IO: the receiver in the pair; S1: the subject in the pair; S1+1: the token after it; S2: the
subject again; END: the last token, which predicts the receiver; AND: the word between the pair
(the last token of it, where it is several)."""

NAMES = language.NAMES
PLACES = language.PLACES
OBJECTS = language.OBJECTS

# The first eight use no word that the demo model's tokenizer does not know.
TEMPLATES: tuple[str, ...] = (
    "After {A} and {B} left the {PLACE}, {S} gave a {OBJECT} to",
    "While {A} and {B} worked at the {PLACE}, {S} handed the {OBJECT} to",
    "When {A} and {B} arrived at the {PLACE}, {S} passed a {OBJECT} to",
    "One day {A} and {B} met near the {PLACE}. Later {S} bought a {OBJECT} for",
    "As {A} and {B} walked from the {PLACE}, {S} showed the {OBJECT} to",
    "Because {A} and {B} were late at the {PLACE}, {S} said thank you to",
    "In the evening {A} and {B} sat at the {PLACE}, and {S} decided to give a {OBJECT} to",
    "Yesterday {A} and {B} had a talk near the {PLACE}. Then {S} told a story to",
    "Since {A} and {B} shared a room above the {PLACE}, {S} often left a {OBJECT} for",
    "Before {A} and {B} reached the {PLACE}, {S} promised to send a {OBJECT} to",
    "Although {A} and {B} rarely visited the {PLACE}, {S} once mailed a {OBJECT} to",
    "Outside the {PLACE} {A} and {B} waited in the rain; finally {S} threw a {OBJECT} to",
    "On the way to the {PLACE} {A} and {B} argued, yet {S} still offered the {OBJECT} to",
    "Last summer {A} and {B} rented a boat near the {PLACE}. Once {S} wrote a letter to",
    "People at the {PLACE} knew that {A} and {B} were close, because {S} had lent a {OBJECT} to",
    "Every winter {A} and {B} painted the {PLACE}, after which {S} cooked dinner for",
)

_FEWEST_NAMES = 5  # a pair, and three others for the ABC counterpart
_MARK = re.compile(r"[,.;:]")


@dataclass(frozen=True)
class IOISample:
    """One prompt. ``str(sample)`` is its text.

    Attributes:
        template: with the slots ``{A} and {B}`` (the pair), ``{S}`` (the subject again) and, where
            wanted, ``{PLACE}`` and ``{OBJECT}``.
        io, s1, s2: the names in the roles; ``s1`` and ``s2`` differ only in the ABC counterpart.
        order: ``"ABBA"`` (IO first in the pair) or ``"BABA"``.
        conjunction: what stands between the pair, with its leading space.
        front: a sentence before the prompt. clause: words before the first mark after the pair.
    """

    template: str
    io: str
    s1: str
    s2: str
    order: Order
    place: str
    object: str
    conjunction: str = " and"
    front: str = ""
    clause: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        return self.spans()[0]

    def spans(self) -> tuple[str, dict[str, int]]:
        """The text, and where IO, S1, S2 and AND end in it, in characters.

        Raises:
            InputError: a clause, but no mark between the pair and the subject to put it before.
        """
        first, second = ("IO", "S1") if self.order == "ABBA" else ("S1", "IO")
        roles = {"A": first, "B": second, "S": "S2"}
        words = {"IO": self.io, "S1": self.s1, "S2": self.s2}
        fills = {"PLACE": self.place, "OBJECT": self.object}
        text, ends = f"{self.front} " if self.front else "", dict[str, int]()
        before, clause = "", ""  # the slot before this piece; the clause that waits for its mark
        for literal, slot in _pieces(self.template):
            if before == "A":
                text += self.conjunction
                ends["AND"] = len(text)
                literal = literal.removeprefix(" and")
            elif clause and (mark := _MARK.search(literal)):
                literal = literal[: mark.start()] + clause + literal[mark.start() :]
                clause = ""
            if clause and slot == "S":
                raise InputError(
                    f"a clause needs a comma or stop between the pair and {{S}} to stand before; "
                    f"{self.template!r} has none"
                )
            text += literal
            if slot in roles:
                text += words[roles[slot]]
                ends[roles[slot]] = len(text)
            elif slot:
                text += fills[slot]
            before, clause = slot, self.clause if slot == "B" else clause
        return text, ends


@dataclass(frozen=True)
class Dropped:
    """What the tokenizer cannot use: names that are not one token, templates, places and objects
    with words it does not know. ``len()`` of a field counts."""

    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()


class IOIDataset:
    """Prompts of the indirect object identification task, with the positions of their roles.

    Args:
        n: how many prompts.
        tokenizer: of the model. Names that are not one token in running text, and templates, places
            and objects with unknown words, are left out and told in ``dropped``.
        seed: the same seed, tokenizer and word lists give the same prompts.
        order: ``"ABBA"``, ``"BABA"``, or ``"mixed"``: the two in turn.
        templates: see :class:`IOISample`. The prompt ends before the indirect object.
        names, places, objects: words to draw from, without space.
        prepend_bos: None: the tokenizer's own convention. Pass ``lens.prepend_bos`` to have what
            ``lens.run(prompt)`` has.

    Attributes:
        samples: the prompts, readable.
        tokens: ``[n, longest]``, padded on the right; ``mask`` is true where there is a token.
            ``groups()`` gives rectangles of equal length without padding, which is what the metrics
            run.
        positions: role (:data:`ROLES`) to its position ``[n]``, BOS counted.
        correct, wrong: ``[n]`` token ids of the names in the roles IO and S1 of these prompts. (A
            clean run that is patched from a counterpart is scored with the clean ones.)
        clean: of a counterpart, the dataset it was made from at first; None of that one itself.
        change: what made a counterpart, ``"clean"`` otherwise.

    Raises:
        InputError: fewer than five usable names, a template without the roles, none usable.
    """

    tokenizer: Any
    seed: int
    prepend_bos: bool
    dropped: Dropped
    samples: tuple[IOISample, ...]
    rows: Rows
    positions: dict[str, Int[Tensor, " n"]]
    correct: Int[Tensor, " n"]
    wrong: Int[Tensor, " n"]

    def __init__(
        self,
        n: int,
        tokenizer: Any,
        seed: int,
        order: Literal["ABBA", "BABA", "mixed"] = "mixed",
        *,
        templates: Sequence[str] = TEMPLATES,
        names: Sequence[str] = NAMES,
        places: Sequence[str] = PLACES,
        objects: Sequence[str] = OBJECTS,
        prepend_bos: bool | None = None,
    ) -> None:
        n, tokenizer = check_count(n), need_tokenizer(tokenizer)
        if order not in ("ABBA", "BABA", "mixed"):
            raise InputError(f"order must be 'ABBA', 'BABA' or 'mixed', got {order!r}")
        for given, what in (
            (templates, "templates"),
            (names, "names"),
            (places, "places"),
            (objects, "objects"),
        ):
            if isinstance(given, str):
                raise InputError(f"{what} must be a list of strings, got one string {given!r}")
        for template in templates:
            _check_template(template)
        if prepend_bos is None:
            prepend_bos = own_convention(tokenizer)
        ids = {name: _name_id(tokenizer, name) for name in dict.fromkeys(names)}
        kept, no_names = _split(names, lambda name: ids[name] is not None)
        if len(kept) < _FEWEST_NAMES:
            raise InputError(
                f"{len(kept)} of {len(kept) + len(no_names)} names are one token in running text "
                f"for this tokenizer; at least {_FEWEST_NAMES} are needed. Dropped: "
                f"{_some(no_names)}. Pass names= that are one token with a space before them"
            )
        spots, no_places = _split(places, lambda word: knows(tokenizer, f" {word}"))
        things, no_objects = _split(objects, lambda word: knows(tokenizer, f" {word}"))

        def usable(template: str) -> bool:
            slots = {slot for _, slot in _pieces(template)}
            if ("PLACE" in slots and not spots) or ("OBJECT" in slots and not things):
                return False
            fills = {"PLACE": spots[0] if spots else "", "OBJECT": things[0] if things else ""}
            text = template.format(A=kept[0], B=kept[1], S=kept[0], **fills)
            return knows(tokenizer, text)

        frames, no_templates = _split(templates, usable)
        if not frames:
            raise InputError(
                f"no template is left: this tokenizer does not know words of any of the "
                f"{len(no_templates)}, or no place or object for them ({len(no_places)} places and "
                f"{len(no_objects)} objects dropped). Pass templates=, places= and objects= in "
                "words of its vocabulary"
            )
        rng = random.Random(f"ioi {seed}")
        orders: tuple[Order, ...] = ("ABBA", "BABA") if order == "mixed" else (order,)
        samples = []
        for i in range(n):
            io, subject = rng.sample(kept, 2)
            samples.append(
                IOISample(
                    template=rng.choice(frames),
                    io=io,
                    s1=subject,
                    s2=subject,
                    order=orders[i % len(orders)],
                    place=rng.choice(spots) if spots else "",
                    object=rng.choice(things) if things else "",
                )
            )
        self.tokenizer, self.seed, self.prepend_bos = tokenizer, seed, prepend_bos
        self.names = kept
        self._name_ids = {name: number for name, number in ids.items() if number is not None}
        self.dropped = Dropped(no_names, no_templates, no_places, no_objects)
        self.clean: IOIDataset | None = None
        self.change = "clean"
        self._fill(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        lengths = self.lengths
        return (
            f"IOIDataset({self.change}: {len(self)} prompts of {int(lengths.min())} to "
            f"{int(lengths.max())} tokens, seed {self.seed})"
        )

    @property
    def texts(self) -> list[str]:
        return [sample.text for sample in self.samples]

    @property
    def tokens(self) -> Int[Tensor, "n position"]:
        return self.rows.tokens

    @property
    def mask(self) -> Bool[Tensor, "n position"]:
        return self.rows.mask

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        return self.rows.lengths

    def groups(self, at_once: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """``(prompt numbers, tokens [member, length])`` of prompts of equal length, unpadded."""
        return self.rows.groups(at_once)

    def repeats(self) -> Int[Tensor, "n 3"]:
        """Columns prompt, destination, source: S2, and the token after S1, which induction heads
        attend to."""
        columns = (torch.arange(len(self)), self.positions["S2"], self.positions["S1+1"])
        return torch.stack(columns, 1)

    # -- counterparts ----------------------------------------------------------------------------

    def abc(self) -> IOIDataset:
        """Three different new names in the places of IO, S1 and S2: no name is repeated."""
        rng = self._rng("abc")
        samples = []
        for s in self.samples:
            io, s1, s2 = rng.sample(self._others(s), 3)
            samples.append(replace(s, io=io, s1=s1, s2=s2))
        return self._counterpart("abc", samples)

    def flipped(self) -> IOIDataset:
        """The two names exchanged throughout: the same positions, the other answer."""
        return self._counterpart(
            "flipped", [replace(s, io=s.s1, s1=s.io, s2=s.io) for s in self._two_names("flipped()")]
        )

    def new_names(self) -> IOIDataset:
        """Both names drawn anew (ABB -> CDD, BAB -> DCD): the same positions and relations."""
        rng = self._rng("new names")
        samples = []
        for s in self._two_names("new_names()"):
            io, subject = rng.sample(self._others(s), 2)
            samples.append(replace(s, io=io, s1=subject, s2=subject))
        return self._counterpart("new names", samples)

    def swapped(self) -> IOIDataset:
        """The pair in the other order (ABBA <-> BABA): IO and S1 change places, nothing else."""
        orders: dict[Order, Order] = {"ABBA": "BABA", "BABA": "ABBA"}
        return self._counterpart(
            "swapped", [replace(s, order=orders[s.order]) for s in self.samples]
        )

    def with_sentence_in_front(self, sentence: str = "It was a calm morning.") -> IOIDataset:
        """A sentence before each prompt: positions move, relations stay."""
        sentence = _words(sentence, "sentence")
        fronts = [f"{sentence} {s.front}".strip() for s in self.samples]
        return self._counterpart(
            "sentence in front",
            [replace(s, front=f) for s, f in zip(self.samples, fronts, strict=True)],
        )

    def with_inserted_clause(self, clause: str = "on a cold morning") -> IOIDataset:
        """Words before the first comma or stop after the pair: S2 and END move, the pair stays.

        Raises:
            InputError: a template without a mark between the pair and the subject.
        """
        clause = f" {_words(clause, 'clause')}"
        return self._counterpart(
            "inserted clause", [replace(s, clause=s.clause + clause) for s in self.samples]
        )

    def with_conjunction(self, conjunction: str) -> IOIDataset:
        """Another word between the pair instead of `` and``, such as ``" alongside"``, ``" or"``.

        Positions after it move where the tokenizer takes several tokens for it.
        """
        conjunction = f" {_words(conjunction, 'conjunction')}"
        return self._counterpart(
            f"conjunction{conjunction}",
            [replace(s, conjunction=conjunction) for s in self.samples],
        )

    def paired_positions(self, role: str) -> Int[Tensor, "n 2"]:
        """Where a role stands in the clean prompt and in this counterpart of it.

        Raises:
            InputError: not a counterpart, or an unknown role.
        """
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
        return torch.stack([self._clean().positions[role], self.positions[role]], 1)

    def paired_tokens(self) -> tuple[Int[Tensor, "n position"], Int[Tensor, "n position"]]:
        """Clean and counterpart tokens, position by position: every role stands at the same place.

        Raises:
            InputError: not a counterpart, or lengths or positions differ.
        """
        clean = self._clean()
        longer = (clean.lengths != self.lengths).nonzero()[:, 0].tolist()
        if longer:
            i = longer[0]
            raise InputError(
                f"pairing position by position needs prompts of equal length: {len(longer)} of "
                f"{len(self)} differ, the first is prompt {i} with {int(clean.lengths[i])} tokens "
                f"clean and {int(self.lengths[i])} after {self.change!r}. Pair by role with "
                "paired_positions(role)"
            )
        for role in ROLES:
            moved = (clean.positions[role] != self.positions[role]).nonzero()[:, 0].tolist()
            if moved:
                raise InputError(
                    f"pairing position by position needs the roles at equal positions: {role} of "
                    f"{len(moved)} prompts moved after {self.change!r}. Pair by role with "
                    "paired_positions(role)"
                )
        return clean.tokens, self.tokens

    # -- inside ----------------------------------------------------------------------------------

    def _fill(self, samples: Iterable[IOISample]) -> None:
        """Tokens, positions and answers of the samples."""
        self.samples = tuple(samples)
        found = [self._encode(sample) for sample in self.samples]
        self.rows = pad([ids for ids, _ in found], padding_id(self.tokenizer))
        self.positions = {role: torch.tensor([at[role] for _, at in found]) for role in ROLES}
        ids = self._name_ids
        self.correct = torch.tensor([ids[s.io] for s in self.samples])
        self.wrong = torch.tensor([ids[s.s1] for s in self.samples])

    def _encode(self, sample: IOISample) -> tuple[list[int], dict[str, int]]:
        text, ends = sample.spans()
        ids = encode_prompt(self.tokenizer, text, self.prepend_bos)
        at = {"END": len(ids) - 1}
        names = {"IO": sample.io, "S1": sample.s1, "S2": sample.s2}
        for role, end in ends.items():
            beginning = encode_prompt(self.tokenizer, text[:end], self.prepend_bos)
            at[role] = len(beginning) - 1
            as_expected = ids[: len(beginning)] == beginning
            if role in names:
                as_expected &= beginning[-1] == self._name_ids[names[role]]
            if not as_expected:
                raise InputError(
                    f"the tokenizer splits {text!r} so that {role} ({text[:end].split()[-1]!r}) is "
                    "not a token of its own; give other names or templates"
                )
        at["S1+1"] = at["S1"] + 1
        return ids, at

    def _counterpart(self, change: str, samples: Iterable[IOISample]) -> IOIDataset:
        other = object.__new__(IOIDataset)
        other.tokenizer, other.seed, other.prepend_bos = self.tokenizer, self.seed, self.prepend_bos
        other.names, other.dropped = self.names, self.dropped
        other._name_ids = self._name_ids
        other.clean = self.clean or self
        other.change = change if self.clean is None else f"{self.change}, {change}"
        other._fill(samples)
        return other

    def _clean(self) -> IOIDataset:
        if self.clean is None:
            raise InputError("this is the clean dataset; pair one of its counterparts with it")
        return self.clean

    def _rng(self, change: str) -> random.Random:
        return random.Random(f"ioi {self.seed} {self.change} {change}")

    def _others(self, sample: IOISample) -> list[str]:
        return [name for name in self.names if name not in (sample.io, sample.s1, sample.s2)]

    def _two_names(self, method: str) -> tuple[IOISample, ...]:
        if any(s.s1 != s.s2 for s in self.samples):
            raise InputError(f"{method} needs a subject named twice, which {self.change!r} has not")
        return self.samples


def _pieces(template: str) -> list[tuple[str, str]]:
    """``(literal text, name of the slot after it or "")``."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"not a template: {template!r}: {error}") from None
    # A conversion or format makes another slot of it: there is no use for either.
    return [
        (text, "" if slot is None else f"{slot or '{}'}{how or ''}{to or ''}")
        for text, slot, to, how in parsed
    ]


def _check_template(template: str) -> None:
    """Refuse a template in which the roles cannot be found."""
    if not isinstance(template, str):
        raise InputError(f"a template must be a string, got {template!r}")
    pieces = _pieces(template)
    slots = [slot for _, slot in pieces]
    roles = [slot for slot in slots if slot in ("A", "B", "S")]
    why = None
    if unknown := sorted(set(slots) - {"", "A", "B", "S", "PLACE", "OBJECT"}):
        why = f"unknown slots {unknown}"
    elif roles != ["A", "B", "S"]:
        why = f"it has the roles {roles}"
    elif pieces[slots.index("A") + 1] != (" and ", "B"):
        why = "' and ' must stand between {A} and {B}"
    elif any(not text.endswith(" ") for text, slot in pieces if slot in ("A", "S")):
        why = "names must follow a space"
    elif template.rstrip() != template or slots[-1] == "S":
        why = "it must end with the word before the indirect object"
    if why is not None:
        raise InputError(
            f"the template {template!r} does not give the roles: {why}. Expected '{{A}} and {{B}}' "
            "once, then '{S}' once, then the words up to the indirect object; {PLACE} and {OBJECT} "
            "where wanted"
        )


def _words(text: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{what} must be words, got {text!r}")
    return text.strip()


def _name_id(tokenizer: Any, name: str) -> int | None:
    """The token of a name within a text, or None where it is not one token."""
    try:
        number = single_token(tokenizer, f" {name}", 0)
    except InputError:
        return None
    # The vocabulary may hold a token that the tokenizer itself would not use here.
    alone, after = _ids(tokenizer, "a"), _ids(tokenizer, f"a {name}")
    return number if after == [*alone, number] else None


def knows(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer has no unknown token in a text."""
    unknown = tokenizer.unk_token_id
    # Some tokenizers use one special token for everything; unknown words then cannot be told.
    told = unknown is not None and unknown != tokenizer.bos_token_id
    return not told or unknown not in _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _split(words: Sequence[str], test: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words that pass and words that do not, each once, in their order."""
    passed = {word: bool(test(word)) for word in dict.fromkeys(words)}
    return tuple(w for w, ok in passed.items() if ok), tuple(
        w for w, ok in passed.items() if not ok
    )


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")

"""IOI prompts: roles and counterparts, on tokenizers of three kinds."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sae_attn_plugin import InputError
from sae_attn_plugin.demo import language
from sae_attn_plugin.tasks import IOIDataset, IOISample
from sae_attn_plugin.tasks.ioi import OBJECTS, PLACES, ROLES, TEMPLATES
from sae_attn_plugin.tokens import token_string

KINDS = ("byte_level", "unigram", "llama", "demo")
SEEN = language.HE[:10] + language.SHE[:10]
UNSEEN = ("Bartholomew", "Wilhelmina")


def _corpus() -> list[str]:
    """Text of the templates in which only some names occur."""
    rng = random.Random("corpus")
    more = ("It was a calm morning.", "Anna alongside Tom or Lucy came on a cold morning.", "a")
    texts = []
    for i in range(1500):
        a, b = SEEN[i % 20], SEEN[(i + 7) % 20]
        place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
        text = TEMPLATES[i % len(TEMPLATES)].format(A=a, B=b, S=a, PLACE=place, OBJECT=thing)
        texts.append(f"{text} {b}. {more[i % 3]}")
    return texts


@functools.cache
def tokenizer_of(kind: str) -> Any:
    """``byte_level``: as GPT-2's; ``unigram`` and ``llama``: sentencepiece's space, in the two ways
    in which it is put before a text; ``demo``: the demo model's."""
    if kind == "demo":
        return language.build_tokenizer()
    if kind == "unigram":
        tokenizer: Any = Tokenizer(models.Unigram())
    else:
        tokenizer = Tokenizer(models.BPE())
    special = ["<s>", "<unk>"]
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace()
    if kind == "unigram":
        options: Any = {"vocab_size": 1500, "special_tokens": special, "unk_token": "<unk>"}
        trainer: Any = trainers.UnigramTrainer(show_progress=False, **options)
    else:
        options = {"vocab_size": 1500, "special_tokens": special}
        trainer = trainers.BpeTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator(_corpus(), trainer)
    if kind == "llama":
        # Llama's own files know no words: a space is put before the text, then every space is a
        # letter.
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    if kind != "byte_level":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    )


def dataset(kind: str = "demo", n: int = 12, seed: int = 0, **options: Any) -> IOIDataset:
    return IOIDataset(n, tokenizer_of(kind), seed, **options)


def at(data: IOIDataset, role: str) -> list[str]:
    """The tokens that stand in a role, as text."""
    ids = data.tokens[torch.arange(len(data)), data.positions[role]].tolist()
    return [token_string(data.tokenizer, i) for i in ids]


def check_roles(data: IOIDataset) -> None:
    assert at(data, "IO") == [f" {s.io}" for s in data.samples]
    assert at(data, "S1") == [f" {s.s1}" for s in data.samples]
    assert at(data, "S2") == [f" {s.s2}" for s in data.samples]
    assert torch.equal(data.positions["S1+1"], data.positions["S1"] + 1)
    assert torch.equal(data.positions["END"], data.mask.sum(1) - 1)
    texts = [token_string(data.tokenizer, i) for i in data.correct.tolist()]
    assert texts == [f" {s.io}" for s in data.samples]
    for i, sample in enumerate(data.samples):
        io, s1, s2, end, conj = (
            int(data.positions[r][i]) for r in ("IO", "S1", "S2", "END", "AND")
        )
        first, second = (io, s1) if sample.order == "ABBA" else (s1, io)
        assert first < conj < second < s2 < end
        assert conj == second - 1


def test_both_surface_forms_are_exercised() -> None:
    assert "ĠMary" in tokenizer_of("byte_level").get_vocab()
    for kind in ("unigram", "llama"):
        assert "▁Mary" in tokenizer_of(kind).get_vocab()
    # Llama's way gives two tokens to the name alone, and one within a text.
    assert len(tokenizer_of("llama")(" Mary", add_special_tokens=False)["input_ids"]) == 2
    assert len(tokenizer_of("unigram")(" Mary", add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["ABBA", "BABA", "mixed"])
def test_roles(kind: str, order: Any) -> None:
    data = dataset(kind, n=40, order=order)
    check_roles(data)
    orders = {"mixed": ["ABBA", "BABA"] * 20}.get(order, [order] * 40)
    assert [s.order for s in data.samples] == orders
    has_bos = (data.tokens[:, 0] == data.tokenizer.bos_token_id).all()
    assert has_bos == data.prepend_bos == (kind != "byte_level")
    for i, sample in enumerate(data.samples):
        ids = data.tokens[i, : int(data.lengths[i])].tolist()
        text = data.tokenizer.decode(ids, skip_special_tokens=True)
        assert text.strip() == sample.text == str(sample)
        if sample.order == "BABA":  # this small Unigram takes two tokens for " and"
            pieces = 2 if kind == "unigram" else 1
            assert int(data.positions["AND"][i]) == int(data.positions["S1"][i]) + pieces


@pytest.mark.parametrize("kind", KINDS)
def test_counterparts(kind: str) -> None:
    data = dataset(kind, n=20)
    abc, flipped, new = data.abc(), data.flipped(), data.new_names()
    for other in (abc, flipped, new):
        check_roles(other)
        clean, tokens = other.paired_tokens()
        differ = (clean != tokens).nonzero().tolist()
        names = {(i, int(data.positions[r][i])) for i in range(20) for r in ("IO", "S1", "S2")}
        assert {(i, p) for i, p in differ} == names
    for clean, a, f, c in zip(data.samples, abc.samples, flipped.samples, new.samples, strict=True):
        assert len({a.io, a.s1, a.s2, clean.io, clean.s1}) == 5
        assert (f.io, f.s1, f.s2) == (clean.s1, clean.io, clean.io)
        assert c.s1 == c.s2
        assert len({c.io, c.s1, clean.io, clean.s1}) == 4
    assert torch.equal(flipped.correct, data.wrong)
    assert torch.equal(flipped.wrong, data.correct)
    assert abc.clean is data
    assert data.clean is None


@pytest.mark.parametrize("kind", KINDS)
def test_position_changes(kind: str) -> None:
    data = dataset(kind, n=20)
    front, inserted = data.with_sentence_in_front(), data.with_inserted_clause()
    both = data.new_names().with_sentence_in_front().with_inserted_clause()
    for other in (front, inserted, both):
        check_roles(other)
        with pytest.raises(InputError, match="equal length"):
            other.paired_tokens()
    for role in ROLES:
        before, after = front.paired_positions(role).unbind(1)
        assert torch.equal(before, data.positions[role])
        shift = after - before
        assert (shift > 0).all()
        assert torch.equal(shift, front.lengths - data.lengths)
        moved = inserted.paired_positions(role)
        assert torch.equal(moved[:, 0] == moved[:, 1], torch.full((20,), role not in ("S2", "END")))
    assert both.clean is data
    assert both.change == "new names, sentence in front, inserted clause"
    for sample in inserted.samples:
        pair, rest = sample.text.split(" on a cold morning")
        assert rest[0] in ",.;"
        assert not set(pair) & set(",.;")


def test_conjunctions() -> None:
    data = dataset("byte_level", n=10)
    other = data.with_conjunction(" alongside")
    check_roles(other)
    assert at(other, "AND") == [" alongside"] * 10
    assert all(" alongside " in text for text in other.texts)
    clean, tokens = other.paired_tokens()
    assert ((clean != tokens).sum(1) == 1).all()
    # A conjunction of several tokens moves what comes after it, and its last token has the role.
    longer = data.with_conjunction("together with")
    check_roles(longer)
    with pytest.raises(InputError, match="equal length"):
        longer.paired_tokens()
    with pytest.raises(InputError, match="does not know: 'alongside'"):
        dataset("demo").with_conjunction(" alongside")


def test_hand_written_sample() -> None:
    sample = IOISample(
        "At the {PLACE} {A} and {B} sat, then {S} gave a {OBJECT} to",
        "Mary", "John", "John", "BABA", "store", "drink", " or", "It rained.", " all day",
    )  # fmt: skip
    text, ends = sample.spans()
    assert text == ("It rained. At the store John or Mary sat all day, then John gave a drink to")
    assert text[: ends["AND"]].endswith("John or")
    assert text[: ends["IO"]].endswith("or Mary")
    assert text[: ends["S1"]] == "It rained. At the store John"
    assert text[: ends["S2"]].endswith("then John")


def test_reproducible_without_global_state() -> None:
    first = dataset(seed=3)
    state = random.getstate()
    random.seed(99)
    again = dataset(seed=3)
    assert first.texts == again.texts
    assert first.abc().texts == again.abc().texts
    random.setstate(state)
    dataset(seed=4).new_names()
    assert random.getstate() == state
    assert dataset(seed=4).texts != first.texts


def test_what_a_tokenizer_cannot_use_is_counted() -> None:
    data = dataset("byte_level", names=(*SEEN, *UNSEEN))
    assert data.dropped.names == UNSEEN
    assert data.names == SEEN
    assert data.dropped.templates == ()
    demo = dataset("demo", places=("zoo", "airport"), objects=("ring", "spanner"))
    assert demo.dropped.templates == TEMPLATES[8:]
    assert demo.dropped.places == ("airport",)
    assert demo.dropped.objects == ("spanner",)
    assert {s.place for s in demo.samples} == {"zoo"}


def test_groups_are_rectangles() -> None:
    data = dataset(n=30)
    seen = []
    for members, tokens in data.groups(4):
        assert len(members) <= 4
        assert (data.lengths[members] == tokens.shape[1]).all()
        assert torch.equal(data.tokens[members, : tokens.shape[1]], tokens)
        seen += members.tolist()
    assert sorted(seen) == list(range(30))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Then {A} and {B} left and {S} gave it to {C}", "unknown slots"),
        ("Then {A} and {B} left.", "it has the roles"),
        ("Then {S} met {A} and {B} at", "it has the roles"),
        ("Then {A} met {B}, {S} gave it to", "must stand between"),
        ("Then {A} and {B} left, {S}", "must end with"),
        ("Then {A} and {B} left, {S} gave it to ", "must end with"),
        ("{A} and {B} left, {S} gave it to", "follow a space"),
        ("Then {A and {B} left", "not a template"),
        ("Then {A} and {B} left, {S} gave {} to", "unknown slots"),
        ("Then {A} and {B!r} left, {S} gave it to", "unknown slots"),
        ("Then {A}{{ and {B} left, {S} gave it to", "must stand between"),
        ("", "it has the roles"),
    ],
)
def test_templates_without_the_roles(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataset(templates=[template])


def test_bad_input() -> None:
    with pytest.raises(InputError, match="0 of 2 names are one token"):
        dataset("llama", names=UNSEEN)
    with pytest.raises(InputError, match="no template is left"):
        dataset("demo", templates=TEMPLATES[8:])
    with pytest.raises(InputError, match="no template is left"):
        dataset("demo", places=("airport",), templates=TEMPLATES[:1])
    with pytest.raises(InputError, match="order must be"):
        dataset(order="AABB")
    with pytest.raises(InputError, match="one string"):
        dataset(names="John")
    for n in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="n must be"):
            dataset(n=n)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tokenizer"):
        IOIDataset(3, None, 0)
    data = dataset()
    with pytest.raises(InputError, match="this is the clean dataset"):
        data.paired_positions("S2")
    with pytest.raises(InputError, match="unknown role"):
        data.flipped().paired_positions("S3")
    with pytest.raises(InputError, match="named twice"):
        data.abc().flipped()
    with pytest.raises(InputError, match="has none"):
        dataset(templates=["Then {A} and {B} met so {S} gave a ring to"]).with_inserted_clause()
    with pytest.raises(InputError, match="must be words"):
        data.with_conjunction(" ")

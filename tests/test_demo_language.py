"""The demo language: tokenizer, held-out rule, distractors, repeated tokens."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from sae_attn_plugin.demo import language

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """Saved and loaded again, as the package ships it."""
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    language.build_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def names_in(text: str) -> Counter[str]:
    return Counter(word for word in re.findall(r"\w+", text) if word in language.NAMES)


def test_prompt_is_in_the_language(tokenizer) -> None:
    ids = tokenizer(PROMPT).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.unk_token_id not in ids
    assert tokenizer(PROMPT, add_special_tokens=False).input_ids == ids[1:]
    assert len(tokenizer(" Mary", add_special_tokens=False).input_ids) == 1
    when = [tokenizer(text, add_special_tokens=False).input_ids for text in ("When", " when")]
    assert when[0] != when[1]


def test_text_survives_the_tokenizer(tokenizer) -> None:
    rng = random.Random(0)
    texts = [language.ioi_example(rng).text for _ in range(300)]
    texts += [make(rng) for make in language._PROSE for _ in range(20)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == language.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_unknown_words_are_marked(tokenizer) -> None:
    for text in ("When Zebedee came", "When  John", "When\nJohn"):
        assert tokenizer.unk_token_id in tokenizer(text).input_ids
    with pytest.raises(KeyError):
        language.encode("When Zebedee came")


def test_every_word_can_be_written_inside_a_text(tokenizer) -> None:
    vocabulary = language.vocabulary()
    assert 400 <= len(vocabulary) <= 900
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    for piece, index in vocabulary.items():
        if piece not in (language.BOS, language.UNK):
            assert tokenizer(piece, add_special_tokens=False).input_ids == [index]


@pytest.mark.parametrize("held_out", [True, False])
def test_held_out_combinations_stay_apart(held_out: bool) -> None:
    rng = random.Random(1)
    for _ in range(500):
        example = language.ioi_example(rng, held_out=held_out)
        assert language.is_held_out(example.template, example.io, example.subject) == held_out


def test_a_quarter_is_held_out() -> None:
    rng = random.Random(2)
    drawn = [
        language.is_held_out(rng.randrange(language.N_TEMPLATES), *rng.sample(language.NAMES, 2))
        for _ in range(8000)
    ]
    assert 0.23 < sum(drawn) / len(drawn) < 0.27


@pytest.mark.parametrize("distractor", language.DISTRACTORS)
@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_distractors(distractor, order) -> None:
    # mentions of IO, S and the third name before the answer
    expected = {
        "none": (1, 2, 0),
        "before": (1, 2, 1),
        "between": (1, 2, 1),
        "twice": (1, 2, 2),
        "io_before": (2, 2, 0),
        "s_before": (1, 3, 0),
        "io_and_third": (2, 2, 1),
    }[distractor]
    rng = random.Random(3)
    for _ in range(100):
        example = language.ioi_example(rng, distractor=distractor, order=order)
        counts = names_in(example.prompt)
        third = counts.pop(example.third) if example.third else 0
        assert (counts.pop(example.io), counts.pop(example.subject), third) == expected
        assert not counts
        names = [w for w in re.findall(r"\w+", example.prompt) if w in language.NAMES]
        assert names[-1] == example.subject
        pair = names[1:3] if distractor not in ("none", "between") else names[:2]
        io_first = pair == [example.io, example.subject]
        assert io_first == (order == "ABBA")


def test_counting_does_not_solve_it() -> None:
    """The least mentioned name (ties broken by chance) is often a wrong answer."""
    rng = random.Random(4)
    hits = 0.0
    for _ in range(2000):
        example = language.ioi_example(rng)
        counts = names_in(example.prompt)
        least = [name for name, n in counts.items() if n == min(counts.values())]
        hits += (example.io in least) / len(least)
    assert hits / 2000 < 0.8


def test_rows_are_reproducible() -> None:
    rows = language.token_rows(random.Random("5"), 40, 64)
    assert rows == language.token_rows(random.Random("5"), 40, 64)
    assert rows != language.token_rows(random.Random("6"), 40, 64)
    assert all(len(row) == 64 and row[0] == 0 and 0 not in row[1:] for row in rows)
    assert all(1 < token < len(language.vocabulary()) for row in rows for token in row[1:])


def test_repeated_random_tokens() -> None:
    row = language.repeated_random_tokens(random.Random(7), segment=10, lead=3, gap=4)
    assert len(row) == 1 + 3 + 10 + 4 + 10
    assert row[4:14] == row[18:28]


def test_ambiguous_rows_need_a_longer_prefix() -> None:
    """Some token has several continuations, which the tokens before it tell apart."""
    needed = 0
    for seed in range(50):
        row = language.token_rows(random.Random(seed), 1, 128, ("ambiguous",))[0]
        after: dict[int, Counter[int]] = {}
        for token, following in pairwise(row):
            after.setdefault(token, Counter())[following] += 1
        # at least two continuations that both come back
        needed += any(sum(n > 1 for n in nexts.values()) > 1 for nexts in after.values())
    assert needed > 45

"""Node ids: a total round trip, and nothing else is accepted."""

from __future__ import annotations

import random

import pytest
from helpers import TINY, random_saes, word_tokenizer

import sae_attn_plugin as sap
from sae_attn_plugin.nodes import KINDS, Node, quote

HOSTILE = [
    " Mary",
    '"',
    "\\",
    '\\"',
    "@",
    "@14",
    "#",
    "#5",
    "-",
    '"-"',
    '" John"-" Mary"@3',
    "\n",
    "\r\n\t",
    "\x00\x1f\x7f",
    "\u2028\u2029",
    "é",
    "日本",
    "\u202e",
    "😀",
    "\ufffd",
    "",
    " ",
    "const:attn:5:1@2",
    "<|endoftext|>",
    "</script>",
    "a" * 300,
]

PLAIN = [
    Node("attn", 10, layer=5, feature=7515),
    Node("attn", 0, layer=0, feature=0),
    Node("attn_err", 10, layer=5),
    Node("attn_bias", 10, layer=5),
    Node("head", 10, layer=5, head=11),
    Node("mlp", 10, layer=3),
    Node("embed", 4),
    Node("pos", 4),
    Node("tc", 10, layer=3, feature=120),
    Node("tc_skip", 10, layer=3),
    Node("tc_err", 10, layer=3),
    Node("tc_bias", 10, layer=3),
    Node("mlp_sae", 10, layer=3, feature=120),
    Node("mlp_sae_err", 10, layer=3),
    Node("mlp_sae_bias", 10, layer=3),
    Node("resid", 10, layer=5, feature=120),
    Node("resid_err", 10, layer=5),
    Node("resid_bias", 10, layer=5),
    Node("resid_mid", 10, layer=5, feature=120),
    Node("resid_mid_err", 10, layer=5),
    Node("resid_mid_bias", 10, layer=5),
]
LABELLED = [
    Node(kind, 14, label=quote(token)) for kind in ("logit", "direction") for token in HOSTILE
]
PAIRS = [
    Node("logit_diff", 14, label=f"{quote(a)}-{quote(b)}")
    for a, b in zip(HOSTILE, reversed(HOSTILE), strict=True)
]
NUMBERED = [
    Node("logit", 14, label=quote(5335)),
    Node("logit_diff", 14, label=f"{quote(5)}-{quote(6)}"),
    Node("logit_diff", 14, label=f"{quote(5)}-{quote('x')}"),
]
SCORES = [Node("score", 14, layer=7, head=3, key=10, label=side) for side in (None, "query", "key")]
TARGETS = [PLAIN[i] for i in (0, 4, 5, 8, 9, 12, 15, 18)] + [*LABELLED, *PAIRS, *NUMBERED, *SCORES]
MERGED = [
    Node("super", 14, layer=layer, label=quote(token))
    for layer in (None, 0, 5)
    for token in HOSTILE
]
CONSTANTS = [Node("const", t.position, of=t) for t in TARGETS]
EVERY = [*PLAIN, *LABELLED, *PAIRS, *NUMBERED, *SCORES, *MERGED, *CONSTANTS]


@pytest.mark.parametrize("node", EVERY, ids=lambda node: ascii(str(node))[:60])
def test_round_trip(node: Node) -> None:
    assert Node.parse(str(node)) == node
    assert str(Node.parse(str(node))) == str(node)


def test_every_kind_is_covered_and_no_ids_collide() -> None:
    assert {node.kind for node in EVERY} == set(KINDS)
    assert len({str(node) for node in EVERY}) == len(set(EVERY)) == len(EVERY)


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (PLAIN[0], "attn:5:7515@10"),
        (PLAIN[2], "attn_err:5@10"),
        (PLAIN[3], "attn_bias:5@10"),
        (PLAIN[4], "head:5.11@10"),
        (PLAIN[5], "mlp:3@10"),
        (PLAIN[6], "embed@4"),
        (PLAIN[7], "pos@4"),
        (PLAIN[8], "tc:3:120@10"),
        (PLAIN[9], "tc_skip:3@10"),
        (PLAIN[10], "tc_err:3@10"),
        (PLAIN[11], "tc_bias:3@10"),
        (PLAIN[12], "mlp_sae:3:120@10"),
        (PLAIN[13], "mlp_sae_err:3@10"),
        (PLAIN[14], "mlp_sae_bias:3@10"),
        (PLAIN[15], "resid:5:120@10"),
        (PLAIN[20], "resid_mid_bias:5@10"),
        (Node("logit", 14, label=quote(" Mary")), 'logit:" Mary"@14'),
        (Node("logit_diff", 14, label='" Mary"-" John"'), 'logit_diff:" Mary"-" John"@14'),
        (SCORES[0], "score:7.3:10@14"),
        (SCORES[1], "score:7.3:10:query@14"),
        (Node("const", 10, of=PLAIN[0]), "const:attn:5:7515@10"),
    ],
)
def test_documented_forms(node: Node, text: str) -> None:
    assert str(node) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "attn",
        "attn:5@10",
        "attn:5:7515",
        "attn:5:7515@",
        "attn:5:7515@-1",
        "attn:5:7515@10 ",
        " attn:5:7515@10",
        "attn:5:7515@10\n",
        "attn:05:7515@10",
        "attn:5:7515@010",
        "attn:5:+7@1",
        "attn:5:\u0663@1",  # a digit to \d and int(), but not as we write it
        "attn:5:7_5@1",
        "ATTN:5:7515@10",
        "attn-err:5@10",
        "attn_err:5:3@10",
        "head:5:1@10",
        "head:5.1",
        "mlp@10",
        "embed:4",
        "embed:0@4",
        "pos",
        "tc:3@10",
        "tc_skip:3:120@10",
        "nonsense:5@10",
        "logit: Mary@14",
        'logit:" Mary"',
        'logit:" Mary@14',
        'logit:"a"-"b"@14',
        'logit:"a"b"@14',
        "logit:@14",
        "logit:5335@14",
        "logit:#@14",
        "logit:#05@14",
        "logit:#\u0663@14",
        "logit:#-5@14",
        'logit:"\\u0041"@14',  # "A" is written A
        'logit:"\\q"@14',
        'logit:"a\nb"@14',  # a newline is written \n
        'logit:"é\\u00e9"@14',
        'logit_diff:" Mary"@14',
        'logit_diff:"a"-"b"-"c"@14',
        'logit_diff:"a""b"@14',
        'logit_diff:"a"-#05@14',
        "direction:mine@3",
        "direction:#5@3",
        "const:",
        "const:embed@4",
        "const:const:attn:5:7515@10",
        "const:tc_err:3@10",
        "attn:5:" + "9" * 5000 + "@10",
        "logit:#" + "9" * 5000 + "@10",
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_malformed_and_non_canonical_ids(text: str) -> None:
    with pytest.raises(sap.InputError, match="not a node id"):
        Node.parse(text)


def test_fuzzed_ids_parse_back_or_are_refused() -> None:
    """Whatever is accepted is what would have been written."""
    rng = random.Random(0)
    seeds = [str(node) for node in EVERY if len(str(node)) < 80]
    alphabet = '"\\@#-:._ 0159anu\n\u0663é'
    accepted = 0
    for _ in range(4000):
        text = list(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randint(0, 1)] = rng.choice(alphabet)
        written = "".join(text)
        try:
            node = Node.parse(written)
        except sap.InputError:
            continue
        accepted += 1
        assert str(node) == written
    assert accepted > 100


def test_an_unknown_kind_has_no_id() -> None:
    with pytest.raises(sap.InputError, match="unknown node kind 'neuron'"):
        str(Node("neuron", 3))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_ids_of_a_graph(with_tokenizer: bool) -> None:
    model = TINY["gpt2"](n_layers=2)
    tokenizer = word_tokenizer() if with_tokenizer else None
    lens = sap.FeatureLens(model, random_saes(model)[:1], tokenizer=tokenizer)
    run = lens.run([3, 4, 5])
    att = run.attribute([sap.Logit(9), sap.LogitDiff(5, 6), sap.Feature(0, 3, -1)])
    nodes = [Node.parse(str(name)) for name in att.nodes.index]
    assert len(set(nodes)) == len(att.nodes)
    assert {node.kind for node in nodes} >= {
        *("embed", "pos", "attn", "attn_err", "attn_bias", "head", "mlp", "logit", "logit_diff")
    }
    names = [str(node) for node in att.roots.values()]
    w = (lambda i: f'"w{i}"') if with_tokenizer else (lambda i: f"#{i}")
    assert names == [f"logit:{w(9)}@2", f"logit_diff:{w(5)}-{w(6)}@2", "attn:0:3@2"]

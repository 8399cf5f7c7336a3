"""The explorer without its page: the queue, sessions, who may ask, answers against the library."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from explore_server import Server, demo_server, process
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin.explore.jobs import Busy, Jobs
from sae_attn_plugin.explore.sessions import Sessions

PROMPT = str(sap.demo.ioi_prompt())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = demo_server(tmp_path_factory.mktemp("explorer") / "sessions")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def run(server: Server) -> Any:
    return server.lens.run(PROMPT)


def answer(server: Any, kind: str, **question: Any) -> Any:
    job = server.ask(kind, prompt=PROMPT, **question)
    assert job["state"] == "done", job
    return job["result"]


# -- answers ---------------------------------------------------------------------------------------


def test_features_are_those_of_the_run(server: Server, run: Any) -> None:
    found = answer(server, "open")
    frame = run.features()
    assert found["tokens"] == list(run.token_strings)
    assert len(found["features"]) == len(frame)
    for row, expected in zip(found["features"], frame.itertuples(), strict=True):
        assert row[:3] == [expected.layer, expected.position, expected.feature]
        assert row[3] == pytest.approx(expected.activation, rel=1e-6)
    probabilities = run.logits[0, -1].double().softmax(-1)
    top = found["next"][0]
    assert top["token"]["id"] == int(probabilities.argmax())
    assert top["probability"] == pytest.approx(float(probabilities.max()), rel=1e-6)


def test_dfa_sources_and_qk(server: Server, run: Any) -> None:
    row = run.features(layer=1, position=-1).iloc[0]
    place = {"layer": 1, "feature": int(row.feature), "position": 14}
    found = answer(server, "dfa", **place)
    dfa = run.dfa(**place)
    for got, expected in zip(found["by_head_and_source"], dfa.by_head_and_source, strict=True):
        assert got == pytest.approx(expected[:15].tolist(), rel=1e-5, abs=1e-9)
    assert found["activation"] == pytest.approx(float(row.activation), rel=1e-6)
    lists = [answer(server, "sources", source=source, **place) for source in range(15)]
    for listed in lists:
        weights = [abs(row["weight"]) for row in listed["rows"]]
        assert weights == sorted(weights, reverse=True)
    total, listed = sum(one["here"] for one in lists), lists[-1]
    assert total + listed["constant"] == pytest.approx(listed["value"], rel=1e-5)
    assert listed["value"] == pytest.approx(found["pre_activation"], rel=1e-5)
    found = answer(server, "qk", layer=1, head=4, query=14, key=9)
    qk = run.qk(1, 4, 14, 9)
    assert found["score"] == pytest.approx(qk.score, rel=1e-6)
    assert found["terms"][0][2] == pytest.approx(float(qk.top(1)["weight"].iloc[0]), rel=1e-5)
    assert len(found["row"]) == 15


def test_interventions(server: Server, run: Any) -> None:
    feature = int(run.features(layer=1, position=-1).iloc[0].feature)
    edits = [{"layer": 1, "feature": feature, "position": -1, "how": "ablate"},
             {"layer": 0, "feature": 3, "position": None, "how": "set", "amount": 2.5},
             {"layer": 2, "feature": 7, "position": 3, "how": "scale", "amount": 0.5}]  # fmt: skip
    found = answer(server, "intervene", edits=edits, new_tokens=5)
    result = server.lens.intervene(
        run,
        [sap.AblateFeature(1, feature, -1), sap.SetFeature(0, 3, None, 2.5),
         sap.ScaleFeature(2, 7, 3, 0.5)],
        max_new_tokens=5,
    )  # fmt: skip
    for row in found["tokens"]:
        number = row["token"]["id"]
        assert row["clean"] == pytest.approx(float(run.logits[0, -1, number]), rel=1e-5)
        assert row["edited"] == pytest.approx(float(result.logits[0, -1, number]), rel=1e-5)
    assert (found["clean_text"], found["edited_text"]) == result.continuations()[0]
    assert found["kl"] > 0


@pytest.mark.parametrize("format", ["json", "native", "graphml", "gexf"])
def test_exports_load_again(server: Server, run: Any, tmp_path: Path, format: str) -> None:
    target = {"token": " Mary", "wrong": " John"}
    found = answer(server, "export", format=format, target=target, max_nodes=20)
    (tmp_path / found["name"]).write_bytes(base64.b64decode(found["base64"]))
    graph = sap.load(tmp_path / found["name"])
    expected = run.attribute(sap.LogitDiff(" Mary", " John")).prune(0.8, 0.98, 20).to_networkx()
    assert sap.graphs_equal(graph, expected)
    data = answer(server, "graph", target=target, max_nodes=20)["data"]
    assert {node["id"] for node in data["nodes"]} == set(graph)


def test_exports_for_others(server: Server) -> None:
    for format, part in (("html", b"<!doctype html>"), ("neuronpedia", b'"qParams"'),
                         ("mib", b'"a0.h0->a1.h0<v>"')):  # fmt: skip
        found = answer(server, "export", format=format, max_nodes=10)
        assert part in base64.b64decode(found["base64"])


# -- wrong input -----------------------------------------------------------------------------------

_PLACE = {"layer": 1, "feature": 3, "position": 2}


@pytest.mark.parametrize(
    ("kind", "question", "message"),
    [
        ("open", {"prompt": ""}, "the prompt is empty"),
        ("open", {"prompt": 5}, "prompt is missing; expected a text"),
        ("open", {"prompt": "a" * 20_001}, "at most 20000"),
        ("open", {"prompt": "\ud83d"}, "half a character"),
        ("open", {"prompt": " the" * 300}, "128"),
        ("dfa", {**_PLACE, "layer": 9}, "no SAE in layer 9"),
        ("dfa", {**_PLACE, "layer": "1"}, "layer is '1'; expected a whole number"),
        ("dfa", {**_PLACE, "feature": 10**6}, "feature 1000000 is out of range"),
        ("dfa", {**_PLACE, "feature": 10**40}, "expected a whole number"),
        ("dfa", {**_PLACE, "position": True}, "expected a whole number"),
        ("dfa", {**_PLACE, "position": 99}, "position 99 is out of range"),
        ("sources", {**_PLACE, "source": 99}, "position 99 is out of range"),
        ("qk", {"layer": 1, "head": 99, "query": 3, "key": 1}, "head 99"),
        ("qk", {"layer": 1, "head": 0, "query": 1, "key": 3}, "key"),
        ("graph", {"target": {"token": "no such token"}}, "no such token"),
        ("graph", {"target": {"token": "#99999"}}, "99999"),
        ("graph", {"target": {"token": ""}}, "token is empty"),
        ("graph", {"target": {"node": "embed@2"}}, "is no attention feature"),
        ("graph", {"target": {"node": "__import__('os')"}}, "not a node id"),
        ("graph", {"target": [1]}, "expected a target"),
        ("graph", {"nodes": 7}, r"prune\(nodes=7.0\): expected a share"),
        ("graph", {"nodes": "all"}, "expected a number"),
        ("graph", {"max_nodes": 0}, "expected 1 to 5000"),
        ("export", {"format": "pickle"}, "unknown format 'pickle'"),
        ("export", {"format": "../../x"}, "unknown format"),
        ("intervene", {"edits": []}, "expected 1 to 64 edits"),
        ("intervene", {"edits": [3]}, "expected an edit"),
        ("intervene", {"edits": [{**_PLACE, "how": "eval"}]}, "how is 'eval'"),
        ("intervene", {"edits": [{**_PLACE, "how": "set"}]}, "amount is None"),
        ("intervene", {"edits": [{**_PLACE, "how": "ablate"}], "new_tokens": 999}, "0 to 60"),
    ],
)  # fmt: skip
def test_wrong_questions_get_a_message(
    server: Server, kind: str, question: dict[str, Any], message: str
) -> None:
    import re

    job = server.ask(kind, **{"prompt": PROMPT, **question})
    assert job["state"] == "failed"
    assert re.search(message, job["error"])
    assert "Traceback" not in job["error"]
    assert "see its terminal" not in job["error"]
    assert "result" not in job


def test_a_defect_is_a_message_too(server: Server) -> None:
    questions = server.app.state.questions
    questions.kinds["broken"] = lambda *_: {}["secret"]
    try:
        job = server.ask("broken", prompt=PROMPT)
    finally:
        del questions.kinds["broken"]
    assert job["error"] == "the server could not do this (KeyError); see its terminal"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/api/jobs", b"{", 400, "no JSON"),
        ("POST", "/api/jobs", b"[]", 400, "no JSON object"),
        ("POST", "/api/jobs", b"[" * 100_000, 400, "no JSON"),
        ("POST", "/api/jobs", b'{"kind": NaN}', 400, "it holds NaN"),
        ("POST", "/api/jobs", b" " * 1_300_000, 400, "longer than"),
        ("POST", "/api/jobs", {"kind": "exec"}, 400, "unknown question 'exec'"),
        ("POST", "/api/jobs", {"kind": ["open"]}, 400, "unknown question"),
        ("GET", "/api/jobs/none", None, 404, "no such request"),
        ("GET", "/api/sessions/none", None, 400, "no session named 'none'"),
        ("PUT", "/api/sessions/x", {"state": 5}, 400, "expected the state"),
        ("GET", "/assets/..%2fserver.py", None, 404, ""),
        ("GET", "/assets/server.py", None, 404, "no such page"),
        ("GET", "/etc/passwd", None, 404, ""),
        ("PATCH", "/api/jobs", None, 405, ""),
    ],
)
def test_wrong_requests(
    server: Server, method: str, path: str, body: Any, status: int, message: str
) -> None:
    got, said, _ = server.send(method, path, body)
    assert got == status
    assert message in said["error"]


# -- who may ask -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Host": "attacker.example:{port}"}, 403),  # a name rebound to 127.0.0.1
        ({"Host": "127.0.0.1.attacker.example:{port}"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": None}, 400),  # refused below us already
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_only_its_own_page_may_ask(
    server: Server, headers: dict[str, str | None], status: int
) -> None:
    filled = {k: v.format(port=server.port) if v else v for k, v in headers.items()}
    for path in ("/", "/api/info", "/api/sessions"):
        got, _, found = server.send("GET", path, **filled)
        assert got == status, path
        assert "access-control-allow-origin" not in found
    if status == 403:
        assert server.send("POST", "/api/jobs", {"kind": "open"}, **filled)[0] == 403


def test_forms_of_other_pages_cannot_ask(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        status, said, _ = server.send("POST", "/api/jobs", {"kind": "open"}, Content_Type=kind)
        assert status == 403
        assert "application/json" in said["error"]


def test_headers_of_every_answer(server: Server) -> None:
    for path in ("/", "/assets/app.js", "/api/info", "/nothing"):
        found = server.send("GET", path)[2]
        assert "script-src 'self'" in found["content-security-policy"]
        assert "unsafe" not in found["content-security-policy"]
        assert found["x-content-type-options"] == "nosniff"
        assert found["cache-control"] == "no-store"


def test_it_listens_on_this_machine_only(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_the_page_evaluates_nothing(server: Server) -> None:
    for name in ("app.js", "graph.js"):
        text = server.send("GET", f"/assets/{name}")[1]
        for word in ("eval(", "new Function", "innerHTML", "outerHTML", "insertAdjacentHTML",
                     "document.write"):  # fmt: skip
            assert word not in text, (name, word)


# -- sessions --------------------------------------------------------------------------------------


def test_sessions_come_back(server: Server) -> None:
    state = {"prompt": "<script>\u202e\U0001f600", "edits": [{"layer": 1}], "n": 0.1}
    assert server.send("PUT", "/api/sessions/my%20one-2", {"state": state})[:2] == (
        200, {"names": ["my one-2"]}
    )  # fmt: skip
    assert server.send("GET", "/api/sessions/my%20one-2")[1] == {"state": state}
    assert server.send("GET", "/api/sessions")[1] == {"names": ["my one-2"]}
    assert server.send("DELETE", "/api/sessions/my%20one-2")[1] == {"names": []}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a.json", "x" * 61, "a\x00", "\u00e9", " a",
     "a ", "~root"],
)  # fmt: skip
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    store = Sessions(tmp_path / "in")
    for act in (store.load, store.delete, lambda n: store.save(n, {})):
        with pytest.raises(sap.InputError, match="a session's name has"):
            act(name)
    assert list(tmp_path.rglob("*")) == []


def test_sessions_follow_no_links_and_refuse_other_files(tmp_path: Path) -> None:
    store = Sessions(tmp_path / "in")
    store.save("a", {"x": 1})
    (tmp_path / "secret.json").write_text("{}")
    (store.folder / "link.json").symlink_to(tmp_path / "secret.json")
    for act in (store.load, lambda n: store.save(n, {})):
        with pytest.raises(sap.InputError, match="is a link"):
            act("link")
    assert (tmp_path / "secret.json").read_text() == "{}"
    for text in ("", "{", "[]", '{"format": "sae-attn-session", "version": 9, "state": {}}'):
        (store.folder / "b.json").write_text(text)
        with pytest.raises(sap.FileError):
            store.load("b")
    with pytest.raises(sap.InputError, match="at most 1000000"):
        store.save("big", {"x": "y" * 1_000_001})
    assert store.load("a") == {"x": 1}
    assert "big" not in store.names()


# -- the queue -------------------------------------------------------------------------------------


def wait_for(jobs: Jobs, identifier: str, *states: str) -> dict[str, Any]:
    end = time.monotonic() + 10
    while (shown := jobs.show(identifier))["state"] not in states:
        assert time.monotonic() < end, shown
        time.sleep(0.01)
    return shown


def test_one_after_another_with_progress_and_cancel() -> None:
    jobs, go, order = Jobs(), threading.Event(), []

    def slow(progress: Any) -> str:
        progress(0.25, "half way to half")
        go.wait(20)
        progress(0.5, "half")
        return "slow"

    first = jobs.submit("a", slow)
    others = [jobs.submit("b", lambda _, i=i: order.append(i)) for i in range(5)]
    shown = wait_for(jobs, first.id, "running")
    while shown["share"] != 0.25:
        shown = jobs.show(first.id)
    assert shown["what"] == "half way to half"
    assert [jobs.show(job.id)["ahead"] for job in others] == [1, 2, 3, 4, 5]
    jobs.cancel(others[2].id)
    assert jobs.show(others[2].id)["state"] == "cancelled"
    go.set()
    assert wait_for(jobs, first.id, "done")["result"] == "slow"
    wait_for(jobs, others[4].id, "done")
    assert order == [0, 1, 3, 4]

    go.clear()
    running = jobs.submit("a", slow)
    wait_for(jobs, running.id, "running")
    jobs.cancel(running.id)
    go.set()
    assert wait_for(jobs, running.id, "cancelled")["state"] == "cancelled"


def test_a_full_queue_says_so_and_old_answers_go() -> None:
    jobs, go = Jobs(limit=2, keep=3), threading.Event()
    first = jobs.submit("a", lambda _: go.wait(20))
    wait_for(jobs, first.id, "running")
    waiting = [jobs.submit("b", lambda _: 1) for _ in range(2)]
    with pytest.raises(Busy, match="2 requests wait already"):
        jobs.submit("c", lambda _: 1)
    go.set()
    wait_for(jobs, waiting[-1].id, "done")
    last = [jobs.submit("d", lambda _: 1) for _ in range(2)]
    wait_for(jobs, last[-1].id, "done")
    with pytest.raises(sap.InputError, match="no such request"):
        jobs.show(first.id)
    assert jobs.counts()["done"] == 3


def test_what_a_client_cancels_stops(server: Server) -> None:
    reached = threading.Event()

    def endless(_: Any, progress: Any) -> None:
        while True:
            progress(0.5, "on and on")
            reached.set()
            time.sleep(0.01)

    questions = server.app.state.questions
    questions.kinds["endless"] = endless
    try:
        job = server.send("POST", "/api/jobs", {"kind": "endless"})[1]
        assert reached.wait(10)
        assert server.send("DELETE", f"/api/jobs/{job['id']}")[0] == 200
        assert answer(server, "open")["tokens"]  # the worker is free again
    finally:
        del questions.kinds["endless"]


def test_the_attribution_itself_can_be_cancelled(run: Any) -> None:
    class Stop(Exception):
        pass

    calls: list[tuple[int, int]] = []

    def report(done: int, of: int) -> None:
        calls.append((done, of))
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        run.attribute(sap.Logit(" Mary"), progress=report)
    assert calls == [(1, 4), (2, 4)]


# -- load ------------------------------------------------------------------------------------------


def resident(process_id: int) -> float:
    """MiB."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.slow
def test_fifty_at_once_then_killed_then_started_anew(tmp_path: Path, record_property: Any) -> None:
    """None lost, each its own answer, memory flat; after SIGKILL the same port serves again."""
    questions = []
    for i in range(50):
        prompt = f"When {['John', 'Mary', 'Tom', 'Anna', 'Paul'][i % 5]} went to the store"
        kind = ("open", "graph", "dfa", "intervene", "sources")[i % 5]
        place: dict[str, Any] = {"layer": i % 4, "feature": i, "position": 3}
        if kind == "sources":
            place["source"] = 2
        if kind == "graph":
            place = {"max_nodes": 30}
        if kind == "intervene":
            place = {"edits": [{"layer": 0, "feature": i, "position": 2, "how": "ablate"}]}
        questions.append((kind, {"prompt": prompt, **place}))
    with process(tmp_path / "sessions") as (client, running):

        def ask(one: tuple[str, dict[str, Any]]) -> Any:
            return client.ask(one[0], **one[1])

        rounds, memory = [], []
        for _ in range(3):
            with ThreadPoolExecutor(50) as pool:
                rounds.append(list(pool.map(ask, questions)))
            memory.append(resident(running.pid))
        for answers in rounds:
            assert [one["state"] for one in answers] == ["done"] * 50
            assert [one["kind"] for one in answers] == [kind for kind, _ in questions]
        assert json.dumps(rounds[0][0]["result"]) == json.dumps(rounds[-1][0]["result"])
        for (kind, question), one in zip(questions, rounds[-1], strict=True):
            if kind == "dfa":
                assert one["result"]["feature"] == question["feature"]
        record_property("resident memory after each round of 50, MiB", memory)
        assert memory[-1] - memory[0] < 20

        client.send("PUT", "/api/sessions/kept", {"state": {"prompt": "x"}})
        jobs = [client.send("POST", "/api/jobs", {"kind": "graph", "prompt": PROMPT})[1]
                for _ in range(5)]  # fmt: skip
        os.kill(running.pid, signal.SIGKILL)
        running.wait(20)
        port = client.port
    assert sorted(path.name for path in (tmp_path / "sessions").iterdir()) == ["kept.json"]
    with process(tmp_path / "sessions", port) as (client, _):
        assert client.port == port
        assert client.send("GET", "/api/sessions/kept")[1] == {"state": {"prompt": "x"}}
        status, said, _ = client.send("GET", f"/api/jobs/{jobs[0]['id']}")
        assert (status, said["gone"]) == (404, True)
        assert client.ask("open", prompt=PROMPT)["state"] == "done"


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt2"], "--model and --saes go together"),
        (["--port", "99999"], "port 99999: expected 0 to 65535"),
        (["--sessions", "FILE"], "is no folder"),
        (["--port", "TAKEN"], "cannot listen on port"),
        (["--model", "no-such-folder", "--saes", "SAES", "--port", "0"], "no-such-folder"),
    ],
)
def test_the_command_refuses(
    server: Server, tmp_path: Path, arguments: list[str], message: str
) -> None:
    from sae_attn_plugin.cli import app

    (tmp_path / "file").write_text("")
    saes = str(sap.demo.SAES_PATH)
    given = {"FILE": str(tmp_path / "file"), "TAKEN": str(server.port), "SAES": saes}
    result = CliRunner().invoke(app, ["explore", *(given.get(a, a) for a in arguments)])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_attn_plugin.explore.server import need_extra

    need_extra()
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as Python marks what is not there
    with pytest.raises(sap.InputError, match=r"pip install 'sae-attn-plugin\[explore\]'"):
        need_extra()

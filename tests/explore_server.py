"""The explorer on a free port, in a thread of the tests or as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sae_attn_plugin as sap

pytest.importorskip("starlette", reason="the explorer's extra is not installed: .[explore]")
pytest.importorskip("uvicorn", reason="the explorer's extra is not installed: .[explore]")


class Client:
    """Plain HTTP, as a page would send it."""

    def __init__(self, port: int) -> None:
        self.port = port

    def send(
        self, method: str, path: str, body: Any = None, **headers: str | None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (or text) and headers of the answer; a header of None is left out."""
        whole: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        if body is not None:
            whole["Content-Type"] = "application/json"
        whole |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in whole.items():
                if value is not None:
                    connection.putheader(name, value)
            encoded = data.encode() if isinstance(data, str) else data or b""
            if method in ("POST", "PUT"):
                connection.putheader("Content-Length", str(len(encoded)))
            connection.endheaders(encoded)
            answer = connection.getresponse()
            text = answer.read().decode("utf-8")
            found = dict(answer.getheaders())
            is_json = "json" in found.get("content-type", "")
            return answer.status, json.loads(text) if is_json else text, found

    def ask(self, kind: str, **question: Any) -> Any:
        """The finished job of a question."""
        status, job, _ = self.send("POST", "/api/jobs", {**question, "kind": kind})
        if status != 202:
            return {"state": "refused", "status": status, **job}
        pause = 0.01
        while job["state"] in ("queued", "running"):
            time.sleep(pause)
            pause = min(1.5 * pause, 0.25)  # fifty who ask all the time keep the server busy
            _, job, _ = self.send("GET", f"/api/jobs/{job['id']}")
        self.send("DELETE", f"/api/jobs/{job['id']}")
        return job


class Server(Client):
    """In a thread; can be stopped and started anew on the same port."""

    def __init__(self, lens: Any, sessions: Path) -> None:
        super().__init__(0)
        self.lens, self.sessions = lens, sessions
        self.start()

    def start(self) -> None:
        import uvicorn

        from sae_attn_plugin.explore.server import create_app, listen

        self.socket = listen(self.port)
        self.port = self.socket.getsockname()[1]
        self.app: Any = create_app(self.lens, self.sessions)
        config = uvicorn.Config(self.app, log_level="critical", lifespan="off",
                                timeout_graceful_shutdown=1)  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextlib.contextmanager
def process(sessions: Path, port: int = 0) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """``sae-attn explore`` as its own process."""
    command = [sys.executable, "-m", "sae_attn_plugin.cli", "explore", "--port", str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(
        [*command, "--sessions", str(sessions)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    try:
        assert running.stdout is not None
        said = []
        for line in running.stdout:
            said.append(line)
            if "http://127.0.0.1:" in line:
                port = int(line.split("127.0.0.1:")[1].split("/")[0])
                break
        else:
            raise AssertionError("".join(said))
        client = Client(port)
        while True:
            with contextlib.suppress(ConnectionError):
                client.send("GET", "/api/info")
                break
            time.sleep(0.05)
        yield client, running
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
        running.wait(20)
        if running.stdout is not None:
            running.stdout.close()


def demo_server(sessions: Path) -> Server:
    return Server(sap.demo.load(), sessions)

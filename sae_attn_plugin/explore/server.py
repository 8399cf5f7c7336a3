"""The explorer's server: the page, the queue of questions and the sessions, for this machine only.

Pages of other sites cannot reach it: requests name it by a loopback address (so a name that was
rebound to 127.0.0.1 is refused), come from its own page where they say from where, and are JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_attn_plugin.errors import FileError, InputError, SaeAttnError
from sae_attn_plugin.explore.jobs import Busy, Jobs
from sae_attn_plugin.explore.questions import Questions
from sae_attn_plugin.explore.sessions import Sessions

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["create_app", "listen", "need_extra", "serve"]

_log = logging.getLogger(__name__)
_LONGEST = 1_200_000  # bytes of a request
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def create_app(lens: FeatureLens, sessions: str | Path, *, jobs: Jobs | None = None) -> Starlette:
    """The explorer as an ASGI application.

    Args:
        lens: what answers.
        sessions: the folder of saved sessions.
        jobs: the queue; None: a new one.

    Raises:
        InputError: starlette is not installed.
    """
    need_extra()
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    questions, queue, store = Questions(lens), jobs or Jobs(), Sessions(sessions)
    instance = secrets.token_hex(8)  # another after each start
    assets = _assets()

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in assets:
            return JSONResponse({"error": f"no such page: {name!r:.80}"}, status_code=404)
        kind, text = assets[name]
        return Response(text, media_type=kind)

    def info(_: Request) -> Response:
        return JSONResponse({**questions.info(), "instance": instance, **queue.counts()})

    async def ask(request: Request) -> Response:
        asked = await _json(request)
        kind = asked.get("kind")
        if not isinstance(kind, str) or kind not in questions.kinds:
            raise InputError(f"unknown question {kind!r:.60}; known: {', '.join(questions.kinds)}")
        job = queue.submit(kind, lambda progress: questions.ask(kind, asked, progress))
        return JSONResponse(queue.show(job.id), status_code=202)

    def show(request: Request) -> Response:
        identifier = request.path_params["id"]
        try:
            shown = queue.show(identifier)
        except InputError as error:
            return JSONResponse({"error": str(error), "gone": True}, status_code=404)
        return JSONResponse(shown)

    def cancel(request: Request) -> Response:
        identifier = request.path_params["id"]
        with contextlib.suppress(InputError):  # over and forgotten already
            queue.cancel(identifier)
        queue.forget(identifier)
        return JSONResponse({})

    def names(_: Request) -> Response:
        return JSONResponse({"names": store.names()})

    async def session(request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "GET":
            return JSONResponse({"state": store.load(name)})
        if request.method == "DELETE":
            store.delete(name)
            return JSONResponse({"names": store.names()})
        store.save(name, (await _json(request)).get("state"))
        return JSONResponse({"names": store.names()})

    async def failed(_: Request, error: Exception) -> Response:
        status = 503 if isinstance(error, Busy) else 500 if isinstance(error, FileError) else 400
        return JSONResponse({"error": str(error)}, status_code=status)

    async def unknown(_: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return JSONResponse({"error": getattr(error, "detail", "not found")}, status_code=status)

    async def broken(_: Request, error: Exception) -> Response:
        _log.error("request failed", exc_info=error)
        message = f"the server could not do this ({type(error).__name__}); see its terminal"
        return JSONResponse({"error": message}, status_code=500)

    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/assets/{name}", page),
            Route("/api/info", info),
            Route("/api/jobs", ask, methods=["POST"]),
            Route("/api/jobs/{id}", show, methods=["GET"]),
            Route("/api/jobs/{id}", cancel, methods=["DELETE"]),
            Route("/api/sessions", names),
            Route("/api/sessions/{name}", session, methods=["GET", "PUT", "DELETE"]),
        ],
        middleware=[Middleware(_Guard)],  # pyright: ignore[reportArgumentType]
        exception_handlers={SaeAttnError: failed, HTTPException: unknown, Exception: broken},
    )
    app.state.questions, app.state.jobs = questions, queue
    return app


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0 takes any free one.

    Raises:
        InputError: the port is taken, or none.
    """
    if not 0 <= port < 65536:
        raise InputError(f"port {port}: expected 0 to 65535")
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind(("127.0.0.1", port))
    except OSError as error:
        one.close()
        raise InputError(
            f"cannot listen on port {port}: {error.strerror}; pass another, or 0 for any"
        ) from None
    return one


def serve(lens: FeatureLens, sessions: str | Path, one: socket.socket) -> None:
    """Answer on a socket until interrupted."""
    app = create_app(lens, sessions)
    import uvicorn

    settings: Any = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 2}
    config = uvicorn.Config(app, lifespan="off", server_header=False, **settings)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[one])


def need_extra() -> None:
    if any(find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise InputError("the explorer needs more packages: pip install 'sae-attn-plugin[explore]'")


def _assets() -> dict[str, tuple[str, str]]:
    """Every file that can be asked for, by name; nothing is looked up in folders."""
    from sae_attn_plugin.graphs.html import script, style

    room = resources.files("sae_attn_plugin.explore.page")

    def text(name: str) -> str:
        return (room / name).read_text(encoding="utf-8")

    return {
        "index.html": ("text/html; charset=utf-8", text("index.html")),
        "app.js": ("text/javascript; charset=utf-8", text("app.js")),
        "app.css": ("text/css; charset=utf-8", text("app.css")),
        "graph.js": ("text/javascript; charset=utf-8", script()),
        "graph.css": ("text/css; charset=utf-8", style()),
    }


async def _json(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _LONGEST:
            raise InputError(f"the request is longer than {_LONGEST} bytes")
    try:
        found = json.loads(bytes(data), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError("the request is no JSON object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


class _Guard:
    """Refuses what does not come from the explorer's own page, and adds headers to all answers."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        from starlette.responses import JSONResponse

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        port = (scope.get("server") or ("", None))[1]
        problem = _foreign(headers, scope["method"], port)
        if problem is not None:
            await JSONResponse({"error": problem}, status_code=403)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)


def _foreign(headers: dict[bytes, bytes], method: str, port: int | None) -> str | None:
    """Why a request is refused, or None."""
    own = {f"{name}:{port}" for name in _NAMES} | ({*_NAMES} if port in (80, None) else set())
    host = headers.get(b"host", b"").decode("latin-1")
    if host not in own:
        return f"this server answers to {_NAMES[0]}:{port} only, not to {host!r:.80}"
    origin = headers.get(b"origin")
    if origin is not None and origin.decode("latin-1") not in {f"http://{name}" for name in own}:
        return "requests from pages of other sites are refused"
    if headers.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
        return "requests from pages of other sites are refused"
    if method in ("POST", "PUT") and not headers.get(b"content-type", b"").startswith(
        b"application/json"
    ):
        return "expected a request of the type application/json"
    return None

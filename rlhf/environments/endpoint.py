"""The HTTP endpoint at which users' own loops ask for turns, on this machine alone."""

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import ModuleType

from aiohttp import web

from rlhf.environments import anthropic_api, openai_api
from rlhf.environments.chat import ChatAnswer, ChatError, ChatRequest
from rlhf.types import Json

Answer = Callable[[ChatRequest], Awaitable[ChatAnswer]]
LOOPBACK = "127.0.0.1"
MAX_REQUEST_BYTES = 64 * 2**20
RETRY_COUNT = "x-stainless-retry-count"
"""With which the clients of OpenAI and Anthropic say that they ask again."""
DIALECTS: Mapping[str, ModuleType] = {
    openai_api.PATH: openai_api,
    anthropic_api.PATH: anthropic_api,
    # Anthropic's clients add v1 themselves.
    f"v1/{anthropic_api.PATH}": anthropic_api,
}
"""Who reads and writes what comes to a path."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Asked:
    """An answer that no client has received yet."""

    task: "asyncio.Task[ChatAnswer]"
    request: web.Request


@dataclass(slots=True, kw_only=True)
class _Session:
    """One episode's requests."""

    answer: Answer
    undelivered: dict[str, list[_Asked]] = field(default_factory=dict)
    """By the bodies of their requests."""

    def forget(self, asked: _Asked) -> None:
        """It was delivered, or there is nothing to deliver."""
        for key, same in list(self.undelivered.items()):
            if asked in same:
                same.remove(asked)
            if not same:
                del self.undelivered[key]


class Endpoint:
    """Serves OpenAI's chat completions and Anthropic's messages, a path with a secret for each episode.

    Listens from the first episode on, in the event loop of that. A task for each request.
        consumes: HTTP requests. Produces: HTTP responses. Waits for: the episode's answer.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._opening = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self._port = 0

    async def _open(self) -> None:
        """Listen on a free port."""
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
        app.router.add_route("*", "/{secret}/v1/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, 0)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop listening, and end what is under way."""
        self._sessions.clear()
        if self._runner is not None:
            await self._runner.cleanup()

    @asynccontextmanager
    async def serving(self, answer: Answer) -> AsyncIterator[str]:
        """The base URL of an episode, while it goes on. Raises OSError."""
        async with self._opening:
            if self._runner is None:
                await self._open()
        secret = secrets.token_urlsafe(24)
        session = self._sessions[secret] = _Session(answer=answer)
        try:
            yield f"http://{LOOPBACK}:{self._port}/{secret}/v1"
        finally:
            self._sessions.pop(secret, None)
            for asked in [asked for same in session.undelivered.values() for asked in same]:
                asked.task.cancel()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        session = self._sessions.get(request.match_info["secret"])
        path = request.match_info["path"]
        if session is None:
            return _json(404, openai_api.write_error(ChatError("there is no such session", code="not_found")))
        if path == "models":
            return _json(200, {"object": "list", "data": [{"id": "policy", "object": "model"}]})
        dialect = DIALECTS.get(path)
        if dialect is None or request.method != "POST":
            text = f"POST {' or '.join((openai_api.PATH, anthropic_api.PATH))}"
            return _json(404, openai_api.write_error(ChatError(f"there is no {path}: {text}", code="not_found")))
        content = await request.read()
        await asyncio.sleep(0)  # after it, a connection that was lost at the same moment is known to be
        try:
            body = _object(content)
            chat = dialect.read(body)
            asked = self._ask(session, request, content, chat)
            answer = await asyncio.shield(asked.task)
        except ChatError as error:
            return _json(error.status, dialect.write_error(error))
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # it runs in one
                raise
            return _json(503, dialect.write_error(ChatError("the episode is over", code="aborted")))
        response = _json(200, dialect.write(answer, chat, body.get("model")))
        if not _is_gone(request):
            await response.prepare(request)
            await response.write_eof()
            session.forget(asked)
        return response

    def _ask(self, session: _Session, request: web.Request, content: bytes, chat: ChatRequest) -> _Asked:
        """Ask for a turn. A client that asks again, because its connection was lost or it would not wait longer, gets
        the turn that it asked for; one that asks twice at the same time gets two. Raises ChatError where the episode
        ended before the request was complete."""
        if request.match_info["secret"] not in self._sessions:
            raise ChatError("the episode is over", code="aborted", status=503)
        key = hashlib.sha256(request.path.encode() + b"\0" + content).hexdigest()
        is_retry = request.headers.get(RETRY_COUNT, "0") != "0"
        same = session.undelivered.setdefault(key, [])
        # Of a client that asks again it may be known late that it was gone; a turn of another one is the second choice.
        left = [asked for asked in same if _is_gone(asked.request)] or (same if is_retry else [])
        if left:
            left[0].request = request
            return left[0]
        asked = _Asked(task=asyncio.ensure_future(session.answer(chat)), request=request)
        same.append(asked)
        asked.task.add_done_callback(lambda task: session.forget(asked) if _failed(task) else None)
        return asked


def _is_gone(request: web.Request) -> bool:
    """Whether its client has hung up."""
    return request.transport is None or request.transport.is_closing()


def _failed(task: "asyncio.Task[ChatAnswer]") -> bool:
    return task.cancelled() or task.exception() is not None


def _object(content: bytes) -> dict[str, Json]:
    """A request's body. Raises ChatError."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"the body is no JSON ({error})") from error
    if not isinstance(body, dict):
        raise ChatError("the body is no JSON object")
    return body


def _json(status: int, value: Mapping[str, Json]) -> web.Response:
    return web.json_response(value, status=status)

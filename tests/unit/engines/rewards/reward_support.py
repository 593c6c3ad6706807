"""Prompts, answers and a reward service with a script of faults."""

import json
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

import numpy as np

from rlhf.engines.base import RewardSource
from rlhf.types import FinishReason, Json, Prompt, Rollout

Request: TypeAlias = dict[str, Any]
"""The JSON of a request: lists of text for a reward service, of messages for a judge."""


def prompts(count: int, **metadata: list[Json]) -> list[Prompt]:
    return [
        Prompt(
            id=f"p{index}",
            token_ids=np.array([1, 2]),
            text=f"prompt {index}",
            label=str(index),
            metadata={name: values[index] for name, values in metadata.items()},
        )
        for index in range(count)
    ]


def rollouts(count: int, reason: FinishReason = FinishReason.STOP) -> list[Rollout]:
    return [
        Rollout(
            id=f"r{index}",
            prompt_id=f"p{index}",
            token_ids=np.arange(3, 5 + index),
            log_probs=np.zeros(2 + index, dtype=np.float32),
            finish_reason=reason,
            weight_version=0,
        )
        for index in range(count)
    ]


def responses(count: int) -> list[str]:
    """Answers of 1, 2, 3 ... letters."""
    return ["x" * (index + 1) for index in range(count)]


def evaluate(reward: RewardSource, code: str, count: int) -> list[float]:
    """The scores of a function with the body `code`, which sets `result`."""
    rows = prompts(count, code=[code] * count)
    return [reward.total for reward in reward.score(rows, responses(count), rollouts(count))]


@dataclass
class Reply:
    """What a service sends back. `body` may be made from the request."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    body: bytes | Callable[[Request], bytes] = b""
    delay: threading.Event | None = None


def lengths(request: Request) -> bytes:
    """Scores that are the answers' lengths, in another order than asked."""
    pairs = list(zip(request["ids"], request["responses"], strict=True))[::-1]
    return json.dumps({"ids": [name for name, _ in pairs], "scores": [len(text) for _, text in pairs]}).encode()


GOOD = Reply(body=lengths)


@dataclass
class Service:
    """A running service: its address and the requests that it got, headers first."""

    url: str
    requests: list[tuple[dict[str, str], Request]]


@contextmanager
def service(script: Sequence[Reply], tls: ssl.SSLContext | None = None) -> Iterator[Service]:
    """Answers by the script, the last answer again and again."""
    state = Service(url="", requests=[])
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                answer = script[min(len(state.requests), len(script) - 1)]
                state.requests.append((dict(self.headers), request))
            if answer.delay is not None:
                answer.delay.wait(10)
            if answer.status == 0:
                self.close_connection = True
                return
            body = answer.body(request) if callable(answer.body) else answer.body
            try:
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:
                return

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("0.0.0.0" if tls else "127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}/score"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Rewards from a service: POST {ids, prompts, responses}, answered by {ids, scores}."""

import json
import logging
import os
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import tenacity

from rlhf.config.reward import HttpSource
from rlhf.engines.rewards.address import check_address
from rlhf.engines.rewards.scores import checked_scores, listed
from rlhf.errors import ConfigError, RewardError
from rlhf.types import Json, Prompt, Reward, Rollout

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
MAX_WAIT_S = 30.0


class OutageError(Exception):
    """A request may succeed later. Says why it did not now; `retry_after_s` is what the service asked for."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class BadReplyError(RewardError):
    """The service answered, and not with scores."""


class HttpReward:
    """Scores by a service. Safe to use from several threads.

    A request that fails in transport, or with 408, 429 or 5xx, is retried for `outage_timeout_s`, with waits that
    double from `first_wait_s` to half a minute (and honour Retry-After); a malformed reply is asked for once more; any
    other status fails at once. Raises ConfigError where the address or its token cannot be used, RewardError where
    the service fails.
    """

    def __init__(self, source: HttpSource, *, first_wait_s: float = 1.0) -> None:
        private = check_address(source.url, allow_plain_http=source.allow_plain_http)
        self._source = source
        self._first_wait_s = first_wait_s
        self._closed = threading.Event()
        parts = urlsplit(source.url)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._client = httpx.Client(
            headers={"Accept-Encoding": "identity", **_auth_header(source.auth_env)},
            verify=_trust(source),
            timeout=httpx.Timeout(source.read_timeout_s, connect=source.connect_timeout_s),
            follow_redirects=False,
            # A proxy has no business between this machine and a private one.
            trust_env=not private,
        )
        self._pool = ThreadPoolExecutor(source.max_concurrency, thread_name_prefix="reward-http")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        size = self._source.batch_size

        def score_from(start: int) -> list[float]:
            end = start + size
            return self._score(prompts[start:end], responses[start:end], rollouts[start:end])

        scored = self._pool.map(score_from, range(0, len(responses), size))
        return [Reward(total=score) for scores in scored for score in scores]

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[float]:
        ids = [rollout.id for rollout in rollouts]
        prompt_ids = [prompt.id for prompt in prompts]
        body: dict[str, Json] = {
            "ids": list(ids),
            "prompts": [prompt.text for prompt in prompts],
            "responses": list(responses),
        }
        try:
            return self._ask(body, ids, prompt_ids)
        except BadReplyError as error:
            logger.warning("%s; asked once more", str(error).rstrip("."))
            return self._ask(body, ids, prompt_ids)

    def _ask(self, body: dict[str, Json], ids: Sequence[str], prompt_ids: Sequence[str]) -> list[float]:
        content = self._post_until_answered(json.dumps(body).encode(), prompt_ids)
        scores = _scores_by_id(content, ids)
        try:
            return checked_scores(scores, prompt_ids, where="reward.url")
        except RewardError as error:
            raise BadReplyError(str(error)) from error

    def _post_until_answered(self, content: bytes, prompt_ids: Sequence[str]) -> bytes:
        first_s = self._first_wait_s
        backoff = tenacity.wait_exponential(multiplier=first_s, max=MAX_WAIT_S) + tenacity.wait_random(0, first_s)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after_s if isinstance(error, OutageError) else 0.0
            return max(backoff(state), asked)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(OutageError),
            wait=wait,
            stop=tenacity.stop_before_delay(self._source.outage_timeout_s) | tenacity.stop_when_event_set(self._closed),
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return retrying(self._post, content)
        except OutageError as error:
            raise RewardError(
                f"reward.url: no answer from {self._origin} ({error}) for {self._source.outage_timeout_s:g} s, asked "
                f"about {listed(prompt_ids)}; resume when it is up."
            ) from error

    def _tell(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait_s = state.next_action.sleep if state.next_action else 0.0
        logger.warning("reward.url: no answer from %s (%s); next try in %.1f s", self._origin, error, wait_s)

    def _post(self, content: bytes) -> bytes:
        """The body of one good answer. Raises OutageError where it is worth another try, RewardError where not."""
        deadline = time.monotonic() + 2 * self._source.read_timeout_s
        try:
            with self._client.stream(
                "POST", self._source.url, content=content, headers={"Content-Type": "application/json"}
            ) as response:
                self._check_status(response)
                return _read_body(response, deadline)
        except httpx.TransportError as error:
            if doubt := _doubted_certificate(error):
                raise RewardError(
                    f"reward.url: TLS certificate not trusted ({doubt}). Set the source's ca_file."
                ) from error
            raise OutageError(_reason(error)) from error

    def _check_status(self, response: httpx.Response) -> None:
        code = response.status_code
        if response.is_redirect:
            raise RewardError(f"reward.url: redirect to {response.headers.get('location', 'nowhere')} refused.")
        if code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or response.is_server_error:
            raise OutageError(f"status {code}", _retry_after_s(response.headers.get("retry-after", "")))
        if code != HTTPStatus.OK:
            hint = "; check auth_env" if code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) else ""
            raise RewardError(f"reward.url: {self._origin} answered with status {code}{hint}.")


def _auth_header(auth_env: str | None) -> dict[str, str]:
    if auth_env is None:
        return {}
    token = os.environ.get(auth_env, "").strip()
    if not token:
        raise ConfigError(f"reward.auth_env: environment variable {auth_env} is not set.")
    # Told here, because a library's message about a bad header would hold the token.
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(f"reward.auth_env: {auth_env} holds characters that a header cannot carry.")
    return {"Authorization": f"Bearer {token}"}


def _trust(source: HttpSource) -> ssl.SSLContext:
    if source.ca_file is None:
        # Plain http needs no certificates, which take a while to read.
        plain = source.url.lower().startswith("http:")
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else httpx.create_ssl_context()
    if not Path(source.ca_file).is_file():
        raise ConfigError(f"reward.ca_file: {source.ca_file} matches no file.")
    try:
        return ssl.create_default_context(cafile=source.ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"reward.ca_file: {source.ca_file} holds no PEM certificate.") from error


def _read_body(response: httpx.Response, deadline: float) -> bytes:
    kind = response.headers.get("content-type", "no content type").partition(";")[0].strip()
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BadReplyError(f"reward.url: reply is larger than {MAX_BODY_BYTES // 2**20} MiB.")
        if time.monotonic() > deadline:
            raise OutageError("a reply that never ended")
    if kind != "application/json":
        raise BadReplyError(f'reward.url: reply is not JSON ({kind}, starts "{_start(body)}").')
    return bytes(body)


def _scores_by_id(content: bytes, ids: Sequence[str]) -> list[Json]:
    """The scores in the order of `ids`, whatever the order of the reply."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadReplyError(f'reward.url: reply is not JSON (starts "{_start(content)}").') from error
    given, scores = (reply.get("ids"), reply.get("scores")) if isinstance(reply, dict) else (None, None)
    if not isinstance(given, list) or not isinstance(scores, list):
        raise BadReplyError('reward.url: reply is not of the form {"ids": [...], "scores": [...]}.')
    if len(scores) != len(ids):
        raise BadReplyError(f"reward.url: got {len(scores)} scores for {len(ids)} samples ({listed(ids)}).")
    by_id = {name: score for name, score in zip(given, scores, strict=False) if isinstance(name, str)}
    if len(given) != len(ids) or set(by_id) != set(ids):
        wrong = next((name for name in ids if name not in by_id), "one too many")
        raise BadReplyError(f"reward.url: reply does not echo the ids ({wrong}).")
    return [by_id[name] for name in ids]


def _start(body: bytes | bytearray) -> str:
    return bytes(body[:40]).decode(errors="replace").replace("\n", " ")


def _retry_after_s(header: str) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date."""
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def _doubted_certificate(error: BaseException) -> str:
    """What is wrong with the service's certificate, if that is the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return "" if cause is None else cause.verify_message.rstrip(".")


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "timed out"
    return "refused" if "refused" in str(error).lower() else str(error) or type(error).__name__

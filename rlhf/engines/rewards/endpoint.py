"""A service that is called by POST: retries, outages, redirects, certificates and size limits, for all sources."""

import logging
import os
import ssl
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import tenacity

from rlhf.config.reward import EndpointSource
from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.address import check_address
from rlhf.engines.rewards.scores import listed
from rlhf.errors import ConfigError, RewardError
from rlhf.repair import Repair, Repaired, RepairKind

MAX_BODY_BYTES = 8 * 2**20
MAX_WAIT_S = 30.0
ADVICE: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "check auth_env",
    HTTPStatus.FORBIDDEN: "check auth_env",
    HTTPStatus.NOT_FOUND: "check the path of the address, which must be complete",
    HTTPStatus.METHOD_NOT_ALLOWED: "the path does not take POST: check that it is complete",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "the request is too large: lower the source's batch_size",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "the service must take application/json",
}
"""What to do about a status that fails at once."""
# Their messages contain whole addresses and headers.
for name in ("httpx", "httpcore", "urllib3"):
    logging.getLogger(name).setLevel(logging.WARNING)


class OutageError(Exception):
    """A request failed but may succeed later. Says why; `retry_after_s` is the wait that the service asked for."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class BadReplyError(RewardError):
    """The service replied, but not with what was requested."""


class Endpoint:
    """Posts JSON and returns the JSON body of the reply. Thread-safe.

    A request that fails in transport, or with status 408, 429 or 5xx, is retried for `outage_timeout_s`, with waits
    that double from `first_wait_s` to 30 seconds (and honor Retry-After); any other status fails at once. Raises
    ConfigError if the address or its token cannot be used, RewardError if the service fails, and its subclass
    BadReplyError if the reply is not JSON.
    """

    def __init__(self, source: EndpointSource, *, first_wait_s: float = 1.0, repaired: Repaired = log_repair) -> None:
        private = check_address(source.url, allow_plain_http=source.allow_plain_http)
        self._source = source
        self._first_wait_s = first_wait_s
        self._repaired = repaired
        self._closed = threading.Event()
        parts = urlsplit(source.url)
        self._origin = f"{parts.scheme}://{parts.netloc}"
        token = self._token = _token(source.auth_env)
        self._client = httpx.Client(
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {})},
            verify=_trust(source),
            timeout=httpx.Timeout(source.read_timeout_s, connect=source.connect_timeout_s),
            follow_redirects=False,
            # Requests to a private address must not go through a proxy.
            trust_env=not private,
        )

    def stop(self) -> None:
        """End all waits for another try."""
        self._closed.set()

    def close(self) -> None:
        """Close the connections. No thread may be posting any more."""
        self._client.close()

    def post(self, content: bytes, prompt_ids: Sequence[str]) -> bytes:
        """The body of the reply to `content`, which is about these prompts."""
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
            if error.retry_after_s > self._source.outage_timeout_s:
                raise RewardError(
                    f"reward.url: {self._origin} asked to wait {error.retry_after_s:g} s ({error}), longer than "
                    f"outage_timeout_s {self._source.outage_timeout_s:g}; resume when it is up."
                ) from error
            raise RewardError(
                f"reward.url: no reply from {self._origin} ({error}) for {self._source.outage_timeout_s:g} s, asked "
                f"about {listed(prompt_ids)}; resume when it is up."
            ) from error

    def without_token(self, error: RewardError) -> RewardError:
        """The error, or one like it if it contains the token: services repeat it in their replies. Raise it outside of
        the handler of the first one, which would be its context."""
        text = self._hidden(str(error))
        return error if text == str(error) else type(error)(text)

    def _hidden(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text

    def tell(self, reason: str) -> None:
        """Tell that a request is sent again."""
        text = self._hidden(f"reward.url: {reason}; the request was sent again")
        self._repaired(Repair(kind=RepairKind.REWARD_REQUEST, where=self._origin, text=text))

    def _tell(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.tell(f"no reply from {self._origin} ({error})")

    def _post(self, content: bytes) -> bytes:
        """The body of a successful reply. Raises OutageError if another try may help, else RewardError."""
        deadline = time.monotonic() + 2 * self._source.read_timeout_s
        try:
            with self._client.stream(
                "POST", self._source.url, content=content, headers={"Content-Type": "application/json"}
            ) as response:
                self._check_status(response)
                return _read_body(response, deadline)
        except httpx.TransportError as error:
            if doubt := _doubted_certificate(error):
                advice = "Renew it at the service." if "expired" in doubt else "Set the source's ca_file."
                raise RewardError(f"reward.url: TLS certificate not trusted ({doubt}). {advice}") from error
            raise OutageError(_reason(error)) from error

    def _check_status(self, response: httpx.Response) -> None:
        code = response.status_code
        if response.is_redirect:
            raise RewardError(f"reward.url: redirect to {_host_of(response.headers.get('location', ''))} refused.")
        if code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or response.is_server_error:
            raise OutageError(f"status {code}", _retry_after_s(response.headers.get("retry-after", "")))
        if code != HTTPStatus.OK:
            hint = f"; {ADVICE[code]}" if code in ADVICE else ""
            raise RewardError(f"reward.url: {self._origin} replied with status {code}{hint}.")


def _host_of(location: str) -> str:
    """Where a redirect leads, without path and query: these may carry a token for it."""
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.hostname}" if parts.hostname else "another path"


def _token(auth_env: str | None) -> str:
    """The bearer token; empty if the service needs none."""
    if auth_env is None:
        return ""
    token = os.environ.get(auth_env, "").strip()
    if not token:
        raise ConfigError(f"reward.auth_env: environment variable {auth_env} is not set.")
    # Checked here, because the library's error message about a bad header would contain the token.
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(f"reward.auth_env: {auth_env} holds characters that a header cannot carry.")
    return token


def _trust(source: EndpointSource) -> ssl.SSLContext:
    if source.ca_file is None:
        # Plain http needs no certificates, which are slow to load.
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
        raise BadReplyError(f'reward.url: reply is not JSON ({kind}, starts "{start_of(body)}").')
    return bytes(body)


def start_of(body: bytes | bytearray) -> str:
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

"""The reward service: what is sent, what is accepted, what is tried again, and what no reply can make us believe."""

import json
import ssl
import threading
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf.config.reward import HttpSource, RewardSection
from rlhf.engines.rewards.address import check_address
from rlhf.engines.rewards.http import HttpReward
from rlhf.errors import ConfigError, RewardError
from tests.unit.engines.rewards.reward_support import GOOD, Reply, lengths, prompts, responses, rollouts, service

pytestmark = pytest.mark.timeout(30)

CERTIFICATE = Path(__file__).parent / "tls" / "self_signed.pem"
EXPIRED = CERTIFICATE.with_name("expired.pem")
"""Self-signed for 127.0.0.1, with its key; good for a hundred years and for these tests alone."""


def scores(url: str, count: int = 3, **keys: object) -> list[float]:
    source = HttpSource.model_validate({"url": url, "outage_timeout_s": 5.0, **keys})
    reward = HttpReward(source, first_wait_s=0.01)
    try:
        return [one.total for one in reward.score(prompts(count), responses(count), rollouts(count))]
    finally:
        reward.close()


def test_scores_are_matched_by_id_and_not_by_order() -> None:
    with service([GOOD]) as server:
        assert scores(server.url) == [1.0, 2.0, 3.0]
        ((headers, request),) = server.requests
    assert request == {
        "ids": ["r0", "r1", "r2"],
        "prompts": [f"prompt {i}" for i in range(3)],
        "responses": responses(3),
    }
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


def test_responses_are_sent_in_concurrent_batches() -> None:
    with service([GOOD]) as server:
        assert scores(server.url, 7, batch_size=2, max_concurrency=3) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        assert sorted(len(request["ids"]) for _, request in server.requests) == [1, 2, 2, 2]
        assert scores(server.url, 0) == []


def test_a_private_service_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with service([GOOD]) as server:
        assert scores(server.url, 1, outage_timeout_s=0.5) == [1.0]


def test_zero_is_a_score() -> None:
    with service([Reply(body=b'{"ids": ["r0"], "scores": [0]}')]) as server:
        assert scores(server.url, 1) == [0.0]


def test_the_token_comes_from_the_environment_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("RM_TOKEN", "s3cret\n")
    with service([Reply(status=503), Reply(status=401)]) as server:
        with pytest.raises(RewardError) as error:
            scores(server.url, auth_env="RM_TOKEN")
        assert server.requests[0][0]["Authorization"] == "Bearer s3cret"
    assert str(error.value).endswith("replied with status 401; check auth_env.")
    assert "s3cret" not in caplog.text + str(error.value)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [("", "is not set."), ("a\x01b", "holds characters that a header cannot carry."), ("é", "holds characters that")],
)
def test_a_token_that_cannot_be_sent_is_a_mistake_in_the_config(
    monkeypatch: pytest.MonkeyPatch, value: str, complaint: str
) -> None:
    monkeypatch.setenv("RM_TOKEN", value)
    with pytest.raises(ConfigError, match=rf"^reward\.auth_env: .*RM_TOKEN {complaint}") as error:
        HttpReward(HttpSource(url="http://127.0.0.1:1/", auth_env="RM_TOKEN"))
    assert value == "" or value not in str(error.value)


def body(**reply: object) -> bytes:
    return json.dumps(reply).encode()


MALFORMED: list[tuple[Reply, str]] = [
    (
        Reply(headers={"Content-Type": "text/html"}, body=b"<p>\n<b>"),
        'reply is not JSON (text/html, starts "<p> <b>").',
    ),
    (Reply(headers={"Content-Type": "text/plain"}, body=lengths), 'reply is not JSON (text/plain, starts "{"ids":'),
    (Reply(headers={}, body=lengths), 'reply is not JSON (no content type, starts "{"ids":'),
    (Reply(body=b""), 'reply is not JSON (starts "").'),
    (Reply(body=b'{"ids": ["r0", "r1"], "sco'), 'reply is not JSON (starts "{"ids": ["r0"'),
    (Reply(body=b"[" * 100_000), 'reply is not JSON (starts "[[['),
    (Reply(body=b"\xff\xfe"), "reply is not JSON (starts"),
    (Reply(body=body(scores=[1, 2])), 'reply is not of the form {"ids": [...], "scores": [...]}.'),
    (Reply(body=b"[1, 2]"), 'reply is not of the form {"ids": [...], "scores": [...]}.'),
    (Reply(body=body(ids=["r0", "r1"], scores=1.0)), 'reply is not of the form {"ids": [...], "scores": [...]}.'),
    (Reply(body=body(ids=["r0", "r1"], scores=[1])), "got 1 scores for 2 samples (r0, r1)."),
    (Reply(body=body(ids=["r0", "r1"], scores=[1, 2, 3])), "got 3 scores for 2 samples (r0, r1)."),
    (Reply(body=body(ids=["r0", "r2"], scores=[1, 2])), "reply does not echo the ids (r1)."),
    (Reply(body=body(ids=["r0", "r0"], scores=[1, 2])), "reply does not echo the ids (r1)."),
    (Reply(body=body(ids=["r0", "r1", "r1"], scores=[1, 2])), "reply does not echo the ids (one too many)."),
    (Reply(body=body(ids=[0, 1], scores=[1, 2])), "reply does not echo the ids (r0)."),
    (Reply(body=body(ids=["r0", ["r1"]], scores=[1, 2])), "reply does not echo the ids (r1)."),
    (Reply(body=body(ids=["r0", "r1"], scores=[1, None])), "score for p1 is not a finite number (got None)."),
    (Reply(body=body(ids=["r0", "r1"], scores=["1", 2])), "score for p0 is not a finite number (got 1)."),
    (Reply(body=body(ids=["r0", "r1"], scores=[True, 2])), "score for p0 is not a finite number (got True)."),
    (Reply(body=body(ids=["r0", "r1"], scores=[1, float("nan")])), "score for p1 is not a finite number (got NaN)."),
    (Reply(body=b'{"ids": ["r0", "r1"], "scores": [1, 1e400]}'), "score for p1 is not a finite number (got inf)."),
    (
        Reply(body=b'{"ids": ["r0", "r1"], "scores": [1, %s]}' % (b"7" * 400)),
        "score for p1 is not a finite number (got 77",
    ),
    (Reply(body=body(ids=["r0", "r1"], scores=[[1], 2])), "score for p0 is not a finite number (got [1])."),
    (Reply(body=b" " * (8 * 2**20 + 1)), "reply is larger than 8 MiB."),
]


@pytest.mark.parametrize(("answer", "complaint"), MALFORMED, ids=[complaint[:40] for _, complaint in MALFORMED])
def test_a_malformed_reply_is_requested_once_more_and_then_rejected(answer: Reply, complaint: str) -> None:
    with service([answer]) as server:
        with pytest.raises(RewardError) as error:
            scores(server.url, 2)
        assert len(server.requests) == 2
    assert str(error.value).startswith(f"reward.url: {complaint}")
    with service([answer, GOOD]) as server:
        assert scores(server.url, 2) == [1.0, 2.0]


@pytest.mark.parametrize("fault", [500, 502, 503, 429, 408, 0])
def test_temporary_faults_are_retried(fault: int) -> None:
    with service([Reply(status=fault), Reply(status=fault), GOOD]) as server:
        assert scores(server.url) == [1.0, 2.0, 3.0]
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 204])
def test_other_statuses_fail_at_once(status: int) -> None:
    with service([Reply(status=status)]) as server:
        with pytest.raises(RewardError, match=f"replied with status {status}"):
            scores(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (403, "check auth_env"),
        (404, "check the path"),
        (405, "does not take POST"),
        (413, "lower the source's batch_size"),
        (415, "must take application/json"),
    ],
)
def test_a_status_comes_with_what_to_do(status: int, advice: str) -> None:
    with service([Reply(status=status)]) as server, pytest.raises(RewardError, match=rf"status {status}; .*{advice}"):
        scores(server.url)


def test_a_proxy_of_the_environment_is_not_used_for_a_private_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with service([Reply(status=502)]) as proxy, service([GOOD]) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/score"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert scores(server.url) == [1.0, 2.0, 3.0]
        assert proxy.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:abc/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:/",
        "http://[::1]:70000/score",
        "http://localhost:80 80/",
        "http://host:-1/",
        "http://host:\u0664\u0662/",
    ],
)
def test_an_impossible_address_is_a_mistake_in_the_config(url: str) -> None:
    with pytest.raises(ValidationError, match=r"port must be a number from 1 to 65535|contains a space"):
        RewardSection(url=url)


@pytest.mark.parametrize(
    "query",
    [
        "api_key=s3cretValue", "token=s3cretValue", "sig=s3cretValue", "subscription-key=s3cretValue",
        "v=1&access_token=s3cretValue", "x=s3cretValue0123456789abc", "password=s3cretValue", "AUTH=s3cretValue",
    ],
)  # fmt: skip
def test_a_secret_in_an_address_is_refused_and_not_repeated(query: str) -> None:
    with pytest.raises(ValidationError) as error:
        RewardSection(url=f"http://127.0.0.1:8000/score?{query}")
    messages = [str(one["msg"]) for one in error.value.errors()]
    assert "no credentials in the address; name an environment variable by auth_env" in messages[0]
    assert "s3cretValue" not in str(messages)


def test_other_queries_are_kept_and_no_library_logs_an_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with service([GOOD]) as server:
        assert scores(f"{server.url}?api-version=2024-06-01") == [1.0, 2.0, 3.0]
    assert "2024-06-01" not in caplog.text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_rejected(status: int) -> None:
    with service([Reply(status=status, headers={"Location": "http://elsewhere/"})]) as server:
        with pytest.raises(RewardError, match=r"^reward\.url: redirect to http://elsewhere refused\.$"):
            scores(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("header", "least_s"), [("0.3", 0.3), ("-5", 0.0), ("soon", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)]
)
def test_retry_after_is_honored(header: str, least_s: float) -> None:
    with service([Reply(status=429, headers={"Retry-After": header}), GOOD]) as server:
        start = time.monotonic()
        assert scores(server.url) == [1.0, 2.0, 3.0]
        assert least_s <= time.monotonic() - start < 3.0


def test_no_wait_begins_that_would_exceed_the_outage_limit() -> None:
    with service([Reply(status=503, headers={"Retry-After": "3600"})]) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"asked to wait 3600 s \(status 503\), longer than outage_timeout_s 5; "):
            scores(server.url)
        assert time.monotonic() - start < 3.0


def test_a_service_that_is_down_is_retried_up_to_the_limit_and_named() -> None:
    with service([GOOD]) as server:
        url = server.url
    origin = url.removesuffix("/score")
    with pytest.raises(RewardError) as error:
        scores(url, outage_timeout_s=0.3)
    assert str(error.value) == (
        f"reward.url: no reply from {origin} (refused) for 0.3 s, asked about p0..p2; resume when it is up."
    )


def test_a_service_that_never_replies_times_out() -> None:
    never = threading.Event()
    with service([Reply(delay=never)]) as server:
        with pytest.raises(RewardError, match=r"\(timed out\) for 0\.2 s"):
            scores(server.url, read_timeout_s=0.1, outage_timeout_s=0.2)
        never.set()


def test_closing_ends_a_wait() -> None:
    with service([Reply(status=503)]) as server:
        reward = HttpReward(HttpSource(url=server.url), first_wait_s=60.0)
        threading.Timer(0.2, reward.close).start()
        with pytest.raises(RewardError, match="status 503"):
            reward.score(prompts(1), ["x"], rollouts(1))


def test_an_untrusted_certificate_fails_at_once_and_a_trusted_one_does_not(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with service([GOOD], context) as server:
        with pytest.raises(
            RewardError,
            match=r"^reward\.url: TLS certificate not trusted \(self-signed certificate\)\. Set the source's ca_file",
        ):
            scores(server.url)
        assert scores(server.url, ca_file=str(CERTIFICATE)) == [1.0, 2.0, 3.0]
        with pytest.raises(RewardError, match=r"not trusted \(IP address mismatch"):
            scores(server.url.replace("127.0.0.1", "127.0.0.2"), ca_file=str(CERTIFICATE))
        (tmp_path / "empty.pem").write_text("")
        for wrong in ("empty.pem", "none.pem"):
            with pytest.raises(ConfigError, match=r"^reward\.ca_file: "):
                scores(server.url, ca_file=str(tmp_path / wrong))


def test_an_expired_certificate_fails_at_once_also_where_its_authority_is_trusted() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(EXPIRED)
    with (
        service([GOOD], context) as server,
        pytest.raises(RewardError, match=r"not trusted \(certificate has expired\)\. Renew it at the service\.$"),
    ):
        scores(server.url, ca_file=str(EXPIRED))


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://x", 'scheme must be http or https (got "ftp").'),
        ("localhost:5000/get", 'scheme must be http or https (got "localhost").'),
        ("http://", 'no host in the address (got "http://").'),
        ("http://169.254.169.254/", "link-local address refused."),
        ("https://[fe80::1]/", "link-local address refused."),
        ("http://[::ffff:169.254.169.254]/", "link-local address refused."),
        ("https://user:word@host/", "no credentials in the address; name an environment variable by auth_env."),
        ("http://8.8.8.8/", "url: plain http to a non-private host; use https, or a source with allow_plain_http."),
    ],
)
def test_an_unsafe_address_is_rejected_by_the_config(url: str, complaint: str) -> None:
    for make in (lambda: HttpSource(url=url), lambda: RewardSection(url=url)):
        with pytest.raises(ValidationError) as error:
            make()
        assert [problem["msg"] for problem in error.value.errors()] == [f"Value error, {complaint}"]


def test_addresses_are_checked_after_name_resolution() -> None:
    assert check_address("http://localhost:5000/", allow_plain_http=False)
    assert check_address("https://10.1.2.3/", allow_plain_http=False)
    assert not check_address("https://8.8.8.8/", allow_plain_http=False)
    assert not check_address("http://8.8.8.8/", allow_plain_http=True)
    for name in ("http://2852039166/", "http://0xa9.0xfe.0xa9.0xfe/"):  # 169.254.169.254 in other words
        with pytest.raises(ConfigError, match="link-local address refused"):
            check_address(name, allow_plain_http=True)
    with pytest.raises(ConfigError, match=r"^reward\.url: plain http to a non-private host"):
        check_address("http://134744072/", allow_plain_http=False)


def test_a_reward_is_given_once() -> None:
    with pytest.raises(ValidationError, match="function and url are both given"):
        RewardSection(url="https://x", function="a:b")
    with pytest.raises(ValidationError, match=r"need module:name or file.py:name \(got "):
        RewardSection(function="a.b")

"""A request to the hub that is sent again is told: by the real library, against a hub on loopback."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub.utils._http import http_backoff

from rlhf.engines.process.hub_retries import telling_hub_retries
from rlhf.engines.process.library_output import silence_libraries
from rlhf.repair import Repair, RepairKind

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that is busy twice."""
    replies = iter([503, 503])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(next(replies, 200))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/model?signature=s3cret"
    server.shutdown()
    server.server_close()
    thread.join()


def test_each_try_is_told_without_its_address(
    hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    silence_libraries()
    told: list[Repair] = []
    with telling_hub_retries(told.append):
        assert http_backoff("GET", hub, base_wait_time=0.01).status_code == 200
    assert [repair.kind for repair in told] == [RepairKind.DOWNLOAD] * 2
    shown = capsys.readouterr()
    assert "s3cret" not in shown.out + shown.err + str(told)

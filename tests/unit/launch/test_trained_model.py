"""Which model a name stands for."""

import json
import socket
import time
from pathlib import Path

import pytest

from rlhf.engines.models.hub import hub_is_reachable
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.errors import ModelError
from rlhf.launch.trained_model import find_model

pytestmark = pytest.mark.timeout(60)


def test_a_run_stands_for_its_model(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert find_model(str(tmp_path / "run")) == str(model)
    assert find_model(str(model)) == str(model)


def test_a_run_without_a_model_says_how_far_it_is(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"status": "running", "step": 3, "num_steps": 9}))
    with pytest.raises(ModelError, match=r"has no model yet: running, step 3 of 9\. It writes one when it ends\."):
        find_model(str(tmp_path))
    status.write_text("damaged")
    with pytest.raises(ModelError, match=r"has no model yet\. It writes one when it ends\."):
        find_model(str(tmp_path))


def test_another_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json: neither a model's folder nor a run's"):
        find_model(str(tmp_path))
    with pytest.raises(ModelError, match="no such folder"):
        find_model(str(tmp_path / "nothing"))


def test_a_hub_that_is_not_there_is_known_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own client tries for half a minute."""
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_is_reachable()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    assert not hub_is_reachable()
    for look in (find_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"model: org/missing is no folder, and the hub cannot be reached\."):
            look("org/missing")
    assert time.monotonic() - start < 3

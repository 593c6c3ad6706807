"""A secret that is planted in a setting, a header or a reply is found in no message, log or file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError
from tests.unit.engines.rewards.reward_support import GOOD, Reply, Request, service
from tests.unit.engines.rewards.test_judge import saying

pytestmark = pytest.mark.timeout(120)

SECRET = "s3cretValue0123456789abcdef"
GIVEN = ["--policy.model", "m", "--data.path", "rows.jsonl"]
JSON = {"Content-Type": "application/json"}


def refusal(*flags: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config("grpo", [*GIVEN, *flags], {})
    return str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        f"https://me:{SECRET}@host/score",
        f"https://{SECRET}@host/score",
        f"https://host/score?token={SECRET}",
        f"https://host/score?x={SECRET}",
        f"https://host/score?a=1;access%5Ftoken={SECRET}",
        f"https://host/services/{SECRET}/score",
        f"https://host/hooks/T0-{SECRET}",
        "https://host/sk-s3cretValue/score",
        f"https://host/score;key={SECRET}",
        f"https://host/score#{SECRET}",
        f"https://host/score#token={SECRET}",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    said = refusal("--reward.url", address)
    assert "no credentials in the address" in said
    assert "s3cretValue" not in said


@pytest.mark.parametrize(
    "address",
    [
        "https://host/v1/models/qwen2.5-72b-instruct-awq/score",
        "https://host/openai/deployments/my-judge-2024-06/chat/completions?api-version=2024-06-01",
        "https://host/v2/3fa85f64-5717-4562-b3fc-2c963f66afa6/runsync",
        "https://host/predict/Llama_3_1_8B_Instruct_reward_model_v2?batch=64",
    ],
)
def test_addresses_of_models_are_no_secrets(address: str) -> None:
    load_config("grpo", [*GIVEN, "--reward.url", address], {})


@pytest.mark.parametrize("value", [SECRET, f"hf_{SECRET}", "sk-s3cretValue", f"Bearer {SECRET}", "$TOKEN"])
def test_a_token_in_place_of_its_variable_is_not_repeated(value: str) -> None:
    source = {"type": "http", "url": "https://host/score", "auth_env": value}
    said = refusal("--reward.sources", json.dumps([source]))
    assert "auth-env" in said
    assert "environment variable" in said
    assert "s3cretValue" not in said


@pytest.mark.parametrize("uri", [f"http://me:{SECRET}@host", f"http://host?token={SECRET}"])
def test_a_secret_in_the_address_of_a_tracker_is_refused(uri: str) -> None:
    said = refusal("--reward.url", "https://host/score", "--log.mlflow-uri", uri)
    assert "MLFLOW_TRACKING_USERNAME" in said
    assert "s3cretValue" not in said


WORKER = """
import logging, os, sys
from pathlib import Path
from rlhf.actors.workers import RewardWorker
from rlhf.config.reward import HttpSource, JudgeSource
from tests.unit.engines.rewards.reward_support import prompts, responses, rollouts

kind, url, log = sys.argv[1:]
worker = RewardWorker(Path.cwd(), Path(log))
logging.getLogger().setLevel(logging.DEBUG)
settings = {"url": url, "auth_env": "RM_TOKEN", "outage_timeout_s": 2.0}
judge = {"model": "m", "mode": "rubric", "rubric": "good?"}
worker.start(HttpSource(**settings) if kind == "http" else JudgeSource(**settings, **judge), 1)
try:
    print(worker.score(prompts(1), responses(1), rollouts(1)))
except Exception as error:
    logging.exception("failed")
    print(repr(error), error.__cause__, error.__context__)
print("asked", flush=True)
"""


def echo(request: Request) -> bytes:
    """A reply that is no verdict and repeats the token."""
    return f"{SECRET} is not welcome".encode()


@pytest.mark.parametrize(
    ("kind", "script"),
    [
        ("http", [Reply(status=503), Reply(body=echo), GOOD]),
        ("http", [Reply(body=echo, headers={"Content-Type": "text/plain"})]),
        ("http", [Reply(status=302, headers={"Location": f"https://login.host/{SECRET}?token={SECRET}"})]),
        ("http", [Reply(status=401, body=echo)]),
        ("judge", [Reply(body=echo), Reply(body=saying(f"{SECRET}?")), Reply(body=saying("<verdict>x</verdict>"))]),
    ],
    ids=["repeated", "never good", "redirect", "unauthorized", "judge"],
)
def test_a_token_is_in_no_log_of_a_worker_and_in_no_error(tmp_path: Path, kind: str, script: list[Reply]) -> None:
    """Whatever the service repeats of it, with every library at its most talkative."""
    with service(script) as server:
        done = subprocess.run(
            [sys.executable, "-c", WORKER, kind, server.url, str(tmp_path / "reward.log")],
            env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "RM_TOKEN": SECRET},
            capture_output=True,
            text=True,
            check=False,
        )
        assert server.requests[0][0]["Authorization"] == f"Bearer {SECRET}"
    said = (tmp_path / "reward.log").read_text() + done.stdout + done.stderr
    assert "asked" in said
    assert SECRET not in said

"""Runs started from Python: twice in one process, with typed results and typed errors, like a notebook would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.command_line import CommandLine

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import json
import sys
import threading

import rlhf
import tastes

COMMON = {"policy": {"model": "policy", "lr": 1e-2}, "data.template": "plain", "log.tensorboard": False}


def main():
    sft = rlhf.load_config(
        "sft",
        settings={**COMMON, "run.name": "api-sft", "data.path": "demonstrations.jsonl", "data.max_tokens": 64,
                  "train.num_steps": 2, "train.batch_size": 8},
    )
    first = rlhf.train(sft)
    grpo = rlhf.load_config(
        "grpo",
        settings={**COMMON, "run.name": "api-grpo", "policy.model": first.model, "data.path": "prompts.jsonl",
                  "reward.function": tastes.vowels, "rollout": {"engine": "transformers", "batch_size": 4,
                  "group_size": 2, "max_prompt_tokens": 16, "max_response_tokens": 8},
                  "train.num_steps": 2, "train.batch_size": 8},
    )
    results = []
    # Not from the main thread: where notebooks and services call from.
    thread = threading.Thread(target=lambda: results.append(rlhf.train(grpo, progress=False)))
    thread.start()
    thread.join()
    second = results[0]
    try:
        rlhf.train(rlhf.load_config("grpo", settings={**grpo_settings(grpo), "reward.function": tastes.broken}))
    except rlhf.RlhfError as error:
        failure = {"class": type(error).__name__, "text": str(error)}
    (generation,) = rlhf.generate(second.model, ["say red 1"], num_samples=2, max_tokens=4, engine="transformers")
    print(json.dumps({
        "models": [str(first.model), str(second.model)],
        "steps": [first.step, second.step],
        "reward": second.metrics["reward/mean"],
        "failure": failure,
        "responses": generation.responses,
    }))


def grpo_settings(config):
    return {**config.model_dump(mode="json"), "run": {"name": "api-broken"}}


if __name__ == "__main__":
    main()
"""
TASTES = """\
def vowels(prompts, responses, **columns):
    return [sum(c in "aeiou" for c in response) / max(1, len(response)) for response in responses]


def broken(prompts, responses, **columns):
    raise ValueError("no taste today")
"""


def test_a_script_trains_twice_and_meets_a_typed_error(command: CommandLine) -> None:
    folder = command.workplace
    (folder / "user_script.py").write_text(SCRIPT)
    (folder / "tastes.py").write_text(TASTES)
    done = subprocess.run(
        [sys.executable, "user_script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    told = json.loads(lines[-1])
    assert any(line.startswith("step 2/2") for line in lines), "the first run shows its progress"
    assert told["steps"] == [2, 2]
    first, second = (load_file(Path(model) / "model.safetensors") for model in told["models"])
    assert any(not weight.equal(second[name]) for name, weight in first.items())
    assert told["failure"]["class"] == "RewardError"
    assert "no taste today" in told["failure"]["text"]
    assert len(told["responses"]) == 2

"""`rlhf check` and `rlhf plan` of a common model import none of the libraries that take seconds; of any other model a
check asks transformers, and finds the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.engines.models.fresh_model import make_llama, train_tokenizer

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "deepspeed", "vllm", "transformers", "datasets", "huggingface_hub", "pyarrow", "tensorboard")
LENGTHS = ["--rollout.max-prompt-tokens", "32", "--rollout.max-response-tokens", "32", "--rollout.batch-size", "8"]
RUNS = {
    "sft": ["--data.max-tokens", "60", "--train.batch-size", "8"],
    "dpo": ["--data.max-tokens", "60", "--train.batch-size", "8", "--policy.lora.rank", "4"],
    "rm": ["--data.max-tokens", "60", "--train.batch-size", "8", "--reward.model", "model"],
    "grpo": [*LENGTHS, "--reward.rules", "number"],
    "ppo": [*LENGTHS, "--train.batch-size", "8", "--reward.function", "light_rewards:joy"],
}
CLUSTER = ["--cluster", "1x4xCPU"]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with a model, a reward function, and rows for every method."""
    train_tokenizer([f"row {n} of the data set" for n in range(100)], 300, tmp_path / "model")
    make_llama(tmp_path / "model", vocab_size=300, hidden_size=32, num_layers=1, context=64)
    rows = [
        {"prompt": f"row {n}", "response": f" {n}", "chosen": f" {n}", "rejected": " no", "answer": str(n)}
        for n in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "light_rewards.py").write_text("def joy(responses): return [1.0 for _ in responses]\n")
    return tmp_path


def call(world: Path, *argv: str) -> tuple[list[str], str]:
    """The heavy libraries that a command imported, and what it wrote, which must be no error."""
    code = (
        "import sys; from rlhf.cli.main import main; code = main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=world, capture_output=True, text=True, timeout=120, env={**environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1].replace("'", '"')), done.stdout


def settings(method: str) -> list[str]:
    models = [] if method == "rm" else ["--policy.model", "model"]
    return [method, "--data.path", "rows.jsonl", *models, *RUNS[method]]


@pytest.mark.parametrize("method", RUNS)
def test_a_check_of_a_common_model_imports_nothing_heavy(method: str, world: Path) -> None:
    imported, shown = call(world, "check", *settings(method))
    assert imported == []
    assert "16 rows with the tokenizer" in shown


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_plan_imports_nothing_heavy(method: str, world: Path) -> None:
    imported, shown = call(world, "plan", *settings(method), *CLUSTER)
    assert imported == []
    assert f"{method} on 1x4xCPU" in shown


def test_nor_does_a_plan_for_this_machine(world: Path) -> None:
    imported, shown = call(world, "plan", *settings("grpo"), "--cluster.device", "cpu")
    assert imported == []
    assert "grpo on " in shown


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_of_other_files_transformers_is_asked_and_says_the_same(file: str, world: Path) -> None:
    _, before = call(world, "check", *settings("dpo"))
    path = world / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_their_own": 1}))
    imported, after = call(world, "check", *settings("dpo"))
    assert "transformers" in imported
    assert after == before


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_the_driver_of_a_run_of_a_common_model_does_without_transformers(method: str, world: Path) -> None:
    """Its import takes as long as the start of a small run's workers. Workers import it themselves."""
    code = (
        "import sys\n"
        "from rlhf.config.loading.load import load_config\n"
        "from rlhf.launch.prepare import prepare\n"
        "from rlhf.launch.train import run_training\n"
        f"run = prepare(load_config({method!r}, {settings(method)[1:]!r}, {{}}))\n"
        "print(run.data.num_rows, [name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=world, capture_output=True, text=True, timeout=120, env={**environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.stdout == "16 ['torch']\n", done.stderr

"""Processes that have the experts of each layer among them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.cli.main import main
from tests.tiny_models import make_family
from tests.unit.config.conftest import Problems

RUN = ("--policy.model", "m", "--data.path", "d.jsonl", "--reward.function", "rewards:score")
SPLIT = ("--policy.expert-parallel-size", "2", "--policy.num-gpus-per-node", "4")


def test_groups_of_processes_have_experts_among_them(problems: Problems) -> None:
    assert problems(*RUN, *SPLIT, command="grpo") == []
    beside = ("--policy.sequence-parallel-size", "2", "--policy.offload-optimizer", "--policy.freeze-router")
    assert problems(*RUN, *SPLIT, *beside, "--policy.gradient-checkpointing", "offload", command="grpo") == []


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (
            ("--policy.num-gpus-per-node", "1"),
            "--policy.expert-parallel-size: 1 processes do not split into groups of 2. Use one of 1, or more",
        ),
        (
            ("--policy.num-gpus-per-node", "3", "--policy.num-nodes", "3"),
            "--policy.expert-parallel-size: 9 processes do not split into groups of 2. Use one of 1, 3, 9, or more",
        ),
        (("--policy.zero-stage", "2"), "--policy.expert-parallel-size: needs ZeRO stage 3 (got policy.zero_stage 2)"),
        (
            ("--policy.zero-hpz-partition-size", "2"),
            "--policy.zero-hpz-partition-size: DeepSpeed holds no second copy of parameters together with its AutoEP",
        ),
        (("--policy.lora.rank", "8"), "--policy.lora.rank: DeepSpeed cannot save experts that its AutoEP spreads"),
        (("--policy.mlp-chunk-tokens", "64"), "--policy.mlp-chunk-tokens: processes have different numbers of chunks"),
        (("--rollout.router-replay",), "--rollout.router-replay: DeepSpeed's AutoEP brings routers of its own"),
        (("--policy.expert-parallel-size", "0"), "--policy.expert-parallel-size: "),
    ],
)
def test_refused(argv: Sequence[str], problem: str, problems: Problems) -> None:
    (found,) = problems(*RUN, *SPLIT, *argv, command="grpo")
    assert found.startswith(problem)


def test_every_model_that_learns_is_checked(problems: Problems) -> None:
    (found,) = problems(*RUN, "--critic.expert-parallel-size", "2", command="ppo")
    assert found.startswith("--critic.expert-parallel-size: 1 processes do not split into groups of 2")
    (found,) = problems(*RUN, "--reference.expert-parallel-size", "2", command="ppo")
    assert "reference.expert-parallel-size" in found


@pytest.mark.parametrize(
    ("family", "size", "problem"),
    [
        ("qwen3_moe", 2, None),
        ("deepseek_v3", 4, None),
        ("qwen3_moe", 3, "4 experts of model do not split over 3 processes. Use one of 1, 2, 4."),
        ("mixtral", 8, "4 experts of model do not split over 8 processes. Use one of 1, 2, 4."),
        ("olmoe", 2, "DeepSpeed's AutoEP does not know a olmoe (model), but deepseek_v2, deepseek_v3, "),
        ("qwen3", 2, "DeepSpeed's AutoEP does not know a qwen3 (model), but "),
    ],
)
def test_a_check_reads_the_models_experts(
    family: str,
    size: int,
    problem: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_family(tmp_path / "model", family)
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 64)
    flags = ("--policy.expert-parallel-size", str(size), "--policy.num-gpus-per-node", str(size))
    rows = ("--data.path", "rows.jsonl", "--data.template", "plain", "--data.max-tokens", "256")
    code = main(["check", "sft", "--policy.model", "model", *rows, *flags])
    lines = capsys.readouterr().err
    assert (code, "--policy.expert-parallel-size" in lines) == ((0, False) if problem is None else (2, True)), lines
    assert (problem or "") in lines

"""What a finished run gives back to Python."""

from pathlib import Path

from rlhf.launch.train import last_metrics
from rlhf.orchestrator.run.trackers import JsonLines


def test_the_metrics_are_those_of_the_last_step(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, {"policy/loss": 2.0, "eval/loss": 3.0})
    lines.log(2, {"policy/loss": 1.0, "reward/mean": float("nan")})
    assert last_metrics(tmp_path / "metrics.jsonl") == {"policy/loss": 1.0}


def test_a_full_disk_leaves_no_metrics(tmp_path: Path) -> None:
    assert last_metrics(tmp_path / "metrics.jsonl") == {}

"""Curves: what a chart draws of any number of steps."""

import math
from pathlib import Path

import pytest

from rlhf.report.curves import as_json, curve, curves
from rlhf.report.run_record import read_run
from tests.unit.report.support import make_run


def test_few_points_are_drawn_as_they_are() -> None:
    one = curve([(1, 0.123456789), (3, 2.0)])
    assert (one.steps, one.means, one.low, one.high) == ((1, 3), (0.123457, 2.0), (), ())


@pytest.mark.parametrize("num_points", [1001, 10_000, 12_345])
def test_many_points_keep_their_mean_and_every_spike(num_points: int) -> None:
    points = [(step, math.sin(step / 100)) for step in range(1, num_points + 1)]
    points[num_points // 2] = (num_points // 2 + 1, 50.0)
    one = curve(points)
    assert len(one.steps) <= 1000
    assert one.steps[-1] == num_points
    assert max(one.high) == 50.0
    assert min(one.low) == pytest.approx(-1, abs=1e-3)
    assert all(low <= mean <= high for low, mean, high in zip(one.low, one.means, one.high, strict=True))
    width = one.steps[0]
    assert one.means[0] == pytest.approx(sum(value for _, value in points[:width]) / width, rel=1e-5)


def test_runs_share_the_lists_of_their_steps(tmp_path: Path) -> None:
    rows = [{"policy/loss": float(step), "policy/lr": 1.0} for step in range(3)]
    runs = [read_run(make_run(tmp_path / "a", rows)), read_run(make_run(tmp_path / "b", [{"eval/loss": 1.0}]))]
    found = as_json([curves(run) for run in runs])
    assert found["steps"] == [[1], [1, 2, 3]]
    assert found["metrics"] == [
        {"name": "eval/loss", "runs": [None, {"x": 0, "y": [1.0], "low": [], "high": []}]},
        {"name": "policy/loss", "runs": [{"x": 1, "y": [0.0, 1.0, 2.0], "low": [], "high": []}, None]},
        {"name": "policy/lr", "runs": [{"x": 1, "y": [1.0, 1.0, 1.0], "low": [], "high": []}, None]},
    ]

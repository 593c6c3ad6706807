"""Which run did best: by hand-made runs whose answer is known."""

import math
from pathlib import Path

import pytest

from rlhf.report.comparison import CERTAIN, cautions, compare
from rlhf.report.config_difference import MISSING, config_difference
from rlhf.report.measures import averaged_steps, measured
from rlhf.report.run_record import RunRecord, read_run
from tests.unit.report.support import evaluation, make_run


def run_with(folder: Path, config: str = "run: {seed: 0}\n", **series: list[float]) -> RunRecord:
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    return read_run(
        make_run(folder, [{name.replace("__", "/"): v for name, v in row.items()} for row in rows], config=config)
    )


def test_the_end_of_a_metric_is_a_mean_and_its_best_a_step() -> None:
    one = measured(
        [(step, float(value)) for step, value in enumerate([0, 1, 2, 9, 3, 5, 2, 4, 6, 8], 1)], "reward/mean_all", 1
    )
    assert one is not None
    assert (one.first, one.last, one.num_averaged) == (0.5, 7.0, 2)
    assert one.error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert (one.best, one.best_step) == (9, 4)
    assert [averaged_steps(n) for n in (1, 4, 9, 10, 1000)] == [1, 1, 1, 2, 20]


def test_less_is_better_of_a_loss_and_the_first_of_equal_steps_is_the_best() -> None:
    one = measured([(1, 2.0), (2, 1.0), (3, 1.0)], "eval/loss", -1)
    assert one is not None
    assert (one.best, one.best_step, one.last, one.error) == (1.0, 2, 1.0, None)
    assert measured([], "eval/loss", -1) is None


def test_the_first_metric_that_all_runs_have_decides(tmp_path: Path) -> None:
    a = run_with(tmp_path / "a", eval__loss=[3.0, 2.0], reward__accuracy=[0.5, 0.9])
    b = run_with(tmp_path / "b", eval__loss=[3.0, 1.0], reward__accuracy=[0.5, 0.6])
    c = run_with(tmp_path / "c", reward__accuracy=[0.5, 0.7])
    found = compare([a, b])
    assert found is not None
    assert (found.metric, found.winner, found.values, found.difference) == ("eval/loss", 1, (1.0, 2.0), 1.0)
    found = compare([c, b, a])
    assert found is not None
    assert (found.metric, found.winner, found.second) == ("reward/accuracy", 2, 0)
    assert compare([a, run_with(tmp_path / "d", policy__lr=[1.0])]) is None


def test_a_difference_within_the_noise_is_not_clear(tmp_path: Path) -> None:
    noisy = [0.0, 1.0] * 25
    a = run_with(tmp_path / "a", reward__mean_all=noisy)
    b = run_with(tmp_path / "b", reward__mean_all=[value + 0.1 for value in noisy])
    far = run_with(tmp_path / "c", reward__mean_all=[value + 1.0 for value in noisy])
    found = compare([a, b])
    assert found is not None
    assert found.error is not None
    assert found.difference == pytest.approx(0.1)
    assert 0 < found.difference < CERTAIN * found.error
    assert not found.is_clear
    beyond = compare([a, far])
    assert beyond is not None
    assert beyond.is_clear
    same = compare([a, a])
    assert same is not None
    assert (same.difference, same.is_clear) == (0.0, False)


def test_evaluations_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    """Rewards that differ much between prompts, and little between the runs, in one direction."""
    base = [float(i) for i in range(10)]
    better = [value + 0.1 + 0.01 * (i % 2) for i, value in enumerate(base)]
    runs = [
        read_run(make_run(tmp_path / name, [{"eval/reward": sum(rewards) / 10}], responses={1: evaluation(rewards)}))
        for name, rewards in (("a", base), ("b", better))
    ]
    found = compare(runs)
    assert found is not None
    assert found.winner == 1
    assert found.basis == "last evaluation, 10 prompts compared one by one"
    assert found.error == pytest.approx(math.sqrt(10 * 0.005**2 / 9 / 10))
    assert found.is_clear


def test_settings_that_differ_are_listed_and_names_are_not(tmp_path: Path) -> None:
    a = run_with(
        tmp_path / "a", "run: {name: a}\nalgo: {kl: {coef: 0.1}}\nreward: {rules: [math]}\n", eval__reward=[1.0]
    )
    b = run_with(tmp_path / "b", "run: {name: b}\nalgo: {kl: {coef: 0.2}}\nreward: {}\n", eval__reward=[1.0])
    torn = run_with(tmp_path / "c", "a: [", eval__reward=[1.0])
    assert config_difference([a, b, torn]) == {
        "algo.kl.coef": [0.1, 0.2, MISSING],
        "reward": [MISSING, {}, MISSING],
        "reward.rules": [["math"], MISSING, MISSING],
    }
    assert config_difference([a, a]) == {}


def test_runs_that_cannot_be_compared_fairly_are_said_to_be(tmp_path: Path) -> None:
    a = run_with(tmp_path / "a", "reward: {rules: [math]}\ndata: {path: x}\n", eval__reward=[1.0, 2.0])
    b = run_with(tmp_path / "b", "reward: {rules: [number]}\ndata: {path: y}\n", eval__reward=[1.0])
    found = compare([a, b])
    assert found is not None
    assert cautions([a, b], found) == [
        "the runs have different reward settings (reward.rules): equal responses may get different rewards",
        "the held-out rows may differ (data.path)",
        "the runs end at different steps: 2, 1",
    ]
    assert cautions([a, a], found) == []

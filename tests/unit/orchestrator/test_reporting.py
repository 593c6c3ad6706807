"""What a person and a tracker get to see."""

import io
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from rlhf.config.rules.trackers import tracker_problems
from rlhf.config.run import LogSection, TrainSection
from rlhf.errors import ConfigError, NumericsError
from rlhf.orchestrator.run.console import PlainConsole
from rlhf.orchestrator.run.live_console import LiveConsole
from rlhf.orchestrator.run.samples_shown import most_telling, sample_lines
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.run.shown_metrics import show_seconds
from rlhf.orchestrator.run.trackers import BestEffort, JsonLines, make_trackers, require_trackers
from rlhf.orchestrator.step.mismatch import MismatchWatch, log_prob_mismatch, mismatch_metrics
from rlhf.types import Example, Json, Role, Signal, TokenSequence
from tests.unit.orchestrator.support import given_group

pytestmark = pytest.mark.timeout(30)


def test_a_message_is_not_markup() -> None:
    out = io.StringIO()
    console = LiveConsole(40, out)
    console.say("[bold]not markup[/bold]")
    console.close()
    assert "[bold]not markup[/bold]" in out.getvalue()


def test_a_sample_is_the_best_and_the_worst_of_a_group_with_its_label() -> None:
    equal = given_group(1, ["ab", "cd"], [0.5, 0.5])
    apart = given_group(2, ["ab", "cd", "ef"], [0.5, 1.0, 0.0])
    apart = replace(apart, prompt=replace(apart.prompt, text="2 + 2", label="4"))
    assert most_telling([equal, apart]) is apart
    assert sample_lines(3, apart) == [
        "sample of step 3: [2 + 2], label [4]",
        "  best, reward 1: [cd]",
        "  worst, reward 0: [ef]",
    ]
    assert sample_lines(3, equal)[1:] == ["  all 2 got reward 0.5, the first: [ab]"]
    assert sample_lines(3, given_group(1, ["ab"], [math.nan]))[1:] == ["  no score: [ab]"]


def test_a_response_cannot_act_on_the_terminal() -> None:
    nasty = "a\x1b[2Jb\r\nrlhf: error\x07 \u202eabc\x9b31m \ud800 é漢"
    group = replace(given_group(1, ["ab"], [0.5]), texts=(nasty,))
    for make in (PlainConsole, LiveConsole):
        out = io.StringIO()
        console = make(4, out)
        console.sample(1, group)
        console.close()
        assert not {"\x07", "\r", "\u202e", "\x9b", "\ud800"} & set(out.getvalue().replace("\x1b[", ""))
        assert "\\x1b[2J" in out.getvalue()


def test_a_long_sample_is_cut() -> None:
    out = io.StringIO()
    PlainConsole(4, out).sample(1, replace(given_group(1, ["ab"], [0.5]), texts=("x" * 10_000,)))
    assert len(out.getvalue()) < 1000


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (200, "3m20s"), (3599.6, "1h00m"), (7500, "2h05m")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


def test_lines_are_valid_json_even_where_numbers_are_not(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "metrics.jsonl")
    tracker.log(3, {"a": math.nan, "b": math.inf, "c": 1.5})
    tracker.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["step"], row["a"], row["b"], row["c"]) == (3, None, None, 1.5)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    trackers = make_trackers(
        LogSection(),
        metrics_path=tmp_path / "metrics.jsonl",
        tensorboard_folder=tmp_path / "tb",
        name="a",
        config={},
        warn=pytest.fail,
    )
    for tracker in trackers:
        tracker.log(1, {"policy/loss": 0.5, "note": "text"})
        tracker.log(2, {"policy/loss": 0.25})
        tracker.close()
    (file,) = (tmp_path / "tb").iterdir()
    found = [
        (
            event.step,
            value.tag,
            float(
                value.tensor.float_val[0]
                if value.tensor.float_val
                else np.frombuffer(value.tensor.tensor_content, np.float32)[0]
            ),
        )
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert found == [(1, "policy/loss", 0.5), (2, "policy/loss", 0.25)]


class Hangs:
    """A tracker whose server never answers."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        threading.Event().wait(60)

    def close(self) -> None:
        """Nothing."""


class Breaks:
    """A tracker whose server is down."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        raise ConnectionError("refused")

    def close(self) -> None:
        """Nothing."""


def test_a_tracker_that_hangs_holds_nothing_up() -> None:
    warnings: list[str] = []
    tracker = BestEffort("wandb", Hangs, warnings.append, close_timeout_s=0.1)
    start = time.monotonic()
    for step in range(3000):
        tracker.log(step, {"a": 1.0})
    tracker.close()
    assert time.monotonic() - start < 2
    assert warnings == ["wandb: did not keep up; some metrics are only in metrics.jsonl"]


@pytest.mark.parametrize("make", [Breaks, lambda: 1 / 0])
def test_a_broken_tracker_is_warned_of_once(make: type[Breaks]) -> None:
    warnings: list[str] = []
    tracker = BestEffort("mlflow", make, warnings.append)
    for step in range(5):
        tracker.log(step, {"a": 1.0})
    tracker.close()
    assert len(warnings) == 1
    assert warnings[0].startswith(("mlflow: ConnectionError: refused", "mlflow: ZeroDivisionError"))


def test_missing_packages_and_keys_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    section = LogSection(wandb_project="p", mlflow_uri="http://x")
    assert [(problem.keys[0], problem.text) for problem in tracker_problems(section, {}, lambda _: False)] == [
        ("log.wandb_project", "wandb is not installed. Run `pip install wandb`."),
        ("log.mlflow_uri", "mlflow is not installed. Run `pip install mlflow`."),
        (
            "log.wandb_project",
            "environment variable WANDB_API_KEY is not set. Export it, or set WANDB_MODE=offline.",
        ),
    ]
    assert not [*tracker_problems(LogSection(), {}, lambda _: False)]
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match=r"log\.wandb_project: environment variable WANDB_API_KEY is not set"):
        require_trackers(section)


def test_the_gap_between_sampler_and_trainer_is_over_response_tokens() -> None:
    sequence = TokenSequence(token_ids=np.arange(4), loss_mask=np.array([False, True, True, True]))
    example = Example(
        id="a",
        sequences=(sequence,),
        rewards=(0.0,),
        sampler_log_probs=(np.array([9.0, -1.0, -2.0, -np.inf], dtype=np.float32),),
    )
    signals = {Signal.OLD_LOG_PROBS: (np.array([0.0, -1.5, -2.0, -3.0], dtype=np.float32),)}
    assert log_prob_mismatch([example], [signals]).tolist() == [-0.5, 0.0, np.inf]
    assert len(log_prob_mismatch([example], [{}])) == 0


def test_the_mismatch_by_hand() -> None:
    """Ratios of trainer to sampler: 1, 3, 1/4, and one that is not known; the band is [1/2, 2]."""
    gap = np.array([0.0, np.log(3.0), -np.log(4.0), np.nan], dtype=np.float32)
    kl = (0.0 + (3 - 1 - np.log(3.0)) + (0.25 - 1 + np.log(4.0))) / 3
    assert mismatch_metrics(gap, mismatch_band=2.0) == pytest.approx(
        {
            "mismatch/log_prob": (np.log(3.0) + np.log(4.0)) / 3,
            "mismatch/log_prob_max": np.log(4.0),
            "mismatch/kl": kl,
            "mismatch/outside_band": 2 / 3,
            "mismatch/not_finite": 0.25,
        }
    )
    assert mismatch_metrics(gap, mismatch_band=3.5)["mismatch/outside_band"] == pytest.approx(1 / 3)
    assert mismatch_metrics(np.zeros(0, dtype=np.float32), mismatch_band=2.0) == {}


def test_missing_log_probs_of_the_sampler_are_warned_of_once() -> None:
    """All of them missing is a mean gap of 0, which would look like full agreement."""
    warned: list[str] = []
    watch = MismatchWatch(TrainSection(), warned.append)
    for step in (1, 2):
        watch.check(step, mismatch_metrics(np.full(4, np.nan, dtype=np.float32), mismatch_band=2.0))
        watch.check(step, mismatch_metrics(np.full(4, 0.2, dtype=np.float32), mismatch_band=2.0))
    assert warned == [
        "step 1: 100.00% of the sampler's log-probs are not finite; shown once",
        "step 1: log-probs of sampler and trainer differ by 0.2 nats a token on average (train.mismatch_warn is 0.1); "
        "shown once",
    ]
    with pytest.raises(NumericsError, match=r"step 3: .* differ by 2 nats"):
        watch.check(3, mismatch_metrics(np.full(4, 2.0, dtype=np.float32), mismatch_band=2.0))
    MismatchWatch(TrainSection(mismatch_warn=0.0, mismatch_stop=0.0), warned.append).check(
        1, mismatch_metrics(np.full(4, 9.0, dtype=np.float32), mismatch_band=2.0)
    )
    assert len(warned) == 2


@pytest.mark.parametrize("numbers", [[100.0, -100.0], [np.inf], [np.nan, -np.inf]])
def test_the_mismatch_of_far_policies_is_finite(numbers: list[float]) -> None:
    metrics = mismatch_metrics(np.array(numbers, dtype=np.float32), mismatch_band=2.0)
    assert np.isfinite(list(metrics.values())).all()


def test_the_schedule_counts_the_updates_that_will_run() -> None:
    """A32."""
    length = RunLength(num_steps=10, examples_per_step=10, batch_size=4, num_epochs=2, critic_warmup_steps=3)
    assert length.num_updates(Role.POLICY) == 7 * 3 * 2
    assert length.num_updates(Role.CRITIC) == 60
    only_warmup = RunLength(num_steps=2, examples_per_step=1, batch_size=1, critic_warmup_steps=3)
    assert only_warmup.num_updates(Role.POLICY) == 0

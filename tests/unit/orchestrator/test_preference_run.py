"""Learning from pairs inside the loop: evaluation on held-out pairs, warnings that reach the user, ties."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.algorithms.stuck_loss import PATIENCE_STEPS
from rlhf.config.algo import DpoSection, OnlineDpoSection
from rlhf.config.algo.preference import IpoLoss, PairLossSection, SimpoLoss
from rlhf.config.run import TrainSection
from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeReward, FakeScorer, FakeTrainEngine, log_softmax
from rlhf.errors import NumericsError
from rlhf.orchestrator.evaluation import PreferenceEvaluator
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import Head, Metrics, Role, Signal, TrainBatch
from tests.unit.orchestrator.support import TOKENIZER, Run, given_group, ppo_run, sft_run

pytestmark = pytest.mark.timeout(60)

POLICY, REFERENCE = np.linspace(-1.0, 1.0, TOKENIZER.num_tokens), np.zeros(TOKENIZER.num_tokens)


def evaluator(
    section: DpoSection, rows: list[tuple[str, str]], *, num_ranks: int = 1, max_tokens: int = 1000
) -> PreferenceEvaluator:
    models = Models(
        trained={Role.POLICY: FakeTrainEngine(POLICY, Head.LOG_PROBS, num_ranks=num_ranks)},
        reference=FakeScorer(REFERENCE, Head.LOG_PROBS, num_ranks=num_ranks) if section.uses_reference else None,
    )
    groups = [given_group(i, pair, [1.0, 0.0]) for i, pair in enumerate(rows)]
    return PreferenceEvaluator(
        models, DPO(section), groups, TrainSection(batch_size=1, max_tokens_per_micro_batch=max_tokens)
    )


def h(chosen: str, rejected: str) -> float:
    """By definition; every response ends with the stop token."""
    said = log_softmax(POLICY) - log_softmax(REFERENCE)
    sums = [sum(said[i] for i in [*TOKENIZER.encode(text), 1]) for text in (chosen, rejected)]
    return float(sums[0] - sums[1])


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 1000), (3, 6), (2, 1)])
def test_every_held_out_pair_counts_once(num_ranks: int, max_tokens: int) -> None:
    rows = [("hh", "a"), ("b", "h"), ("hgf", "abc"), ("c", "bb"), ("ab", "ab")]
    metrics = evaluator(DpoSection(), rows, num_ranks=num_ranks, max_tokens=max_tokens).evaluate(0).metrics
    gaps = [h(*row) for row in rows[:4]]
    assert metrics["eval/num_pairs"] == 4
    assert metrics["eval/accuracy"] == pytest.approx(np.mean([gap > 0 for gap in gaps]))
    assert metrics["eval/margin"] == pytest.approx(0.1 * np.mean(gaps), rel=1e-5)
    assert metrics["eval/loss"] == pytest.approx(np.mean([math.log1p(math.exp(-0.1 * gap)) for gap in gaps]), rel=1e-5)
    assert metrics["eval/chosen_reward"] - metrics["eval/rejected_reward"] == pytest.approx(metrics["eval/margin"])


@pytest.mark.parametrize("loss", [SimpoLoss(), IpoLoss()])
def test_each_loss_is_measured_its_own_way(loss: PairLossSection) -> None:
    """By averages over tokens `h` is better than `ga`, though its sum is not the point."""
    section = DpoSection.model_validate({"loss": loss})
    metrics = evaluator(section, [("h", "ga")]).evaluate(0).metrics
    assert metrics["eval/accuracy"] == 1.0
    assert set(metrics) >= {"eval/loss", "eval/chosen_log_prob", "eval/rejected_log_prob"}


def test_held_out_rows_without_a_pair_give_no_metric() -> None:
    assert evaluator(DpoSection(), [("ab", "ab")]).evaluate(0).metrics == {}


class AtLn2(FakeTrainEngine):
    """Its loss stays where a preference loss starts."""

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        super().forward_backward(batches)
        return PassReport(metrics=Metrics(sums={"policy/loss": math.log(2)}))


def warnings_of(run: Run) -> list[str]:
    events = (run.path / "events.jsonl").read_text().splitlines()
    return [event["text"] for event in map(json.loads, events) if event["kind"] == "warning"]


def test_a_loss_that_does_not_move_is_warned_of_once(tmp_path: Path) -> None:
    run = sft_run(tmp_path, algorithm=DPO(DpoSection()))
    run.rows = [given_group(i, ["ab", "b"], [1.0, 0.0]) for i in range(7)]
    run.engines = {Role.POLICY: AtLn2(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2)}
    run.num_steps, run.checkpoint_every = PATIENCE_STEPS + 10, 1000
    run.num_epochs = 1
    run.run()
    warned = [text for text in warnings_of(run) if "ln 2" in text]
    assert len(warned) == 1
    assert warned[0].startswith(f"step {PATIENCE_STEPS + 1}: the loss is still 0.6931 after {PATIENCE_STEPS} steps")


def online(folder: Path, rewards: FakeReward) -> Run:
    run = ppo_run(folder)
    engines = {Role.POLICY: run.engines[Role.POLICY]}
    made = Run(folder, OnlineDPO(OnlineDpoSection()), engines, rollout=run.rollout, rewards=rewards, group_size=4)
    made.num_epochs = 1
    return made


def test_online_pairs_are_best_and_worst_and_ties_are_counted(tmp_path: Path) -> None:
    run = online(tmp_path, FakeReward())
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["data/examples"] + row["pairs/tied"] + row["pairs/empty"] + row["pairs/identical"] == run.batch_size
        assert row["pairs/score_gap"] > 0
        assert row["mismatch/log_prob"] < 1e-6
    learned = [batch for batch in run.engines[Role.POLICY].seen if not batch.is_padding]
    assert all(batch.signals.keys() == {Signal.REF_LOG_PROBS} for batch in learned)
    assert all(batch.targets.tolist() == [1.0, 0.0] * (len(batch.targets) // 2) for batch in learned)


def test_a_run_whose_rewards_are_all_equal_warns_and_fails(tmp_path: Path) -> None:
    run = online(tmp_path, FakeReward(scale=0.0))
    with pytest.raises(NumericsError, match="nothing was learned"):
        run.run()
    assert len(warnings_of(run)) == run.num_steps

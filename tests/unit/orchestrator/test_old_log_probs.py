"""Old log-probs from the pass that learns: the same run as with a pass of their own, and one forward pass less."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.grpo import GRPO
from rlhf.config.algo import (
    AdaptiveKl,
    AlgorithmSection,
    FixedKl,
    GrpoSection,
    GspoSection,
    NoCorrection,
    OnlineDpoSection,
    OnlineKtoSection,
    PpoSection,
    RatioToSampler,
    RlooSection,
)
from rlhf.engines.fakes import FakeReward, FakeRollout, FakeTrainEngine
from rlhf.errors import NumericsError
from rlhf.types import Example, Head, Metrics, Role, Rollout, RolloutRequest, Signals, TrainBatch
from tests.unit.orchestrator.support import TOKENIZER, Run


class Drifting(FakeRollout):
    """Reports log-probs that are off by half a nat, in the third step and later."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        rollouts = super().generate(requests)
        return [replace(one, log_probs=one.log_probs - 0.5) if self.version >= 2 else one for one in rollouts]


def run_of(path: Path, section: AlgorithmSection, *, rollout: FakeRollout | None = None, **train: float) -> Run:
    """Five steps of eight responses each, with a critic if the algorithm has one."""
    rollout = rollout or FakeRollout(TOKENIZER.num_tokens)
    algorithm = build_algorithm(section)
    engines = {
        role: FakeTrainEngine(
            np.zeros(TOKENIZER.num_tokens), head, num_ranks=2, rollout=rollout if role is Role.POLICY else None
        )
        for role, head in algorithm.needs.trains.items()
    }
    run = Run(path, algorithm, engines, num_steps=5, group_size=4, batch_size=2, num_epochs=1)
    run = replace(run, rollout=rollout, rewards=FakeReward(scale=4.0), checkpoint_every=2)
    run.set_train(**{"batch_size": 8, **train})
    return run


def metrics_of(run: Run) -> list[Mapping[str, float]]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "throughput/", "sync/seconds")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def first_passes(run: Run) -> set[bool]:
    """Whether the policy's batches were a first pass."""
    return {batch.is_first_pass for batch in batches_of(run)}


def batches_of(run: Run) -> list[TrainBatch]:
    return run.engines[Role.POLICY].seen


@pytest.mark.parametrize(
    "section",
    [
        GrpoSection(),
        GrpoSection(kl=FixedKl(coef=0.1), correction=NoCorrection()),
        GspoSection(),
        RlooSection(kl=AdaptiveKl(coef=0.1, target=0.01, horizon=8), kl_placement="loss"),
        PpoSection(kl=FixedKl(coef=0.0)),
        OnlineDpoSection(),
    ],
)
def test_a_run_without_the_pass_is_the_same_run(tmp_path: Path, section: AlgorithmSection) -> None:
    fused = run_of(tmp_path / "fused", section)
    separate = run_of(tmp_path / "separate", section, fuse_old_log_probs=False)
    for run in (fused, separate):
        run.run()
    assert (first_passes(fused), first_passes(separate)) == ({True}, {False})
    assert fused.engines[Role.POLICY].calls == 0
    assert separate.engines[Role.POLICY].calls == 5
    assert metrics_of(fused) == metrics_of(separate)
    assert metrics_of(fused)[-1]["mismatch/log_prob"] >= 0.0
    for role, engine in fused.engines.items():
        assert engine.table.tobytes() == separate.engines[role].table.tobytes()
        assert engine.table.any()


@pytest.mark.parametrize(
    ("section", "train"),
    [
        (GrpoSection(), {"batch_size": 4}),
        (PpoSection(), {}),
        (OnlineKtoSection(), {}),
        (GrpoSection(correction=RatioToSampler()), {}),
        (GrpoSection(truncated="mask"), {}),
    ],
)
def test_who_needs_the_pass_has_it(tmp_path: Path, section: AlgorithmSection, train: dict[str, int]) -> None:
    """Several optimizer steps a batch; log-probs in rewards or labels; the sampler's in their place; tokens that are
    sampled and not learned from."""
    run = run_of(tmp_path / "a", section)
    run.set_train(**train)
    run.run()
    assert first_passes(run) == {False}


def test_several_epochs_have_the_pass(tmp_path: Path) -> None:
    run = replace(run_of(tmp_path / "a", GrpoSection()), num_epochs=2)
    run.run()
    assert first_passes(run) == {False}


def test_a_policy_that_waits_for_its_critic_has_the_pass(tmp_path: Path) -> None:
    """There is no pass that learns: its log-probs are measured for the metrics."""
    section = PpoSection(kl=FixedKl(coef=0.0), critic_warmup_steps=2)
    run = replace(run_of(tmp_path / "a", section), critic_warmup_steps=2)
    run.run()
    assert run.engines[Role.POLICY].calls == 2
    assert all("mismatch/log_prob" in row for row in metrics_of(run))


def test_a_mismatch_ends_the_run_before_the_weights_change(tmp_path: Path) -> None:
    """The first two steps agree. In the third the pass is done, and no update."""
    run = run_of(tmp_path / "a", GrpoSection(), rollout=Drifting(TOKENIZER.num_tokens), mismatch_stop=0.4)
    with pytest.raises(NumericsError, match=r"step 3: .* differ by 0\.5 nats a token"):
        run.run()
    assert first_passes(run) == {True}
    assert run.engines[Role.POLICY].num_steps == 2


def test_padding_is_a_part_of_the_pass_and_of_no_response(tmp_path: Path) -> None:
    """One response a micro-batch, over three ranks: eight do not divide."""
    run = run_of(tmp_path / "a", GrpoSection(), micro_batch_size=1)
    run.engines[Role.POLICY] = FakeTrainEngine(
        np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=3, rollout=run.rollout
    )
    run.run()
    assert any(batch.is_padding for batch in batches_of(run))
    assert max(row["mismatch/log_prob_max"] for row in metrics_of(run)) < 1e-6


def test_what_describe_warns_of_is_shown(tmp_path: Path) -> None:
    class Odd(GRPO):
        def describe(self, examples: Sequence[Example], signals: Sequence[Signals]) -> Metrics:
            return super().describe(examples, signals) + Metrics(warnings=("the weights are odd",))

    run = run_of(tmp_path / "a", GrpoSection())
    run.algorithm = Odd(GrpoSection())
    run.run()
    assert "step 1: the weights are odd" in run.out.getvalue()

"""docs/metrics.md names every metric that a run logs, and no other."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.algorithms.base import Algorithm, Objective, Outputs, TensorBatch
from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.kto import KTO
from rlhf.algorithms.nash_md import NashMD
from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.algorithms.online_kto import OnlineKTO
from rlhf.algorithms.prm import PRM
from rlhf.algorithms.rm import RM
from rlhf.algorithms.sft import SFT
from rlhf.config.algo import (
    DpoSection,
    GrpoSection,
    KtoSection,
    NashMdSection,
    OnlineDpoSection,
    OnlineKtoSection,
    PpoSection,
    PrmSection,
    RmSection,
    SftSection,
)
from rlhf.config.algo.preference import DpoLoss
from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeReward, FakeTrainEngine, predict
from rlhf.engines.models.router_replay import CHANGED, REPLAYED
from rlhf.engines.training.router_balance import BALANCE
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.evaluation import (
    LabelEvaluator,
    LikelihoodEvaluator,
    PairEvaluator,
    PreferenceEvaluator,
    SampleEvaluator,
    StepEvaluator,
)
from rlhf.orchestrator.step.learning import Pretraining
from rlhf.orchestrator.step.sampler import Sampler
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import Head, Metrics, Role, Sampling, ScoredGroup, TrainBatch
from tests.unit.orchestrator.episodes import episodes_run
from tests.unit.orchestrator.support import (
    TOKENIZER,
    Run,
    given_group,
    labeled_group,
    make_prompt,
    ppo_run,
    rm_run,
    sft_run,
)

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"
NOT_METRICS = {"step", "time"}
EVERYTHING = PpoSection(
    loss="penalty", num_epochs=2, kl_placement="loss", normalize_rewards=True, ptx_coef=0.1, ptx_path="texts.jsonl"
)
"""Settings with which every optional metric of PPO is logged."""


class Reporting(FakeTrainEngine):
    """Learns as a fake does, and reports what the algorithm's real losses report."""

    objectives: Mapping[str, Objective]

    @classmethod
    def in_place_of(cls, fake: FakeTrainEngine, algorithm: Algorithm) -> "Reporting":
        engine = cls(fake.table, fake.head, num_ranks=fake.num_ranks, rollout=fake._rollout)
        engine.objectives = algorithm.objectives()
        return engine

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        super().forward_backward(batches)
        reported = (self.report(batch) for batch in batches if not batch.is_padding)
        return PassReport(metrics=sum(reported, Metrics()))

    def report(self, batch: TrainBatch) -> Metrics:
        predictions = torch.from_numpy(predict(self.table, self.head, batch.tokens))
        outputs = Outputs(predictions=predictions, entropy=torch.zeros_like(predictions))
        return self.objectives[batch.objective](outputs, TensorBatch.from_numpy(batch, torch.device("cpu"))).metrics


def logged_by(run: Run) -> set[str]:
    """The names in metrics.jsonl after a run of two steps: what ends a step counts in the next one."""
    run.engines = {role: Reporting.in_place_of(fake, run.algorithm) for role, fake in run.engines.items()}
    run.num_steps, run.checkpoint_every = 2, 1
    run.run()
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    placed = [
        ("/source/.*", "/source/NAME"), ("^memory/.*", "memory/ROLES"), ("^rollout/lag/.*", "rollout/lag/N"),
        ("^agent/calls/.*", "agent/calls/NAME"),
    ]  # fmt: skip
    names = {name for row in rows for name in row}
    for found, shown in placed:
        names = {re.sub(found, shown, name) for name in names}
    return names - NOT_METRICS


def logged_by_ppo(folder: Path) -> set[str]:
    texts = [given_group(i, ["ab"], [0.0]) for i in range(3)]
    run = ppo_run(
        folder, section=EVERYTHING, pretraining=Pretraining(Order(texts, seed=1), SFT(SftSection()), batch_size=2)
    )
    sampler = Sampler(run.rollout, FakeReward(), TOKENIZER)
    evaluator = SampleEvaluator(sampler, [make_prompt(1)], Sampling(max_tokens=3, temperature=0), 0)
    return logged_by(replace(run, evaluator=evaluator, greedy_baseline=True))


def logged_by_sft(folder: Path) -> set[str]:
    run, held_out = sft_run(folder), [given_group(8, ["a"], [0.0])]
    models = Models(trained=dict(run.engines))
    return logged_by(replace(run, evaluator=LikelihoodEvaluator(models, SFT(SftSection()), held_out, run.train)))


def logged_by_rm(folder: Path) -> set[str]:
    run, held_out = rm_run(folder), [given_group(8, ["a", "b"], [1.0, 0.0])]
    models = Models(trained=dict(run.engines))
    return logged_by(replace(run, evaluator=PairEvaluator(models, RM(RmSection()), held_out, run.train)))


def logged_by_dpo(folder: Path) -> set[str]:
    algorithm = DPO(DpoSection(loss=DpoLoss(humanline=True)))
    run, held_out = sft_run(folder, algorithm=algorithm), [given_group(8, ["a", "b"], [1.0, 0.0])]
    run.rows = [given_group(i, ["ab", "b"], [1.0, 0.0]) for i in range(7)]
    models = Models(trained=dict(run.engines), reference=run.reference)
    return logged_by(replace(run, evaluator=PreferenceEvaluator(models, algorithm, held_out, run.train)))


def logged_by_kto(folder: Path) -> set[str]:
    algorithm = KTO(KtoSection())
    run, held_out = sft_run(folder, algorithm=algorithm), [labeled_group(i, ["ab"], [i % 2 == 1]) for i in range(2)]
    run.rows = [labeled_group(i, ["ab"], [i % 2 == 1]) for i in range(7)]
    models = Models(trained=dict(run.engines), reference=run.reference)
    return logged_by(replace(run, evaluator=LabelEvaluator(models, algorithm, held_out, run.train)))


def logged_by_prm(folder: Path) -> set[str]:
    steps = [given_steps(i, "ab", [True, False]) for i in range(7)]
    run = rm_run(folder, algorithm=PRM(PrmSection()), rows=steps)
    run.engines = {Role.REWARD: FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.TOKEN_SCORES)}
    models = Models(trained=dict(run.engines))
    return logged_by(replace(run, evaluator=StepEvaluator(models, run.algorithm, steps[:2], run.train)))


def given_steps(number: int, response: str, right: Sequence[bool]) -> ScoredGroup:
    """A response whose first tokens each end a step."""
    group = given_group(number, [response], [0.0])
    mask = np.arange(len(response) + 1) < len(right)
    rollout = replace(group.responses[0], loss_mask=mask, step_labels=tuple(map(float, right)))
    return replace(group, responses=(rollout,))


def logged_by_online(folder: Path, algorithm: Algorithm) -> set[str]:
    run = ppo_run(folder)
    return logged_by(replace(run, algorithm=algorithm, engines={Role.POLICY: run.engines[Role.POLICY]}))


def logged_by_episodes(folder: Path) -> set[str]:
    return logged_by(episodes_run(folder))


def named_by_page() -> list[str]:
    return re.findall(r"^\| `([a-z_]+/[^`*]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_names_every_metric_and_no_other(tmp_path: Path) -> None:
    logged = logged_by_ppo(tmp_path / "ppo") | logged_by_sft(tmp_path / "sft") | logged_by_rm(tmp_path / "rm")
    logged |= logged_by_dpo(tmp_path / "dpo")
    logged |= logged_by_episodes(tmp_path / "episodes")
    logged |= logged_by_kto(tmp_path / "kto") | logged_by_prm(tmp_path / "prm")
    for algorithm in (
        GRPO(GrpoSection(overlong_buffer=2, overlong_limit=6)),
        OnlineDPO(OnlineDpoSection(reference="ema")),
        NashMD(NashMdSection()),
        OnlineKTO(OnlineKtoSection()),
    ):
        logged |= logged_by_online(tmp_path / type(algorithm).__name__, algorithm)
    logged |= {BALANCE, REPLAYED, CHANGED}  # of experts, which no fake has
    logged |= {f"throughput/{name}" for name in ("busy_share", "busy_share_min", "idle_tail_seconds")}  # of workers
    shares, episodes = ("busy_share", "busy_share_max"), ("episodes", "episodes_max")
    logged |= {f"agent/worker_{name}" for name in (*shares, *episodes, "restarts")}  # of environment workers
    named = named_by_page()
    assert sorted(logged - set(named)) == [], "logged, and docs/metrics.md does not name them"
    assert sorted(set(named) - logged) == [], "docs/metrics.md names them, and nothing logs them"
    assert len(named) == len(set(named)), "a metric is named twice"

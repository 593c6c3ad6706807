"""Deadlines that lie around others are longer than those, whose errors say more."""

from collections.abc import Sequence

import pytest

from rlhf.actors.calls import Worker
from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.actors.waiting import RemoteCalls
from rlhf.config.commands import GrpoConfig
from rlhf.config.loading.load import load_config
from rlhf.config.reward import EndpointSource
from rlhf.launch.rewards import scoring_timeout_s
from rlhf.launch.rollouts import rollout_pool, sampling_timeout_s, scoring_plan


class TimedGroup(WorkerGroup):
    """Workers that are called at once; keeps each call's deadline."""

    def __init__(self) -> None:
        super().__init__((), RemoteCalls(()))
        self.timeouts: dict[str, float] = {}

    def run(self, submit: Submit, *, phase: str, timeout_s: float, peers: Sequence[Worker] = ()) -> list[object]:
        self.timeouts[phase] = timeout_s
        return []


def grpo(*flags: str) -> GrpoConfig:
    given = ("--policy.model", "m", "--data.path", "rows.jsonl", "--reward.url", "https://example.com/score")
    config = load_config("grpo", [*given, *flags], {})
    assert isinstance(config, GrpoConfig)
    return config


def test_a_service_that_is_out_is_given_up_before_those_who_wait_for_its_rewards() -> None:
    config = grpo("--train.step-timeout-s", "10", "--rollout.generate-timeout-s", "20")
    (service,) = config.reward.all_sources
    assert isinstance(service, EndpointSource)
    assert scoring_timeout_s(config.reward, config.train.step_timeout_s) == 10 + service.outage_timeout_s
    assert sampling_timeout_s(config) > 20 + scoring_timeout_s(config.reward, config.train.step_timeout_s)


def test_a_step_may_sample_as_often_as_its_algorithm_allows() -> None:
    """Each completed response begins the deadline anew."""
    once, often = grpo("--algo", "grpo"), grpo("--algo", "dapo", "--algo.max-sampling-rounds", "40")
    assert often.algo.sampling_rounds == 40
    assert sampling_timeout_s(often) == sampling_timeout_s(once)


@pytest.mark.parametrize(
    ("engine", "max_lag", "whole"), [("vllm", 0, False), ("transformers", 0, True), ("transformers", 1, False)]
)
def test_what_is_scored_together(engine: str, max_lag: int, whole: bool) -> None:
    config = grpo("--rollout.engine", engine, "--rollout.max-lag", str(max_lag))
    assert scoring_plan(config.reward, config.rollout).whole_step == whole


def test_engines_that_wake_wait_for_the_checkpoint_that_their_devices_are_saving() -> None:
    """A rank answers one call after the other, and a save may take as long as a step."""
    config = grpo("--train.step-timeout-s", "1000", "--rollout.sync-timeout-s", "10")
    ranks, engines = TimedGroup(), TimedGroup()
    rollout_pool(config, [ranks], "cpu", engines).wake()
    assert ranks.timeouts == {"release of memory for engines": 1010.0}
    assert engines.timeouts == {"rollout wake": 10.0}

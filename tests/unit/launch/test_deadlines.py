"""Deadlines that lie around others are longer than those, whose errors say more."""

from rlhf.config.commands import GrpoConfig
from rlhf.config.loading.load import load_config
from rlhf.config.reward import EndpointSource
from rlhf.launch.rewards import scoring_timeout_s
from rlhf.launch.rollouts import sampling_timeout_s


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
    config = grpo("--algo", "dapo", "--algo.max-sampling-rounds", "4")
    assert config.algo.sampling_rounds == 4
    assert sampling_timeout_s(config) > 4 * (
        config.rollout.generate_timeout_s + scoring_timeout_s(config.reward, config.train.step_timeout_s)
    )

"""Where groups come from."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlhf.engines.fakes import FakeReward, FakeRollout
from rlhf.errors import RewardError, RlhfError
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.step.batch_queue import BatchQueue
from rlhf.orchestrator.step.policy_weights import require_lag
from rlhf.orchestrator.step.rollout_source import RolloutSource, ScoringPlan
from rlhf.orchestrator.step.sampler import RolloutPlan, Sampler, make_requests, request_seed
from rlhf.orchestrator.step.sources import GroupBatch, OfflineSource
from rlhf.orchestrator.step.stream import StreamLimits
from rlhf.types import UNSCORED, Prompt, Reward, Rollout, RolloutRequest, Sampling, ScoredGroup
from tests.unit.orchestrator.support import TOKENIZER, given_group, make_prompt

pytestmark = pytest.mark.timeout(20)

PLAN = RolloutPlan(group_size=2, sampling=Sampling(max_tokens=5), seed=1)


def source(
    *,
    engine: FakeRollout | None = None,
    rewards: FakeReward | None = None,
    plan: RolloutPlan = PLAN,
    keep: Callable[[ScoredGroup], bool] = lambda _: True,
    num_prompts: int = 7,
) -> RolloutSource:
    engine = engine or FakeRollout(TOKENIZER.num_tokens)
    if engine.version < 0:
        engine.receive(0, engine.table)
    return RolloutSource(
        Order([make_prompt(i) for i in range(num_prompts)], seed=0),
        Sampler(engine, rewards or FakeReward(), TOKENIZER),
        plan,
        StreamLimits(batch_size=4),
        ScoringPlan(),
        BatchQueue(take_timeout_s=5),
        keep,
    )


def first_batch(made: RolloutSource) -> GroupBatch:
    made.start(1, 1, 0)
    try:
        return made.take(1)
    finally:
        made.close()


def test_seeds_depend_on_the_run_and_the_place_alone() -> None:
    seeds = {
        request_seed(run, step, prompt, index)
        for run in (0, 1, 2**62)
        for step in (1, 2)
        for prompt in ("p1", "p11", "1")
        for index in (0, 1, 11)
    }
    assert len(seeds) == 3 * 2 * 3 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, 2, "p", 3) == 2179604260263729431


def test_a_prompt_that_comes_twice_in_a_step_gets_other_responses() -> None:
    seen: Counter[str] = Counter()
    requests = make_requests(3, [make_prompt(1), make_prompt(2), make_prompt(1)], PLAN, seen)
    requests += make_requests(3, [make_prompt(1)], PLAN, seen)
    assert len({request.id for request in requests}) == len({request.seed for request in requests}) == 8
    again = make_requests(3, [make_prompt(2)], PLAN, Counter())
    assert [request.seed for request in again] == [request.seed for request in requests[2:4]]


def test_opponents_are_the_last_responses_of_each_group_and_the_greedy_response_comes_after_them() -> None:
    plan = replace(PLAN, group_size=3, num_opponents=1, mixture=0.25, greedy_baseline=True)
    requests = make_requests(3, [make_prompt(1), make_prompt(2)], plan, Counter())
    drawn = [(request.prompt_id, request.sampling.mixture, request.sampling.temperature) for request in requests]
    assert drawn == [(p, *how) for p in ("p1", "p2") for how in ((0.0, 1.0), (0.0, 1.0), (0.25, 1.0), (0.0, 0.0))]


class GreedyBest(FakeReward):
    """10 for the response that is asked for last of each prompt, which is the greedy one; else its length."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        return [Reward(total=10.0 if r.id.endswith("/2") else float(len(r.token_ids))) for r in rollouts]


def test_the_greedy_response_is_the_baseline_and_is_not_trained_on() -> None:
    engine = FakeRollout(TOKENIZER.num_tokens)
    engine.receive(0, np.linspace(0.0, 1.0, TOKENIZER.num_tokens))
    baseline = replace(PLAN, greedy_baseline=True)
    batch = first_batch(source(engine=engine, rewards=GreedyBest(), plan=baseline))
    plain = first_batch(source(engine=engine))
    assert [g.baseline.reward.total for g in batch.groups if g.baseline is not None] == [10.0] * 4
    assert [len(g.rollouts) for g in batch.groups] == [2] * 4
    assert [g.texts for g in batch.groups] == [g.texts for g in plain.groups]
    assert [g.baseline.rollout.token_ids.tolist() for g in batch.groups if g.baseline is not None] == [[9] * 5] * 4
    assert [g.baseline.rollout.prompt_id for g in batch.groups if g.baseline] == [g.prompt.id for g in batch.groups]
    assert batch.metrics["rollout/baseline"] == 10.0
    assert batch.metrics["reward/mean_all"] < 10.0
    assert batch.metrics["rollout/tokens"] == plain.metrics["rollout/tokens"] + 4 * 5


def test_only_what_is_learned_from_may_not_be_too_old() -> None:
    batch = first_batch(source(plan=replace(PLAN, greedy_baseline=True)))
    group = batch.groups[0]
    assert group.baseline is not None
    assert group.baseline.rollout.weight_version == 0
    newer = replace(group, responses=tuple(replace(rollout, weight_version=2) for rollout in group.rollouts))
    require_lag(3, replace(batch, groups=(newer,)), max_lag=1)
    with pytest.raises(RlhfError, match=r"step 3: .* weights of version 0, the policy is at 2; at most 1 versions"):
        require_lag(3, replace(batch, groups=(newer, group)), max_lag=1)


def test_prompts_that_are_drawn_in_a_later_round_have_a_baseline_too() -> None:
    batch = first_batch(source(plan=replace(PLAN, greedy_baseline=True), keep=lambda group: group.prompt.id != "p3"))
    assert batch.metrics["rollout/groups_dropped"] > 0
    assert len(batch.groups) == 4
    assert all(group.baseline is not None for group in batch.groups)


class TooFew(FakeReward):
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        return super().score(prompts, responses, rollouts)[:-1]


def test_a_missing_reward_is_an_error_and_never_invented() -> None:
    with pytest.raises(RewardError, match="got 7 scores for 8 samples"):
        first_batch(source(rewards=TooFew()))


def test_a_response_is_the_decoded_tokens_and_the_tokens_are_kept() -> None:
    for group in first_batch(source()).groups:
        for rollout, response in zip(group.rollouts, group.texts, strict=True):
            assert response == TOKENIZER.decode(rollout.token_ids.tolist())


def test_groups_that_are_dropped_are_sampled_again_and_reported() -> None:
    """Reward of what was kept and of everything are both there."""

    def keep(group: ScoredGroup) -> bool:
        return any(reward.total > 0 for reward in group.rewards)

    batch = first_batch(source(keep=keep))
    assert len(batch.groups) == 4
    assert batch.metrics["rollout/groups_dropped"] > 0
    kept = np.mean([reward.total for group in batch.groups for reward in group.rewards])
    assert batch.metrics["reward/mean_all"] < kept
    assert batch.position == 4 + batch.metrics["rollout/groups_dropped"]


def test_a_solved_task_ends_and_does_not_loop() -> None:
    """The rounds are bounded, and the end is clear."""
    engine = FakeRollout(TOKENIZER.num_tokens)
    with pytest.raises(RewardError, match="none of the 40 groups sampled for step 1 is worth training on"):
        first_batch(source(engine=engine, keep=lambda _: False))
    assert engine.num_requests == 80


def test_rounds_that_end_with_some_groups_train_on_those() -> None:
    batch = first_batch(source(keep=lambda group: group.prompt.id == "p3", num_prompts=20))
    assert {group.prompt.id for group in batch.groups} == {"p3"}
    assert len(batch.groups) < 4


def test_given_data_keeps_its_place() -> None:
    rows = [given_group(i, ["a"], [0.0]) for i in range(5)]
    first = OfflineSource(Order(rows, seed=2), 3, lambda _: True)
    first.start(1, 9, 0)
    first.take(1)
    position = first.take(2).position
    wanted = first.take(3)
    second = OfflineSource(Order(rows, seed=2), 3, lambda _: True)
    second.start(3, 9, position)
    assert second.take(3) == wanted


def test_given_rows_that_teach_nothing_are_dropped_and_counted() -> None:
    rows = [given_group(i, ["a"], [float(i)]) for i in range(4)]
    made = OfflineSource(Order(rows, seed=2), 4, lambda group: group.rewards[0].total > 1)
    made.start(1, 1, 0)
    batch = made.take(1)
    assert len(batch.groups) == 2
    assert batch.metrics["data/groups_dropped"] == 2


class Updated(FakeRollout):
    """Gets new weights after the first two tokens of each response."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        return [replace(rollout, num_older_tokens=2, newest_version=1) for rollout in super().generate(requests)]


def test_tokens_of_older_weights_are_not_learned_from_where_they_are_masked() -> None:
    engine = Updated(TOKENIZER.num_tokens)
    engine.receive(0, np.linspace(1.0, 0.0, TOKENIZER.num_tokens))
    masked = first_batch(source(engine=engine, plan=replace(PLAN, mask_stale_tokens=True)))
    for group in masked.groups:
        for rollout in group.rollouts:
            assert rollout.loss_mask is not None
            assert rollout.loss_mask.tolist() == [place >= 2 for place in range(len(rollout.token_ids))]
            assert rollout.weight_version == 1
    plain = first_batch(source(engine=engine))
    assert all(rollout.loss_mask is None for group in plain.groups for rollout in group.rollouts)


class Leaving(FakeReward):
    """No score for the responses whose request ends in one of `ends`."""

    def __init__(self, *ends: str) -> None:
        super().__init__()
        self._ends = ends

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        rewards = super().score(prompts, responses, rollouts)
        unscored = [rollout.id.endswith(self._ends) for rollout in rollouts]
        return [Reward(total=UNSCORED) if gone else one for gone, one in zip(unscored, rewards, strict=True)]


def test_responses_without_a_score_are_left_out_of_their_group_and_counted() -> None:
    batch = first_batch(source(rewards=Leaving("/1"), plan=replace(PLAN, group_size=3)))
    assert [len(group.responses) for group in batch.groups] == [2] * 4
    for group in batch.groups:
        assert [rollout.id.rpartition("/")[2] for rollout in group.rollouts] == ["0", "2"]
        assert len(group.texts) == len(group.rewards) == 2
        assert all(reward.is_scored for reward in group.rewards)
    assert batch.metrics["reward/unscored"] == pytest.approx(1 / 3)
    assert np.isfinite(batch.metrics["reward/mean_all"])


@pytest.mark.parametrize(
    ("rewards", "plan"),
    [
        (Leaving("p3/1", "p5/0"), PLAN),
        (Leaving("p3/1", "p5/2"), replace(PLAN, group_size=3, num_opponents=1)),
        (Leaving("p3/2", "p5/2"), replace(PLAN, greedy_baseline=True)),
        (Leaving("p3/0", "p5/0"), replace(PLAN, group_size=1)),
    ],
)
def test_groups_with_too_few_scores_are_sampled_again(rewards: Leaving, plan: RolloutPlan) -> None:
    batch = first_batch(source(rewards=rewards, plan=plan))
    assert len(batch.groups) == 4
    assert not {"p3", "p5"} & {group.prompt.id for group in batch.groups}
    assert batch.metrics["rollout/groups_dropped"] > 0


def test_a_reward_source_that_scores_nothing_ends_the_run() -> None:
    with pytest.raises(RewardError, match=r"^reward: None for every response of the 40 groups sampled for step 1: "):
        first_batch(source(rewards=Leaving("")))

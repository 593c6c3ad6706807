"""Responses with tokens that the model did not write: every online algorithm learns as if these were not there.

The same responses come once with the tokens of tools and environments between the model's own, and once without. Models
say NaN about everything that is not the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm, LossOutput, Outputs, TensorBatch
from rlhf.config.algo import (
    AlgorithmSection,
    GrpoSection,
    NashMdSection,
    OnlineDpoSection,
    OnlineKtoSection,
    PpoSection,
    ReinforceSection,
)
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import (
    SCORED_BY,
    Example,
    Experience,
    FinishReason,
    GreedyResponse,
    Reward,
    Role,
    Rollout,
    ScoredGroup,
    Signal,
    Signals,
)
from tests.unit.algorithms.build import prompt, rollout

OWN = ([5, 6, 7, 8, 2], [9, 5, 2], [4, 4, 4, 2], [3, 2], [8, 9, 8, 9], [7, 2], [6, 6, 2], [5, 4, 3])
"""The model's tokens of each response; those of the fifth and of the last were cut off."""
TURNS = ([3, 5], [1, 3], [1, 2, 4], [2], [2, 4], [1, 2], [3], [1, 3])
"""Where the model's turns end."""
REWARDS = (1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 0.75, 0.5)
SECTIONS: Mapping[str, AlgorithmSection] = {
    "ppo": PpoSection(gamma=0.9, gae_lambda=0.8),
    "ppo bootstrapping": PpoSection(gamma=0.9, gae_lambda=0.8, truncated="bootstrap"),
    "ppo masking": PpoSection(truncated="mask"),
    "ppo by response": PpoSection(token_level=False, value_clip=0.0),
    "grpo": GrpoSection(),
    "grpo with kl": GrpoSection.model_validate({"kl": {"type": "fixed", "coef": 0.1}}),
    "online dpo": OnlineDpoSection(),
    "nash-md": NashMdSection(),
    "online kto": OnlineKtoSection(),
}


def algorithms() -> dict[str, AlgorithmSection]:
    from rlhf.config.commands import COMMANDS, GrpoConfig  # noqa: PLC0415

    found = dict(SECTIONS)
    for name, command in COMMANDS.items():
        if command.method == "grpo" and command.key is not None:
            found[name] = GrpoConfig.model_validate({"algo": {"type": name}}).resolved().algo
    return found


def response(index: int, *, holes: bool) -> Rollout:
    """A response with or without what came back between the model's turns."""
    ids, mask = [], []
    start = 0
    for end in TURNS[index]:
        ids += OWN[index][start:end]
        mask += [True] * (end - start)
        if holes and end < len(OWN[index]):
            ids += [90 + end] * (end + 1)
            mask += [False] * (end + 1)
        start = end
    log_probs = [-1.0 - 0.1 * token if own else 0.0 for token, own in zip(ids, mask, strict=True)]
    return rollout(
        ids,
        name=f"{index}",
        finish_reason=FinishReason.STOP if ids[-1] == 2 else FinishReason.LENGTH,
        log_probs=log_probs,
        loss_mask=mask if holes else None,
    )


def groups(*, holes: bool) -> list[ScoredGroup]:
    made = []
    for number in range(2):
        members = range(4 * number, 4 * number + 4)
        greedy = GreedyResponse(rollout=response(members[0], holes=holes), reward=Reward(total=0.3))
        made.append(
            ScoredGroup(
                # As long as each other: KTO cuts what it takes from another prompt to the longest sequence.
                prompt=replace(prompt(name=f"p{number}"), token_ids=np.arange(3) + 100 * (number + 1)),
                responses=tuple(response(index, holes=holes) for index in members),
                texts=("",) * 4,
                rewards=tuple(Reward(total=REWARDS[index]) for index in members),
                baseline=greedy,
            )
        )
    return made


def said(example: Example, signal: Signal) -> tuple[np.ndarray, ...]:
    """A number for each of the model's own tokens, by the token and its place among them; NaN elsewhere."""
    scale = {Signal.OLD_LOG_PROBS: -0.3, Signal.REF_LOG_PROBS: -0.35, Signal.VALUES: 0.05}[signal]
    arrays = []
    for sequence in example.sequences:
        own = sequence.token_ids[sequence.loss_mask]
        array = np.full(len(sequence), np.nan, dtype=np.float32)
        array[sequence.loss_mask] = scale * own + 0.01 * np.arange(len(own))
        arrays.append(array)
    return tuple(arrays)


def credited(algorithm: Algorithm, *, holes: bool) -> tuple[list[Experience], Mapping[str, float]]:
    examples = algorithm.select(groups(holes=holes))
    signals: list[Signals] = [
        {signal: said(example, signal) for signal in (*algorithm.needs.signals, Signal.OLD_LOG_PROBS)}
        for example in examples
    ]
    experiences, metrics = algorithm.credit(examples, signals)
    return experiences, metrics.sums


def own(experiences: Sequence[Experience], signal: Signal) -> list[list[float]]:
    """A signal at the tokens that are learned from."""
    return [
        sequence.signals[signal][sequence.loss_mask].tolist()
        for experience in experiences
        for sequence in experience.sequences
        if signal in sequence.signals
    ]


def losses(
    algorithm: Algorithm, experiences: Sequence[Experience], objective: str, micro_batch_size: int | None
) -> tuple[float, dict[str, list[float]], dict[str, float]]:
    """Loss, gradient at the learned tokens by experience, and metrics of a step."""
    limits = MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1000, micro_batch_size=micro_batch_size)
    plan = plan_batches(experiences, limits)
    total = 0.0
    gradients: dict[str, list[float]] = {}
    sums: dict[str, float] = {}
    for members, batch in zip(plan.micro_batches, build_batches(plan, experiences, objective), strict=True):
        given = TensorBatch.from_numpy(batch, torch.device("cpu"))
        sequences = [sequence for i in members for sequence in experiences[i].sequences]
        places = np.concatenate([np.cumsum(sequence.loss_mask) for sequence in sequences])
        ids = torch.tensor(batch.tokens.token_ids, dtype=torch.float32)
        predictions = -0.31 * ids + 0.012 * torch.tensor(places)
        # What the output layer leaves out is 0; the tokens of others would give something else.
        predictions = torch.where(given.loss_mask, predictions, 0.0).requires_grad_()
        output: LossOutput = algorithm.objectives()[objective](
            Outputs(predictions=predictions, entropy=torch.where(given.loss_mask, 1.5, 0.0)), given
        )
        output.loss.backward()
        assert predictions.grad is not None
        assert not predictions.grad[~given.loss_mask].any(), "nothing is learned from the tokens of others"
        total += float(output.loss.detach())
        start = 0
        for i in members:
            for sequence in experiences[i].sequences:
                gradient = predictions.grad[start : start + len(sequence.token_ids)]
                gradients.setdefault(experiences[i].id, []).extend(gradient[sequence.loss_mask].tolist())
                start += len(sequence.token_ids)
        for name, value in output.metrics.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return total, gradients, sums


@pytest.mark.parametrize("name", algorithms())
def test_credit_is_that_of_the_same_response_without_them(name: str) -> None:
    section = algorithms()[name]
    (holed, holed_metrics), (plain, plain_metrics) = (
        credited(build_algorithm(section), holes=holes) for holes in (True, False)
    )
    assert [one.id for one in holed] == [one.id for one in plain]
    assert holed_metrics == pytest.approx(plain_metrics)
    assert any(not sequence.loss_mask[sequence.loss_mask.argmax() :].all() for e in holed for sequence in e.sequences)
    for signal in (Signal.ADVANTAGES, Signal.RETURNS, Signal.REF_LOG_PROBS, Signal.OLD_LOG_PROBS):
        for a, b in zip(own(holed, signal), own(plain, signal), strict=True):
            assert a == pytest.approx(b), signal
    assert [one.targets for one in holed] == [one.targets for one in plain]


@pytest.mark.parametrize("micro_batch_size", [None, 1], ids=["packed", "alone"])
@pytest.mark.parametrize("name", algorithms())
def test_losses_and_gradients_are_those_without_them(name: str, micro_batch_size: int | None) -> None:
    section = algorithms()[name]
    algorithm = build_algorithm(section)
    for objective in [role for role in (Role.POLICY, Role.CRITIC) if role in algorithm.objectives()]:
        (holed, holed_gradients, holed_sums), (plain, gradients, sums) = (
            losses(algorithm, credited(build_algorithm(section), holes=holes)[0], objective, micro_batch_size)
            for holes in (True, False)
        )
        assert holed == pytest.approx(plain)
        assert any(any(gradient) for gradient in gradients.values())
        assert holed_sums == pytest.approx(sums)
        for key, gradient in gradients.items():
            assert holed_gradients[key] == pytest.approx(gradient, abs=1e-7)


def test_gae_goes_from_a_turn_to_the_next_over_what_came_back() -> None:
    """By hand: turns of two tokens and one, with three tokens of a tool between them."""
    section = PpoSection.model_validate(
        {"gamma": 0.5, "gae_lambda": 1.0, "whiten_advantages": False, "kl": {"type": "fixed", "coef": 0.0}}
    )
    algorithm = build_algorithm(section)
    given = ScoredGroup(
        prompt=prompt(2),
        responses=(
            rollout([5, 6, 90, 91, 92, 2], log_probs=[0.0] * 6, loss_mask=[True, True, False, False, False, True]),
        ),
        texts=("",),
        rewards=(Reward(total=1.0),),
    )
    (example,) = algorithm.select([given])
    values = np.full(8, np.nan, dtype=np.float32)
    values[example.sequences[0].loss_mask] = [0.2, 0.4, 0.6]
    zeros = np.where(example.sequences[0].loss_mask, 0.0, np.nan).astype(np.float32)
    signals = {Signal.VALUES: (values,), Signal.OLD_LOG_PROBS: (zeros,), Signal.REF_LOG_PROBS: (zeros,)}
    (experience,), _ = algorithm.credit([example], [signals])
    # delta = 0 + 0.5 * 0.4 - 0.2, 0 + 0.5 * 0.6 - 0.4, 1 - 0.6; then A_t = delta_t + 0.5 * A_{t+1}
    assert own([experience], Signal.ADVANTAGES)[0] == pytest.approx([0.0 + 0.5 * (-0.1 + 0.5 * 0.4), -0.1 + 0.2, 0.4])


def two_turns(algorithm: Algorithm, mask: list[bool]) -> tuple[list[float], float]:
    """Advantages of a response of two turns that earned 1 and 2, of a score of 4; and the mean shaped reward."""
    given = ScoredGroup(
        prompt=prompt(2),
        responses=(rollout([5, 6, 90, 91, 7, 2], log_probs=[0.0] * 6, loss_mask=mask),),
        texts=("",),
        rewards=(Reward(total=4.0, turns=((1, 1.0), (5, 2.0))),),
    )
    (example,) = algorithm.select([given])
    zeros = np.where(example.sequences[0].loss_mask, 0.0, np.nan).astype(np.float32)
    models = {Signal.OLD_LOG_PROBS, *algorithm.needs.signals} & {*SCORED_BY}
    (experience,), metrics = algorithm.credit([example], [{signal: (zeros,) for signal in models}])
    return list(own([experience], Signal.ADVANTAGES)[0]), metrics.sums["reward/shaped"]


def credited_turns(discount: float | None, *, mask: list[bool], truncated: str = "learn") -> tuple[list[float], float]:
    """`two_turns` with PPO."""
    section = PpoSection.model_validate(
        {
            **{"gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False, "kl": {"type": "fixed", "coef": 0.0}},
            **{"turn_discount": discount, "truncated": truncated},
        }
    )
    return two_turns(build_algorithm(section), mask)


def test_each_turn_earns_its_reward_and_later_ones_are_discounted() -> None:
    """The second turn gets its 2 and the 1 that no turn earned; the first one its 1 and 0.5 times those."""
    mask = [True, True, False, False, True, True]
    assert credited_turns(None, mask=mask) == ([4.0] * 4, 4.0)
    assert credited_turns(0.5, mask=mask) == ([2.5, 2.5, 3.0, 3.0], 4.0)
    assert credited_turns(1.0, mask=mask) == ([4.0, 4.0, 3.0, 3.0], 4.0)
    assert credited_turns(0.0, mask=mask) == ([1.0, 1.0, 3.0, 3.0], 4.0)


@pytest.mark.parametrize(
    ("discount", "expected"),
    [(None, [4.0] * 4), (0.5, [2.5, 2.5, 3.0, 3.0]), (1.0, [4.0, 4.0, 3.0, 3.0]), (0.0, [1.0, 1.0, 3.0, 3.0])],
)
def test_reinforce_gives_each_turn_what_it_and_later_ones_earned(discount: float | None, expected: list[float]) -> None:
    """As PPO without a critic: the second turn has its 2 and the 1 that no turn earned."""
    assert reinforced_turns(discount, mask=[True, True, False, False, True, True]) == expected


def reinforced_turns(discount: float | None, *, mask: list[bool]) -> list[float]:
    """The advantages of `two_turns` with REINFORCE."""
    section = ReinforceSection.model_validate(
        {"turn_discount": discount, "scale": "none", "kl": {"type": "fixed", "coef": 0.0}}
    )
    return two_turns(build_algorithm(section), mask)[0]


def test_a_turn_that_is_not_learned_from_earns_for_the_one_before() -> None:
    assert credited_turns(0.5, mask=[True, True, False, False, False, False]) == ([4.0, 4.0], 4.0)


def test_no_token_earns_what_was_earned_before_it() -> None:
    """The first turn was sampled by older weights, or not from the policy: its 1 is in no other turn's advantage."""
    second = [False, False, False, False, True, True]
    for discount in (0.0, 0.5, 1.0):
        assert credited_turns(discount, mask=second) == ([3.0, 3.0], 3.0)
        assert reinforced_turns(discount, mask=second) == [3.0, 3.0]
    assert credited_turns(None, mask=second) == ([4.0, 4.0], 4.0)
    partly = [False, True, False, False, True, True]
    assert credited_turns(0.5, mask=partly)[0] == reinforced_turns(0.5, mask=partly) == [2.5, 3.0, 3.0]


def test_rewards_of_turns_do_not_go_with_other_ways_to_place_a_score() -> None:
    for setting in ({"reward_at_end": False}, {"token_level": False}, {"normalize_rewards": True}):
        with pytest.raises(ValueError, match="does not go with rewards for each turn"):
            PpoSection.model_validate({"turn_discount": 1.0, **setting})

"""The critic-free family on the driver: what is kept, what credit is given, what is remembered."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms import algorithm_class, build_algorithm
from rlhf.algorithms.critic_free import CriticFree
from rlhf.algorithms.response_metrics import response_metrics
from rlhf.algorithms.sequences import one_by_one
from rlhf.config.algo import (
    AdaptiveKl,
    CispoSection,
    CriticFreeSection,
    DapoSection,
    DrGrpoSection,
    FixedKl,
    GrpoSection,
    GspoSection,
    NoCorrection,
    ReinforceBaselineSection,
    ReinforceSection,
    RemaxSection,
    RlooSection,
)
from rlhf.errors import NumericsError
from rlhf.types import (
    Example,
    Experience,
    FinishReason,
    GreedyResponse,
    Head,
    Metrics,
    Reward,
    Role,
    Rollout,
    ScoredGroup,
    Signal,
    Signals,
)
from tests.unit.algorithms.build import group, rollout

SECTIONS: tuple[type[CriticFreeSection], ...] = (
    GrpoSection, RlooSection, ReinforceSection, ReinforceBaselineSection, RemaxSection, DrGrpoSection, DapoSection,
    GspoSection, CispoSection,
)  # fmt: skip
GOLDEN = [1.0, 0.0, 0.5, 1.0]
PLAIN = {"kl": FixedKl(coef=0.0), "correction": NoCorrection()}


def build(section: CriticFreeSection) -> CriticFree:
    algorithm = build_algorithm(section)
    assert isinstance(algorithm, CriticFree)
    return algorithm


def grouped(
    rewards: Sequence[float], *, lengths: Sequence[int] | None = None, name: str = "p", greedy: float | None = None
) -> ScoredGroup:
    """Answers of those lengths (1 by default) to one prompt."""
    sizes = lengths or [1] * len(rewards)
    rollouts = [rollout([5] * size, name=f"{name}{i}") for i, size in enumerate(sizes)]
    made = group(rollouts, rewards, name=name)
    if greedy is None:
        return made
    return replace(made, baseline=GreedyResponse(rollout=rollout([1], name="greedy"), reward=Reward(total=greedy)))


def said(example: Example, *, old: float = -1.0, ref: float | Sequence[float] = -1.0) -> Signals:
    """What models said about the example's own tokens; every other position holds NaN."""
    mask = example.sequences[0].loss_mask
    arrays = []
    for numbers in (old, ref):
        array = np.full(len(mask), np.nan, dtype=np.float32)
        array[mask] = numbers
        arrays.append((array,))
    return {Signal.OLD_LOG_PROBS: arrays[0], Signal.REF_LOG_PROBS: arrays[1]}


def credit(
    section: CriticFreeSection, *groups: ScoredGroup, ref: float | Sequence[float] = -1.0
) -> tuple[list[Experience], Metrics]:
    algorithm = build(section)
    examples = algorithm.select(groups)
    return algorithm.credit(examples, [said(example, ref=ref) for example in examples])


def column(experience: Experience) -> list[float]:
    """The advantages of the tokens that are learned from."""
    (sequence,) = experience.sequences
    numbers: list[float] = sequence.signals[Signal.ADVANTAGES][sequence.loss_mask].tolist()
    return numbers


def advantages(section: CriticFreeSection, *groups: ScoredGroup, **how: float) -> list[list[float]]:
    return [column(experience) for experience in credit(section, *groups, **how)[0]]


def close(*rows: Sequence[float], tolerance: float = 1e-5) -> list[object]:
    return [pytest.approx(list(row), abs=tolerance) for row in rows]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_member_is_registered_and_says_what_it_needs(section: type[CriticFreeSection]) -> None:
    algorithm = build(section())
    assert isinstance(algorithm, algorithm_class(section().type))  # type: ignore[arg-type]
    assert algorithm.needs.trains == {Role.POLICY: Head.LOG_PROBS}
    assert algorithm.needs.online
    assert algorithm.needs.greedy_baseline == (section is RemaxSection)
    assert ("ref_log_probs" in algorithm.needs.signals) == section().uses_reference
    assert build(section(**PLAIN)).needs.signals == {"old_log_probs"}
    assert "arXiv" in (type(algorithm).__doc__ or "")


def test_golden_grpo() -> None:
    got = advantages(GrpoSection(**PLAIN), grouped(GOLDEN))
    assert got == close([0.905], [-1.508], [-0.302], [0.905], tolerance=1e-3)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # mean 0.625, deviation 0.41458 by n and 0.47871 by n - 1
        (GrpoSection(**PLAIN), (0.90453, -1.50756, -0.30151, 0.90453)),
        (GrpoSection(std="sample", **PLAIN), (0.78335, -1.30558, -0.26112, 0.78335)),
        (GrpoSection(scale="none", **PLAIN), (0.375, -0.625, -0.125, 0.375)),
        (DrGrpoSection(**PLAIN), (0.375, -0.625, -0.125, 0.375)),
        # the others' means are 0.5, 0.8333, 0.6667, 0.5
        (RlooSection(**PLAIN), (0.5, -0.83333, -0.16667, 0.5)),
        (RemaxSection(**PLAIN), (0.75, -0.25, 0.25, 0.75)),
        (ReinforceSection(scale="none", **PLAIN), GOLDEN),
        (ReinforceSection(**PLAIN), (0.90453, -1.50756, -0.30151, 0.90453)),
        (ReinforceBaselineSection(**PLAIN), (0.90453, -1.50756, -0.30151, 0.90453)),
        (DapoSection(**PLAIN), (0.90453, -1.50756, -0.30151, 0.90453)),
        (GspoSection(**PLAIN), (0.90453, -1.50756, -0.30151, 0.90453)),
        (CispoSection(**PLAIN), (0.90453, -1.50756, -0.30151, 0.90453)),
    ],
    ids=lambda value: value.type if isinstance(value, CriticFreeSection) else "",
)
def test_golden_advantages(section: CriticFreeSection, expected: Sequence[float]) -> None:
    got = advantages(section, grouped(GOLDEN, greedy=0.25))
    assert got == close(*([number] for number in expected))


def test_the_batch_is_whitened_over_its_tokens() -> None:
    """Groups [1, 0] and [4, 2] less their means: 1/2, -1/2 on one token each, then 1 and -1 on three and one."""
    groups = grouped([1.0, 0.0]), grouped([4.0, 2.0], lengths=[3, 1], name="q")
    tokens = np.array([0.5, -0.5, 1.0, 1.0, 1.0, -1.0])
    z = (tokens - tokens.mean()) / tokens.std()
    got = advantages(ReinforceBaselineSection(**PLAIN), *groups)
    assert got == close(z[:1], z[1:2], z[2:5], z[5:])
    sample = (tokens - tokens.mean()) / tokens.std(ddof=1)
    got = advantages(ReinforceBaselineSection(std="sample", **PLAIN), *groups)
    assert got == close(sample[:1], sample[1:2], sample[2:5], sample[5:])


def test_groups_do_not_mix_even_where_a_step_draws_a_prompt_twice() -> None:
    first, second = grouped([1.0, 0.0]), grouped([7.0, 5.0])
    renamed = tuple(replace(r, id=f"again{i}") for i, r in enumerate(second.responses))
    got = advantages(GrpoSection(scale="none", **PLAIN), first, replace(second, responses=renamed))
    assert got == close([0.5], [-0.5], [1.0], [-1.0])


KL = FixedKl(coef=0.1)
"""With old -1 and these reference log-probs the KL (k1) of a token is 0.5, 0 and -0.25."""
REF = (-1.5, -1.0, -0.75)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # rewards to go: the last token has the score and its own KL, earlier ones their own too
        (ReinforceSection(kl=KL, scale="none"), ([0.975, 1.025, 1.025], [-0.025, 0.025, 0.025])),
        (RemaxSection(kl=KL), ([0.575, 0.625, 0.625], [-0.425, -0.375, -0.375])),
        # the answer is one action: its KL of 0.25 is in its reward, and in the other's baseline
        (RlooSection(kl=KL), ([1.0] * 3, [-1.0] * 3)),
        (GrpoSection(kl=KL, kl_placement="reward", scale="none"), ([0.5] * 3, [-0.5] * 3)),
        (GrpoSection(kl=KL, scale="none"), ([0.5] * 3, [-0.5] * 3)),
    ],
    ids=lambda value: value.type if isinstance(value, CriticFreeSection) else "",
)
def test_the_kl_in_the_reward(section: CriticFreeSection, expected: Sequence[Sequence[float]]) -> None:
    section = section.model_copy(update={"correction": NoCorrection()})
    got = advantages(section, grouped([1.0, 0.0], lengths=[3, 3], greedy=0.4), ref=REF)  # type: ignore[arg-type]
    assert got == close(*expected)


def test_the_kl_of_an_answer_counts_once_in_its_reward() -> None:
    """Scores 1 and 1; only the first drifts: 0.3 nats, 0.03 with its weight."""
    algorithm = build(RlooSection(kl=KL, correction=NoCorrection()))
    examples = algorithm.select([grouped([1.0, 1.0], lengths=[2, 1])])
    signals = [said(examples[0], ref=(-1.1, -1.2)), said(examples[1])]
    experiences, metrics = algorithm.credit(examples, signals)
    assert [column(experience) for experience in experiences] == close([-0.03, -0.03], [0.03])
    assert algorithm.describe(examples, signals).sums["kl/ref_per_response"] == pytest.approx(0.15)
    assert metrics.sums["reward/shaped"] == pytest.approx(0.985)
    assert metrics.sums["groups/zero_std"] == 1.0  # by the scores, whatever the KL adds


@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in (ReinforceSection, RemaxSection)])
@settings(max_examples=25)
@given(reward=st.floats(-1e6, 1e6), size=st.integers(1, 32))
def test_equal_rewards_have_advantage_exactly_0(section: type[CriticFreeSection], reward: float, size: int) -> None:
    """Whatever the reward, and also where rounding would put the mean beside it."""
    experiences, metrics = credit(section(**PLAIN), grouped([reward] * size, lengths=[2] * size))
    assert all(column(experience) == [0.0, 0.0] for experience in experiences)
    assert metrics.sums["groups/zero_std"] == float(size > 1)


def test_equal_rewards_of_a_whole_batch_have_advantage_exactly_0() -> None:
    got = advantages(ReinforceSection(**PLAIN), grouped([0.1] * 3), grouped([0.1] * 3, name="q"))
    assert got == [[0.0]] * 6


def test_rewards_that_differ_by_rounding_stay_nearly_equal() -> None:
    """0.1 + 0.2 is not 0.3: a deviation of 2e-17 must not make an advantage of 1."""
    got = advantages(GrpoSection(**PLAIN), grouped([0.1 + 0.2, 0.3]))
    assert np.abs(got).max() < 1e-9


def test_a_score_of_0_is_a_score() -> None:
    assert advantages(GrpoSection(**PLAIN), grouped([0.0, -1.0])) == close([1.0], [-1.0])
    assert advantages(RemaxSection(**PLAIN), grouped([0.0, -1.0], greedy=0.0)) == close([0.0], [-1.0])


def test_remax_without_a_greedy_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="greedy response"):
        credit(RemaxSection(**PLAIN), grouped([1.0]))


@pytest.mark.parametrize("section", SECTIONS)
def test_answers_without_tokens_are_in_no_baseline(section: type[CriticFreeSection]) -> None:
    """Neither an empty nor an aborted answer moves the others, and both are counted."""
    plain = grouped([1.0, 0.0], lengths=[2, 1], greedy=0.3)
    silent = [rollout([], name="e"), rollout([1, 2], name="x", finish_reason=FinishReason.ABORTED)]
    with_silent = replace(
        plain,
        responses=(plain.responses[0], *silent, plain.responses[1]),
        texts=("",) * 4,
        rewards=(plain.rewards[0], Reward(total=100.0), Reward(total=-50.0), plain.rewards[1]),
    )
    experiences, _ = credit(section(**PLAIN), with_silent)
    got = [column(experience) for experience in experiences]
    expected = advantages(section(**PLAIN), plain)
    assert got == [expected[0], [], [], expected[1]]
    assert len(experiences) == 4
    assert response_metrics([with_silent])["response/empty"] == 0.5
    assert response_metrics([with_silent])["reward/mean"] == 0.5


@pytest.mark.parametrize("section", SECTIONS)
def test_a_step_without_any_token_is_no_crash(section: type[CriticFreeSection]) -> None:
    experiences, metrics = credit(section(), grouped([1.0, 0.0], lengths=[0, 0]))
    assert [column(experience) for experience in experiences] == [[], []]
    assert all(math.isfinite(number) for number in metrics.sums.values())


@pytest.mark.parametrize("section", SECTIONS)
@settings(max_examples=20)
@given(gaps=st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_environment_tokens_do_not_exist(section: type[CriticFreeSection], gaps: list[int]) -> None:
    """However much a tool writes between the model's tokens, credit and figures are the same, also where
    length is punished."""
    how = section(kl=KL, overlong_buffer=3, overlong_limit=5)
    other = rollout([5], name="b")

    def pair(one: Rollout) -> ScoredGroup:
        baseline = GreedyResponse(rollout=one, reward=Reward(total=0.2))
        return replace(group([one, other], [1.0, 0.0]), baseline=baseline)

    def given_credit(one: Rollout) -> tuple[list[list[float]], Metrics]:
        algorithm = build(how)
        examples = algorithm.select([pair(one)])
        experiences, metrics = algorithm.credit(examples, [said(examples[0], ref=REF), said(examples[1])])
        return [column(experience) for experience in experiences], metrics

    token_ids, mask = [0] * gaps[0], [False] * gaps[0]
    for gap in gaps[1:]:
        token_ids += [5] + [0] * gap
        mask += [True] + [False] * gap
    expected = given_credit(rollout([5, 5, 5], name="a"))
    assert given_credit(rollout(token_ids, name="a", loss_mask=mask)) == expected


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (11, -1.0), (40, -1.0)]
)
def test_the_soft_punishment_of_length(length: int, penalty: float) -> None:
    """Yu et al. 2025, equation 13, with limit 10 and buffer 4."""
    section = ReinforceSection(scale="none", overlong_limit=10, overlong_buffer=4, **PLAIN)
    experiences, metrics = credit(section, grouped([0.5], lengths=[length]))
    assert column(experiences[0]) == pytest.approx([0.5 + penalty] * length)
    assert metrics.sums["reward/overlong"] == pytest.approx(penalty)


def test_length_is_not_punished_by_default() -> None:
    assert GrpoSection().overlong_buffer == 0
    experiences, metrics = credit(ReinforceSection(scale="none", **PLAIN), grouped([0.5], lengths=[4000]))
    assert set(column(experiences[0])) == {0.5}
    assert "reward/overlong" not in metrics.sums


@pytest.mark.parametrize(
    ("rewards", "lengths", "kept"),
    [
        ([1.0, 1.0, 1.0], [1, 2, 3], False),
        ([0.0, 0.0], [1, 1], False),
        ([1.0, 0.0], [1, 1], True),
        ([1.0, 0.0], [1, 0], False),  # an answer without tokens tells nothing
        ([1.0, 0.0, 1.0], [0, 2, 2], True),
        ([0.5, 0.0], [0, 0], False),
        ([0.1 + 0.2, 0.3], [1, 1], True),
    ],
)
def test_dynamic_sampling_leaves_out_groups_without_spread(
    rewards: Sequence[float], lengths: Sequence[int], kept: bool
) -> None:
    answers = grouped(rewards, lengths=lengths)
    assert build(DapoSection()).keep(answers) is kept
    assert build(GrpoSection(dynamic_sampling=True)).keep(answers) is kept
    assert build(GrpoSection()).keep(answers)


def test_dynamic_sampling_looks_at_the_reward_and_not_at_the_punished_length() -> None:
    answers = grouped([1.0, 1.0], lengths=[1, 10])
    assert not build(DapoSection(overlong_limit=10, overlong_buffer=5)).keep(answers)


def test_what_the_sampler_said_reaches_the_loss() -> None:
    """Sampler -1, trainer log(3) - 1 and -1: the first ratio, 3, is truncated at 2. The loss weighs; advantages do not
    depend on log-probs, which may come later."""
    algorithm = build(GrpoSection(scale="none"))
    examples = algorithm.select([grouped([1.0, 0.0])])
    signals = [said(examples[0], old=-1.0 + math.log(3.0)), said(examples[1])]
    late: list[Signals] = [{}, {}]
    for known in (signals, late):
        experiences, _ = algorithm.credit(examples, known)
        assert [column(experience) for experience in experiences] == close([0.5], [-0.5])
        for experience in experiences:
            (sequence,) = experience.sequences
            assert sequence.signals[Signal.SAMPLER_LOG_PROBS][sequence.loss_mask].tolist() == [-1.0]
    assert algorithm.describe(examples, signals).sums["importance/cut"] == 0.5
    plain, _ = build(GrpoSection(scale="none", correction=NoCorrection())).credit(examples, signals)
    assert Signal.SAMPLER_LOG_PROBS not in plain[0].sequences[0].signals


def test_log_probs_that_are_not_finite_are_an_error() -> None:
    algorithm = build(GrpoSection())
    examples = algorithm.select([grouped([1.0, 0.0])])
    with pytest.raises(NumericsError, match="p0: old_log_probs: 1 of 1 tokens are not finite"):
        algorithm.credit(examples, [said(examples[0], old=math.nan), said(examples[1])])


def test_an_example_is_exactly_what_was_sampled() -> None:
    answers = grouped([0.0, 1.0], greedy=0.0)
    examples = one_by_one([answers])
    assert [(e.id, e.group, e.rewards, e.baseline, e.weight_version) for e in examples] == [
        ("p0", "p0", (0.0,), answers.baseline, 7),
        ("p1", "p0", (1.0,), answers.baseline, 7),
    ]
    assert one_by_one([grouped([0.0])])[0].baseline is None


def test_the_adaptive_coefficient_acts_from_the_next_step_on_and_survives_a_restart() -> None:
    section = RlooSection(kl=AdaptiveKl(coef=0.1, target=1.0, horizon=2))
    algorithm = build(section)
    examples = algorithm.select([grouped([1.0, 0.0])])
    drifted = [said(example, ref=-6.0) for example in examples]
    (first, _), _ = algorithm.credit(examples, drifted)
    assert first.coefficients["kl"] == 0.1
    algorithm.describe(examples, drifted)
    restored = build(section)
    restored.restore(json.loads(json.dumps(algorithm.state())))
    for one in (algorithm, restored):
        assert one.credit(examples, drifted)[0][0].coefficients["kl"] == pytest.approx(0.12)
    assert algorithm.after_pass(Metrics())


def test_figures_by_hand() -> None:
    _, metrics = credit(GrpoSection(**PLAIN), grouped(GOLDEN), grouped([2.0, 2.0], name="q"))
    expected = {
        "reward/shaped": 6.5 / 6,
        "groups/zero_std": 0.5,
        "advantages/mean": 0.0,
        "advantages/std": math.sqrt(4 / 6),
        "kl/coef": 0.0,
    }
    assert {name: metrics.sums[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_the_constant_of_dr_grpo_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="aggregation_tokens"):
        build(DrGrpoSection()).objectives()

"""PPO on the driver: what is selected, what credit is given, what is remembered."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.response_metrics import response_metrics
from rlhf.algorithms.rm import RM
from rlhf.algorithms.sft import SFT
from rlhf.config.algo import (
    AdaptiveKl,
    FixedKl,
    NoCorrection,
    PpoSection,
    RatioToSampler,
    RmSection,
    SftSection,
    TruncatedWeights,
)
from rlhf.errors import NumericsError
from rlhf.types import Example, Experience, FinishReason, Head, Metrics, Role, Signal
from tests.unit.algorithms.build import group, rollout, signals

PLAIN = PpoSection(kl=FixedKl(coef=0.0), whiten_advantages=False, correction=NoCorrection())


def column(experience: Experience, name: str) -> list[float]:
    """A signal at the tokens that are learned from."""
    (sequence,) = experience.sequences
    values: list[float] = sequence.signals[Signal(name)][sequence.loss_mask].tolist()
    return values


def select(*answers: Sequence[int], rewards: Sequence[float]) -> list[Example]:
    rollouts = [rollout(token_ids, name=f"a{i}") for i, token_ids in enumerate(answers)]
    return PPO(PLAIN).select([group(rollouts, rewards)])


def test_every_section_has_its_algorithm() -> None:
    for section, kind in ((SftSection(), SFT), (RmSection(), RM), (PpoSection(), PPO)):
        assert type(build_algorithm(section)) is kind


def test_needs() -> None:
    needs = PPO(PpoSection()).needs
    assert needs.trains == {Role.POLICY: Head.LOG_PROBS, Role.CRITIC: Head.VALUES}
    assert needs.signals == {"old_log_probs", "ref_log_probs", "values"}
    assert needs.online
    assert PPO(PLAIN).needs.signals == {"old_log_probs", "values"}
    assert "ref_log_probs" in PPO(PpoSection(kl=AdaptiveKl(coef=1e-9))).needs.signals
    assert set(PPO(PLAIN).objectives()) == {"policy", "critic", "ptx"}


def test_an_example_is_exactly_what_was_sampled() -> None:
    (example,) = PPO(PLAIN).select(
        [group([rollout([5, 6, 7], finish_reason=FinishReason.LENGTH, log_probs=[-0.1, -0.2, -0.3])], [0.0])]
    )
    (sequence,) = example.sequences
    assert sequence.token_ids.tolist() == [100, 101, 102, 5, 6, 7]  # truncated: and no EOS is put there
    assert sequence.loss_mask.tolist() == [False] * 3 + [True] * 3
    assert example.sampler_log_probs[0].tolist() == pytest.approx([0, 0, 0, -0.1, -0.2, -0.3])
    assert (example.rewards, example.truncated, example.weight_version) == ((0.0,), (True,), 7)


def test_examples_keep_the_order_of_the_groups() -> None:
    groups = [group([rollout([1], name=f"{g}{i}") for i in "ab"], [0.0, 0.0], name=g) for g in "xyz"]
    assert [e.id for e in PPO(PLAIN).select(groups)] == ["xa", "xb", "ya", "yb", "za", "zb"]


def test_an_aborted_answer_teaches_nothing() -> None:
    (example,) = PPO(PLAIN).select([group([rollout([1, 2], finish_reason=FinishReason.ABORTED)], [1.0])])
    assert not example.sequences[0].loss_mask.any()


def test_a_token_that_nothing_predicts_is_not_learned_from() -> None:
    answers = group([rollout([1, 2])], [1.0])
    without_prompt = replace(answers, prompt=replace(answers.prompt, token_ids=np.zeros(0, dtype=np.int64)))
    (example,) = PPO(PLAIN).select([without_prompt])
    assert example.sequences[0].loss_mask.tolist() == [False, True]


def test_credit_by_hand() -> None:
    """KL-shaped rewards 0.05, 0, 1 - 0.05 and values .5 .6 .7 with gamma = lambda = 1."""
    section = PLAIN.model_copy(update={"kl": FixedKl(coef=0.1), "gae_lambda": 1.0})
    examples = select([1, 2, 3], rewards=[1.0])
    said = signals(examples[0], old=[-1.5, -1.0, -1.0], ref=[-1.0, -1.0, -1.5], values=[0.5, 0.6, 0.7])
    (experience,), metrics = PPO(section).credit(examples, [said])
    assert column(experience, "advantages") == pytest.approx([0.5, 0.35, 0.25])
    assert column(experience, "returns") == pytest.approx([1.0, 0.95, 0.95])
    assert column(experience, "values") == pytest.approx([0.5, 0.6, 0.7])
    assert column(experience, "old_log_probs") == pytest.approx([-1.5, -1.0, -1.0])
    assert experience.coefficients["kl"] == 0.1
    figures = {"reward/shaped": 1.0, "kl/coef": 0.1}
    assert {name: metrics.sums[name] for name in figures} == pytest.approx(figures)
    assert PPO(section).describe(examples, [said]).sums["kl/ref_per_response"] == pytest.approx(0.0)


def test_tokens_outside_the_mask_get_no_credit() -> None:
    examples = select([1, 2], rewards=[1.0])
    (experience,), _ = PPO(PLAIN).credit(examples, [signals(examples[0], old=[-1, -1], values=[0, 0])])
    (sequence,) = experience.sequences
    assert (
        sequence.signals[Signal.ADVANTAGES][:3].tolist()
        == sequence.signals[Signal.RETURNS][:3].tolist()
        == [0.0, 0.0, 0.0]
    )
    assert sequence.signals[Signal.ADVANTAGES].dtype == sequence.signals[Signal.RETURNS].dtype == np.float32


@given(st.lists(st.integers(0, 60), min_size=4, max_size=4))
def test_environment_tokens_do_not_exist(gaps: list[int]) -> None:
    """However many tokens a tool puts between, before or after the model's own, credit and figures are the same."""
    own = [11, 12, 13]
    plain = select(own, rewards=[1.0])
    section = PpoSection(kl=FixedKl(coef=0.1))
    said = {"old": [-1.0, -2.0, -1.5], "ref": [-1.1, -1.5, -1.6], "values": [0.2, 0.5, 0.4]}
    (expected,), figures = PPO(section).credit(plain, [signals(plain[0], **said)])
    token_ids, mask = [0] * gaps[0], [False] * gaps[0]
    for token, gap in zip(own, gaps[1:], strict=True):
        token_ids += [token] + [0] * gap
        mask += [True] + [False] * gap
    examples = PPO(section).select([group([rollout(token_ids, loss_mask=mask)], [1.0])])
    (experience,), with_tools = PPO(section).credit(examples, [signals(examples[0], **said)])
    assert column(experience, "advantages") == column(expected, "advantages")
    assert column(experience, "returns") == column(expected, "returns")
    assert with_tools == figures


def test_the_published_trap_of_multi_turn_credit() -> None:
    """gamma = 1, lambda = 0.95: 50 tool tokens, stepped through, would turn a first advantage of 0.475 negative."""
    section = PLAIN.model_copy(update={"gae_lambda": 0.95})
    for num_tool_tokens in (0, 50):
        mask = [True] + [False] * num_tool_tokens + [True]
        groups = [group([rollout([1] * len(mask), loss_mask=mask)], [1.0])]
        examples = PPO(section).select(groups)
        said = signals(examples[0], old=[-1, -1], values=[0.5, 0.5])
        (experience,), _ = PPO(section).credit(examples, [said])
        assert column(experience, "advantages") == pytest.approx([0.475, 0.5])
        assert response_metrics(groups)["response/length"] == 2.0


def test_whitening_spans_all_answers_and_ignores_empty_ones() -> None:
    section = PpoSection(kl=FixedKl(coef=0.0), gae_lambda=1.0)
    examples = select([1, 2], [], [3], rewards=[1.0, 9.0, 0.0])
    said = [signals(e, old=[-1] * n, values=[0] * n) for e, n in zip(examples, (2, 0, 1), strict=True)]
    experiences, metrics = PPO(section).credit(examples, said)
    # Returns 1 1 0: mean 2/3, deviation sqrt(2)/3.
    half = 1 / np.sqrt(2)
    assert [column(e, "advantages") for e in experiences] == [
        pytest.approx([half, half]),
        [],
        pytest.approx([-2 * half]),
    ]
    assert metrics.sums["advantages/mean"] == pytest.approx(2 / 3)
    assert [e.id for e in experiences] == [e.id for e in examples]


def test_a_whole_answer_is_one_action() -> None:
    section = PpoSection(token_level=False, whiten_advantages=False, kl=FixedKl(coef=1.0))
    examples = select([1, 2, 3], [], rewards=[1.0, 5.0])
    said = [
        signals(examples[0], old=[-1, -1, -1], ref=[-1.1, -1, -1], values=[0.25, 7, 7]),
        signals(examples[1], old=[], ref=[], values=[]),
    ]
    experiences, _ = PPO(section).credit(examples, said)
    assert column(experiences[0], "advantages") == pytest.approx([0.65] * 3)  # 1 - 0.1 - V(prompt)
    assert column(experiences[0], "returns") == pytest.approx([0.9] * 3)
    assert column(experiences[1], "advantages") == []


def test_no_answer_at_all() -> None:
    experiences, metrics = PPO(PpoSection(normalize_rewards=True)).credit([], [])
    assert experiences == []
    assert all(np.isfinite(list({**metrics.sums, **metrics.maxima}.values())))


def test_a_score_of_0_is_a_score() -> None:
    examples = select([1], [2], rewards=[0.0, 1.0])
    said = [signals(e, old=[-1], values=[0]) for e in examples]
    (zero, one), _ = PPO(PpoSection(kl=FixedKl(coef=0.0))).credit(examples, said)
    assert column(zero, "advantages") == pytest.approx([-1.0])
    assert column(one, "advantages") == pytest.approx([1.0])


@pytest.mark.parametrize("bad", ["old", "ref", "values"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_says_nan_is_named(bad: str, value: float) -> None:
    examples = select([1, 2], rewards=[1.0])
    said = {"old": [-1.0, -1.0], "ref": [-1.0, -1.0], "values": [0.0, 0.0]} | {bad: [0.0, value]}
    with pytest.raises(NumericsError, match=rf"a0: .*{bad}.*: 1 of 2 tokens"):
        PPO(PpoSection()).credit(examples, [signals(examples[0], **said)])


def test_what_the_sampler_said_reaches_the_loss_and_not_the_critic() -> None:
    """Trainer against sampler: ratios e^-1 and e^3, the second truncated at 2; the critic learns what it did."""
    examples = PPO(PLAIN).select([group([rollout([1, 2], log_probs=[-1.0, -4.0])], [1.0])])
    said = [signals(examples[0], old=[-2.0, -1.0], values=[0.5, 0.25])]
    (plain,), _ = PPO(PLAIN).credit(examples, said)
    weighing = PPO(PLAIN.model_copy(update={"correction": TruncatedWeights()}))
    (weighed,), _ = weighing.credit(examples, said)
    assert column(weighed, "sampler_log_probs") == [-1.0, -4.0]
    for name in ("advantages", "returns", "values", "old_log_probs"):
        assert column(weighed, name) == column(plain, name)
    assert weighing.describe(examples, said).sums["importance/cut"] == 0.5


def test_the_sampler_stands_for_the_old_policy_where_the_ratio_corrects() -> None:
    """The trainer is not asked, what it would have said is not read, and advantages have no weight beside the ratio."""
    ratio = PPO(PLAIN.model_copy(update={"correction": RatioToSampler()}))
    assert (PPO(PLAIN).needs.signals - ratio.needs.signals, ratio.needs.signals) == ({"old_log_probs"}, {"values"})
    examples = ratio.select([group([rollout([1, 2], log_probs=[-1.0, -4.0])], [1.0])])
    measured = signals(examples[0], old=[-2.0, -1.0], values=[0.5, 0.25])
    (plain,), _ = PPO(PLAIN).credit(examples, [measured])
    (learned,), _ = ratio.credit(examples, [{Signal.VALUES: measured[Signal.VALUES]}])
    metrics = ratio.describe(examples, [{Signal.VALUES: measured[Signal.VALUES]}])
    assert column(learned, "old_log_probs") == [-1.0, -4.0]
    for name in ("advantages", "returns", "values"):
        assert column(learned, name) == column(plain, name)
    assert not [name for name in (*metrics.sums, *metrics.maxima) if name.startswith("importance/")]
    silent = ratio.select([group([rollout([1, 2], log_probs=[-1.0, math.nan])], [1.0])])
    with pytest.raises(
        NumericsError, match=r"^sampler: .*: 1 of 2 log-probs are not finite, and algo.correction ratio"
    ):
        ratio.credit(silent, [measured])


def step(algorithm: PPO, kl: float = 0.5) -> tuple[Experience, Metrics]:
    examples = select([1], [2], rewards=[1.0, 0.0])
    said = [signals(e, old=[-1], ref=[-1 - kl], values=[0.1]) for e in examples]
    experiences, metrics = algorithm.credit(examples, said)
    algorithm.describe(examples, said)
    return experiences[0], metrics


def test_the_adaptive_coefficient_acts_from_the_next_step_on() -> None:
    algorithm = PPO(PpoSection(kl=AdaptiveKl(coef=0.1, target=1.0, horizon=2)))
    assert step(algorithm, kl=1.1)[0].coefficients["kl"] == 0.1
    assert step(algorithm, kl=5.0)[0].coefficients["kl"] == pytest.approx(0.11)
    assert step(algorithm)[0].coefficients["kl"] == pytest.approx(0.11 * 1.2)


def test_early_stop_by_kl() -> None:
    algorithm = PPO(PpoSection(num_epochs=4, target_kl=0.02))
    assert algorithm.after_pass(Metrics(sums={"policy/approx_kl": 0.02}))
    assert not algorithm.after_pass(Metrics(sums={"policy/approx_kl": 0.021}))
    assert algorithm.after_pass(Metrics(sums={"critic/loss": 1.0}))  # the policy is frozen
    assert PPO(PpoSection()).after_pass(Metrics(sums={"policy/approx_kl": 1e9}))


def test_the_penalty_adapts_between_updates() -> None:
    algorithm = PPO(PpoSection(loss="penalty", num_epochs=2))
    seen = []
    for kl in (0.1, 0.01, 0.001, 0.0):
        experience, metrics = step(algorithm)
        seen.append(experience.coefficients["penalty"])
        assert metrics.sums["policy/penalty_coef"] == seen[-1]
        assert algorithm.after_pass(Metrics(sums={"policy/approx_kl": 0.0}))
        assert algorithm.after_pass(Metrics(sums={"policy/approx_kl": kl}))
    assert seen == [1.0, 2.0, 2.0, 1.0]


def test_what_it_remembers_survives_a_restart() -> None:
    section = PpoSection(kl=AdaptiveKl(), loss="penalty", num_epochs=2, normalize_rewards=True)
    whole, first, second = PPO(section), PPO(section), PPO(section)
    for algorithm in (whole, first):
        step(algorithm, kl=9.0)
        algorithm.after_pass(Metrics(sums={"policy/approx_kl": 0.5}))
    second.restore(json.loads(json.dumps(first.state())))
    expected, got = step(whole), step(second)
    assert got[1] == expected[1]
    assert got[0].coefficients == expected[0].coefficients
    assert second.state() == whole.state()


def test_the_kl_coefficient_stays_while_the_policy_is_frozen() -> None:
    """Its KL is 0 then, whatever the coefficient; also after a restart in the midst of it."""
    section = PpoSection(kl=AdaptiveKl(coef=0.1, target=1.0, horizon=2), critic_warmup_steps=2)
    whole, restarted = PPO(section), PPO(section)
    assert [step(whole, kl=0.0)[1].sums["kl/coef"] for _ in range(4)] == pytest.approx([0.1, 0.1, 0.1, 0.08])
    step(restarted, kl=0.0)
    again = PPO(section)
    again.restore(json.loads(json.dumps(restarted.state())))
    assert [step(again, kl=0.0)[1].sums["kl/coef"] for _ in range(3)] == pytest.approx([0.1, 0.1, 0.08])


def test_old_log_probs_pass_through_bit_for_bit() -> None:
    """The first ratio is exactly 1 only if credit hands on what was measured."""
    examples = select([1, 2, 3], rewards=[1.0])
    old = np.array([0, 0, 0, -0.1, -1 / 3, -7e-8], dtype=np.float32)
    (experience,), _ = PPO(PLAIN).credit(
        examples, [{Signal.OLD_LOG_PROBS: (old,), Signal.VALUES: (np.zeros(6, dtype=np.float32),)}]
    )
    got = experience.sequences[0].signals[Signal.OLD_LOG_PROBS]
    assert got is not None
    assert got.tobytes() == old.tobytes()

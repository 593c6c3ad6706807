"""Critic-free settings: what is refused and why, what is advised, what is filled in."""

# ruff: noqa: E501

from collections.abc import Sequence

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.config.algo import CriticFreeSection
from rlhf.config.commands import GrpoConfig
from rlhf.config.loading.load import dump_config, load_config
from rlhf.config.rules.all_rules import advice_on, problems_of
from tests.unit.config.conftest import Problems

RIGHT = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")
MEMBERS = ("grpo", "rloo", "reinforce++", "reinforce++-baseline", "remax", "dr-grpo", "dapo", "gspo", "cispo")
WITHOUT_GROUPS = ("reinforce++", "remax")
ONE = ("--rollout.group-size", "1")
SEQUENCE_MEAN = ("--algo.aggregation", "seq-mean-token-mean")


def grpo(*argv: str) -> GrpoConfig:
    config = load_config("grpo", [*RIGHT, *argv], {})
    assert isinstance(config, GrpoConfig)
    return config


def section(*argv: str) -> CriticFreeSection:
    algo = grpo(*argv).algo
    assert isinstance(algo, CriticFreeSection)
    return algo


@pytest.mark.parametrize("member", MEMBERS)
def test_the_defaults_of_every_member_are_right_and_stay_right(member: str, problems: Problems) -> None:
    """Also once they are written out in full and read again, as a resumed run does."""
    assert problems(*RIGHT, "--algo", member, command="grpo") == []
    config = grpo("--algo", member)
    assert config.algo.type == member
    assert problems(*RIGHT, command="grpo", text=dump_config(config)) == []
    build_algorithm(config.algo).objectives()


@pytest.mark.parametrize("member", MEMBERS)
def test_a_group_of_one_is_refused_where_the_group_is_the_baseline(member: str, problems: Problems) -> None:
    found = problems(*RIGHT, "--algo", member, *ONE, command="grpo")
    need = f"--rollout.group-size: {member.upper()} needs >= 2 (got 1): the baseline is made of the responses to the same prompt."
    assert found == ([] if member in WITHOUT_GROUPS else [need])


REFUSED = [
    (
        ["--algo", "reinforce++", *ONE, "--rollout.batch-size", "1", "--train.batch-size", "1"],
        "--rollout.batch-size: 1 response in a step is its own mean over the batch: its advantage is always 0. Raise it, or set scale none.",
    ),
    (
        ["--algo", "remax", *ONE, "--algo.dynamic-sampling"],
        "--rollout.group-size: a group of 1 response has zero standard deviation, and algo.dynamic_sampling would leave out every prompt.",
    ),
    (
        ["--algo", "dr-grpo", "--algo.scale", "group"],
        "--algo.scale: must be none for dr-grpo (got group); with it, it is GRPO. Use algo.type grpo.",
    ),
    (
        ["--algo", "gspo", "--algo.ratio", "token"],
        "--algo.ratio: must be sequence-mean for gspo (got token); with another, it is GRPO. Use algo.type grpo.",
    ),
    (
        ["--algo", "cispo", "--algo.loss", "clip"],
        "--algo.loss: must be cispo for cispo (got clip); with another, it is GRPO. Use algo.type grpo.",
    ),
    (
        ["--algo", "remax", "--algo.scale", "group"],
        "--algo.scale: remax does not compare the responses to one prompt, and group is their standard deviation. Use batch or none.",
    ),
    (["--algo", "rloo", "--algo.std", "sample"], "--algo.std: not used: scale none does not divide by a standard deviation. Remove it."),
    (
        ["--algo.ratio", "sequence"],
        "algo.aggregation: a response that has one ratio (sequence) is one action, which token-mean would weight by its length. Use seq-mean-token-mean.",
    ),
    (
        ["--algo", "gspo", "--algo.aggregation", "seq-mean-token-sum-norm"],
        "--algo.aggregation: a response that has one ratio (sequence-mean) is one action, which seq-mean-token-sum-norm would weight by its length. Use seq-mean-token-mean.",
    ),
    (
        ["--algo", "reinforce++", "--algo.ratio", "sequence", *SEQUENCE_MEAN],
        "--algo.ratio: reinforce++ gives each token an advantage of its own, and needs a ratio for each token. Use token.",
    ),
    (
        ["--algo", "cispo", "--algo.ratio", "sequence", *SEQUENCE_MEAN],
        "--algo.ratio: cispo weights each token by its own ratio (got sequence). Use token, or loss clip.",
    ),
    (
        ["--algo", "cispo", "--algo.dual-clip", "3"],
        "--algo.dual-clip: cispo has no minimum that a dual clip could bound. Set it to 0.",
    ),
    (
        ["--algo.dual-clip", "1"],
        "--algo.dual-clip: must be > 1, or 0 for none (got 1): at 1 or less, tokens with negative advantage would have no gradient.",
    ),
    (
        ["--algo.kl-estimator", "k1"],
        "--algo.kl-estimator: k1 has no gradient in expectation inside the loss; use k2 or k3.",
    ),
    (
        ["--algo.overlong-buffer", "512"],
        "--algo.overlong-buffer: 512 >= 512 tokens: every response would be penalized. Lower it.",
    ),
    (
        ["--algo.overlong-buffer", "100", "--algo.overlong-limit", "700"],
        "--algo.overlong-limit: penalizes responses above 600 tokens, and none has more than 512. Lower it.",
    ),
    (
        ["--algo.overlong-limit", "400"],
        "--algo.overlong-limit: not used: algo.overlong_buffer 0 does not penalize length. Remove it, or set that.",
    ),
    (
        ["--algo.aggregation-tokens", "100"],
        "--algo.aggregation-tokens: not used by token-mean. Remove it, or use seq-mean-token-sum-norm.",
    ),
    (
        ["--algo.max-sampling-rounds", "3"],
        "--algo.max-sampling-rounds: not used without algo.dynamic_sampling, which alone samples again. Remove it, or set that.",
    ),
    (
        ["--rollout.temperature", "0"],
        "--rollout.temperature: 0 is greedy and makes all 8 responses to a prompt equal: GRPO learns from sampled responses, and needs > 0 (got 0).",
    ),
    (
        ["--algo.correction.cap", "0.5"],
        "--algo.correction.cap: must be >= 1 (got 0.5): below 1, even the weights of equal policies would be truncated.",
    ),
    (
        ["--algo.correction.type", "mask", "--algo.correction.low", "1.5"],
        "--algo.correction.low: the band [1.5, 2] leaves out the ratio of equal policies, 1.",
    ),
    (
        ["--rollout.top-p", "0.9"],
        "--rollout.top-p: 0.9 samples from a part of the vocabulary, but the engine's log-probs are over all of it: importance weights would be wrong. Set it to 1, or algo.correction.type to none.",
    ),
    (
        ["--rollout.top-k", "40"],
        "--rollout.top-k: 40 samples from a part of the vocabulary, but the engine's log-probs are over all of it: importance weights would be wrong. Set it to 0, or algo.correction.type to none.",
    ),
    (
        ["--algo.correction.type", "ratio", "--train.mismatch-stop", "0.5"],
        "--train.mismatch-stop: 0.5 has no effect: algo.correction ratio uses the sampler's log-probs as the old log-probs, and the trainer computes none to compare them with. Remove it, or choose another correction.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "line"), REFUSED, ids=lambda value: " ".join(value)[:50])
def test_what_makes_no_sense_is_refused_with_the_reason(argv: Sequence[str], line: str, problems: Problems) -> None:
    assert problems(*RIGHT, *argv, command="grpo") == [line]


ALLOWED = [
    ["--algo.ratio", "sequence", *SEQUENCE_MEAN],
    ["--algo.ratio", "sequence-mean", *SEQUENCE_MEAN],
    ["--algo", "rloo", "--algo.ratio", "sequence", *SEQUENCE_MEAN],
    ["--algo.loss", "cispo", "--algo.clip-low", "1"],
    ["--algo.dual-clip", "3"],
    ["--algo.kl-placement", "reward", "--algo.kl-estimator", "k1", "--algo.kl.coef", "0.1"],
    ["--algo", "dapo", "--algo.overlong-buffer", "128", "--algo.max-sampling-rounds", "3"],
    ["--algo.aggregation", "seq-mean-token-sum-norm", "--algo.aggregation-tokens", "100"],
    ["--algo.scale", "batch", "--algo.std", "sample"],
    ["--rollout.top-p", "0.9", "--algo.correction.type", "none"],
    ["--algo.correction.type", "ratio", "--rollout.max-lag", "2", "--train.mismatch-stop", "0"],
    ["--rollout.max-lag", "4"],
]


@pytest.mark.parametrize("argv", ALLOWED, ids=lambda value: " ".join(value)[:50])
def test_what_makes_sense_is_not_refused(argv: Sequence[str], problems: Problems) -> None:
    assert problems(*RIGHT, *argv, command="grpo") == []
    config = grpo(*argv)
    assert problems_of(config) == []  # resolved, too


def test_all_problems_come_at_once(problems: Problems) -> None:
    found = problems(*RIGHT, *ONE, "--algo.dual-clip", "1", "--rollout.top-k", "5", command="grpo")
    assert len(found) == 3


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_the_correction_is_checked_for_ppo_too(command: str, problems: Problems) -> None:
    assert len(problems(*RIGHT, "--rollout.top-p", "0.9", command=command)) == 1
    assert len(problems(*RIGHT, "--algo.correction.cap", "0.1", command=command)) == 1


def test_lag_without_correction_is_advised_against() -> None:
    lagging = ("--rollout.max-lag", "2")
    assert advice_on(grpo(*lagging)) == []
    (advice,) = advice_on(grpo(*lagging, "--algo.correction.type", "none"))
    assert advice.keys == ("rollout.max_lag", "algo.correction.type")
    assert advice.text.startswith("2 lets responses be 2 versions old (off-policy), and algo.correction none")
    assert advice_on(grpo("--algo.correction.type", "none")) == []


def test_lengths_are_filled_in_once() -> None:
    algo = section("--algo", "dr-grpo", "--rollout.max-response-tokens", "300")
    assert (algo.aggregation_tokens, algo.overlong_limit) == (300, 300)
    algo = section("--algo", "dr-grpo", "--algo.aggregation-tokens", "99")
    assert algo.aggregation_tokens == 99


def test_sampling_rounds_reach_the_plan_of_a_run() -> None:
    assert section("--algo", "dapo", "--algo.max-sampling-rounds", "3").sampling_rounds == 3


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("--algo.dual-clip", "3"), None),
        (("--algo.truncated", "bootstrap"), None),
        (
            ("--algo.dual-clip", "0.5"),
            "--algo.dual-clip: must be > 1, or 0 for none (got 0.5): at 1 or less, tokens with negative advantage would have no gradient.",
        ),
        (
            ("--algo.dual-clip", "3", "--algo.loss", "penalty", "--algo.num-epochs", "2"),
            "--algo.dual-clip: penalty has no minimum that a dual clip could bound. Set it to 0.",
        ),
        (
            ("--algo.truncated", "bootstrap", "--algo.token-level", "false"),
            "--algo.truncated: the critic's value at the last token needs an action for each token. Set algo.token_level true.",
        ),
        (
            ("--algo.truncated", "mask", "--algo.truncated-penalty", "1"),
            "--algo.truncated-penalty: not used: algo.truncated mask does not use the score of a truncated response. Set it to 0.",
        ),
    ],
)
def test_what_ppo_shares_is_checked_for_ppo(argv: tuple[str, ...], line: str | None, problems: Problems) -> None:
    found = problems(*RIGHT, *argv, command="ppo")
    assert [one.split(" (", 1)[0] if line is None else one for one in found] == ([] if line is None else [line])

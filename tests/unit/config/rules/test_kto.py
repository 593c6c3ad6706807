"""Settings of KTO that do not go together."""

import pytest

from tests.unit.config.conftest import Problems

ONLINE = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")
OFFLINE = ("--data.path", "x.jsonl", "--policy.model", "m")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            ("--train.batch_size", "32"),
            "--train.batch-size: online KTO learns from a step's responses at once (got 32). Set it to 64 = "
            "batch_size*group_size.",
        ),
        (
            ("--train.batch_size", "100"),
            "--train.batch-size: online KTO learns from a step's responses at once (got 100). Set it to 64 = "
            "batch_size*group_size.",
        ),
        (
            ("--rollout.group_size", "1", "--train.batch_size", "16"),
            "--rollout.group-size: 1 response is its own mean, and group-mean leaves it out. Raise it, or use "
            "threshold batch-mean or fixed.",
        ),
        (
            ("--algo.threshold_score", "0.5"),
            "--algo.threshold-score: 0.5 is only used by threshold fixed (got group-mean).",
        ),
        (
            ("--algo.desirable_weight", "2"),
            "--algo.desirable-weight: 2 has no effect with algo.class_weights auto. Set class_weights to given.",
        ),
    ],
)
def test_online(flags: tuple[str, ...], problem: str, problems: Problems) -> None:
    assert problem in problems(*ONLINE, *flags, command="online-kto")


def test_offline_weights(problems: Problems) -> None:
    found = problems(*OFFLINE, "--algo.undesirable_weight", "0.5", command="kto")
    assert (
        "--algo.undesirable-weight: 0.5 has no effect with algo.class_weights auto. Set class_weights to given."
        in found
    )
    given = problems(*OFFLINE, "--algo.undesirable_weight", "0.5", "--algo.class_weights", "given", command="kto")
    assert not [problem for problem in given if problem.startswith("--algo")]


@pytest.mark.parametrize(
    "flags", [(), ("--algo.threshold", "fixed", "--algo.threshold_score", "0.5", "--rollout.group_size", "4")]
)
def test_defaults_fit(flags: tuple[str, ...], problems: Problems) -> None:
    found = problems(*ONLINE, *flags, command="online-kto")
    assert not [p for p in found if p.startswith(("--train", "--algo", "--rollout", "train", "algo", "rollout"))]

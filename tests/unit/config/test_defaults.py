"""Defaults as papers and practice have them: what a command without settings does changes only on purpose."""

from functools import reduce
from typing import TypeAlias

import pytest

from rlhf.config.loading.load import load_config

Settings: TypeAlias = dict[str, object]

GIVEN = ("--policy.model", "m", "--data.path", "x.jsonl")
SCORED = (*GIVEN, "--reward.function", "rewards:score")
GROUP: Settings = {"policy.lr": 1e-6, "rollout.group_size": 8} | {
    "algo.correction.type": "truncate", "algo.correction.cap": 2.0
}  # fmt: skip
CLIP: Settings = {"algo.clip_low": 0.2, "algo.clip_high": 0.2}
IN_REWARD: Settings = {"algo.kl.coef": 0.01, "algo.kl_placement": "reward", "algo.estimator": "k1"}
NO_KL: Settings = {"algo.kl.coef": 0.0, "algo.kl_placement": "loss", "algo.estimator": "k3"}
PAIRS: Settings = {"policy.lr": 5e-7}

DEFAULTS: dict[tuple[str, ...], Settings] = {
    ("ppo",): CLIP
    | IN_REWARD
    | {
        "policy.lr": 1e-6, "critic.lr": 9e-6, "algo.num_epochs": 1, "algo.gamma": 1.0, "algo.gae_lambda": 0.95,
        "algo.value_clip": 0.5, "algo.entropy_coef": 0.0, "algo.ptx_coef": 0.0, "algo.clip_rewards": 10.0,
        "algo.penalty_target": 0.01, "algo.whiten_advantages": True, "algo.reward_at_end": True,
        "algo.token_level": True, "algo.dual_clip": 0.0, "algo.truncated": "learn", "policy.lr_schedule": "cosine",
    },
    ("grpo",): GROUP | CLIP | NO_KL | {"algo.aggregation": "token-mean", "algo.scale": "group"},
    # An answer is one action: the log-probs of its tokens are added up.
    ("grpo", "--algo", "rloo"): GROUP | IN_REWARD | {"algo.aggregation": "seq-mean-token-sum-norm"},
    ("grpo", "--algo", "reinforce++"): GROUP | IN_REWARD | {"algo.aggregation": "token-mean", "algo.scale": "batch"},
    ("grpo", "--algo", "reinforce++-baseline"): GROUP | {"algo.scale": "batch"},
    ("grpo", "--algo", "remax"): GROUP | IN_REWARD | {"algo.aggregation": "token-mean", "algo.scale": "none"},
    ("grpo", "--algo", "dr-grpo"): GROUP | NO_KL | {"algo.aggregation": "seq-mean-token-sum-norm"},
    ("grpo", "--algo", "dapo"): GROUP | NO_KL | {"algo.clip_low": 0.2, "algo.clip_high": 0.28},
    ("grpo", "--algo", "gspo"): GROUP
    | {"algo.correction.level": "sequence", "algo.clip_low": 3e-4, "algo.clip_high": 4e-4},
    ("grpo", "--algo", "cispo"): GROUP | {"algo.clip_high": 0.2},
    **{
        ("dpo", "--loss", loss): PAIRS | {"algo.loss.beta": 0.1}
        for loss in ("dpo", "ipo", "hinge", "apo-zero", "apo-down", "r-dpo")
    },
    ("dpo", "--loss", "cdpo"): PAIRS | {"algo.loss.beta": 0.1, "algo.loss.label_noise": 0.1},
    ("dpo", "--loss", "rdpo"): PAIRS | {"algo.loss.beta": 0.1, "algo.loss.label_noise": 0.1},
    ("dpo", "--loss", "orpo"): {"policy.lr": 8e-6, "algo.loss.beta": 0.1},
    ("dpo", "--loss", "orpo", "--policy.lr", "5e-7"): {"policy.lr": 5e-7},
    ("dpo", "--loss", "simpo"): {"policy.lr": 1e-6, "algo.loss.beta": 2.0, "algo.loss.gamma": 0.5},
    ("dpo", "--loss", "slic"): PAIRS | {"algo.loss.delta": 1.0, "algo.loss.nll_coef": 0.1},
    ("dpo", "--loss", "cpo"): PAIRS | {"algo.loss.beta": 0.1, "algo.loss.nll_coef": 1.0},
    ("dpo", "--loss", "rpo"): PAIRS | {"algo.loss.beta": 0.1, "algo.loss.nll_coef": 1.0},
    ("dpo", "--loss", "discopop"): PAIRS | {"algo.loss.beta": 0.1, "algo.loss.tau": 0.05},
    ("dpo",): PAIRS | {"algo.loss.type": "dpo", "algo.loss.humanline_low": -1.0, "algo.loss.humanline_high": 1.5},
    ("online-dpo",): PAIRS
    | {"rollout.group_size": 2, "rollout.temperature": 0.9, "algo.loss.beta": 0.1, "algo.reference": "frozen"},
    ("online-dpo", "--algo", "nash-md"): {"algo.mixture": 0.25},
    ("kto",): PAIRS | {"algo.beta": 0.1, "algo.desirable_weight": 1.0, "algo.undesirable_weight": 1.0},
    ("online-kto",): {"algo.max_class_weight": 4.0, "algo.beta": 0.1, "algo.threshold": "group-mean"},
}  # fmt: skip


@pytest.mark.parametrize("command", DEFAULTS, ids=" ".join)
def test_defaults(command: tuple[str, ...]) -> None:
    name, *flags = command
    config = load_config(name, [*(GIVEN if name in ("dpo", "kto") else SCORED), *flags], {})
    found = {key: reduce(getattr, key.split("."), config) for key in DEFAULTS[command]}
    assert found == DEFAULTS[command]

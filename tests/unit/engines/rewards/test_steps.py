"""Process reward models as a source: steps found where training put them, and one number made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pytest

from rlhf.config.data import DataSection
from rlhf.config.reward import ModelSource, PrmSource
from rlhf.engines.base import Tokenizer
from rlhf.engines.rewards import ModelReward, StepReward, build_scored, head_of
from rlhf.errors import RewardError
from rlhf.types import FloatArray, Head, Json, PackedTokens, Rollout
from tests.unit.engines.rewards.reward_support import prompts, rollouts
from tests.unit.orchestrator.data.data_support import CHAT, PLAIN, LetterTokenizer, load_steps

Aggregate = Literal["min", "mean", "product", "last"]
A, B, C = (100 + ord(letter) for letter in "abc")


class ByLetter:
    """At each token the log-odds that stand for the letter before it: a step is as right as its last letter says."""

    def __init__(self, odds: dict[int, float], num_ranks: int = 1) -> None:
        self.num_ranks = num_ranks
        self.seen: list[PackedTokens] = []
        self._odds = odds

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        assert len(batches) % self.num_ranks == 0
        self.seen += batches
        return [
            np.array([np.nan, *(self._odds.get(token, np.nan) for token in batch.token_ids[:-1].tolist())], np.float32)
            for batch in batches
        ]


class ByPosition(ByLetter):
    """Log-odds at given positions, and nowhere else."""

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        self.seen += batches
        return [np.array([self._odds.get(t, np.nan) for t in range(len(b.token_ids))], np.float32) for b in batches]


def reward(
    scorer: ByLetter,
    *,
    aggregate: Aggregate = "min",
    separator: str = "\n",
    tokenizer: Tokenizer = PLAIN,
    max_tokens: int = 4096,
) -> StepReward:
    source = PrmSource(model="m", aggregate=aggregate, step_separator=separator)
    return StepReward(source, scorer, tokenizer=tokenizer, max_tokens_per_batch=max_tokens)


def sigmoid(number: float) -> float:
    return float(1 / (1 + np.exp(-number)))


ODDS = {A: 2.0, B: -1.0, C: 0.5}


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("min", sigmoid(-1)),
        ("mean", (sigmoid(2) + sigmoid(-1) + sigmoid(0.5)) / 3),
        ("product", sigmoid(2) * sigmoid(-1) * sigmoid(0.5)),
        ("last", sigmoid(0.5)),
    ],
)
def test_one_number_of_three_steps(aggregate: Aggregate, expected: float) -> None:
    """The end of the answer ends a step too; a blank line is none."""
    source = reward(ByLetter(ODDS), aggregate=aggregate)
    for text in ("xa\nxb\nc", "xa\nxb\nc\n", "xa\n\nxb\n  \nc\n"):
        (one,) = source.score(prompts(1), [text], rollouts(1))
        assert one.total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("max_tokens", [1, 30, 4096])
def test_each_response_gets_its_own_score(num_ranks: int, max_tokens: int) -> None:
    texts = ["a", "", "b\na", "\n \n", "c", "a\na\na\nb"]
    source = reward(ByLetter(ODDS, num_ranks), max_tokens=max_tokens)
    scores = [one.total for one in source.score(prompts(6), texts, rollouts(6))]
    expected = [sigmoid(2), 0.0, sigmoid(-1), 0.0, sigmoid(0.5), sigmoid(-1)]
    assert scores == pytest.approx(expected, rel=1e-6)
    assert source.score([], [], []) == []
    assert [one.total for one in source.score(prompts(1), [""], rollouts(1))] == [0.0]


def test_another_separator() -> None:
    """The model is asked at the separator's last character; the one before it decides here."""
    scorer = ByLetter({ord(";") + 100: -1.0})
    (one,) = reward(scorer, separator=";;").score(prompts(1), ["xa;;xb"], rollouts(1))
    assert one.total == pytest.approx(sigmoid(-1.0))
    assert PLAIN.decode(scorer.seen[0].token_ids.tolist()).endswith("xa;;xb;;")


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT, LetterTokenizer(merges=["a\n", "\nb", "?a"])])
def test_steps_are_tokenized_as_they_were_for_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same tokens and the same ends, also where tokens would join across steps."""
    question: Json = "why?" if tokenizer is not CHAT else [{"role": "user", "content": "why?"}]
    rows = [{"prompt": question, "completions": ["ab a", "b is b", "a"], "labels": [True, False, True]}]
    file = tmp_path / "steps.jsonl"
    file.write_text(json.dumps(rows[0]) + "\n")
    (group,) = load_steps(DataSection(path=str(file)), tokenizer).train
    (rollout,) = group.responses
    assert rollout.loss_mask is not None
    positions = np.flatnonzero(rollout.loss_mask) + len(group.prompt.token_ids)
    scorer = ByPosition({int(position): odds for position, odds in zip(positions, (1.0, 2.0, 3.0), strict=True)})
    source = reward(scorer, aggregate="mean", tokenizer=tokenizer)
    (one,) = source.score([group.prompt], [group.texts[0]], cast("Sequence[Rollout]", group.responses))
    assert one.total == pytest.approx(np.mean([sigmoid(1), sigmoid(2), sigmoid(3)]))
    assert scorer.seen[0].token_ids.tolist() == [*group.prompt.token_ids.tolist(), *rollout.token_ids.tolist()]


def test_a_score_that_is_not_finite_is_rejected() -> None:
    with pytest.raises(RewardError, match="score for p1 is not a finite number"):
        reward(ByLetter({A: 1.0, B: np.inf})).score(prompts(2), ["a", "b"], rollouts(2))


def test_what_model_a_source_starts() -> None:
    prm, rm = PrmSource(model="m"), ModelSource(model="m")
    assert (head_of(prm), head_of(rm)) == (Head.TOKEN_SCORES, Head.SCORES)
    assert (prm.label, rm.label) == ("prm", "model")
    scorer = ByLetter({})
    assert isinstance(build_scored(prm, scorer, policy_tokenizer=PLAIN, reward_tokenizer=PLAIN), StepReward)
    assert isinstance(build_scored(rm, scorer, policy_tokenizer=PLAIN, reward_tokenizer=PLAIN), ModelReward)

"""Reward models and weighted sums: the right tokens scored, each score with its own answer, and nothing invented."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.data import DataSection
from rlhf.config.reward import FunctionSource, ModelSource
from rlhf.engines.rewards import ModelReward, Weighted, WeightedRewards, build_reward, probe
from rlhf.engines.rewards.model import plan_batches
from rlhf.errors import ConfigError, RewardError
from rlhf.orchestrator.data.encoding import Encoder
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.records import Record
from rlhf.types import FinishReason, FloatArray, Message, PackedTokens, Prompt, Reward, Rollout
from tests.unit.engines.rewards.reward_support import prompts, responses, rollouts
from tests.unit.orchestrator.data.data_support import CHAT, PLAIN, LetterTokenizer


class SumScorer:
    """Scores a sequence by the sum of its tokens, and remembers what it was given."""

    def __init__(self, num_ranks: int = 1, scale: float = 1.0) -> None:
        self.num_ranks = num_ranks
        self.batches: list[PackedTokens] = []
        self._scale = scale

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        self.batches = list(batches)
        return [np.array([part.sum() * self._scale for part in split(batch)], dtype=np.float32) for batch in batches]


class FixedReward:
    """Gives the same score to everything."""

    def __init__(self, score: float) -> None:
        self._score = score
        self.closed = False

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        return [Reward(total=self._score) for _ in responses]

    def close(self) -> None:
        self.closed = True


def split(batch: PackedTokens) -> list[np.ndarray]:
    return np.split(batch.token_ids, np.cumsum(batch.lengths)[:-1])


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("max_tokens", [1, 8, 1000])
def test_each_response_gets_its_own_score_on_any_number_of_ranks(num_ranks: int, max_tokens: int) -> None:
    scorer = SumScorer(num_ranks)
    reward = ModelReward(scorer, policy_tokenizer=PLAIN, reward_tokenizer=PLAIN, max_tokens_per_batch=max_tokens)
    scored = reward.score(prompts(5), responses(5), rollouts(5))
    expected = [float(1 + 2 + rollout.token_ids.sum()) for rollout in rollouts(5)]
    assert [one.total for one in scored] == expected
    assert len(scorer.batches) % num_ranks == 0
    assert all(len(batch.lengths) for batch in scorer.batches)
    assert reward.score([], [], []) == []


def test_of_a_response_of_several_segments_the_last_one_is_scored() -> None:
    """It is the conversation as it ended; those before it are what the model read on the way."""
    (rollout,) = rollouts(1)
    several = replace(rollout, token_ids=np.array([3, 50, 60, 4, 5]), segment_starts=(1, 3))
    reward = ModelReward(SumScorer(), policy_tokenizer=PLAIN, reward_tokenizer=PLAIN)
    assert [one.total for one in reward.score(prompts(1), responses(1), [several])] == [9.0]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    num_ranks=st.integers(1, 5),
    max_tokens=st.integers(1, 60),
)
def test_batches_hold_every_sequence_within_the_limit(lengths: list[int], num_ranks: int, max_tokens: int) -> None:
    batches = plan_batches(lengths, num_ranks, max_tokens)
    assert len(batches) % num_ranks == 0
    assert {index for batch in batches for index in batch} == set(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= max_tokens or len(batch) == 1 for batch in batches)


def test_with_another_tokenizer_the_text_is_tokenized_again_and_ended_if_it_had_ended() -> None:
    other = LetterTokenizer(merges=["xx"])
    scorer = SumScorer()
    reward = ModelReward(scorer, policy_tokenizer=PLAIN, reward_tokenizer=other)
    for reason, end in ((FinishReason.STOP, [other.eos_token_id]), (FinishReason.LENGTH, [])):
        reward.score(prompts(1), ["xxx"], rollouts(1, reason))
        (sequence,) = split(scorer.batches[0])
        assert sequence.tolist() == [*other.encode("prompt 0xxx", add_special_tokens=True), *end]


@pytest.mark.parametrize(("reason", "end"), [(FinishReason.STOP, "<|im_end|>"), (FinishReason.LENGTH, "")])
def test_with_another_tokenizer_a_chat_is_rendered_by_its_own_template(reason: FinishReason, end: str) -> None:
    """Up to where a reward model that is trained on such chats reads its score; a truncated answer has no end."""
    scorer = SumScorer()
    reward = ModelReward(scorer, policy_tokenizer=PLAIN, reward_tokenizer=CHAT)
    rows = prompts(1, messages=[[{"role": "user", "content": "hi"}]])
    reward.score(rows, ["yo"], rollouts(1, reason))
    (sequence,) = split(scorer.batches[0])
    text = CHAT.decode(sequence.tolist(), skip_special_tokens=False)
    assert text == f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo{end}"
    record = Record(
        row=Row(file="", where="", values={}),
        id="p",
        prompt=(Message(role="user", content="hi"),),
        responses=((Message(role="assistant", content="yo"),),),
    )
    encoder = Encoder(DataSection(path="x"), CHAT)
    trained_on = encoder.prompt(record)
    answer = encoder.response(record, trained_on, record.responses[0])
    whole = [*trained_on.token_ids.tolist(), *answer.token_ids.tolist()]
    assert sequence.tolist() == (whole if end else whole[:-1])


@pytest.mark.parametrize(
    ("prompt", "response"), [("a", "b"), ("Answer: ", "4"), ("x", "y\nz"), ("ends in \n", "\nbegins with one")]
)
def test_with_another_tokenizer_a_response_has_the_tokens_of_its_training(prompt: str, response: str) -> None:
    """Also where the tokenizer would merge the end of the prompt with the beginning of the response."""
    other = LetterTokenizer(merges=["ab", " 4", "xy", "\n\n"])
    scorer = SumScorer()
    reward = ModelReward(scorer, policy_tokenizer=PLAIN, reward_tokenizer=other)
    (row,) = prompts(1)
    reward.score([replace(row, text=prompt)], [response], rollouts(1))
    (sequence,) = split(scorer.batches[0])
    record = Record(row=Row(file="", where="", values={}), prompt=prompt, responses=(response,))
    encoder = Encoder(DataSection(path="x"), other)
    trained_on = encoder.prompt(record)
    answer = encoder.response(record, trained_on, response)
    assert sequence.tolist() == [*trained_on.token_ids.tolist(), *answer.token_ids.tolist()]


def test_a_model_that_gives_nan_is_rejected() -> None:
    reward = ModelReward(SumScorer(scale=float("nan")), policy_tokenizer=PLAIN, reward_tokenizer=PLAIN)
    with pytest.raises(RewardError, match=r"^reward: score for p0 is not a finite number \(got NaN\)\.$"):
        reward.score(prompts(2), responses(2), rollouts(2))


def test_a_weighted_sum_keeps_every_part_unweighted() -> None:
    sources = {
        "good": Weighted(source=FixedReward(2.0), weight=0.5),
        "zero": Weighted(source=FixedReward(0.0), weight=9.0),
    }
    (reward,) = WeightedRewards(sources).score(prompts(1), ["x"], rollouts(1))
    assert reward == Reward(total=1.0, parts={"good": 2.0, "zero": 0.0})


def test_a_sum_that_overflows_is_rejected() -> None:
    sources = {name: Weighted(source=FixedReward(1e308), weight=10.0) for name in ("a", "b")}
    with pytest.raises(RewardError, match="the sum for p0 is not finite"):
        WeightedRewards(sources).score(prompts(1), ["x"], rollouts(1))


def test_sources_are_built_by_label_and_closed_together() -> None:
    opened = {"model": FixedReward(1.0), "rule": FixedReward(3.0)}
    sections = (ModelSource(model="x", weight=2.0), FunctionSource(function="a:b", name="rule", weight=-1.0))
    reward = build_reward(sections, opened)
    assert probe(reward, prompts(1)[0], PLAIN) == Reward(total=-1.0, parts={"model": 1.0, "rule": 3.0})
    reward.close()
    assert all(source.closed for source in opened.values())


def test_two_sources_of_one_name_and_a_model_not_started_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r'two are called "function"; give each a name\.'):
        build_reward((FunctionSource(function="a:b"), FunctionSource(function="a:c")), {})
    with pytest.raises(ConfigError, match="no model was started for model"):
        build_reward((ModelSource(model="x"),), {})

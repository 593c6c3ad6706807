"""Rewards from a reward model: its scalar head at the last token of prompt and response."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from rlhf.conversations.continuing import continued, up_to_stop
from rlhf.conversations.messages import conversation_of
from rlhf.engines.base import Tokenizer, TokenScorer
from rlhf.engines.rewards.scores import checked_scores
from rlhf.types import FinishReason, IntArray, Message, PackedTokens, Prompt, Reward, Rollout


class ScoredSequences(ABC):
    """What reward models share: a scorer that gives one score for each sequence. If policy and reward model have the
    same tokenizer, that sequence is the prompt and the sampled token ids, as they are."""

    def __init__(self, scorer: TokenScorer, *, has_same_tokenizer: bool, max_tokens_per_batch: int) -> None:
        self._scorer = scorer
        self._same = has_same_tokenizer
        self._max_tokens = max_tokens_per_batch

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        items = zip(prompts, responses, rollouts, strict=True)
        return scored(self._scorer, [self._sequence(*item) for item in items], prompts, self._max_tokens)

    def close(self) -> None:  # noqa: B027  nothing to close is right for all of them
        """Nothing to do: the scorer's creator closes it."""

    def _sequence(self, prompt: Prompt, response: str, rollout: Rollout) -> IntArray:
        """The tokens that are scored."""
        if self._same:
            if rollout.segment_starts:  # the last one is the conversation as it ended
                return rollout.token_ids[rollout.segment_starts[-1] :]
            return np.concatenate([prompt.token_ids, rollout.token_ids])
        return self._tokenize(prompt, response, rollout)

    @abstractmethod
    def _tokenize(self, prompt: Prompt, response: str, rollout: Rollout) -> IntArray:
        """Prompt and response by the reward model's own tokenizer."""


class ModelReward(ScoredSequences):
    """Scores by a scorer with the head `scores`.

    With another tokenizer than the policy's the text is tokenized by the reward model's (and its chat template, for a
    chat prompt), the response behind the prompt as in training. A response that was cut off gets no end token.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        *,
        policy_tokenizer: Tokenizer,
        reward_tokenizer: Tokenizer,
        max_tokens_per_batch: int = 4096,
    ) -> None:
        same = policy_tokenizer.fingerprint() == reward_tokenizer.fingerprint()
        super().__init__(scorer, has_same_tokenizer=same, max_tokens_per_batch=max_tokens_per_batch)
        self._tokenizer = reward_tokenizer

    def _tokenize(self, prompt: Prompt, response: str, rollout: Rollout) -> IntArray:
        """Prompt and response as in the reward model's training: the response's tokens are those that it adds behind
        the prompt, up to its first stop token."""
        ended = rollout.finish_reason is FinishReason.STOP
        if isinstance(prompt.metadata.get("messages"), list):
            turns, tools = conversation_of(prompt.metadata)
            before = self._tokenizer.render(turns, add_generation_prompt=True, tools=tools)
            token_ids = self._tokenizer.encode(before)
            if ended:
                answer = Message(role="assistant", content=response)
                whole = self._tokenizer.render([*turns, answer], add_generation_prompt=False, tools=tools)
                # A template that rewrites what stands before its answers shows no part of its own for this one.
                response = whole[len(before) :] if whole.startswith(before) else response
        else:
            before = prompt.text
            token_ids = self._tokenizer.encode(before, add_special_tokens=True)
        added = continued(self._tokenizer.encode, before, response)
        token_ids += added[: up_to_stop(added, self._tokenizer.stop_token_ids)]
        if ended and token_ids[-1] not in self._tokenizer.stop_token_ids:
            token_ids.append(self._tokenizer.eos_token_id)
        return np.array(token_ids, dtype=np.int64)


def scored(
    scorer: TokenScorer, sequences: Sequence[IntArray], prompts: Sequence[Prompt], max_tokens: int
) -> list[Reward]:
    """The scorer's score of each sequence, which ends the response to a prompt. Raises RewardError for a score that is
    not finite."""
    if not sequences:
        return []
    batches = plan_batches([len(sequence) for sequence in sequences], scorer.num_ranks, max_tokens)
    replies = scorer.forward([pack([sequences[index] for index in batch]) for batch in batches])
    scores = [0.0] * len(sequences)
    for batch, reply in zip(batches, replies, strict=True):
        for index, score in zip(batch, reply.tolist(), strict=True):
            scores[index] = score
    checked = checked_scores(list(scores), [prompt.id for prompt in prompts])
    return [Reward(total=score) for score in checked]


def plan_batches(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each packed batch: longest first, each into the first batch with room for it. A
    sequence that is longer than `max_tokens` has a batch of its own.

    The number of batches is a multiple of `num_ranks`: ranks without a batch run the shortest sequence again, which
    gives the same score.
    """
    batches: list[list[int]] = []
    totals: list[int] = []
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in order:
        fits = next((b for b, total in enumerate(totals) if total + lengths[index] <= max_tokens), None)
        if fits is None:
            batches.append([index])
            totals.append(lengths[index])
        else:
            batches[fits].append(index)
            totals[fits] += lengths[index]
    return batches + [[order[-1]]] * (-len(batches) % num_ranks)


def pack(sequences: Sequence[IntArray]) -> PackedTokens:
    """Sequences laid end to end."""
    return PackedTokens(
        token_ids=np.concatenate(sequences), lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    )

"""Rewards from a process reward model (PRM): the probabilities that a response's steps are correct, aggregated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.config.reward import PrmSource
from rlhf.conversations.continuing import continued
from rlhf.conversations.messages import conversation_of
from rlhf.engines.base import Tokenizer, TokenScorer
from rlhf.engines.rewards.model import pack, plan_batches
from rlhf.engines.rewards.scores import checked_scores
from rlhf.types import FloatArray, IntArray, Prompt, Reward, Rollout

Aggregate = Callable[[FloatArray], np.floating]

AGGREGATES: dict[str, Aggregate] = {"min": np.min, "mean": np.mean, "product": np.prod, "last": lambda steps: steps[-1]}
"""Probabilities of the steps (at least one) -> the response's reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The tokens of prompt and response; the response's steps end at the positions `ends`."""

    token_ids: IntArray
    ends: IntArray


class StepReward:
    """Scores by a scorer with the head `token_scores`: the sigmoid at a step's last token is the probability that the
    step is correct.

    A step ends at the separator in the response's text, and at the response's end; blank steps do not count. Texts are
    tokenized by the reward model's tokenizer, step by step, each with its separator, as in its training. The reward of
    a response without a step is 0.
    """

    def __init__(
        self, source: PrmSource, scorer: TokenScorer, *, tokenizer: Tokenizer, max_tokens_per_batch: int = 4096
    ) -> None:
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens_per_batch
        self._separator = source.step_separator
        self._aggregate = AGGREGATES[source.aggregate]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        tokenized = [self._tokenize(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        with_steps = [index for index, steps in enumerate(tokenized) if len(steps.ends)]
        scores = [0.0] * len(tokenized)
        for index, right in zip(with_steps, self._ask([tokenized[index] for index in with_steps]), strict=True):
            scores[index] = float(self._aggregate(right))
        return [Reward(total=score) for score in checked_scores(list(scores), [prompt.id for prompt in prompts])]

    def close(self) -> None:
        """Nothing to do: the scorer's creator closes it."""

    def _ask(self, tokenized: Sequence[Steps]) -> list[FloatArray]:
        """The probability that a step is correct, for each step of each response."""
        if not tokenized:
            return []
        right: list[FloatArray] = [np.zeros(0, dtype=np.float32)] * len(tokenized)
        batches = plan_batches([len(one.token_ids) for one in tokenized], self._scorer.num_ranks, self._max_tokens)
        replies = self._scorer.forward([pack([tokenized[index].token_ids for index in batch]) for batch in batches])
        for batch, reply in zip(batches, replies, strict=True):
            start = 0
            for index in batch:
                scores = reply[start + tokenized[index].ends].astype(np.float64)
                # A score that is not finite becomes NaN, which is rejected later, rather than probability 0 or 1.
                sigmoid = np.where(np.isfinite(scores), (1.0 + np.tanh(scores / 2.0)) / 2.0, np.nan)
                right[index] = sigmoid.astype(np.float32)
                start += len(tokenized[index].token_ids)
        return right

    def _tokenize(self, prompt: Prompt, response: str) -> Steps:
        texts = [f"{step}{self._separator}" for step in response.split(self._separator) if step.strip()]
        before, token_ids = self._prompt(prompt)
        ends = []
        for text in texts:
            token_ids += continued(self._tokenizer.encode, before, text)
            ends.append(len(token_ids) - 1)
            before = text
        return Steps(token_ids=np.array(token_ids, dtype=np.int64), ends=np.array(ends, dtype=np.int64))

    def _prompt(self, prompt: Prompt) -> tuple[str, list[int]]:
        """The prompt as the reward model reads it, and its tokens."""
        if not isinstance(prompt.metadata.get("messages"), list):
            return prompt.text, self._tokenizer.encode(prompt.text, add_special_tokens=True)
        turns, tools = conversation_of(prompt.metadata)
        text = self._tokenizer.render(turns, add_generation_prompt=True, tools=tools)
        return text, self._tokenizer.encode(text)

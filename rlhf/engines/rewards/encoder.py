"""Rewards from a reward model that reads both ways: the one output of its classifier for prompt and response."""

from collections.abc import Sequence

import numpy as np

from rlhf.conversations.messages import conversation_of
from rlhf.engines.base import PairTokenizer, Tokenizer, TokenScorer
from rlhf.engines.rewards.model import scored
from rlhf.errors import RewardError
from rlhf.types import IntArray, Message, Prompt, Reward, Rollout


class EncoderReward:
    """Scores by a scorer that gives one score for each sequence.

    If policy and reward model have the same tokenizer, the sampled token ids are scored as they are; otherwise prompt
    and response are a pair of texts of the reward model's tokenizer, or a conversation of its chat template. The
    prompt of a chat without such a template is the contents of its messages, a line each. Raises RewardError where
    the tokens are more than the model reads: nothing is cut off.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        *,
        policy_tokenizer: Tokenizer,
        reward_tokenizer: PairTokenizer,
        max_tokens_per_batch: int = 4096,
    ) -> None:
        self._scorer = scorer
        self._tokenizer = reward_tokenizer
        self._max_tokens = max_tokens_per_batch
        self._same = policy_tokenizer.fingerprint() == reward_tokenizer.fingerprint()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        items = zip(prompts, responses, rollouts, strict=True)
        return scored(self._scorer, [self._tokens(*item) for item in items], prompts, self._max_tokens)

    def close(self) -> None:
        """Nothing to do: the scorer's creator closes it."""

    def _tokens(self, prompt: Prompt, response: str, rollout: Rollout) -> IntArray:
        if self._same:
            tokens = np.concatenate([prompt.token_ids, rollout.token_ids])
        else:
            tokens = np.array(self._tokenize(prompt, response), dtype=np.int64)
        limit = self._tokenizer.max_tokens
        if limit is not None and len(tokens) > limit:
            raise RewardError(
                f"reward.model: row {prompt.id}: prompt and response are {len(tokens)} of its tokens, and it reads "
                f"{limit}. Lower rollout.max_prompt_tokens or rollout.max_response_tokens."
            )
        return tokens

    def _tokenize(self, prompt: Prompt, response: str) -> list[int]:
        if not isinstance(prompt.metadata.get("messages"), list):
            return self._tokenizer.encode_pair(prompt.text, response)
        turns, _ = conversation_of(prompt.metadata)
        chat = self._tokenizer.encode_chat([*turns, Message(role="assistant", content=response)])
        return chat or self._tokenizer.encode_pair("\n".join(turn.content for turn in turns), response)

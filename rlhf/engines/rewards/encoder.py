"""Rewards from a reward model that reads both ways: the one output of its classifier for prompt and response."""

import numpy as np

from rlhf.conversations.messages import conversation_of
from rlhf.engines.base import PairTokenizer, Tokenizer, TokenScorer
from rlhf.engines.rewards.model import ScoredSequences
from rlhf.errors import RewardError
from rlhf.types import IntArray, Message, Prompt, Rollout


class EncoderReward(ScoredSequences):
    """Scores by a scorer that reads both ways.

    With another tokenizer than the policy's, prompt and response are a pair of texts of the reward model's tokenizer,
    or a conversation of its chat template. The prompt of a chat without such a template is the contents of its
    messages, a line each. Raises RewardError where the tokens are more than the model reads: nothing is cut off.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        *,
        policy_tokenizer: Tokenizer,
        reward_tokenizer: PairTokenizer,
        max_tokens_per_batch: int = 4096,
    ) -> None:
        same = policy_tokenizer.fingerprint() == reward_tokenizer.fingerprint()
        super().__init__(scorer, has_same_tokenizer=same, max_tokens_per_batch=max_tokens_per_batch)
        self._tokenizer = reward_tokenizer

    def _sequence(self, prompt: Prompt, response: str, rollout: Rollout) -> IntArray:
        tokens = super()._sequence(prompt, response, rollout)
        limit = self._tokenizer.max_tokens
        if limit is not None and len(tokens) > limit:
            raise RewardError(
                f"reward.model: row {prompt.id}: prompt and response are {len(tokens)} of its tokens, and it reads "
                f"{limit}. Lower rollout.max_prompt_tokens or rollout.max_response_tokens."
            )
        return tokens

    def _tokenize(self, prompt: Prompt, response: str, rollout: Rollout) -> IntArray:
        return np.array(self._token_ids(prompt, response), dtype=np.int64)

    def _token_ids(self, prompt: Prompt, response: str) -> list[int]:
        if not isinstance(prompt.metadata.get("messages"), list):
            return self._tokenizer.encode_pair(prompt.text, response)
        turns, _ = conversation_of(prompt.metadata)
        chat = self._tokenizer.encode_chat([*turns, Message(role="assistant", content=response)])
        return chat or self._tokenizer.encode_pair("\n".join(turn.content for turn in turns), response)

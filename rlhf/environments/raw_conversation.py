"""A conversation whose environment writes all text between the turns itself, marks of turns included."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf.environments.calls import Said
from rlhf.environments.conversation import Conversation
from rlhf.types import IntArray, Message, Rollout


class RawConversation(Conversation):
    """Nothing is rendered: what the environment says is encoded as it is and follows the turn."""

    def add_turn(self, rollout: Rollout, *, is_learned: bool = True) -> tuple[str, Said]:
        """See `Conversation.add_turn`. The text has the token that ends it."""
        text, said = super().add_turn(rollout, is_learned=is_learned)
        return text + self._unended, replace(said, text=text + self._unended)

    def world_tokens(self, said: Sequence[Message]) -> tuple[str, IntArray]:
        """All text so far with what was said, and the tokens of that."""
        between = "".join(message.content for message in said)
        ids = self._tokenizer.encode(between) if between else []
        return self.rendered_text + between, np.array(ids, dtype=np.int64)

    def clean(self, text: str) -> str:
        """The text as it is: its special tokens are meant."""
        return text

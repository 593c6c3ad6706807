"""Which rules hold for the episodes of a row, where a run has several environments."""

from dataclasses import dataclass

from rlhf.engines.base import Tokenizer
from rlhf.environments.calls import CallFormat
from rlhf.environments.conversation import Conversation
from rlhf.environments.episode import EpisodeLimits, Rules
from rlhf.environments.raw_conversation import RawConversation
from rlhf.environments.spec import Described
from rlhf.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRules:
    """What all episodes of a run share."""

    tokenizer: Tokenizer
    described: Described
    format: CallFormat
    """In which turns are written."""
    limits: EpisodeLimits

    def of(self, prompt: Prompt) -> Rules:
        """The rules for a row. Raises EnvironmentNameError."""
        world = self.described.of(prompt.metadata)
        return Rules(
            tokenizer=self.tokenizer,
            described=world,
            format=self.format,
            limits=self.limits,
            conversation=RawConversation if world.raw_text else Conversation,
        )

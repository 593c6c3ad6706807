"""Tools and environments in commands that sample in their own process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from rlhf.config.data import DataSection
from rlhf.config.rollout import EpisodeSection
from rlhf.conversations.messages import as_json
from rlhf.engines.base import RolloutEngine, Tokenizer
from rlhf.errors import DataError
from rlhf.launch.agents import episode_engine, load_world, make_rules, missing_columns, require_reset, require_template
from rlhf.launch.data import load_world_prompts
from rlhf.orchestrator.data import DataSplit
from rlhf.repair import Repair
from rlhf.terminal import tell
from rlhf.types import Json, Message, Prompt

NO_LIMIT = 2**31
"""Tokens of all segments of a response with their prompts: nothing is learned from it."""


class SampledWorld:
    """Tools and environment as a training run has them; without any, responses are single turns."""

    def __init__(self, section: EpisodeSection) -> None:
        """Raises ConfigError where they cannot be loaded."""
        self._section = section
        self._world = load_world(section)

    def tools(self, prompt: Prompt) -> tuple[Json, ...]:
        """Schemas of the tools that a prompt was rendered with."""
        return () if self._world is None else self._world.of(prompt.metadata).tools

    @property
    def has_episodes(self) -> bool:
        """Whether responses have several turns."""
        return self._world is not None

    @property
    def renders_turns(self) -> bool:
        """Whether the chat template writes what stands between turns."""
        return self._world is not None and not self._world.raw_text

    def load_prompts(self, data: DataSection, tokenizer: Tokenizer, max_prompt_tokens: int) -> DataSplit[Prompt]:
        """See `load_world_prompts`."""
        return load_world_prompts(data, self._section, tokenizer, max_prompt_tokens, self._world)

    def prompts_of_texts(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[Prompt]:
        """Texts as users' messages, for responses of several turns. Raises as `load_world_prompts` does."""
        assert self._world is not None, "the caller asked"
        require_template(self._world, tokenizer)
        if len(self._world.worlds) > 1:
            raise DataError("rollout.environment: a text names none of several. Give rows, --prompts ROWS.jsonl.")
        is_open, tools = bool(self._section.environment), self._world.worlds[0].tools
        prompts = []
        for index, text in enumerate(texts):
            message = Message(role="user", content=text)
            shown = tokenizer.render([message], add_generation_prompt=not is_open, tools=tools)
            ids = np.array(tokenizer.encode(shown), dtype=np.int64)
            metadata: dict[str, Json] = {"messages": [as_json(message)]}
            prompts.append(Prompt(id=str(index), token_ids=ids, text=shown, metadata=metadata))
        if lacking := missing_columns(self._world, prompts):
            raise DataError([*lacking, "A text has no columns: give rows, --prompts ROWS.jsonl."])
        require_reset(self._section, prompts[0])
        return prompts

    @contextmanager
    def playing(
        self, engine: RolloutEngine, tokenizer: Tokenizer, prompts: Sequence[Prompt], context: int
    ) -> Iterator[RolloutEngine]:
        """Inside, an engine whose responses are episodes with each turn by `engine`, which takes `context` tokens, or
        `engine` itself where there are none. An environment that fails is told in a line."""
        if self._world is None:
            yield engine
            return
        rules = make_rules(self._section, self._world, tokenizer, context=context, max_tokens=NO_LIMIT)
        episodes = episode_engine(self._section, engine, rules, prompts, _tell)
        try:
            yield episodes
        finally:
            episodes.close()


def _tell(repair: Repair) -> None:
    tell([f"rlhf: warning: {repair.text}"])

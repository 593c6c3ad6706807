"""Plays episodes with real processes of tools and environments, and an engine that follows a script."""

import json
from collections.abc import Callable
from dataclasses import replace

from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.environments.calls import find_parser, no_calls
from rlhf.environments.engine import EpisodeEngine, FaultPolicy, _by_content
from rlhf.environments.episode import EpisodeLimits, Rules
from rlhf.environments.host import describe
from rlhf.environments.spec import WorldSpec
from rlhf.episode import EpisodeRollout
from rlhf.repair import Repair
from rlhf.types import Json, Rollout
from tests.unit.environments.support import Script, ScriptedEngine, byte_tokenizer, make_prompt, make_request

HERE = "tests.unit.environments.agent_tools:"
TOKENIZER = byte_tokenizer()


def call(name: str, **arguments: Json) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Play:
    """Plays episodes with tools and an environment."""

    def __init__(
        self,
        script: Script,
        *tools: str,
        environment: str | None = None,
        tokenizer: HfTokenizer = TOKENIZER,
        **settings: object,
    ) -> None:
        self.tokenizer = tokenizer
        named = tuple(HERE + name for name in tools)
        self.spec = WorldSpec(tools=named, environment=None if environment is None else HERE + environment)
        self.described = describe(self.spec)
        self.prompt = make_prompt(self.tokenizer, tools=self.described.tools, is_open=environment is not None)
        self.engine = ScriptedEngine(tokenizer, script)
        self.repairs: list[Repair] = []
        limits = {"max_turns": 4, "max_turn_tokens": None, "max_tool_response_tokens": 40, "max_tokens": 100}
        faults = {"timeout_s": 10.0, "num_retries": 1, "on_error": "drop"}
        self.episodes = EpisodeEngine(
            self.engine,
            self.spec,
            Rules(
                tokenizer=tokenizer,
                described=self.described,
                parser=find_parser(tokenizer, self.described.tools) if self.described.tools else no_calls,
                limits=EpisodeLimits(**{name: settings.get(name, value) for name, value in limits.items()}),  # type: ignore[arg-type]
            ),
            FaultPolicy(**{name: settings.get(name, value) for name, value in faults.items()}),  # type: ignore[arg-type]
            [self.prompt],
            num_processes=1,
            repaired=self.repairs.append,
        )

    def row(self, **columns: Json) -> "Play":
        """The same prompt with other columns."""
        given = make_prompt(self.tokenizer, tools=self.described.tools, is_open=True)
        self.prompt = replace(given, metadata={**given.metadata, **columns})
        self.episodes._prompts = _by_content([self.prompt])
        return self

    def once(self, name: str = "1/row 1/0", *, max_tokens: int = 4000) -> EpisodeRollout:
        (future,) = self.episodes.submit([make_request(self.prompt, name, max_tokens=max_tokens)])
        rollout = future.result(50)
        assert isinstance(rollout, EpisodeRollout)
        return rollout

    def text(self, rollout: Rollout) -> str:
        return self.tokenizer.decode(rollout.token_ids.tolist(), skip_special_tokens=False)


Make = Callable[..., Play]


def says(*turns: str) -> Script:
    return lambda seen, turn: turns[turn]

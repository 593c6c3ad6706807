"""Plays episodes with real processes of tools and environments, and an engine that follows a script."""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.environments.engine import EpisodeEngine, FaultPolicy, _by_content
from rlhf.environments.episode import EpisodeLimits
from rlhf.environments.host import describe
from rlhf.environments.routing import RunRules
from rlhf.environments.session import LocalSessions, Sessions
from rlhf.environments.spec import WorldSpec
from rlhf.episode import EpisodeRollout
from rlhf.launch.agents import call_format
from rlhf.repair import Repair
from rlhf.types import Json, Rollout
from tests.unit.environments.support import Script, ScriptedEngine, byte_tokenizer, make_prompt, make_request

FOLDER = "tests.unit.environments."
HERE = f"{FOLDER}agent_tools:"
TOKENIZER = byte_tokenizer()


def call(name: str, **arguments: Json) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Play:
    """Plays episodes with tools and an environment, of `agent_tools` or where `module:name` says."""

    def __init__(
        self,
        script: Script,
        *tools: str,
        environment: str | tuple[str, ...] = (),
        agent: str | None = None,
        tokenizer: HfTokenizer = TOKENIZER,
        **settings: object,
    ) -> None:
        """`sessions` opens them elsewhere than in one process of this node."""
        self.tokenizer = tokenizer
        given = (environment,) if isinstance(environment, str) else environment
        self.spec = WorldSpec(tools=tuple(map(_whole, tools)), environments=tuple(map(_whole, given)), agent=agent)
        self.described = describe(self.spec)
        self.tools = self.described.worlds[0].tools
        self.prompt = make_prompt(self.tokenizer, tools=self.tools, is_open=bool(given))
        self.engine = ScriptedEngine(tokenizer, script)
        self.repairs: list[Repair] = []
        limits = {
            "max_turns": 4,
            "max_turn_tokens": None,
            "max_tool_response_tokens": 40,
            "context": 4000,
            "max_tokens": 100,
        }
        faults = {"num_retries": 1, "on_error": "drop"}
        self.episodes = EpisodeEngine(
            self.engine,
            self.spec,
            RunRules(
                tokenizer=tokenizer,
                described=self.described,
                format=call_format(self.described, tokenizer),
                limits=EpisodeLimits(**{name: settings.get(name, value) for name, value in limits.items()}),  # type: ignore[arg-type]
            ),
            FaultPolicy(**{name: settings.get(name, value) for name, value in faults.items()}),  # type: ignore[arg-type]
            [self.prompt],
            settings.get("sessions", local_sessions)(self.spec, float(str(settings.get("timeout_s", 10.0)))),  # type: ignore[operator]
            repaired=self.repairs.append,
        )

    def row(self, **columns: Json) -> "Play":
        """The same prompt with other columns."""
        met = self.described.of(columns)
        given = make_prompt(self.tokenizer, tools=met.tools, is_open=True)
        self.prompt = replace(given, metadata={**given.metadata, **columns})
        self.episodes._prompts = _by_content([self.prompt])
        return self

    def submit(self, name: str = "1/row 1/0", *, max_tokens: int = 4000) -> "Future[Rollout]":
        (future,) = self.episodes.submit([make_request(self.prompt, name, max_tokens=max_tokens)])
        return future

    def once(self, name: str = "1/row 1/0", *, max_tokens: int = 4000) -> EpisodeRollout:
        rollout = self.submit(name, max_tokens=max_tokens).result(50)
        assert isinstance(rollout, EpisodeRollout)
        return rollout

    def started(self) -> "tuple[Future[Rollout], str]":
        """An episode of a user's own loop under way, and its URL."""
        future, endpoint = self.submit(), self.episodes._endpoint
        assert endpoint is not None
        while not endpoint._sessions:
            time.sleep(0.05)
        (secret,) = endpoint._sessions
        return future, f"http://127.0.0.1:{endpoint._port}/{secret}/v1"

    def text(self, rollout: Rollout) -> str:
        return self.tokenizer.decode(rollout.token_ids.tolist(), skip_special_tokens=False)


def local_sessions(spec: WorldSpec, timeout_s: float) -> Sessions:
    return LocalSessions(spec, num_processes=1, timeout_s=timeout_s)


def _whole(name: str) -> str:
    return (FOLDER if ":" in name else HERE) + name


Make = Callable[..., Play]


def says(*turns: str) -> Script:
    return lambda seen, turn: turns[turn]

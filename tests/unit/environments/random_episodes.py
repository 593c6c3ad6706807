"""Episodes with a policy and a world that say anything: calls, thoughts, odd spaces, any script, broken calls."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from rlhf.conversations.messages import REASONING
from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.environments.calls import Call, CallFormat
from rlhf.environments.episode import EpisodeLimits, EpisodeRun, Rules
from rlhf.environments.formats.known import Written, find_format, written_turn
from rlhf.environments.session import Reply
from rlhf.environments.spec import EpisodeWorld
from rlhf.environments.transcript import Transcript
from rlhf.episode import EpisodeRollout
from rlhf.types import FinishReason, IntArray, Json, Message, Rollout, RolloutRequest
from tests.unit.environments.support import make_prompt, make_request

PIECES = (
    *(
        "a",
        "The answer",
        " is 42",
        "No.",
        "\n",
        "\n\n",
        "  ",
        "\t",
        " \n ",
        "{",
        '{"name": "x"}',
        "'",
        '"',
        "\\",
        "</s",
    ),
    *("\u65e5\u672c\u8a9e", "\U0001f642", "e\u0301", "\u0645\u0631", "\u200d", "\u00a0"),
    *("&amp;", "<b>", "|", "#", "```json", "0", "<"),
)
PROPERTIES: dict[str, Json] = {
    "text": {"type": "string", "description": "a text"},
    "count": {"type": "integer", "description": "a number"},
    "flag": {"type": "boolean", "description": "yes or no"},
    "words": {"type": "array", "items": {"type": "string"}, "description": "texts"},
    "inner": {"type": "object", "properties": {"text": {"type": "string"}}, "description": "an object"},
    "either": {"anyOf": [{"type": "string"}, {"type": "null"}], "type": "string", "description": "a text or none"},
}
NAMES = ("lookup", "search_web", "f")
TOOLS: tuple[Json, ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name}.",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": ["text"]},
        },
    }
    for name in NAMES
)


@dataclass(kw_only=True)
class Speaker:
    """Says random things."""

    random: random.Random

    def text(self, most: int = 8) -> str:
        return "".join(self.random.choices(PIECES, k=self.random.randint(0, most)))

    def plain(self, most: int = 8) -> str:
        """A text without spaces around it, which templates write as it is, and that begins no call."""
        return f"So {self.text(most)} on."

    def call(self) -> Call:
        made: dict[str, Json] = {
            "text": self.plain(4),
            "count": self.random.randint(-9, 99),
            "flag": self.random.random() < 0.5,
            "words": [self.plain(2) for _ in range(self.random.randint(1, 2))],
            "inner": {"text": self.plain(2)},
            "either": self.random.choice(["12", "true", self.plain(2)]),
        }
        kept = [name for name in made if name == "text" or self.random.random() < 0.4]
        return Call(name=self.random.choice(NAMES), arguments={name: made[name] for name in kept})


@dataclass(kw_only=True)
class Policy(Speaker):
    """The model. It writes turns as the chat template does, or, if it is `odd`, also in any other way. `served` are the
    tokens of each turn: what it read, and what it wrote."""

    tokenizer: HfTokenizer
    form: CallFormat
    tools: Sequence[Json]
    odd: bool
    one_call: bool
    served: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    is_split: bool = False
    """Whether it wrote tokens that its text does not encode to."""

    async def sample(self, request: RolloutRequest) -> Rollout:
        text, end = self._turn()
        ids = self.tokenizer.encode(text)
        if self.odd and self.random.random() < 0.2 and text:
            cut = self.random.randint(0, len(text))
            pieces = [*self.tokenizer.encode(text[:cut]), *self.tokenizer.encode(text[cut:])]
            self.is_split |= pieces != ids
            ids = pieces
        stopped = not self.odd or self.random.random() < 0.95
        ids += self.tokenizer.encode(end) if stopped else []
        written = np.array(ids, dtype=np.int64)
        self.served.append((request.prompt_token_ids, written))
        return Rollout(
            id=request.id,
            prompt_id=request.prompt_id,
            token_ids=written,
            log_probs=-np.ones(len(written), dtype=np.float32),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            weight_version=0,
        )

    def _turn(self) -> tuple[str, str]:
        calls = [self.call() for _ in range(self.random.choice([0, 1, 1, 1] if self.one_call else [0, 1, 1, 2]))]
        calls = calls if self.tools else []
        fields: dict[str, Json] = {REASONING[0]: self.plain()} if self.random.random() < 0.6 else {}
        if calls:
            fields["tool_calls"] = [
                {
                    "type": "function",
                    "id": f"call{n:05d}",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for n, call in enumerate(calls)
            ]
        written = self._written("" if calls else self.plain(), fields)
        if calls:
            assert self.form.read(written.text, self.tools).calls == tuple(calls), written.text
        text = self._oddly(written.text) if self.odd and self.random.random() < 0.4 else written.text
        return text, written.end or "<eos>"

    def _written(self, content: str, fields: Mapping[str, Json]) -> Written:
        """How the template writes a turn: with its thoughts, or without where it has no place for them, or with
        some where it begins them itself."""
        thoughts = dict(fields)
        silent = {key: value for key, value in fields.items() if key != REASONING[0]}
        for given in (thoughts, silent, {**fields, REASONING[0]: "Hm."}):
            turn = Message(role="assistant", content=content, fields=given)
            with suppress(ValueError):
                return written_turn(self.tokenizer, self.tools, turn)
        raise AssertionError(f"the template writes no {content} with {fields}")

    def _oddly(self, text: str) -> str:
        cut = self.random.randint(0, len(text))
        return self.random.choice([text[:cut], text[:cut] + self.text(3) + text[cut:], f" {text}", f"{text}\n", ""])


@dataclass(kw_only=True)
class World(Speaker):
    """Tools and an environment."""

    async def open(self, row: Mapping[str, Json]) -> str | None:
        return self.random.choice([None, self.plain()])

    async def step(self, text: str) -> Reply:
        return self._reply(self.plain())

    async def reward(self) -> float:
        return 1.0

    async def call_method(self, name: str, arguments: Json) -> Reply:
        return self._reply(self.text())

    async def call_function(self, name: str, arguments: Json) -> Reply:
        return self._reply(self.text())

    async def close(self) -> None: ...

    def _reply(self, text: str) -> Reply:
        return Reply(text=text + self.random.choice(["", "<eos>"]), terminated=self.random.random() < 0.1)


@dataclass(frozen=True, kw_only=True)
class Played:
    """An episode, and what the engine served for it."""

    rollout: EpisodeRollout
    transcript: Transcript
    prompt_ids: IntArray
    served: list[tuple[IntArray, IntArray]]
    is_split: bool


def play(tokenizer: HfTokenizer, seed: str, *, tools: Sequence[Json], odd: bool, one_call: bool = False) -> Played:
    """A random episode, always the same one for a seed: with tools where there are any, else with an environment that
    gets the text of each turn."""
    rng = random.Random(seed)
    form = find_format(tokenizer, tools)
    policy = Policy(random=rng, tokenizer=tokenizer, form=form, tools=tools, odd=odd, one_call=one_call)
    prompt = make_prompt(tokenizer, policy.plain(), tools=tools, is_open=not tools)
    rules = Rules(
        tokenizer=tokenizer,
        described=EpisodeWorld(tools=tuple(tools), steps=not tools),
        format=form,
        limits=EpisodeLimits(
            max_turns=rng.randint(1, 5),
            max_turn_tokens=None,
            max_tool_response_tokens=60,
            context=1_000_000,
            max_tokens=10_000_000,
        ),
    )
    request = make_request(prompt, max_tokens=1_000_000)
    run = EpisodeRun(rules, request, prompt, World(random=rng), policy.sample, has_environment=not tools)
    rollout = asyncio.run(run.run())
    return Played(
        rollout=rollout,
        transcript=run._transcript,
        prompt_ids=prompt.token_ids,
        served=policy.served,
        is_split=policy.is_split,
    )

"""A policy that says what a script says: for a dry run of an episode."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from rlhf.conversations.messages import REASONING
from rlhf.conversations.turns import LeftOutError
from rlhf.engines.base import Tokenizer
from rlhf.environments.formats.known import CALL, written_turn
from rlhf.environments.made_up_arguments import made_up_arguments
from rlhf.environments.spec import EpisodeWorld
from rlhf.types import FinishReason, FloatArray, Json, Message, PackedTokens, Rollout, RolloutRequest

SAID = "Yes."
"""What it says to an environment, and after it has called a tool."""
THOUGHT = "Let me see."
"""What it thinks where it must."""


class ScriptedPolicy:
    """Implements `RolloutEngine`: answers at once, each request with the next turn. Log-probs are 0."""

    def __init__(self, tokenizer: Tokenizer, turns: Sequence[Message], world: EpisodeWorld) -> None:
        """`turns` are written as the chat template writes them, or as they are where the environment writes all text
        around them; the last one is repeated. Raises RewrittenError, LeftOutError or DataError where it cannot."""
        self._turns = [_ids(tokenizer, turn, world) for turn in turns]
        self._num_asked = 0

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """See `RolloutEngine.submit`."""
        return [self._answer(request) for request in requests]

    def abort(self, request_ids: Collection[str]) -> None:
        """Nothing is in progress."""

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """See `RolloutEngine.score`."""
        return [np.zeros(len(one.token_ids), dtype=np.float32) for one in sequences]

    def sleep(self) -> None:
        """Nothing sleeps."""

    def wake(self) -> None:
        """Nothing sleeps."""

    def close(self) -> None:
        """Nothing to close."""

    def _answer(self, request: RolloutRequest) -> "Future[Rollout]":
        ids = self._turns[min(self._num_asked, len(self._turns) - 1)]
        self._num_asked += 1
        most = request.sampling.max_tokens
        future: Future[Rollout] = Future()
        future.set_result(
            Rollout(
                id=request.id,
                prompt_id=request.prompt_id,
                token_ids=np.array(ids[:most], dtype=np.int64),
                log_probs=np.zeros(len(ids[:most]), dtype=np.float32),
                finish_reason=FinishReason.STOP if len(ids) <= most else FinishReason.LENGTH,
                weight_version=0,
            )
        )
        return future


def script_for(described: EpisodeWorld) -> list[Message]:
    """The turns of a dry run: a call of the first tool where there is one, then a text."""
    said = Message(role="assistant", content=SAID)
    if not described.tools:
        return [said]
    (first, *_), name = described.tools, described.tool_names[0]
    assert isinstance(first, dict), "schemas are made by make_tool"
    function = first["function"]
    assert isinstance(function, dict), "schemas are made by make_tool"
    parameters = function.get("parameters")
    arguments: Json = made_up_arguments(parameters if isinstance(parameters, dict) else {})
    call: Json = [{"type": "function", "id": CALL.id, "function": {"name": name, "arguments": arguments}}]
    return [Message(role="assistant", content="", fields={"tool_calls": call}), said]


def _ids(tokenizer: Tokenizer, turn: Message, world: EpisodeWorld) -> list[int]:
    """A turn's tokens, up to and including the one that ends it."""
    if world.raw_text:
        return [*tokenizer.encode(turn.content), tokenizer.eos_token_id]
    try:
        written = written_turn(tokenizer, world.tools, turn)
    except LeftOutError:  # the template begins the model's thoughts itself
        turn = replace(turn, fields={REASONING[0]: THOUGHT, **turn.fields})
        written = written_turn(tokenizer, world.tools, turn)
    return [*tokenizer.encode(written.text), *(tokenizer.encode(written.end) or [tokenizer.eos_token_id])]

"""Rewards from the user's own Python function, which runs in a process of its own."""

import math
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rlhf.config.reward.arguments import (
    Argument,
    Binding,
    Column,
    Parameter,
    UnclearArgumentsError,
    Value,
    bind_arguments,
)
from rlhf.engines.process.repairs import log_repair
from rlhf.engines.rewards.function_process import ChildFailedError, ChildOverranError, FunctionProcess
from rlhf.engines.rewards.scores import checked_scores, listed
from rlhf.errors import ConfigError, RewardError
from rlhf.repair import Repaired
from rlhf.types import UNSCORED, Json, Prompt, Reward, Rollout

NUM_TRIES = 2
SEARCH_TIMEOUT_S = 10.0
MORE_TIME = "Fix the function, or give it more time: timeout_s of its source, under reward.sources."


class FunctionRaisedError(ChildFailedError):
    """The function raised an exception. Says which and where."""

    @property
    def kind(self) -> str:
        """Place and class of the exception, without its message."""
        return str(self).split(": ")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Responses to score, with what is known of each."""

    prompts: Sequence[Prompt]
    responses: Sequence[str]
    rollouts: Sequence[Rollout]
    binding: Binding

    def request(self, rows: slice) -> dict[str, Json]:
        """The request to the child for some of the responses."""
        return {
            "placed": [self._values(value, rows) for _, value in self.binding.placed],
            "named": {name: self._values(value, rows) for name, value in self.binding.named.items()},
            "each": self.binding.each,
            "count": len(self.responses[rows]),
        }

    def _values(self, value: Value, rows: slice) -> list[Json]:
        """One entry for each of the responses `rows`."""
        prompts, responses = self.prompts[rows], self.responses[rows]
        if isinstance(value, Column):
            return [column_of(prompt, value) for prompt in prompts]
        known: dict[Argument, list[Json]] = {
            "prompts": [prompt.text for prompt in prompts],
            "responses": list(responses),
            "queries": [prompt.text + response for prompt, response in zip(prompts, responses, strict=True)],
            "labels": [prompt.label for prompt in prompts],
            "token_ids": [rollout.token_ids.tolist() for rollout in self.rollouts[rows]],
            "empty": [{} for _ in prompts],
        }
        return known[value]


def column_of(prompt: Prompt, column: Column) -> Json:
    """The value of a column in a prompt's row; None if the row has none."""
    value = prompt.metadata.get(column.name)
    if column.inner is None:
        return value
    return value.get(column.inner) if isinstance(value, dict) else None


class FunctionReward:
    """Scores by `module:name`, whose parameters get what their names mean (`bind_arguments`).

    One batch may take `timeout_s`; a process that takes longer or dies is replaced, and the batch is tried once more.
    Raises ConfigError if the function cannot be used, RewardError if it fails.
    """

    def __init__(
        self,
        function: str,
        *,
        timeout_s: float = 60.0,
        memory_gib: float | None = None,
        network: bool = True,
        repaired: Repaired = log_repair,
    ) -> None:
        self._process = FunctionProcess(function, memory_gib=memory_gib, network=network, repaired=repaired)
        self._function = function
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        if not responses:
            return []
        call = Call(prompts=prompts, responses=responses, rollouts=rollouts, binding=self.binding_for(prompts))
        with self._lock:
            reply = self._try(call)
        return rewards_of(reply, [prompt.id for prompt in prompts])

    def binding_for(self, prompts: Sequence[Prompt]) -> Binding:
        """What the function gets from the rows of these prompts. Raises ConfigError if that is not clear."""
        return arguments_of(self._function, self._process.parameters, columns_of(prompts))

    def close(self) -> None:
        with self._lock:
            self._process.close()

    def _try(self, call: Call) -> dict[str, Json]:
        failure: ChildFailedError | None = None
        for _ in range(NUM_TRIES):
            try:
                reply = self._ask(call.request(slice(None)), self._timeout_s)
            except ChildFailedError as error:
                failure = error
                continue
            if failure is not None:
                process = "" if isinstance(failure, FunctionRaisedError) else " in a new process"
                self._process.tell(f"{failure}; its call was repeated{process}")
            return reply
        failing = self._failing_prompt(call, failure.kind) if isinstance(failure, FunctionRaisedError) else None
        where = failing or listed([prompt.id for prompt in call.prompts])
        advice = f" {MORE_TIME}" if isinstance(failure, ChildOverranError) else ""
        raise RewardError(f"reward: {failure} on {where} ({NUM_TRIES} of {NUM_TRIES} tries).{advice}") from failure

    def _ask(self, request: Mapping[str, Json], timeout_s: float) -> dict[str, Json]:
        """The reply with scores and parts."""
        reply = self._process.ask(request, timeout_s)
        if "raised" in reply:
            raise FunctionRaisedError(str(reply["raised"]))
        if "scores" not in reply:
            raise RewardError(f"reward: {reply.get('wrong', 'the function gave no reply')}.")
        return reply

    def _failing_prompt(self, call: Call, kind: str) -> str | None:
        """The prompt of the first response that alone makes the function fail in the same way; None if none is found in
        SEARCH_TIMEOUT_S."""
        deadline = time.monotonic() + SEARCH_TIMEOUT_S
        for index, prompt in enumerate(call.prompts):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            try:
                self._ask(call.request(slice(index, index + 1)), remaining)
            except FunctionRaisedError as error:
                if error.kind == kind:
                    return prompt.id
            except (ChildFailedError, RewardError):
                continue
        return None


def columns_of(prompts: Sequence[Prompt]) -> set[str]:
    """The columns of the prompts' rows, with `labels` if any row has a label."""
    columns = {name for prompt in prompts for name in prompt.metadata}
    return columns | {"labels"} if any(prompt.label is not None for prompt in prompts) else columns - {"labels"}


def arguments_of(function: str, parameters: Sequence[Parameter], columns: Collection[str]) -> Binding:
    """What a function gets from rows with these columns. Raises ConfigError if that is not clear."""
    try:
        return bind_arguments(function, parameters, sorted(columns))
    except UnclearArgumentsError as error:
        raise ConfigError(f"reward.function: {error}") from error


def rewards_of(reply: Mapping[str, Json], prompt_ids: Sequence[str]) -> list[Reward]:
    """The rewards in a child's reply: None as a score makes a reward that nothing is learned from."""
    scores, parts = reply["scores"], reply["parts"]
    assert isinstance(scores, list), "the child sends a list"
    assert isinstance(parts, dict), "the child sends an object"
    totals = iter(checked_scores([0.0 if score is None else score for score in scores], prompt_ids))
    logged = reply.get("logged", {})
    assert isinstance(logged, dict), "the child sends an object"
    reported = {name: value for name, value in logged.items() if isinstance(value, float)}
    named: list[dict[str, float]] = [{} for _ in prompt_ids]
    for name, values in parts.items():
        assert isinstance(values, list), "the child sends a list for each part"
        for one, value in zip(named, values, strict=True):
            if isinstance(value, float) and math.isfinite(value):
                one[name] = value
    return [
        Reward(total=total if score is not None else UNSCORED, parts=part, logged=reported)
        for total, score, part in zip(totals, scores, named, strict=True)
    ]

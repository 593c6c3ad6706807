"""Rewards from the user's own Python function, which runs in a process of its own."""

import threading
import time
from collections.abc import Mapping, Sequence

from rlhf.engines.rewards.function_process import ChildFailedError, ChildOverranError, FunctionProcess
from rlhf.engines.rewards.scores import checked_scores, listed
from rlhf.errors import ConfigError, RewardError
from rlhf.types import Json, Prompt, Reward, Rollout

NUM_TRIES = 2
SEARCH_TIMEOUT_S = 10.0
MORE_TIME = "Fix the function, or give it more time: timeout_s of its source, under reward.sources."
RESERVED = ("prompts", "responses", "labels")
"""Column names that are not passed on, because the function's own arguments have them."""


class FunctionRaisedError(ChildFailedError):
    """The function raised an exception. Says which and where."""

    @property
    def kind(self) -> str:
        """Place and class of the exception, without its message."""
        return str(self).split(": ")[0]


class FunctionReward:
    """Scores by `module:name`, a function (prompts, responses, **columns) -> list of numbers.

    Columns are lists with one entry for each response: `labels`, and the rows' other columns by name; a function gets
    those that it accepts. One batch may take `timeout_s`; a process that takes longer or dies is replaced, and the
    batch is tried once more. Raises ConfigError if the function cannot be used, RewardError if it fails.
    """

    def __init__(self, function: str, *, timeout_s: float = 60.0, memory_gib: float | None = None) -> None:
        self._process = FunctionProcess(function, memory_gib=memory_gib)
        self._function = function
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        if not responses:
            return []
        columns = self._columns(prompts)
        with self._lock:
            scores = self._try(prompts, responses, columns)
        ids = [prompt.id for prompt in prompts]
        return [Reward(total=score) for score in checked_scores(scores, ids)]

    def close(self) -> None:
        with self._lock:
            self._process.close()

    def _try(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Mapping[str, list[Json]]
    ) -> list[Json]:
        for _ in range(NUM_TRIES):
            try:
                return self._ask(prompts, responses, columns, self._timeout_s)
            except ChildFailedError as error:
                failure = error
        failing = None
        if isinstance(failure, FunctionRaisedError):
            failing = self._failing_prompt(prompts, responses, columns, failure.kind)
        where = failing or listed([prompt.id for prompt in prompts])
        advice = f" {MORE_TIME}" if isinstance(failure, ChildOverranError) else ""
        raise RewardError(f"reward: {failure} on {where} ({NUM_TRIES} of {NUM_TRIES} tries).{advice}") from failure

    def _ask(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        columns: Mapping[str, list[Json]],
        timeout_s: float,
    ) -> list[Json]:
        request: dict[str, Json] = {
            "prompts": [prompt.text for prompt in prompts],
            "responses": list(responses),
            "columns": dict(columns),
        }
        reply = self._process.ask(request, timeout_s)
        if "raised" in reply:
            raise FunctionRaisedError(str(reply["raised"]))
        scores = reply.get("scores")
        if not isinstance(scores, list):
            raise RewardError(f"reward: {reply.get('wrong', 'the function gave no reply')}.")
        return scores

    def _failing_prompt(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Mapping[str, list[Json]], kind: str
    ) -> str | None:
        """The prompt of the first response that alone makes the function fail in the same way; None if none is found in
        SEARCH_TIMEOUT_S."""
        deadline = time.monotonic() + SEARCH_TIMEOUT_S
        for index, prompt in enumerate(prompts):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            one = {name: values[index : index + 1] for name, values in columns.items()}
            try:
                self._ask([prompt], [responses[index]], one, remaining)
            except FunctionRaisedError as error:
                if error.kind == kind:
                    return prompt.id
            except (ChildFailedError, RewardError):
                continue
        return None

    def _columns(self, prompts: Sequence[Prompt]) -> dict[str, list[Json]]:
        """The columns that the function accepts. Raises ConfigError if it needs one that the rows do not have."""
        names = dict.fromkeys(name for prompt in prompts for name in prompt.metadata)
        columns: dict[str, list[Json]] = {
            name: [prompt.metadata.get(name) for prompt in prompts] for name in names if name not in RESERVED
        }
        columns["labels"] = [prompt.label for prompt in prompts]
        missing = sorted(self._process.needs - set(columns))
        if missing:
            raise ConfigError(
                f"reward.function: {self._function} needs {', '.join(missing)}, which the rows do not have "
                f"(have {', '.join(sorted(columns))})."
            )
        takes = self._process.takes
        return {name: values for name, values in columns.items() if takes is None or name in takes}

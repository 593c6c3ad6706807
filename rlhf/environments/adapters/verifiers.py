"""Environments of verifiers as agents: `verifiers://glossary?agent.max_turns=4`, and their tasks as rows.

python -m rlhf.environments.adapters.verifiers glossary --num-rows 500 --out tasks.jsonl
rlhf train grpo ... --data.path tasks.jsonl --rollout.agent verifiers://glossary

The environment runs its episode itself, against the session's endpoint, and scores it by the rewards of its task.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from pydantic import ValidationError
from verifiers.v1.utils.compile import validate_pairing

from rlhf.environments.adapters import verifiers_harness, with_options
from rlhf.environments.agent import Agent, AgentSession
from rlhf.environments.environment import Result
from rlhf.types import Json

NO_OWN_HARNESS, CONVERSATION = "bash", "null"
"""What verifiers plays an environment with that names none, and its plain conversation."""
HARNESS = "rlhf_conversation"
"""What verifiers imports where a harness of this name is asked for."""


def agent(what: str) -> Agent:
    """An environment by the name of its package, with settings as `vf-eval` names them after `--env.`. Raises
    ValueError where there is none, its settings are wrong or it has several agents."""
    env = _environment(what)
    make_task, make_data = env.taskset.task_type(), env.taskset.task_type().data_type()
    services = _Services(env)

    async def run(session: AgentSession, row: dict[str, Json]) -> Result:
        """One episode on the task of a row."""
        if "task" not in row:
            raise ValueError(f"the row has no task; make rows with python -m {__name__} {what} --out tasks.jsonl")
        task = make_task(make_data.model_validate(row["task"]), env.config.taskset.task)
        # A name that no variable has: the user's key for other endpoints is not for this one.
        client = vf.EvalClientConfig(base_url=session.base_url, api_key_var="")
        await services.start()
        return _result(await env.run_episode(task, vf.ModelContext(model=session.model, client=client)))

    return run


def rows(what: str, num_rows: int) -> Iterator[dict[str, object]]:
    """The first tasks of an environment, each with what it is made of. Raises ValueError as `agent` does."""
    for task in _environment(what).taskset.take(num_rows):
        data = task.data
        messages = verifiers_harness.messages_of(data.system_prompt, data.prompt)
        # Where the environment opens the conversation, it is not known yet.
        prompt: object = messages or data.description or data.name or f"task {data.idx}"
        yield {"prompt": prompt, "task": data.model_dump(mode="json", exclude_defaults=True)}


class _Services:
    """What the episodes of a process share: servers of tools that are the taskset's. They end with the process."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._serving: Any = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        async with self._lock:
            if self._serving is None:
                serving = self._env.serving()
                await serving.__aenter__()
                # It would keep a client for the URL of each session, and there are as many as episodes. Without it each
                # episode has its own, and closes it.
                self._env._interception = None
                self._serving = serving


def _environment(what: str) -> Any:
    name, options = with_options(what)
    given: dict[str, Any] = {"taskset": {"id": name}}
    for key, value in options.items():
        *path, last = key.split(".")
        inner = given
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    try:
        config = vf.resolve_env_config(given)
        agents = [field for field, value in config if isinstance(value, vf.AgentConfig)]
        if len(agents) != 1:
            raise ValueError(f"{name} has the agents {', '.join(agents)}; an environment of one agent is needed")
        env = vf.load_environment(_configured(config, agents[0]))
    except ValidationError as error:
        said = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False)]
        raise ValueError(f"settings of {name}: {'; '.join(said)}") from error
    except (ImportError, AttributeError, TypeError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"{' '.join(str(error).split())}{cause}") from error
    used = getattr(env.config, agents[0])
    validate_pairing(vf.load_harness(used.harness), env.taskset.task_type(), used.runtime)
    return env


def _configured(config: Any, role: str) -> Any:
    """An environment's settings with an agent that runs here, in place of a sandbox that is rented, and talks."""
    given = getattr(config, role)
    harness = given.harness or vf.default_agent_harness(config.taskset.id)
    changed: dict[str, object] = {"harness": harness}
    if harness.id == CONVERSATION or (given.harness is None and harness.id == NO_OWN_HARNESS):
        sys.modules[HARNESS] = verifiers_harness
        changed["harness"] = vf.HarnessConfig(id=HARNESS, tool_timeout=harness.tool_timeout)
    if "runtime" not in given.model_fields_set:
        changed["runtime"] = vf.SubprocessConfig()
    return config.model_copy(update={role: given.model_copy(update=changed)})


def _result(episode: Any) -> Result:
    """What an episode gave. Raises RuntimeError where it failed, and where there is no one reward."""
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not episode.ok:
        raise RuntimeError(f"{errors[-1].type}: {errors[-1].message}" if errors else "the episode failed")
    if len(episode.traces) != 1:
        raise RuntimeError(f"the agent ran {len(episode.traces)} times, and one run is learned from")
    (trace,) = episode.traces
    rewards = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
    return Result(
        reward=trace.reward,
        truncated=trace.is_truncated or trace.is_timeout,
        info={**trace.metrics, **rewards},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write rows to a file."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="Tasks of verifiers as rows.")
    parser.add_argument("name", metavar="NAME", help="package of the environment, also with settings: NAME?KEY=VALUE")
    parser.add_argument("--num-rows", type=int, default=500, help="most tasks")
    parser.add_argument("--out", type=Path, required=True, help="file of rows (.jsonl)")
    given = parser.parse_args(arguments)
    try:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(given.name, given.num_rows)]
    except ValueError as error:
        parser.error(str(error))
    given.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()

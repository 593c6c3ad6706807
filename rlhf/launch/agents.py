"""Tools and environments of a run: loaded and tried before anything starts, and the engine that runs episodes."""

from collections.abc import Mapping, Sequence

from rlhf.config.commands import OnlineConfig
from rlhf.config.rollout import EpisodeSection, RolloutSection
from rlhf.engines.base import RolloutEngine, Tokenizer
from rlhf.environments.calls import NO_CALLS, CallFormat
from rlhf.environments.engine import EpisodeEngine, FaultPolicy
from rlhf.environments.episode import EpisodeLimits, row_of
from rlhf.environments.formats.known import find_format, rewritten_turn
from rlhf.environments.host import describe, try_reset
from rlhf.environments.routing import RunRules
from rlhf.environments.session import LocalSessions, Sessions
from rlhf.environments.spec import (
    Described,
    EnvironmentNameError,
    EpisodeWorld,
    WorldSpec,
    named_environment,
)
from rlhf.errors import ConfigError
from rlhf.orchestrator.data import EpisodePrompts
from rlhf.orchestrator.data.problems import RowError
from rlhf.repair import Repaired
from rlhf.terminal import counted
from rlhf.types import Json, Prompt

MAX_NAMED_ROWS = 3


def world_spec(section: EpisodeSection) -> WorldSpec:
    """What the processes of tools and environments load."""
    return WorldSpec(
        tools=section.tools,
        environments=section.environment,
        agent=section.agent,
        memory_gib=section.environment_memory_gib,
        network=section.environment_network,
        max_processes=section.environment_max_processes,
    )


def load_world(section: EpisodeSection) -> Described | None:
    """Import tools and environment in a process of their own; None where a run has none. Raises ConfigError with
    everything that is wrong with them."""
    return describe(world_spec(section)) if section.has_episodes else None


def episode_prompts(section: EpisodeSection, world: Described) -> EpisodePrompts | None:
    """How rows become prompts of a run's episodes; None for as all prompts do, where environments render nothing."""
    if world.raw_text:
        return None

    def tools(row: Mapping[str, Json]) -> tuple[Json, ...]:
        try:
            return world.of(row).tools
        except EnvironmentNameError as error:
            raise RowError(str(error)) from error

    return EpisodePrompts(tools=tools, world_first=bool(section.environment))


def describe_world(section: RolloutSection, world: Described) -> str:
    """One line for a check."""
    workers = section.environment_workers
    where = [f"they run in {counted(workers, 'worker')}, on any node"] if workers else []
    return f"rollout: {'; '.join([*map(_describe, world.worlds), *where])}."


def _describe(world: EpisodeWorld) -> str:
    if world.runs:
        return f"{world.environment} runs the episodes"
    tools = f"tools {', '.join(world.tool_names)}" if world.tools else ""
    steps = "steps through the turns" if world.steps else ""
    rewards = "a reward at the end" if world.rewards else ""
    said = ", ".join(part for part in (tools, steps, rewards) if part)
    return ": ".join(part for part in (world.environment, said) if part)


def missing_columns(world: Described, prompts: Sequence[Prompt]) -> list[str]:
    """The rows that lack a column that the environment's `reset` needs, a line for each of the first ones."""
    lacking = [
        f"data: row {prompt.id} has no {name}, which {met.environment}.reset needs."
        for prompt in prompts
        for met in [world.of(prompt.metadata)]
        for name in met.required
        if name not in prompt.metadata and name != "prompt_text" and not (name == "label" and prompt.label is not None)
    ]
    more = [f"data: {len(lacking) - MAX_NAMED_ROWS} more rows like these."] if len(lacking) > MAX_NAMED_ROWS else []
    return [*lacking[:MAX_NAMED_ROWS], *more]


def first_of_each(world: Described, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first row of each environment that has any."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(world.of(prompt.metadata).environment, prompt)
    return list(found.values())


def require_reset(section: EpisodeSection, prompt: Prompt) -> None:
    """Raise ConfigError where the environment cannot begin with a row."""
    if not section.environment:
        return
    name = section.environment[0]
    if len(section.environment) > 1:
        name = named_environment(section.environment, prompt.metadata)
    failure = try_reset(world_spec(section), row_of(prompt), section.environment_timeout_s)
    if failure:
        raise ConfigError(f"rollout.environment: {name}.reset on row {prompt.id}: {failure}.")


def describe_episodes(config: OnlineConfig, world: Described, tokenizer: Tokenizer) -> list[str]:
    """Lines for a check: tools and environment, and whether responses will have several segments. Raises ModelError
    where the chat template takes no message after a turn."""
    said = [describe_world(config.rollout, world)]
    if how := rewritten_turns(world, tokenizer):
        said.append(
            f"rollout: the chat template rewrites a turn once another message follows ({how}). A response then goes on "
            "in another segment, which repeats the conversation, as long as all segments together have room in "
            f"train.max_tokens_per_micro_batch ({config.train.max_tokens_per_micro_batch})."
        )
    return said


def rewritten_turns(world: Described, tokenizer: Tokenizer) -> str:
    """How the chat template rewrites turns that others follow; empty where it does not. Raises ModelError where it
    takes no message after a turn."""
    asked = [(met.tools, "tool") for met in world.worlds if met.tools]
    asked += [(met.tools, "user") for met in world.worlds if met.steps and not met.raw_text]
    return next((how for tools, role in asked if (how := rewritten_turn(tokenizer, tools, role))), "")


def require_template(world: Described, tokenizer: Tokenizer) -> None:
    """Raise ModelError where the chat template takes no message after a turn, or writes calls in a form that is not
    known."""
    call_format(world, tokenizer)
    rewritten_turns(world, tokenizer)


def call_format(world: Described, tokenizer: Tokenizer) -> CallFormat:
    """The form of turns, with calls where there are tools. Raises ModelError where the chat template writes calls in
    one that is not known."""
    if any(met.raw_text for met in world.worlds):
        return NO_CALLS
    return find_format(tokenizer, next((met.tools for met in world.worlds if met.tools), ()))


def make_rules(
    section: EpisodeSection, world: Described, tokenizer: Tokenizer, *, context: int, max_tokens: int
) -> RunRules:
    """What all episodes share. `context` are the tokens that the engine takes, `max_tokens` those of all segments of a
    response with their prompts. Raises ModelError where the chat template writes calls in a form that is not known."""
    return RunRules(
        tokenizer=tokenizer,
        described=world,
        format=call_format(world, tokenizer),
        limits=EpisodeLimits(
            max_turns=section.max_turns,
            max_turn_tokens=section.max_turn_tokens,
            max_tool_response_tokens=section.max_tool_response_tokens,
            context=context,
            max_tokens=max_tokens,
        ),
    )


def local_sessions(section: EpisodeSection) -> LocalSessions:
    """Tools and environments in processes of this node."""
    return LocalSessions(
        world_spec(section), num_processes=section.environment_processes, timeout_s=section.environment_timeout_s
    )


def episode_engine(
    section: EpisodeSection,
    engine: RolloutEngine,
    rules: RunRules,
    prompts: Sequence[Prompt],
    repaired: Repaired,
    sessions: Sessions | None = None,
) -> EpisodeEngine:
    """An engine whose responses are episodes, with each turn by `engine`. `prompts` are all of the run; without
    `sessions`, tools and environments run on this node."""
    return EpisodeEngine(
        engine,
        world_spec(section),
        rules,
        FaultPolicy(num_retries=section.environment_retries, on_error=section.on_environment_error),
        prompts,
        sessions or local_sessions(section),
        repaired=repaired,
    )

"""Rules of online methods."""

import math
from collections import Counter
from collections.abc import Iterator

from rlhf.config.algo import CriticFreeSection, PpoSection, critic_warmup_steps
from rlhf.config.commands import OnlineConfig, method_name, method_of
from rlhf.config.data import DataSection
from rlhf.config.environment_name import writes_raw_text
from rlhf.config.problems import Problem
from rlhf.config.reward import EnvironmentSource, OverlongSource, PrmSource, RewardSection, StartedSource
from rlhf.config.rollout import EpisodeSection, engines_that
from rlhf.config.rules.colocation import colocated_roles
from rlhf.config.rules.narrow import for_algorithm, for_config

LEAST_TEMPERATURE = 0.01
"""vLLM replaces any lower temperature except 0 by this one."""


def batches(config: OnlineConfig) -> Iterator[Problem]:
    """A step's responses are a whole number of optimizer steps."""
    if config.algo.is_one_update:
        return  # a rule of its own
    size, total = config.train.batch_size, config.examples_per_step
    keys = ("train.batch_size", "rollout.batch_size", "rollout.group_size")
    pairs = method_of(config).sequences_per_example == 2
    counted = "rollout.batch_size" if pairs else "rollout.batch_size*group_size"
    if total < size:
        text = f"{size} > {counted} = {total}: no step could ever run. Lower it to {total}."
        yield Problem(keys=keys, text=text)
    elif total % size:
        below, above = nearest_divisors(total, size)
        text = f"{size} does not divide {counted} = {total}. Nearest: {below} or {above}."
        yield Problem(keys=keys, text=text)


def nearest_divisors(total: int, size: int) -> tuple[int, int]:
    """The divisors of `total` just below and above `size`, which lies in [1, total]."""
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    divisors = [*small, *(total // n for n in reversed(small))]
    return max(n for n in divisors if n <= size), min(n for n in divisors if n >= size)


def sampling(config: OnlineConfig) -> Iterator[Problem]:
    """Sampling explores, and the engine supports the settings."""
    rollout = config.rollout
    if rollout.temperature == 0.0:
        equal = f" and makes all {rollout.group_size} responses to a prompt equal" if rollout.group_size > 1 else ""
        yield Problem(
            keys=("rollout.temperature",),
            text=f"0 is greedy{equal}: {method_name(config).upper()} learns from sampled responses, "
            "and needs > 0 (got 0).",
        )
    elif rollout.temperature < LEAST_TEMPERATURE:
        yield Problem(
            keys=("rollout.temperature",),
            text=f"vLLM samples at {LEAST_TEMPERATURE} for any lower temperature, and ratios would compare two "
            f"policies; needs >= {LEAST_TEMPERATURE} (got {rollout.temperature:g}).",
        )
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := rollout.model_dump()[name]) > 1 and not rollout.expected_traits.spreads:
            others = " or ".join(engines_that(lambda engine: engine.spreads))
            yield Problem(
                keys=(f"rollout.{name}", "rollout.engine"),
                text=f"the {rollout.engine} engine runs on one device (got {size}). Use engine {others}.",
            )
    if rollout.expert_parallel and rollout.tensor_parallel_size == 1:
        yield Problem(
            keys=("rollout.expert_parallel", "rollout.tensor_parallel_size"),
            text="the experts of a layer are divided among tensor_parallel_size GPUs (got 1). Raise that, or set this "
            "to false.",
        )
    flags = config.cluster.colocate
    together = [flag for flag, roles in zip(flags, colocated_roles(flags), strict=True) if "rollout" in roles]
    if rollout.max_lag > 0 and together:
        yield Problem(
            keys=("rollout.max_lag", "cluster.colocate"),
            text=f"{rollout.max_lag} lets rollouts run while the policy trains, but --colocate {together[0]} puts both "
            f"on the same devices, which would do both at once. Set it to 0, or give rollout its own devices.",
        )


def stream(config: OnlineConfig) -> Iterator[Problem]:
    """Steps take as many groups as they can have."""
    rollout = config.rollout
    if rollout.oversample > 1.0 and rollout.order != "ready":
        yield Problem(
            keys=("rollout.oversample", "rollout.order"),
            text=f"{rollout.oversample:g} samples more groups than a step needs, and order fifo takes all in their "
            "order. Use order ready.",
        )
    if rollout.kv_cache == "keep" and not (rollout.max_lag and rollout.partial == "keep"):
        text = "keep has no effect: no response goes on over a weight sync. Set rollout.max_lag above 0, partial keep."
        yield Problem(keys=("rollout.kv_cache", "rollout.max_lag", "rollout.partial"), text=text)
    if rollout.kv_cache == "keep" and not rollout.expected_traits.continuous:
        text = f"the {rollout.engine} engine ends its batch before it takes new weights. Set recompute, or use vllm."
        yield Problem(keys=("rollout.kv_cache", "rollout.engine"), text=text)
    shares_devices = any("rollout" in roles for roles in colocated_roles(config.cluster.colocate))
    if rollout.oversample > 1.0 and not rollout.max_lag and shares_devices:
        yield Problem(
            keys=("rollout.oversample", "cluster.colocate"),
            text="engines that share devices sleep while models train, and cannot with responses in progress. "
            "Set it to 1, or give rollout its own devices.",
        )


def router_replay(config: OnlineConfig) -> Iterator[Problem]:
    """The engine records the experts that are replayed."""
    rollout = config.rollout
    if not rollout.router_replay:
        return
    if not rollout.expected_traits.records_experts:
        others = " or ".join(engines_that(lambda engine: engine.records_experts))
        text = f"the {rollout.engine} engine does not record which experts it uses. Set it to false, or use {others}."
        yield Problem(keys=("rollout.router_replay", "rollout.engine"), text=text)
    if rollout.sync_adapters:
        text = "is not known to work with adapters that the engine applies itself. Set one of them."
        yield Problem(keys=("rollout.router_replay", "rollout.sync_adapters"), text=text)


def reward_given(config: OnlineConfig) -> Iterator[Problem]:
    """There is a reward, and every source has a unique name and a model if it needs one."""
    sources = config.reward.all_sources
    if not sources and not config.rollout.gives_reward:
        text = "none given; set one of reward.model, reward.function, reward.url, reward.rules, reward.sources."
        yield Problem(keys=("reward",), text=text)
    for label, count in Counter(source.label for source in sources).items():
        if count > 1:
            text = f'{count} sources are called "{label}". Give each source its own name.'
            yield Problem(keys=("reward.sources",), text=text)
    for n, source in enumerate(sources):
        if isinstance(source, StartedSource) and source.model is None:
            yield Problem(keys=(f"reward.sources.{n}.model",), text="missing; name a folder or a hub name.")


def episodes(config: OnlineConfig) -> Iterator[Problem]:
    """Responses of several turns are conversations, and rewards of an environment come from one."""
    yield from episode_problems(config.rollout, config.reward, config.data)
    if config.rollout.agent is not None and config.rollout.environment_workers:
        text = "an agent asks for the policy's turns on the driver's node. Set it to 0."
        yield Problem(keys=("rollout.environment_workers", "rollout.agent"), text=text)


def episode_problems(rollout: EpisodeSection, reward: RewardSection, data: DataSection) -> Iterator[Problem]:
    """What of a command's settings does not go with tools, an environment or an agent, or only with them."""
    sources = reward.all_sources
    given = {"agent": rollout.agent, "environment": rollout.environment, "tools": rollout.tools}
    named = [f"rollout.{name}" for name, value in given.items() if value]
    where = next(iter(named), "rollout.tools")
    if rollout.agent is not None and len(named) > 1:
        text = "an agent brings its tools and environment itself. Set one or the other."
        yield Problem(keys=tuple(named), text=text)
    if rollout.agent is not None and not rollout.environment_network:
        text = "an agent asks for the policy's turns over the network, on this machine. Leave it out."
        yield Problem(keys=("rollout.environment_network", "rollout.agent"), text=text)
    renders = rollout.has_episodes and not (rollout.environment and all(map(writes_raw_text, rollout.environment)))
    if renders and data.template == "plain":
        text = "plain joins texts, and responses of several turns need the chat template. Use chat."
        yield Problem(keys=("data.template", where), text=text)
    if not rollout.has_episodes and any(isinstance(source, EnvironmentSource) for source in sources):
        text = "the reward environment is what tools, an environment or an agent give; set rollout.environment."
        yield Problem(keys=("reward.sources", "rollout.environment"), text=text)
    if rollout.has_episodes and any(isinstance(source, PrmSource) for source in sources):
        text = "a process reward model scores steps of one text, and would score what tools returned. Use another one."
        yield Problem(keys=("reward.sources", where), text=text)
    for name, count in Counter(rollout.environment).items():
        if count > 1:
            yield Problem(keys=("rollout.environment",), text=f"{name} is given {count} times.")
    if rollout.environment_processes > 1 and not rollout.has_episodes:
        text = f"{rollout.environment_processes} has no effect without tools, an environment or an agent."
        yield Problem(keys=("rollout.environment_processes",), text=text)


def punished_once(config: OnlineConfig, algo: CriticFreeSection) -> Iterator[Problem]:
    """Length is penalized by the algorithm or by a reward source, not by both."""
    if algo.overlong_buffer != 0 and any(isinstance(source, OverlongSource) for source in config.reward.all_sources):
        text = "a reward source already penalizes overlong responses. Set it to 0, or remove the source overlong."
        yield Problem(keys=("algo.overlong_buffer", "reward.sources", "reward.rules"), text=text)


def pretraining_text(_config: OnlineConfig, algo: PpoSection) -> Iterator[Problem]:
    """The ptx loss has text, and the text has a weight."""
    if algo.ptx_coef > 0.0 and algo.ptx_path is None:
        text = f"missing; algo.ptx_coef {algo.ptx_coef:g} needs rows of text."
        yield Problem(keys=("algo.ptx_path", "algo.ptx_coef"), text=text)
    if algo.ptx_coef == 0.0 and algo.ptx_path is not None:
        text = "0, so algo.ptx_path has no effect. Set it above 0, or remove the path."
        yield Problem(keys=("algo.ptx_coef", "algo.ptx_path"), text=text)


def policy_learns(config: OnlineConfig) -> Iterator[Problem]:
    """Critic warm-up ends before the run does."""
    num_steps, warmup_steps = config.train.num_steps, critic_warmup_steps(config.algo)
    if num_steps is not None and warmup_steps >= num_steps:
        text = f"{warmup_steps} of {num_steps} steps: the policy would never learn. Lower it, or raise train.num_steps."
        yield Problem(keys=("algo.critic_warmup_steps", "train.num_steps"), text=text)


def truncated_sampling(config: OnlineConfig) -> Iterator[Problem]:
    """Advice on sampling from a part of the vocabulary."""
    rollout = config.rollout
    for key, value, whole in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0)):
        if value != whole:
            text = f"{value:g} samples from a part of the vocabulary, but the ratio is taken over all of it."
            yield Problem(keys=(f"rollout.{key}",), text=text)


ONLINE_RULES = (
    for_config(OnlineConfig, batches, sampling, stream, router_replay, reward_given, episodes, policy_learns),
    for_algorithm(CriticFreeSection, punished_once),
    for_algorithm(PpoSection, pretraining_text),
)
ONLINE_ADVICE = (for_config(OnlineConfig, truncated_sampling),)

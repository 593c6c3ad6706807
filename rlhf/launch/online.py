"""The parts of a loop that trains on the policy's own responses (PPO, GRPO, online DPO)."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

from rlhf.actors.colocated import SleepMode, WakeForSync
from rlhf.actors.launch_spec import Workers, colocated_models
from rlhf.actors.probed import OpenPool, ProbedPolicy
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm
from rlhf.config.algo import SftSection
from rlhf.config.commands import OnlineConfig
from rlhf.config.run import TrainSection
from rlhf.engines.base import RewardSource, Tokenizer
from rlhf.engines.rewards import build_reward
from rlhf.launch.agents import episode_engine, make_rules
from rlhf.launch.data import RunData
from rlhf.launch.engines import ema_reference_engine, memory_gauge, role_engine
from rlhf.launch.rewards import model_reward, probe_local_rewards, remote_rewards, scoring_timeout_s
from rlhf.launch.rollouts import (
    engines_sleep_during_training,
    probe_requests,
    rollout_pool,
    rollout_source,
    sampling,
)
from rlhf.orchestrator.data import DataSplit, Order
from rlhf.orchestrator.evaluation import Evaluator, SampleEvaluator
from rlhf.orchestrator.loop import Parts
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.step.learning import Pretraining
from rlhf.orchestrator.step.sampler import Sampler
from rlhf.orchestrator.step.token_scores import Models
from rlhf.planning.placement import Placement
from rlhf.planning.roles import reward_model
from rlhf.repair import Repaired
from rlhf.types import Prompt, Role, RolloutRequest, ScoredGroup


def assemble_online(
    config: OnlineConfig,
    algorithm: Algorithm,
    data: RunData,
    workers: Workers,
    placement: Placement,
    tokenizer: Tokenizer,
    stop: StopRequest,
    repaired: Repaired,
) -> Parts:
    """The parts of the loop of an online method. `repaired` is told of what reward sources repair."""
    assert data.prompts is not None
    assert workers.engines is not None
    prompts, needs = data.prompts.train, algorithm.needs
    pool = partial(rollout_pool, config, colocated_models(placement, workers.groups), workers.device)
    sleeps = engines_sleep_during_training(placement, config.rollout.max_lag)
    requests = probe_requests(config.rollout, tokenizer, prompts)
    rewards = reward_sources(config, workers, tokenizer, repaired)
    policy = sending_policy(config, workers, partial(pool, phase="log-prob probe of rollout engine"), requests, sleeps)
    engines = pool(workers.engines, introduce=policy.introduce)
    episodes = None
    if data.world is not None:
        every = (*data.prompts.train, *data.prompts.held_out)
        rules = make_rules(
            config.rollout,
            data.world,
            tokenizer,
            context=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
            max_tokens=config.train.max_tokens_per_micro_batch,
        )
        episodes = episode_engine(config.rollout, engines, rules, every, repaired, workers.environments)
    memory = memory_gauge(workers, config.train.step_timeout_s)
    reward = build_reward(config.reward.all_sources, rewards)
    sampled = episodes or engines
    sampler = Sampler(sampled, reward, tokenizer, SleepMode(sampled).awake if sleeps else nullcontext)
    num_responses = config.rollout.group_size + needs.greedy_baseline
    probe_local_rewards(config.reward, rewards, prompts[0], tokenizer, num_responses)
    return Parts(
        algorithm=algorithm,
        models=models(config.train, algorithm, workers, policy),
        source=rollout_source(config, prompts, sampler, algorithm, tokenizer, stop),
        evaluator=sample_evaluator(config, sampler, data.prompts.held_out, tokenizer),
        pretraining=pretraining(data.texts, config.run.seed, config.train.batch_size),
        gauge=lambda: {
            **memory(),
            **engines.usage(),
            **({} if workers.environments is None else workers.environments.usage()),
        },
        takes_turns=sleeps,
        close=(lambda: None) if episodes is None else episodes.close,
    )


def sending_policy(
    config: OnlineConfig, workers: Workers, pool: OpenPool, requests: Sequence[RolloutRequest], sleeps: bool
) -> ProbedPolicy:
    """The policy. Its first weight sync is checked with `requests`; sleeping engines are woken for each sync."""
    assert workers.engines is not None
    kind = WakeForSync if sleeps else ProbedPolicy
    return kind(
        workers.groups[Role.POLICY],
        engines=workers.engines,
        pool=pool,
        requests=requests,
        step_timeout_s=config.train.step_timeout_s,
        # Joining, sending and finishing each have a shorter deadline of their own, with more precise errors.
        sync_timeout_s=4 * config.rollout.sync_timeout_s,
        sequence_parallel_size=config.policy.sequence_parallel_size,
    )


def models(train: TrainSection, algorithm: Algorithm, workers: Workers, policy: ProbedPolicy) -> Models:
    """The models that the loop trains, and the reference that it gets log-probs from."""
    timeout_s = train.step_timeout_s
    trained = {role: role_engine(workers, role, timeout_s) for role in algorithm.needs.trains}
    if algorithm.needs.ema_reference is not None:
        ema_reference = ema_reference_engine(workers, timeout_s)
        return Models(trained={**trained, Role.POLICY: policy}, reference=ema_reference, ema_reference=ema_reference)
    has_reference = Role.REFERENCE in workers.groups
    reference = role_engine(workers, Role.REFERENCE, timeout_s) if has_reference else None
    return Models(trained={**trained, Role.POLICY: policy}, reference=reference)


def reward_sources(
    config: OnlineConfig, workers: Workers, tokenizer: Tokenizer, repaired: Repaired
) -> Mapping[str, RewardSource]:
    """The reward sources that run in other processes, by label: those with workers of their own, and the model."""
    timeout_s = config.train.step_timeout_s
    opened = remote_rewards(workers.rewards, scoring_timeout_s(config.reward, timeout_s), repaired)
    source = reward_model(config)
    if source is not None and Role.REWARD in workers.groups:
        scorer = role_engine(workers, Role.REWARD, timeout_s)
        opened[source.label] = model_reward(source, scorer, tokenizer, config.train.max_tokens_per_micro_batch)
    return opened


def sample_evaluator(
    config: OnlineConfig, sampler: Sampler, held_out: Sequence[Prompt], tokenizer: Tokenizer
) -> Evaluator | None:
    """Scores responses to held-out prompts; None if there are no held-out prompts."""
    prompts = held_out[: config.eval.max_prompts]
    if not prompts:
        return None
    drawn = sampling(config.rollout, tokenizer, config.eval.temperature)
    return SampleEvaluator(sampler, prompts, drawn, config.run.seed)


def pretraining(texts: DataSplit[ScoredGroup] | None, seed: int, batch_size: int) -> Pretraining | None:
    """Text for the ptx loss; None if the run has none."""
    if texts is None:
        return None
    return Pretraining(Order(texts.train, seed=seed), build_algorithm(SftSection()), batch_size)

"""Rollouts of an online run: the engines that sample, their requests, and the deadlines."""

import math
from collections.abc import Sequence
from dataclasses import replace

from rlhf.actors.groups import WorkerGroup
from rlhf.actors.rollout import PHASE, Introduce, RolloutPool, serves_already
from rlhf.algorithms.base import Algorithm, Needs
from rlhf.config.algo.common import AlgorithmSection
from rlhf.config.commands import OnlineConfig
from rlhf.config.reward import RewardSection, StartedSource
from rlhf.config.rollout import ENGINES, RolloutSection
from rlhf.engines.base import Tokenizer
from rlhf.engines.rollout.open_engine import engine_kind
from rlhf.launch.rewards import scoring_timeout_s
from rlhf.orchestrator.data import Order
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.step.batch_queue import BatchQueue
from rlhf.orchestrator.step.rollout_source import RolloutSource, ScoringPlan
from rlhf.orchestrator.step.sampler import RolloutPlan, Sampler
from rlhf.orchestrator.step.sources import GroupSource
from rlhf.orchestrator.step.stream import StreamLimits
from rlhf.planning.placement import Placement
from rlhf.types import Prompt, Role, RolloutRequest, Sampling

SLOTS_AHEAD = 1.25
"""Requests that an engine gets, as a multiple of those that it decodes at once: it never waits for the driver, and most
requests still wait where every engine can take them."""
PROBE_PROMPTS = 4
PROBE_TOKENS = 8
START_MARGIN_S = 60.0
"""Added to the time for generation and scoring in the deadline of a wait for rollouts."""


def engines_sleep_during_training(placement: Placement, max_lag: int) -> bool:
    """Whether engines use sleep mode (a hybrid engine): they share devices with models, and generation and training
    alternate. With `max_lag` above 0 both go on at the same time."""
    return placement.group_of(Role.ROLLOUT).is_shared_by_engines and max_lag == 0


def rollout_pool(
    config: OnlineConfig,
    colocated: Sequence[WorkerGroup],
    device: str,
    engines: WorkerGroup,
    introduce: Introduce = serves_already,
    phase: str = PHASE,
) -> RolloutPool:
    """All rollout engines as one. `colocated` are the models on the same devices, which may be saving a checkpoint when
    the engines are to wake."""
    is_continuous = ENGINES[engine_kind(config.rollout)].continuous
    return RolloutPool(
        engines,
        introduce=introduce,
        phase=phase,
        generate_timeout_s=config.rollout.generate_timeout_s,
        control_timeout_s=config.rollout.sync_timeout_s,
        colocated=colocated,
        colocated_timeout_s=config.train.step_timeout_s,
        slots=math.ceil(SLOTS_AHEAD * config.rollout.max_num_seqs_on(device)) if is_continuous else None,
    )


def sampling(section: RolloutSection, tokenizer: Tokenizer, temperature: float) -> Sampling:
    """How response tokens are sampled."""
    return Sampling(
        max_tokens=section.max_response_tokens,
        temperature=temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        stop_token_ids=tokenizer.stop_token_ids,
    )


def probe_requests(section: RolloutSection, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[RolloutRequest]:
    """Requests for short responses, which show after the first weight sync that an engine has the policy's weights."""
    short = replace(sampling(section, tokenizer, section.temperature or 1.0), max_tokens=PROBE_TOKENS)
    return [
        RolloutRequest(
            id=f"probe/{index}", prompt_id=prompt.id, prompt_token_ids=prompt.token_ids, seed=index, sampling=short
        )
        for index, prompt in enumerate(prompts[:PROBE_PROMPTS])
    ]


def rollout_source(
    config: OnlineConfig,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    algorithm: Algorithm,
    tokenizer: Tokenizer,
    stop: StopRequest,
) -> GroupSource:
    """Groups of responses that the policy samples during the run."""
    rollout = config.rollout
    return RolloutSource(
        Order(prompts, seed=config.run.seed, shuffle=config.data.shuffle),
        sampler,
        RolloutPlan(
            group_size=rollout.group_size,
            sampling=sampling(rollout, tokenizer, rollout.temperature),
            seed=config.run.seed,
            greedy_baseline=algorithm.needs.greedy_baseline,
            mixture=algorithm.needs.mixture,
            num_opponents=num_opponents(algorithm.needs, rollout.group_size),
            mask_stale_tokens=config.algo.masks_stale_tokens,
        ),
        stream_limits(rollout, config.algo),
        scoring_plan(config.reward, rollout),
        BatchQueue(take_timeout_s=sampling_timeout_s(config), check=stop.check),
        algorithm.keep,
    )


def stream_limits(rollout: RolloutSection, algo: AlgorithmSection) -> StreamLimits:
    """How many groups may be on their way, and how old they may become."""
    return StreamLimits(
        batch_size=rollout.batch_size,
        max_lag=rollout.max_lag,
        order=rollout.order,
        extra=math.ceil((rollout.oversample - 1.0) * rollout.batch_size),
        max_rounds=algo.sampling_rounds,
        finish_partial=rollout.partial == "keep",
        counts_newest=algo.masks_stale_tokens,
    )


def scoring_plan(reward: RewardSection, rollout: RolloutSection) -> ScoringPlan:
    """Which responses are scored together. With `max_lag` 0 these are a whole step's where a run with the same seed
    would not be the same run otherwise: with a model among the sources, which also finds its memory free of engines
    then, and with an engine that decodes in batches, since groups in place of dropped ones are asked for together."""
    has_model = any(isinstance(source, StartedSource) for source in reward.all_sources)
    return ScoringPlan(
        whole_step=rollout.max_lag == 0 and (has_model or not ENGINES[engine_kind(rollout)].continuous),
        call_size=reward.call_size,
        call_wait_s=reward.call_wait_s,
        concurrency=reward.concurrency,
    )


def sampling_timeout_s(config: OnlineConfig) -> float:
    """Longest wait for the scored responses of a step in which none is completed or scored. The deadlines of generation
    and scoring are shorter, since their errors are more precise."""
    scoring_s = scoring_timeout_s(config.reward, config.train.step_timeout_s)
    return config.rollout.generate_timeout_s + scoring_s + START_MARGIN_S


def num_opponents(needs: Needs, group_size: int) -> int:
    """How many responses of a group are sampled from the mixture of policy and reference."""
    if not needs.mixture:
        return 0
    return group_size if needs.opponents is None else needs.opponents

"""The parts that the loop drives, joined from started actors and read data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rlhf.actors.colocated import SleepingRolloutPool, WakeBeforeSync
from rlhf.actors.groups import EmaReferenceEngine, GroupEngine, WorkerGroup
from rlhf.actors.launcher import Workers, colocated_models
from rlhf.actors.memory import MemoryGauge
from rlhf.actors.probed import TOLERANCES, ProbedPolicy
from rlhf.actors.reward import RemoteReward
from rlhf.actors.rollout import RolloutPool
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm, Needs
from rlhf.config.algo import AlgorithmSection, SftSection
from rlhf.config.commands import OnlineConfig, PpoConfig, TrainConfig
from rlhf.config.reward import EndpointSource, RemoteSource
from rlhf.engines.base import RewardSource, RolloutEngine, Tokenizer, TokenScorer
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.engines.rewards import build_reward, build_scored, probe
from rlhf.orchestrator.data import DataSplit, Order
from rlhf.orchestrator.evaluation import (
    Evaluator,
    LabelEvaluator,
    LikelihoodEvaluator,
    PairEvaluator,
    PreferenceEvaluator,
    SampleEvaluator,
    StepEvaluator,
)
from rlhf.orchestrator.loop import Course, Parts
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.schedule import RunLength, count_steps
from rlhf.orchestrator.step.buffer import LagBuffer
from rlhf.orchestrator.step.learning import Passes, Pretraining
from rlhf.orchestrator.step.sources import GroupSource, OfflineSource, RolloutPlan, RolloutSource, Sampler
from rlhf.orchestrator.step.token_scores import Models, Portions
from rlhf.planning.placement import Placement
from rlhf.planning.roles import dtype_of, model_of, reward_model
from rlhf.types import Prompt, Role, RolloutRequest, Sampling, ScoredGroup

OfflineEvaluator = Callable[[Models, Algorithm, Sequence[ScoredGroup], Portions], Evaluator]
EVALUATORS: Mapping[str, OfflineEvaluator] = {
    "sft": LikelihoodEvaluator,
    "rm": PairEvaluator,
    "prm": StepEvaluator,
    "dpo": PreferenceEvaluator,
    "kto": LabelEvaluator,
}
PROBE_PROMPTS = 4
PROBE_TOKENS = 8
START_MARGIN_S = 60.0
"""What a wait for rollouts allows beyond generation and scoring themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What a run reads: prompts to answer, or groups with given answers."""

    prompts: DataSplit[Prompt] | None = None
    groups: DataSplit[ScoredGroup] | None = None
    texts: DataSplit[ScoredGroup] | None = None
    """Pretraining text for the ptx loss."""

    @property
    def fingerprint(self) -> str:
        return "-".join(split.fingerprint for split in (self.prompts, self.groups, self.texts) if split is not None)

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return len(self.prompts.train) if self.prompts is not None else len(self.groups.train if self.groups else ())


def first_role(algorithm: Algorithm) -> Role:
    """The role whose model a run is about."""
    return next(iter(algorithm.needs.trains))


def run_length(config: TrainConfig, data: Data) -> RunLength:
    """How long the run is, from the steps that will really run."""
    train = config.train
    if not isinstance(config, OnlineConfig):
        steps = count_steps(train.num_steps, train.num_epochs, data.num_rows, train.batch_size)
        return RunLength(num_steps=steps, examples_per_step=train.batch_size, batch_size=train.batch_size)
    rollout = config.rollout
    return RunLength(
        num_steps=count_steps(train.num_steps, train.num_epochs, data.num_rows, rollout.batch_size),
        examples_per_step=config.examples_per_step,
        batch_size=train.batch_size,
        num_epochs=config.algo.max_passes,
        frozen_steps={Role.POLICY: config.algo.frozen_policy_steps},
    )


def tricks(config: TrainConfig) -> dict[str, float]:
    """Those of PPO's tricks that are settings of models and schedules; the algorithm itself logs the others."""
    if not isinstance(config, PpoConfig):
        return {}
    policy, critic = config.policy, config.critic
    source = reward_model(config)
    return {
        "tricks/lr_warmup_and_cosine": float(policy.warmup_ratio > 0 and policy.lr_schedule == "cosine"),
        "tricks/critic_from_reward_model": float(source is not None and critic.model == source.model),
        "tricks/policy_lr_below_critic_lr": float(policy.lr < critic.lr),
    }


def course(config: TrainConfig, length: RunLength) -> Course:
    """How long the run is and what happens when."""
    train = config.train
    return Course(
        num_steps=length.num_steps,
        portions=portions(config),
        passes=Passes(
            num_epochs=length.num_epochs,
            frozen_steps=length.frozen_steps,
            timeout_s=train.step_timeout_s,
        ),
        max_lag=config.rollout.max_lag if isinstance(config, OnlineConfig) else 0,
        evaluate_every=config.eval.every_steps,
        checkpoint_every=config.checkpoint.every_steps,
        gap_warn=train.mismatch_warn,
        gap_stop=train.mismatch_stop,
        gap_band=train.mismatch_band,
    )


def portions(config: TrainConfig) -> Portions:
    """How much goes into one optimizer step, and into one forward pass."""
    return Portions(
        batch_size=config.train.batch_size,
        max_tokens=config.train.max_tokens_per_micro_batch,
        max_examples=config.train.micro_batch_size,
        seed=config.run.seed,
    )


def assemble_offline(
    command: str,
    config: TrainConfig,
    section: AlgorithmSection,
    algorithm: Algorithm,
    given: DataSplit[ScoredGroup],
    workers: Workers,
    reference: TokenScorer | None,
) -> Parts:
    """Everything that the loop drives in a run on given answers. `section` is the algorithm's, with what follows from
    the data."""
    models = Models(
        trained={role: trainee(config, workers, role) for role in algorithm.needs.trains}, reference=reference
    )
    # An algorithm of its own: what is held out must not count in the training figures.
    evaluated, groups = build_algorithm(section), held_out(config, given)
    return Parts(
        algorithm=algorithm,
        models=models,
        source=offline_source(config, given.train, algorithm),
        evaluator=EVALUATORS[command](models, evaluated, groups, portions(config)) if groups else None,
        gauge=memory_gauge(config, workers),
    )


def held_out(config: TrainConfig, given: DataSplit[ScoredGroup]) -> Sequence[ScoredGroup]:
    """The groups of an evaluation."""
    return given.held_out[: config.eval.max_prompts]


def assemble_online(
    config: OnlineConfig,
    algorithm: Algorithm,
    data: Data,
    workers: Workers,
    placement: Placement,
    tokenizer: Tokenizer,
    stop: StopRequest,
) -> Parts:
    """Everything that the loop drives in a run that samples."""
    assert data.prompts is not None
    engines = {role: trainee(config, workers, role) for role in workers.groups}
    rests = takes_turns(config, placement)
    assert workers.engines is not None
    beside = colocated_models(placement, workers.groups)
    pool: RolloutEngine = rollout_pool(config, beside, workers.engines)
    if rests:
        pool = SleepingRolloutPool(pool)
    trained = {role: engines[role] for role in algorithm.needs.trains}
    trained[Role.POLICY] = probed_policy(
        WakeBeforeSync if rests else ProbedPolicy, config, workers, beside, data.prompts.train, tokenizer
    )
    copy = ema_reference_engine(config, workers) if algorithm.needs.ema_reference is not None else None
    opened = opened_rewards(config, workers, engines.get(Role.REWARD), tokenizer)
    rewards = build_reward(config.reward.all_sources, opened)
    if here := [source for source in config.reward.all_sources if not isinstance(source, RemoteSource)]:
        try_reward(build_reward(here, opened), config, algorithm.needs, data.prompts.train[0], tokenizer)
    sampler = Sampler(pool, rewards, tokenizer)
    held_out_prompts = data.prompts.held_out[: config.eval.max_prompts]
    evaluator = SampleEvaluator(
        sampler, held_out_prompts, sampling(config, tokenizer, config.eval.temperature), config.run.seed
    )
    return Parts(
        algorithm=algorithm,
        models=Models(trained=trained, reference=copy or engines.get(Role.REFERENCE), ema_reference=copy),
        source=rollout_source(config, data.prompts.train, sampler, algorithm, tokenizer, stop),
        evaluator=evaluator if held_out_prompts else None,
        pretraining=pretraining(config, data),
        gauge=memory_gauge(config, workers),
    )


def memory_gauge(config: TrainConfig, workers: Workers) -> MemoryGauge:
    """Reads how full the processes have been, by the roles that they host."""
    model_roles: dict[str, WorkerGroup] = {}
    for group in dict.fromkeys(workers.groups.values()):
        model_roles["+".join(role for role, other in workers.groups.items() if other is group)] = group
    if workers.engines is not None:
        model_roles[Role.ROLLOUT] = workers.engines
    return MemoryGauge(groups=model_roles, timeout_s=config.train.step_timeout_s)


def trainee(config: TrainConfig, workers: Workers, role: Role) -> GroupEngine:
    """A role of the crew as one engine."""
    timeout_s = config.train.step_timeout_s
    return GroupEngine(workers.groups[role], role, step_timeout_s=timeout_s, sync_timeout_s=timeout_s)


def ema_reference_engine(config: TrainConfig, workers: Workers) -> EmaReferenceEngine:
    """The copy of the policy that its own processes hold."""
    timeout_s = config.train.step_timeout_s
    return EmaReferenceEngine(
        workers.groups[Role.POLICY], Role.POLICY, step_timeout_s=timeout_s, sync_timeout_s=timeout_s
    )


def takes_turns(config: OnlineConfig, placement: Placement) -> bool:
    """Engines that share devices with models sleep while these compute, unless rollouts run beside training."""
    return len(placement.group_of(Role.ROLLOUT).roles) > 1 and config.rollout.max_lag == 0


def probed_policy(
    kind: type[ProbedPolicy],
    config: OnlineConfig,
    workers: Workers,
    beside: Sequence[WorkerGroup],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
) -> ProbedPolicy:
    """The policy, with a few short answers to prove its first weight sync by."""
    assert workers.engines is not None
    drawn = replace(sampling(config, tokenizer, config.rollout.temperature or 1.0), max_tokens=PROBE_TOKENS)
    return kind(
        workers.groups[Role.POLICY],
        engines=workers.engines,
        pool=partial(rollout_pool, config, beside),
        requests=[
            RolloutRequest(
                id=f"probe/{index}", prompt_id=prompt.id, prompt_token_ids=prompt.token_ids, seed=index, sampling=drawn
            )
            for index, prompt in enumerate(prompts[:PROBE_PROMPTS])
        ],
        tolerance=TOLERANCES[dtype_of(config.policy, workers.device)],
        step_timeout_s=config.train.step_timeout_s,
        # Joining, sending and finishing each have their own deadline inside, whose errors say more.
        sync_timeout_s=4 * config.rollout.sync_timeout_s,
    )


def rollout_pool(config: OnlineConfig, beside: Sequence[WorkerGroup], engines: WorkerGroup) -> RolloutPool:
    """Engines as one."""
    return RolloutPool(
        engines,
        generate_timeout_s=config.rollout.generate_timeout_s,
        control_timeout_s=config.rollout.sync_timeout_s,
        beside=beside,
    )


def offline_source(config: TrainConfig, groups: Sequence[ScoredGroup], algorithm: Algorithm) -> GroupSource:
    """Given answers in the run's order."""
    order = Order(groups, seed=config.run.seed, shuffle=config.data.shuffle)
    return OfflineSource(order, config.train.batch_size, algorithm.keep)


def sampling(config: OnlineConfig, tokenizer: Tokenizer, temperature: float) -> Sampling:
    """How tokens are drawn."""
    return Sampling(
        max_tokens=config.rollout.max_response_tokens,
        temperature=temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_token_ids=tokenizer.stop_token_ids,
    )


def rollout_source(
    config: OnlineConfig,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    algorithm: Algorithm,
    tokenizer: Tokenizer,
    stop: StopRequest,
) -> GroupSource:
    """Groups that the policy samples now."""
    rollout = config.rollout
    patience_s = sampling_timeout_s(config)
    return RolloutSource(
        Order(prompts, seed=config.run.seed, shuffle=config.data.shuffle),
        sampler,
        RolloutPlan(
            batch_size=rollout.batch_size,
            group_size=rollout.group_size,
            sampling=sampling(config, tokenizer, rollout.temperature),
            seed=config.run.seed,
            max_rounds=config.algo.sampling_rounds,
            greedy_baseline=algorithm.needs.greedy_baseline,
            mixture=algorithm.needs.mixture,
            num_opponents=num_opponents(algorithm.needs, rollout.group_size),
        ),
        LagBuffer(max_lag=rollout.max_lag, slot_timeout_s=patience_s, take_timeout_s=patience_s, check=stop.check),
        algorithm.keep,
    )


def sampling_timeout_s(config: OnlineConfig) -> float:
    """Longest wait for a step's scored answers. All that is waited for inside has a deadline of its own, whose error
    says more: this one comes after them."""
    round_s = config.rollout.generate_timeout_s + scoring_timeout_s(config)
    return config.algo.sampling_rounds * round_s + START_MARGIN_S


def num_opponents(needs: Needs, group_size: int) -> int:
    """How many answers of a group are drawn from the mixture."""
    if not needs.mixture:
        return 0
    return group_size if needs.opponents is None else needs.opponents


def remote_rewards(config: OnlineConfig, groups: Mapping[str, WorkerGroup]) -> dict[str, RewardSource]:
    """The reward sources with processes of their own, by label."""
    return {label: RemoteReward(group, timeout_s=scoring_timeout_s(config)) for label, group in groups.items()}


def scoring_timeout_s(config: OnlineConfig) -> float:
    """Longest wait for a step's rewards. A service that is out has a deadline of its own, whose error says more."""
    outages = (source.outage_timeout_s for source in config.reward.all_sources if isinstance(source, EndpointSource))
    return config.train.step_timeout_s + sum(outages)


def try_reward(source: RewardSource, config: OnlineConfig, needs: Needs, prompt: Prompt, tokenizer: Tokenizer) -> None:
    """Score as many made answers to a prompt as a group will have, so that what cannot work is known now."""
    probe(source, prompt, tokenizer, group_size=config.rollout.group_size + needs.greedy_baseline)


def opened_rewards(
    config: OnlineConfig, workers: Workers, scorer: TokenScorer | None, tokenizer: Tokenizer
) -> dict[str, RewardSource]:
    """The reward sources that live in other processes, by label: those on their own, and the model."""
    opened = remote_rewards(config, workers.rewards)
    source = reward_model(config)
    if source is not None and scorer is not None:
        opened[source.label] = build_scored(
            source,
            scorer,
            policy_tokenizer=tokenizer,
            reward_tokenizer=load_tokenizer(model_of(source, Role.REWARD), key="reward.model"),
            max_tokens_per_batch=config.train.max_tokens_per_micro_batch,
        )
    return opened


def pretraining(config: OnlineConfig, data: Data) -> Pretraining | None:
    """Text for the ptx loss, where the run has it."""
    if data.texts is None:
        return None
    return Pretraining(
        Order(data.texts.train, seed=config.run.seed), build_algorithm(SftSection()), config.train.batch_size
    )

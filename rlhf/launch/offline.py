"""The parts of a loop that trains on a data set of responses (SFT, reward models, DPO, KTO)."""

from collections.abc import Sequence

from rlhf.actors.launch_spec import Workers
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Algorithm
from rlhf.config.algo import AlgorithmSection
from rlhf.config.commands import TrainConfig
from rlhf.config.run import EvalSection
from rlhf.engines.base import TokenScorer
from rlhf.launch.engines import memory_gauge, role_engine
from rlhf.launch.methods import offline_evaluator
from rlhf.orchestrator.data import DataSplit, Order
from rlhf.orchestrator.loop import Parts
from rlhf.orchestrator.step.sources import GroupSource, OfflineSource
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import ScoredGroup


def assemble_offline(
    config: TrainConfig,
    section: AlgorithmSection,
    algorithm: Algorithm,
    groups: DataSplit[ScoredGroup],
    workers: Workers,
    reference: TokenScorer | None,
) -> Parts:
    """The parts of the loop of an offline method. `section` configures `algorithm`: config.algo with the values that
    are computed from the data."""
    timeout_s = config.train.step_timeout_s
    models = Models(
        trained={role: role_engine(workers, role, timeout_s) for role in algorithm.needs.trains}, reference=reference
    )
    evaluated = held_out(config.eval, groups)
    # A separate algorithm: held-out rows must not enter the statistics of training.
    evaluator = (
        offline_evaluator(config)(models, build_algorithm(section), evaluated, config.train) if evaluated else None
    )
    return Parts(
        algorithm=algorithm,
        models=models,
        source=offline_source(config, groups.train, algorithm),
        evaluator=evaluator,
        gauge=memory_gauge(workers, timeout_s),
    )


def held_out(section: EvalSection, groups: DataSplit[ScoredGroup]) -> Sequence[ScoredGroup]:
    """The groups that an evaluation uses."""
    return groups.held_out[: section.max_prompts]


def offline_source(config: TrainConfig, groups: Sequence[ScoredGroup], algorithm: Algorithm) -> GroupSource:
    """The data set's groups in the order of the run."""
    order = Order(groups, seed=config.run.seed, shuffle=config.data.shuffle)
    return OfflineSource(order, config.train.batch_size, algorithm.keep)

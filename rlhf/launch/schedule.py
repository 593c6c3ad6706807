"""How long a run is, and what happens at which step."""

from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.orchestrator.loop import Course
from rlhf.orchestrator.run.schedule import RunLength, count_steps
from rlhf.orchestrator.step.learning import Passes
from rlhf.orchestrator.step.token_scores import Portions
from rlhf.types import Role


def run_length(config: TrainConfig, num_rows: int) -> RunLength:
    """The number of steps and of optimizer steps in each, for `num_rows` rows an epoch."""
    train = config.train
    if not isinstance(config, OnlineConfig):
        steps = count_steps(train.num_steps, train.num_epochs, num_rows, train.batch_size)
        return RunLength(num_steps=steps, examples_per_step=train.batch_size, batch_size=train.batch_size)
    return RunLength(
        num_steps=count_steps(train.num_steps, train.num_epochs, num_rows, config.rollout.batch_size),
        examples_per_step=config.examples_per_step,
        batch_size=train.batch_size,
        num_epochs=config.algo.max_passes,
        frozen_steps={Role.POLICY: config.algo.frozen_policy_steps},
    )


def course(config: TrainConfig, length: RunLength) -> Course:
    """What the loop does, and when."""
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
    """The sizes of a mini-batch and of a micro-batch."""
    return Portions(
        batch_size=config.train.batch_size,
        max_tokens=config.train.max_tokens_per_micro_batch,
        max_examples=config.train.micro_batch_size,
        seed=config.run.seed,
    )

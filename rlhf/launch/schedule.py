"""How long a run is, and what happens at which step."""

from rlhf.config.algo import critic_warmup_steps, num_epochs
from rlhf.config.commands import TrainConfig
from rlhf.orchestrator.loop import LoopSections
from rlhf.orchestrator.run.schedule import RunLength, count_steps


def run_length(config: TrainConfig, num_rows: int) -> RunLength:
    """The number of steps and of optimizer steps in each, for `num_rows` rows an epoch."""
    train = config.train
    return RunLength(
        num_steps=count_steps(train.num_steps, train.num_epochs, num_rows, config.rows_per_step[1]),
        examples_per_step=config.examples_per_step,
        batch_size=train.batch_size,
        num_epochs=num_epochs(config.algo),
        critic_warmup_steps=critic_warmup_steps(config.algo),
    )


def loop_sections(config: TrainConfig) -> LoopSections:
    """The sections of the config that the loop reads."""
    return LoopSections(
        train=config.train,
        eval=config.eval,
        checkpoint=config.checkpoint,
        max_lag=config.max_lag,
    )

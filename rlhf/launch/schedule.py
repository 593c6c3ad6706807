"""How long a run is, and what happens at which step."""

from math import ceil
from typing import TYPE_CHECKING

from rlhf.config.algo import critic_warmup_steps, num_epochs
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.terminal import counted

if TYPE_CHECKING:
    from rlhf.orchestrator.loop import LoopSections


def run_length(config: TrainConfig, num_rows: int) -> RunLength:
    """The number of steps and of optimizer steps in each, for `num_rows` rows an epoch."""
    train = config.train
    return RunLength(
        num_steps=train.num_steps or _steps_of_epochs(config, num_rows),
        examples_per_step=config.examples_per_step,
        batch_size=train.batch_size,
        num_epochs=num_epochs(config.algo),
        critic_warmup_steps=critic_warmup_steps(config.algo),
    )


def unlearned(config: TrainConfig, num_rows: int) -> str | None:
    """What to say of a run whose policy would never learn, because all of its steps are critic warm-up."""
    length = run_length(config, num_rows)
    if length.critic_warmup_steps < length.num_steps:
        return None
    return (
        f"algo.critic_warmup_steps: {length.critic_warmup_steps} of {counted(length.num_steps, 'step')} "
        f"({counted(config.train.num_epochs, 'epoch')} over {counted(num_rows, 'row')}): the policy would never learn. "
        "Lower it, or raise train.num_epochs."
    )


def _steps_of_epochs(config: TrainConfig, num_rows: int) -> int:
    """Steps that read every row of every epoch. Prompts are sampled across the end of an epoch; a batch of an offline
    data set ends with it."""
    _, rows_per_step = config.rows_per_step
    if isinstance(config, OnlineConfig):
        return ceil(config.train.num_epochs * num_rows / rows_per_step)
    return config.train.num_epochs * ceil(num_rows / rows_per_step)


def loop_sections(config: TrainConfig) -> "LoopSections":
    """The sections of the config that the loop reads."""
    from rlhf.orchestrator.loop import LoopSections  # noqa: PLC0415  imports torch, which a check does without

    return LoopSections(
        train=config.train,
        eval=config.eval,
        checkpoint=config.checkpoint,
        max_lag=config.max_lag,
    )

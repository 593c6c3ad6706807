"""One tree of errors. Each class carries the exit code of the command that ends with it, and survives pickling.

An error says what is wrong, with which value, where, and what to do. A user's mistake is shown as such lines, all
of them at once, without a traceback.
"""

from collections.abc import Sequence
from typing import ClassVar


class RlhfError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: ClassVar[int] = 70
    meaning: ClassVar[str] = "a bug in rlhf"
    advice: ClassVar[str] = "Report it with the traceback's file, which the message names."


class ConfigError(RlhfError, ValueError):
    """The command line or a config file is wrong. Holds every problem found, one line each."""

    exit_code = 2
    meaning = (
        "the command line or config is wrong, the run folder is another run's or in use, the cluster cannot be "
        "reached or is too small"
    )
    advice = "Fix what the lines name; `rlhf check` shows most of it without a start."

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class DataError(ConfigError):
    """A data set's rows are wrong."""

    exit_code = 3
    meaning = "data cannot be used"
    advice = "Fix the rows or files that are named; `rlhf data` shows everything that is wrong with them."


class ModelError(ConfigError):
    """A model or tokenizer cannot be used as asked."""

    exit_code = 3
    meaning = "a model or tokenizer cannot be used as asked"
    advice = "Fix the files that are named, or name another model."


class RewardError(RlhfError, RuntimeError):
    """A reward source failed, or returned something that is not a finite number for every response."""

    exit_code = 4
    meaning = "a reward source failed, or returned something that is not a finite number; no reward was invented"
    advice = "Fix the source, then continue with --resume: the last finished step is saved."


class CheckpointError(RlhfError, OSError):
    """A checkpoint or run directory cannot be written, read or trusted."""

    exit_code = 5
    meaning = "a checkpoint or the disk failed"
    advice = "Free space or fix the path, then continue with --resume: older checkpoints are intact."


class NumericsError(RlhfError, ArithmeticError):
    """Numbers stopped being finite, or weights did not move."""

    exit_code = 6
    meaning = "numbers stopped being finite, rollout engine and trainer disagree too much, or nothing was learned"
    advice = (
        "See events.jsonl and the metrics mismatch/*; lower the learning rate or set dtype to float32, then continue "
        "with --resume."
    )


class WorkerLostError(RlhfError, RuntimeError):
    """A worker process died. Names role, rank, node and phase."""

    exit_code = 7
    meaning = "a worker was lost, and starting again did not help"
    advice = (
        "Its .log says why, mostly memory: lower train.max_tokens_per_micro_batch, use gradient checkpointing or "
        "offload; then continue with --resume."
    )


class MemoryExhaustedError(RlhfError, MemoryError):
    """A process ran out of its device's memory, or of the host's. Names role, phase, sizes and the setting that helps.

    `splittable_tokens` are the tokens of the largest micro-batch; 0 if it is not known or is a single sequence, so that
    smaller micro-batches cannot help.
    """

    exit_code = 7
    meaning = "memory ran out, and smaller micro-batches did not help or were not allowed (train.on_oom)"
    advice = (
        "Change the setting that the message names; `rlhf plan` shows what each process needs. Then continue with "
        "--resume."
    )

    def __init__(self, text: str, splittable_tokens: int = 0) -> None:
        super().__init__(text, splittable_tokens)
        self.text = text
        self.splittable_tokens = splittable_tokens

    def __str__(self) -> str:
        return self.text


class StallError(RlhfError, TimeoutError):
    """A wait passed its deadline. Names who waited for whom, in which phase, and for how long."""

    exit_code = 8
    meaning = "a wait passed its deadline, and starting again did not help"
    advice = (
        "The message names the worker; its .stacks file shows what it was doing. If it was only slow, raise the "
        "deadline of that phase; then continue with --resume."
    )


INFRASTRUCTURE = (WorkerLostError, StallError)
"""Failures that other processes may not meet again."""


class WeightSyncError(StallError):
    """A rollout engine does not hold the weights that the policy sent. Names engine, version and bucket."""

    meaning = "a weight sync failed, and starting again did not help; no engine sampled from half-updated weights"
    advice = "See which engine is named; if it was only slow, raise rollout.sync_timeout_s; continue with --resume."


class PreemptedError(RlhfError):
    """The run was asked to stop, saved what it had, and can be resumed."""

    exit_code = 75
    meaning = "stopped on request and saved"
    advice = "Continue with --resume."


def error_classes() -> list[type[RlhfError]]:
    """Every class of the tree, the internal error last, by exit code."""
    found: list[type[RlhfError]] = [RlhfError]
    for kind in found:
        found += kind.__subclasses__()
    ours = (kind for kind in found if kind.__module__ == __name__)
    return sorted(dict.fromkeys(ours), key=lambda kind: (kind.exit_code, kind.__name__))

"""What may differ between a run and its continuation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rlhf.config.renamed import with_current_names
from rlhf.errors import ConfigError
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.run_directory import Resume, Status
from rlhf.types import Json

HARMLESS = (
    "run.name",
    "run.dir",
    "reference.cache_dir",
    "*.log_probs_kept_mib",
    "train.num_steps",
    "train.step_timeout_s",
    "train.on_oom",
    "train.mismatch_*",
    "eval.*",
    "log.*",
    "checkpoint.*",
    "cluster.address",
    "cluster.allow_unauthenticated",
    "cluster.debug",
    "cluster.max_restarts",
    "cluster.*_timeout_s",
    "rollout.*_timeout_s",
    "reward.*timeout_s",
)
"""Keys that do not change what the run learns, but for the learning rate that follows num_steps."""


CHECKPOINT_LAYOUT_KEYS = (
    *("{role}.zero_stage", "{role}.expert_parallel_size", "{role}.lora.rank", "{role}.lora.targets"),
    "{role}.quantization",
)
"""Keys that decide the layout of a trained role's checkpoint: with another value it cannot be read."""


RANK_KEYS = ("{role}.num_nodes", "{role}.num_gpus_per_node")
"""Keys that decide on how many ranks a trained role is."""


STEP_SIZE_KEYS = ("rollout.batch_size", "train.batch_size")
"""Keys that decide how many rows a step reads: of a run that has both, the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A complete checkpoint and its state."""

    path: Path
    state: RunState
    is_end: bool = False
    """Whether the run has reached its last step and exported its model: nothing is left to do."""


def find_resume_point(
    checkpoints: Checkpoints,
    now: RunState,
    *,
    num_steps: int,
    status: Status | None,
    accepted: Sequence[str],
    resume: Resume = True,
) -> ResumePoint:
    """The newest whole checkpoint, where this run may continue from it. It needs no model, and is called before
    any is started.

    `now` is the state of this run before its first step, `status` its last recorded one. A run that is done is an end
    with `resume` auto, which asks for whatever is left; otherwise it is an error.

    Raises:
        ConfigError: the run is another one, is done, or is past `num_steps`.
        CheckpointError: no checkpoint is complete.
    """
    path, saved = checkpoints.newest()
    require_same_run(saved, now, accepted)
    is_end = saved.step == num_steps and status is Status.DONE
    if saved.step > num_steps or (is_end and resume != "auto"):
        raise ConfigError(
            f"resume: step {saved.step} is done, and train.num_steps is {num_steps}: nothing is left to do. "
            "Raise train.num_steps to go on"
        )
    return ResumePoint(path=path, state=saved, is_end=is_end)


def remembered_token_limit(saved: RunState, now: RunState) -> int:
    """The limit of tokens that a run reached when memory ran out, for its continuation; 0 where it did not, or where
    the limit of the config has changed since."""
    limits = [dict(_leaves(state.config)).get("train.max_tokens_per_micro_batch") for state in (saved, now)]
    return saved.token_limit if limits[0] == limits[1] else 0


def warn_of_threads(saved: RunState, now: RunState) -> str:
    """A line about processes that compute with another number of threads than those that wrote a checkpoint; empty if
    they do not, or if either is not known."""
    if saved.threads == now.threads or not saved.threads or not now.threads:
        return ""
    return (
        f"resume: step_{saved.step} was computed with {saved.threads} threads in each process, now there are "
        f"{now.threads}: sums are rounded differently, so the weights will not be equal to the byte to those of a run "
        f"that was never interrupted. For equal ones set OMP_NUM_THREADS={saved.threads}"
    )


def require_same_run(saved: RunState, now: RunState, accepted: Sequence[str]) -> None:
    """Compare a checkpoint with the run that wants to continue it.

    Raises ConfigError with every key that changed, unless it is harmless or named in `accepted`.
    """
    where = f"step_{saved.step}"
    resized = [role for role, count in now.ranks.items() if saved.ranks.get(role, count) != count]
    problems = [
        f"resume: {role} was saved on {saved.ranks[role]} ranks, now {now.ranks[role]}. Set {role}.num_nodes and "
        f"{role}.num_gpus_per_node as they were; other numbers of ranks cannot read {where}"
        for role in resized
    ]
    if missing := sorted(now.ranks.keys() ^ saved.ranks.keys()):
        problems.append(f"resume: {where} does not hold the same trained models ({', '.join(missing)})")
    differing = changed_keys(saved.config, now.config)
    fixed = [key.format(role=role) for role in now.ranks for key in CHECKPOINT_LAYOUT_KEYS]
    # One that the checkpoint does not know yet is a change like others, as long as it is not used.
    laid_out = [(key, old, new) for key, old, new in differing if key in fixed and (old is not None or new)]
    problems += [
        f"resume: {key} was {_show(old)}, now {_show(new)}; {where} can only be read with the former"
        for key, old, new in laid_out
    ]
    # A problem already, which accepting the change would not solve.
    of_ranks = [key.format(role=role) for role in resized for key in RANK_KEYS]
    changes = [c for c in differing if c not in laid_out and not _matches(c[0], (*HARMLESS, *of_ranks, *accepted))]
    if changes:
        listed = ", ".join(f"{key} {_show(old)} -> {_show(new)}" for key, old, new in changes)
        flags = " ".join(f"--checkpoint.accept_change {key}" for key, _, _ in changes)
        problems.append(f"resume: changed since {where}: {listed}. To accept: {flags}")
    problems += _other_steps(saved, now, differing)
    if saved.data_fingerprint != now.data_fingerprint and "data" not in accepted:
        problems.append(f"data: the files changed since {where} (sha256 differs). Pass --checkpoint.accept_change data")
    if problems:
        raise ConfigError(problems)


def _other_steps(saved: RunState, now: RunState, differing: Sequence[tuple[str, Json, Json]]) -> Iterator[str]:
    """A problem where steps are counted by epochs and have another size than before: their number would be that of a
    run that had the new size from its first step on, so that rows would be left out or read again."""
    given = dict(_leaves(now.config))
    step_size = next((key for key in STEP_SIZE_KEYS if key in given), None)
    if given.get("train.num_steps") is not None:
        return
    for key, old, new in differing:
        if key == step_size:
            yield (
                f"resume: {key} {_show(old)} -> {_show(new)} and train.num_steps is not given: the steps of "
                f"train.num_epochs would be counted as if all had the new size, and step_{saved.step} has read "
                f"{saved.position} rows. Set train.num_steps to the step at which the run ends"
            )


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def changed_keys(old: Mapping[str, Json], new: Mapping[str, Json]) -> list[tuple[str, Json, Json]]:
    """Dotted keys whose values differ, with both values; None stands for a key that is not there."""
    before, after = with_current_names(dict(_leaves(old))), dict(_leaves(new))
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _leaves(values: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, Json]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _show(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."

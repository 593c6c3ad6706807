"""Folders of runs, made by what writes them in a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rlhf.config.commands import SftConfig
from rlhf.config.loading.load import dump_config
from rlhf.orchestrator.run.responses import StepResponses
from rlhf.orchestrator.run.run_directory import RunDirectory, Status
from rlhf.orchestrator.run.trackers import JsonLines
from rlhf.types import Json, Prompt, Reward, ScoredGroup
from tests.unit.orchestrator.support import as_sampled, given_group


def make_run(
    folder: Path,
    metrics: Sequence[Mapping[str, Json]],
    *,
    config: str | None = None,
    responses: Mapping[int, StepResponses] | None = None,
    status: Status = Status.DONE,
    error: str | None = None,
) -> Path:
    """A run whose step i had metrics[i - 1]."""
    with RunDirectory.open(folder, resume=False) as run:
        run.write_config(dump_config(SftConfig()) if config is None else config)
        tracker = JsonLines(run.metrics)
        for step, row in enumerate(metrics, 1):
            tracker.log(step, row)
        for step, recorded in (responses or {}).items():
            run.write_responses(step, recorded)
        run.note("resume", "continuing after step 0", step=0)
        run.write_status(status, step=len(metrics), num_steps=len(metrics), error=error)
    return folder


def group(number: int, texts: Sequence[str], rewards: Sequence[float], prompt: str | None = None) -> ScoredGroup:
    """Sampled responses to a prompt, with a part of their rewards."""
    made = as_sampled(given_group(number, ["a"] * len(texts), rewards))
    text = made.prompt.text if prompt is None else prompt
    return replace(
        made,
        prompt=Prompt(id=made.prompt.id, token_ids=made.prompt.token_ids, text=text, label="b", metadata={"level": 3}),
        texts=tuple(texts),
        rewards=tuple(Reward(total=reward, parts={"rule": reward / 2}) for reward in rewards),
    )


def evaluation(rewards: Sequence[float]) -> StepResponses:
    """One response to each held-out prompt."""
    return StepResponses(evaluated=[group(i, ["a"], [reward], f"q{i}") for i, reward in enumerate(rewards)])

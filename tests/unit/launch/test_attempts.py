"""What an attempt changes for the next one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.actors.calls import Worker
from rlhf.config.commands import SftConfig
from rlhf.config.loading.load import load_config
from rlhf.errors import CheckpointError, MemoryExhaustedError
from rlhf.launch.attempts import RunAttempts
from rlhf.orchestrator.run.checkpoint import RunState, verify
from rlhf.orchestrator.run.resume import ResumePoint, remembered_token_limit
from tests.unit.orchestrator.support import sft_run


def attempts(*flags: str) -> RunAttempts:
    config = load_config("sft", ["--policy.model", "m", "--data.path", "rows.jsonl", *flags], {})
    assert isinstance(config, SftConfig)
    nothing: Any = None
    return RunAttempts(
        config=config, algorithm=config.algo, data=nothing, tokenizer=nothing, length=nothing, cluster=nothing,
        records=nothing, checkpoints=nothing, stop=nothing, fresh=state(config),
    )  # fmt: skip


def state(config: SftConfig, token_limit: int = 0) -> RunState:
    return RunState(step=0, seed=0, config=config.model_dump(mode="json"), token_limit=token_limit)


def exhausted(tokens: int) -> MemoryExhaustedError:
    return MemoryExhaustedError("out of memory", tokens)


@pytest.mark.parametrize(("tokens", "limit"), [(1000, 500), (5000, 1024), (3, 1)])
def test_the_next_attempt_has_half_micro_batches(tokens: int, limit: int) -> None:
    """Half of the largest that was tried, or of the limit."""
    run = attempts("--train.max-tokens-per-micro-batch", "2048")
    told = run.use_less_memory(exhausted(tokens))
    assert told == f"micro-batches have at most {limit} tokens (train.max_tokens_per_micro_batch)"
    assert run.config.train.max_tokens_per_micro_batch == run.fresh.token_limit == limit
    again = run.use_less_memory(exhausted(limit))
    assert run.fresh.token_limit == (limit // 2 or limit)
    assert (again is None) == (limit == 1)


def test_nothing_changes_where_that_cannot_help_or_is_not_allowed() -> None:
    run = attempts()
    assert run.use_less_memory(exhausted(0)) is None
    run = attempts("--train.on-oom", "stop")
    assert run.use_less_memory(exhausted(1000)) is None
    assert run.fresh.token_limit == 0


def test_a_continuation_keeps_the_limit_until_the_config_changes() -> None:
    before = attempts("--train.max-tokens-per-micro-batch", "2048")
    before.limit_tokens(300)
    same = attempts("--train.max-tokens-per-micro-batch", "2048").fresh
    other = attempts("--train.max-tokens-per-micro-batch", "4096").fresh
    assert before.fresh.config == same.config, "a limit that memory set is no change of the config"
    assert remembered_token_limit(before.fresh, same) == 300
    assert remembered_token_limit(before.fresh, other) == 0
    assert remembered_token_limit(same, same) == 0


@pytest.mark.parametrize(("before", "now", "is_told"), [("2", "4", True), ("2", "2", False), ("", "4", False)])
def test_another_number_of_threads_is_said(before: str, now: str, is_told: bool) -> None:
    run, lines = attempts(), list[str]()
    launcher: Any = SimpleNamespace(threads=now)
    records: Any = SimpleNamespace(warn=lines.append)
    run.launcher, run.records = launcher, records
    saved = replace(run.fresh, step=7, threads=before)
    run._record_threads(None)
    run._record_threads(ResumePoint(path=Path("step_7"), state=saved))
    assert run.fresh.threads == now
    assert [line.startswith(f"resume: step_7 was computed with {before} threads") for line in lines] == [True] * is_told
    assert all(line.endswith(f"set OMP_NUM_THREADS={before}") for line in lines)


@pytest.mark.parametrize("problem", ["", "it cannot write there (Read-only file system)"])
def test_every_node_that_saves_looks_at_the_folder(tmp_path: Path, problem: str) -> None:
    seen: list[tuple[Path, bool, int]] = []

    def look(folder: Path, marker: str, room: int) -> str:
        seen.append((folder, (folder / marker).exists(), room))
        return problem if len(seen) == 2 else ""

    handle = SimpleNamespace(folder_problem=SimpleNamespace(remote=look))
    savers = [Worker(handle=handle, name=f"policy rank {n}", node=f"10.0.0.{n}", node_id="x", pid=n) for n in (1, 2)]
    run = attempts()
    records: Any = SimpleNamespace(directory=SimpleNamespace(path=tmp_path))
    waiting = SimpleNamespace(wait_all=lambda calls, **_: [call.ref for call in calls])
    cluster: Any = SimpleNamespace(calls=waiting)
    run.records, run.cluster = records, cluster
    if problem:
        with pytest.raises(CheckpointError) as raised:
            run._require_folder(savers)
        assert str(raised.value) == f"run.dir: {tmp_path}: policy rank 2 (node 10.0.0.2, pid 2): {problem}"
    else:
        run._require_folder(savers)
    assert [(folder, is_there, room >= 2**24) for folder, is_there, room in seen] == [(tmp_path, True, True)] * 2
    assert not list(tmp_path.iterdir())


def test_checkpoints_hold_limit_and_threads_of_the_attempt_that_saves(tmp_path: Path) -> None:
    run = sft_run(tmp_path)
    run.num_steps, run.checkpoint_every = 2, 1
    with run.open(resume=False) as (records, checkpoints, fresh):
        run.loop(records, checkpoints, replace(fresh, token_limit=7, threads="2")).run(None)
    run = sft_run(tmp_path)
    run.num_steps, run.checkpoint_every = 3, 1
    with run.open(resume=True) as (records, checkpoints, fresh):
        path, saved = checkpoints.newest()
        assert (saved.token_limit, saved.threads) == (7, "2")
        point = ResumePoint(path=path, state=saved)
        run.loop(records, checkpoints, replace(fresh, token_limit=3, threads="4")).run(point)
    saved = verify(run.path / "checkpoints" / "step_3")
    assert (saved.token_limit, saved.threads) == (3, "4")

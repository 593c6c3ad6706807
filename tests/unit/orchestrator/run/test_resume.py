"""A run that was cut off and continued is the run that never stopped; and what may not be continued."""

import json
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeRollout, FakeTrainEngine
from rlhf.errors import CheckpointError, ConfigError, PreemptedError
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.resume import ResumePoint, changed_keys, find_resume_point, require_same_run, warn_of_threads
from rlhf.orchestrator.run.run_directory import Status
from rlhf.types import (
    Head,
    Json,
    Role,
    Rollout,
    RolloutRequest,
    TrainBatch,
)
from tests.unit.orchestrator.counted import CallCounter, KilledError, counted_run, evidence, kill
from tests.unit.orchestrator.support import TOKENIZER, Run, ppo_run, sft_run

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, list[str]]:
    counter = CallCounter(0, kill)
    run = counted_run(tmp_path_factory.mktemp("whole") / "a", counter)
    run.run()
    return evidence(run), counter.names


NUM_CALLS = 115


def test_the_calls_of_a_run_are_as_many_as_are_cut_off_below(uninterrupted: tuple[object, list[str]]) -> None:
    assert len(uninterrupted[1]) == NUM_CALLS


@pytest.mark.parametrize("calls", [*range(3, NUM_CALLS, 9), NUM_CALLS - 2, NUM_CALLS - 1, NUM_CALLS])
def test_killed_between_any_two_phases_and_resumed_is_uninterrupted(
    tmp_path: Path, uninterrupted: tuple[object, list[str]], calls: int
) -> None:
    killed = counted_run(tmp_path / "a", CallCounter(calls, kill))
    with pytest.raises(KilledError):
        killed.run()
    resumed = counted_run(tmp_path / "a", CallCounter(0, kill))
    resumed.run(resume=True)
    assert evidence(resumed) == uninterrupted[0]


@pytest.mark.parametrize("calls", [5, 8, 10, 13, 20, 31, 44, 57, 62, 68, 79, 90])
def test_a_signal_saves_a_finished_step_and_resumes_to_the_same(
    tmp_path: Path, uninterrupted: tuple[object, list[str]], calls: int
) -> None:
    number = signal.SIGUSR1 if calls % 2 else signal.SIGTERM
    preempted = counted_run(tmp_path / "a", CallCounter(calls, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(PreemptedError, match=r"asked to stop: step \d is saved; continue with --resume") as error:
        preempted.run()
    assert error.value.exit_code == 75
    assert json.loads((tmp_path / "a/status.json").read_text())["status"] == "preempted"
    resumed = counted_run(tmp_path / "a", CallCounter(0, kill))
    resumed.run(resume=True)
    assert evidence(resumed) == uninterrupted[0]


def test_a_signal_before_the_loop_ends_the_run_at_once() -> None:
    stop = StopRequest(grace_s=60)
    with stop.listening(), pytest.raises(PreemptedError, match="stopped by SIGUSR1 while the run starts"):
        signal.raise_signal(signal.SIGUSR1)


def test_a_signal_is_named_whatever_a_library_makes_of_it() -> None:
    def wait_in_a_library() -> None:
        with stop.listening(), stop.naming_interruptions():
            try:
                signal.raise_signal(signal.SIGTERM)
            except PreemptedError as error:
                raise SystemError("returned a result with an exception set") from error

    stop = StopRequest(grace_s=60)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM while the run starts"):
        wait_in_a_library()


def test_a_signal_that_a_library_swallowed_ends_the_run_before_its_loop() -> None:
    stop = StopRequest(grace_s=60)
    with stop.listening():
        with suppress(PreemptedError):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(PreemptedError, match="stopped by SIGTERM while the run starts"), stop.safe_points():
            pass


def test_no_update_is_begun_after_sigterm_came_while_measuring(tmp_path: Path) -> None:
    counter = CallCounter(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run = counted_run(tmp_path / "a", counter)
    with pytest.raises(PreemptedError, match="step 0 is saved"):
        run.run()
    assert "forward" in counter.names[5]
    assert run.engines[Role.POLICY].num_steps == 0


class Stuck(FakeRollout):
    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        threading.Event().wait(1.5)
        raise AssertionError


def stuck_run(path: Path, grace_s: float) -> Run:
    run = sft_run(path, stop=StopRequest(grace_s))

    class StuckEngine(FakeTrainEngine):
        def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(30)
            raise AssertionError

    run.engines[Role.POLICY] = StuckEngine(FakeRollout(TOKENIZER.num_tokens).table, Head.LOG_PROBS)
    return run


def test_the_grace_period_is_kept(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match=r"no safe point within 0\.2 s of the signal"):
        stuck_run(tmp_path / "a", 0.2).run()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(PreemptedError, match="stopped at once by a second SIGINT"):
        stuck_run(tmp_path / "a", 20.0).run()


def test_waiting_for_rollouts_is_a_safe_point(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", stop=StopRequest(10.0))
    run.rollout = Stuck(TOKENIZER.num_tokens)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    run.engines[Role.POLICY] = FakeTrainEngine(run.rollout.table, Head.LOG_PROBS, rollout=run.rollout)
    with pytest.raises(PreemptedError, match="step 0 is saved"):
        run.run()


def test_resuming_a_finished_run_is_an_error(tmp_path: Path) -> None:
    sft_run(tmp_path / "a").run()
    with pytest.raises(ConfigError, match=r"step 6 is done, and train\.num_steps is 6: nothing is left to do"):
        sft_run(tmp_path / "a").run(resume=True)
    longer = sft_run(tmp_path / "a", num_steps=8)
    longer.run(resume=True)
    assert [json.loads(line)["step"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()] == [
        *range(1, 9)
    ]


def test_a_damaged_newest_checkpoint_is_a_warning_and_the_older_one_is_used(tmp_path: Path) -> None:
    sft_run(tmp_path / "a").run()
    (tmp_path / "a/checkpoints/step_6/policy/engine.npz").write_bytes(b"")
    again = sft_run(tmp_path / "a", num_steps=7)
    again.run(resume=True)
    assert "step_6: policy/engine.npz has 0 bytes" in again.out.getvalue()
    assert "continuing after step 4" in again.out.getvalue()


def test_none_whole_is_not_a_fresh_start(tmp_path: Path) -> None:
    sft_run(tmp_path / "a").run()
    for manifest in (tmp_path / "a/checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="2 checkpoints, none complete"):
        sft_run(tmp_path / "a").run(resume=True)


SAVED = RunState(
    step=400,
    seed=1,
    ranks={"policy": 8},
    config={"policy": {"lr": 1e-6}, "data": {"path": "a"}, "log": {"x": 1}, "train": {"num_steps": 5}},
    data_fingerprint="f1",
)


def changed(**leaves: str | float) -> dict[str, Json]:
    config: dict[str, dict[str, Json]] = {
        "policy": {"lr": 1e-6}, "data": {"path": "a"}, "log": {"x": 1}, "train": {"num_steps": 5}
    }  # fmt: skip
    for key, value in leaves.items():
        section, leaf = key.split("__")
        config[section][leaf] = value
    return {**config}


def test_every_harmful_change_is_listed_at_once() -> None:
    now = replace(
        SAVED, config=changed(policy__lr=2e-6, data__path="b", log__x=2, train__num_steps=9), data_fingerprint="f2"
    )
    with pytest.raises(ConfigError) as caught:
        require_same_run(SAVED, now, ())
    assert caught.value.problems == (
        "resume: changed since step_400: policy.lr 1e-06 -> 2e-06, data.path a -> b. "
        "To accept: --checkpoint.accept_change policy.lr --checkpoint.accept_change data.path",
        "data: the files changed since step_400 (sha256 differs). Pass --checkpoint.accept_change data",
    )
    require_same_run(SAVED, now, ("policy.lr", "data.path", "data"))


def test_harmless_changes_pass_and_other_ranks_never_do() -> None:
    require_same_run(SAVED, replace(SAVED, config=changed(log__x=5, train__num_steps=50)), ())
    with pytest.raises(ConfigError, match="policy was saved on 8 ranks, now 4"):
        require_same_run(SAVED, replace(SAVED, ranks={"policy": 4}), ("policy.*",))
    eight, four = (
        replace(SAVED, ranks={"policy": n}, config={"policy": {"num_nodes": 1, "num_gpus_per_node": n}}) for n in (8, 4)
    )
    with pytest.raises(ConfigError) as caught:
        require_same_run(eight, four, ())
    (problem,) = caught.value.problems  # no advice to accept a change that cannot be accepted
    assert problem.startswith("resume: policy was saved on 8 ranks, now 4. Set policy.num_nodes and policy.num_gpus_")
    with pytest.raises(ConfigError, match="does not hold the same trained models"):
        require_same_run(SAVED, replace(SAVED, ranks={"policy": 8, "critic": 1}), ())


@pytest.mark.parametrize(
    "key",
    [
        "run.name", "run.dir", "reference.cache_dir", "policy.log_probs_kept_mib", "train.num_steps",
        "train.step_timeout_s", "train.on_oom", "train.mismatch_band", "eval.every_steps", "log.rollouts",
        "checkpoint.keep", "cluster.address", "cluster.allow_unauthenticated", "cluster.debug", "cluster.max_restarts",
        "cluster.start_timeout_s", "rollout.stall_timeout_s", "reward.timeout_s", "reward.call_timeout_s",
    ],
)  # fmt: skip
def test_what_does_not_change_what_is_learned_may_change(key: str) -> None:
    section, _, leaf = key.partition(".")
    saved, now = (replace(SAVED, config={section: {leaf: value}}) for value in (1, 2))
    require_same_run(saved, now, ())


def test_adapters_beside_other_layers_are_never_accepted() -> None:
    saved = replace(SAVED, config={"policy": {"lora": {"rank": 8, "targets": ["q_proj", "k_proj"]}}})
    now = replace(SAVED, config={"policy": {"lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}}})
    with pytest.raises(ConfigError, match=r"^resume: policy\.lora\.targets was .*; step_\d+ can only be read with"):
        require_same_run(saved, now, ["policy.lora.targets", "policy.*"])


@pytest.mark.parametrize("key", ["train.batch_size", "rollout.batch_size"])
def test_steps_of_another_size_do_not_count_epochs(key: str) -> None:
    """Half of 640 rows in steps of 64 are read after step 5, which is the last one of an epoch in steps of 128."""

    def state(size: int, num_steps: int | None) -> RunState:
        config: dict[str, Json] = {"train": {"num_steps": num_steps, "batch_size": size}}
        if key == "rollout.batch_size":
            config = {"train": {"num_steps": num_steps, "batch_size": 8}, "rollout": {"batch_size": size}}
        return replace(SAVED, step=5, position=320, config=config)

    refused = rf"^resume: {key} 64 -> 128 and train\.num_steps is not given: .* step_5 has read 320 rows"
    with pytest.raises(ConfigError, match=refused):
        require_same_run(state(64, None), state(128, None), (key,))
    require_same_run(state(64, None), state(128, 8), (key,))
    require_same_run(state(64, None), state(64, None), ())


def test_a_checkpoint_from_before_adapters_is_read_without_them() -> None:
    saved = replace(SAVED, config={"policy": {"lr": 1e-6}})
    without, with_some = (replace(SAVED, config={"policy": {"lr": 1e-6, "lora": {"rank": n}}}) for n in (0, 8))
    require_same_run(saved, without, ("policy.lora.*",))
    with pytest.raises(ConfigError, match=r"^resume: policy\.lora\.rank was .*, now 8; step_\d+ can only be read with"):
        require_same_run(saved, with_some, ("policy.lora.*",))


def test_a_checkpoint_with_settings_under_their_old_names_is_read() -> None:
    old: dict[str, Json] = {"rollout": {"num_samples": 8}, "algo": {"kl_stop": 0.1, "reference": "behaviour"}}
    new: dict[str, Json] = {"rollout": {"group_size": 8}, "algo": {"target_kl": 0.1, "reference": "behavior"}}
    require_same_run(replace(SAVED, config=old), replace(SAVED, config=new), ())
    with pytest.raises(ConfigError, match=r"rollout\.group_size 8 -> 4"):
        require_same_run(replace(SAVED, config=old), replace(SAVED, config=new | {"rollout": {"group_size": 4}}), ())


def test_another_zero_stage_is_never_accepted() -> None:
    saved = replace(SAVED, config={"policy": {"zero_stage": 3, "lr": 1e-6}})
    now = replace(SAVED, config={"policy": {"zero_stage": 2, "lr": 1e-6}})
    with pytest.raises(ConfigError, match=r"^resume: policy\.zero_stage was 3, now 2; step_\d+ can only be read with"):
        require_same_run(saved, now, ("policy.*",))
    scorers = [replace(SAVED, config={"reference": {"zero_stage": stage}}) for stage in (3, 0)]
    require_same_run(scorers[0], scorers[1], ("reference.*",))  # of a reference nothing is saved


@pytest.mark.parametrize(
    ("num_steps", "status", "may_go_on"),
    [
        (399, None, False),
        (399, Status.FAILED, False),
        (400, Status.DONE, False),
        (400, Status.FAILED, True),
        (400, None, True),
        (401, Status.DONE, True),
    ],
)
def test_what_is_left_to_do(num_steps: int, status: Status | None, may_go_on: bool, tmp_path: Path) -> None:
    """After the last step a run still exports its model."""
    checkpoints = Checkpoints(tmp_path, keep=2, warn=pytest.fail, repaired=lambda _: None)
    engines = {Role.POLICY: FakeTrainEngine(FakeRollout(TOKENIZER.num_tokens).table, Head.LOG_PROBS)}
    saved = checkpoints.save(SAVED, engines)
    if may_go_on:
        point = find_resume_point(checkpoints, SAVED, num_steps=num_steps, status=status, accepted=())
        assert point == ResumePoint(path=saved, state=SAVED)
        return
    with pytest.raises(ConfigError, match=rf"step 400 is done, and train\.num_steps is {num_steps}: nothing is left"):
        find_resume_point(checkpoints, SAVED, num_steps=num_steps, status=status, accepted=())


@pytest.mark.parametrize(("num_steps", "is_end"), [(400, True), (401, False)])
def test_a_run_that_is_done_is_an_end_with_auto(num_steps: int, is_end: bool, tmp_path: Path) -> None:
    """Of a chain of jobs with one command, those after the last step succeed, and do nothing."""
    checkpoints = Checkpoints(tmp_path, keep=2, warn=pytest.fail, repaired=lambda _: None)
    engines = {Role.POLICY: FakeTrainEngine(FakeRollout(TOKENIZER.num_tokens).table, Head.LOG_PROBS)}
    checkpoints.save(SAVED, engines)
    point = find_resume_point(checkpoints, SAVED, num_steps=num_steps, status=Status.DONE, accepted=(), resume="auto")
    assert point.is_end == is_end
    with pytest.raises(ConfigError, match="step 400 is done"):
        find_resume_point(checkpoints, SAVED, num_steps=399, status=Status.DONE, accepted=(), resume="auto")


@pytest.mark.parametrize(
    ("before", "now", "is_warned"),
    [("2", "2", False), ("2", "4", True), ("", "4", False), ("2", "", False), ("", "", False)],
)
def test_another_number_of_threads_is_said_where_both_are_known(before: str, now: str, is_warned: bool) -> None:
    line = warn_of_threads(replace(SAVED, threads=before), replace(SAVED, threads=now))
    assert line.startswith(
        f"resume: step_400 was computed with {before} threads in each process, now there are {now}: "
    ) == (is_warned)
    assert line.endswith(f"For equal ones set OMP_NUM_THREADS={before}") == is_warned
    assert bool(line) == is_warned


@pytest.mark.parametrize(("length", "shown"), [(40, "x" * 40), (41, "x" * 37 + "...")])
def test_a_long_value_is_cut(length: int, shown: str) -> None:
    now = replace(SAVED, config=changed(data__path="x" * length))
    with pytest.raises(ConfigError, match=rf"data\.path a -> {shown}\. To accept".replace("...", r"\.\.\.")):
        require_same_run(SAVED, now, ())


def test_keys_that_come_and_go_are_changes() -> None:
    assert changed_keys({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": 2}) == [("a.b", 1, None), ("a.d", None, 3)]

"""What a run says of a process that died: what Ray knows of its end, in a sentence."""

import pytest
import ray
from ray.exceptions import RayActorError

from rlhf.actors import post_mortem
from rlhf.actors.calls import Call, Worker, cause_of_death, failure_of
from rlhf.errors import WorkerLostError

ENDED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 25397\n"
    "The actor is dead because its worker process has died. Worker exit type: {kind} Worker exit detail: {detail}"
)


class DiedError(RayActorError):  # type: ignore[misc]
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("kind", "detail", "said"),
    [
        ("NODE_OUT_OF_MEMORY", "Task was killed. Consider more.", "Ray killed it because its node ran out of memory. "),
        (
            "SYSTEM_ERROR",
            "Worker unexpectedly exits. Some causes are: (1) OOM.",
            "It crashed, or the kernel killed it ",
        ),
        ("INTENDED_USER_EXIT", "Worker exits by exit(3). More.", "Worker exits by exit(3)."),
    ],
)
def test_how_a_process_ended(kind: str, detail: str, said: str) -> None:
    text = cause_of_death(DiedError(ENDED.format(kind=kind, detail=detail)))
    assert text.startswith(said)
    assert ("lower train.max_tokens_per_micro_batch" in text) == (kind != "INTENDED_USER_EXIT")


def test_an_end_of_which_nothing_is_known() -> None:
    assert cause_of_death(DiedError("The actor is gone.\nMore.")) == "The actor is gone."


def test_an_error_while_it_starts_is_named() -> None:
    text = (
        "The actor died because of an error raised in its creation task, ray::policy rank 0:Policy.__init__() (pid=7)\n"
        "RuntimeError: The actor with name Policy failed to import on the worker:\n\nTraceback:\n"
        "  File \"worker.py\", line 3, in <module>\nModuleNotFoundError: No module named 'deepspeed'\n"
    )
    assert cause_of_death(DiedError(text)) == "Its start failed: ModuleNotFoundError: No module named 'deepspeed'"


PARTS = tuple(
    Worker(handle=None, name=f"rollout engine 0 part {n}", node=f"10.0.0.{n}", node_id=f"n{n}", pid=7) for n in (1, 2)
)
ENGINE = Worker(handle=None, name="rollout engine 0", node="10.0.0.9", node_id="n9", pid=8, parts=PARTS)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "It crashed, or the kernel killed it "),
        ({("n1", 7): "is stopped (by SIGSTOP or a debugger)"}, "It crashed, or the kernel killed it "),
        (
            {("n2", 7): post_mortem.GONE},
            "It cannot go on without rollout engine 0 part 2 (node 10.0.0.2, pid 7), which is gone. If memory is ",
        ),
        (
            {("n1", 7): "is dead", ("n2", 7): post_mortem.UNREACHABLE},
            "It cannot go on without rollout engine 0 part 1 (node 10.0.0.1, pid 7), which is dead; rollout engine 0 "
            "part 2 (node 10.0.0.2, pid 7), which is on a node that does not reply. ",
        ),
    ],
)
def test_an_engine_that_ended_itself_says_which_part_was_lost(
    found: dict[post_mortem.Process, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DiedError(ENDED.format(kind="SYSTEM_ERROR", detail="Worker exits."))

    monkeypatch.setattr(ray, "get", fail)
    monkeypatch.setattr(post_mortem, "examine", lambda _: found)
    error = failure_of(Call(worker=ENGINE, ref=None), "rollout generation 0")
    assert isinstance(error, WorkerLostError)
    assert str(error).startswith(f"rollout generation 0: rollout engine 0 (node 10.0.0.9, pid 8) died. {said}")

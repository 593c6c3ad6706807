"""What a run says of a process that died: what Ray knows of its end, in a sentence."""

import pytest
from ray.exceptions import RayActorError

from rlhf.actors.calls import cause_of_death

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

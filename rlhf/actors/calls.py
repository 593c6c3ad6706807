"""Remote calls and what their failures mean: errors that name the worker, its node and the phase."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rlhf.actors import post_mortem
from rlhf.actors.portable_errors import ForeignError, short_text
from rlhf.errors import RlhfError, StallError, WorkerLostError

EXIT = re.compile(r"Worker exit type: (?P<kind>\w+) Worker exit detail: (?P<detail>.+)")
"""Finds the cause in Ray's message about an actor that died."""
CONSTRUCTOR = "because of an error raised in its creation task"
MEMORY_ADVICE = "If memory is the cause: offload, share fewer roles, or lower train.max_tokens_per_micro_batch."
STORE_ERRORS = (ObjectStoreFullError, OutOfDiskError, ObjectLostError)
"""What Ray raises in a worker when its arguments or its result do not fit into the object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A remote actor and the name that errors call it by."""

    handle: "ray.actor.ActorHandle"
    name: str
    """Role and rank, e.g. `policy rank 1`."""
    node: str
    """The node's address."""
    node_id: str
    """The node's id in Ray. Several nodes may share an address."""
    pid: int
    stacks: Path | None = None
    """The file that it writes its stacks to, if any."""
    parts: "tuple[Worker, ...]" = field(default=(), compare=False)
    """The workers on other nodes that it computes with: if one of them is lost, so is it."""

    def __str__(self) -> str:
        return f"{self.name} (node {self.node}, pid {self.pid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A remote call under way."""

    worker: Worker
    ref: "ray.ObjectRef[object]"


def with_parts(workers: Iterable[Worker]) -> list[Worker]:
    """Workers, each followed by its parts on other nodes."""
    return [one for worker in workers for one in (worker, *worker.parts)]


def failure_of(call: Call, phase: str) -> RlhfError | None:
    """The error of a call that has ended, as an RlhfError; None if it succeeded."""
    try:
        ray.get(call.ref, timeout=60.0)
    except RayActorError as error:
        cause = _lost_parts(call.worker) or cause_of_death(error)
        return WorkerLostError(f"{phase}: {call.worker} died. {cause}")
    except RayTaskError as error:
        return error_in_worker(call.worker, phase, error)
    except GetTimeoutError:
        return StallError(f"{phase}: the reply of {call.worker} did not arrive.")
    except RayError as error:
        return WorkerLostError(f"{phase}: {call.worker}: {first_line(error)}")
    return None


def _lost_parts(worker: Worker) -> str:
    """A sentence about the parts of a dead worker that are lost too: it ends with each of them."""
    if not worker.parts:
        return ""
    places = [(part.node_id, (part.pid, part.stacks)) for part in worker.parts]
    found = post_mortem.examine(post_mortem.by_node(places))
    lost = [part for part in worker.parts if found.get((part.node_id, part.pid)) in post_mortem.ENDED]
    texts = [f"{part}, which {found[part.node_id, part.pid]}" for part in lost]
    return f"It cannot go on without {'; '.join(texts)}. {MEMORY_ADVICE}" if texts else ""


def error_in_worker(worker: Worker, phase: str, error: RayTaskError) -> RlhfError:
    """What a worker raised, as an RlhfError."""
    cause = error.cause
    if isinstance(cause, RlhfError):
        return cause
    text = short_text(cause) if isinstance(cause, ForeignError) else f"{type(cause).__name__}: {first_line(cause)}"
    is_lost = isinstance(cause, STORE_ERRORS)
    found = WorkerLostError(f"{phase}: {worker}: {text}") if is_lost else RlhfError(f"{phase}: {worker} failed: {text}")
    found.__cause__ = error  # its text is the traceback in the worker
    return found


def cause_of_death(error: RayActorError) -> str:
    """Why a process ended, as far as Ray knows, in a sentence or two."""
    text = str(error)
    if CONSTRUCTOR in text:  # what follows is the traceback; its last line is the error
        return f"Its start failed: {[line.strip() for line in text.splitlines() if line.strip()][-1]}"
    found = EXIT.search(text)
    if found is None:
        return first_line(error)
    if found["kind"] == "NODE_OUT_OF_MEMORY":
        return f"Ray killed it because its node ran out of memory. {MEMORY_ADVICE}"
    if found["kind"] == "SYSTEM_ERROR":
        return f"It crashed, or the kernel killed it because memory ran out (see dmesg). {MEMORY_ADVICE}"
    return f"{found['detail'].partition('. ')[0].rstrip('.')}."


def first_line(error: Exception) -> str:
    """The first line of an error's text that is not empty; all of it if that line is only a heading of what follows."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return short_text(error) if line.endswith(":") else line

"""The actor that tests of remote calls ask."""

import os
import time
from pathlib import Path
from queue import SimpleQueue

from ray.exceptions import ObjectStoreFullError

from rlhf.actors.actor import process_location
from rlhf.actors.calls import Worker
from rlhf.actors.cluster import Cluster, WorkerSlot
from rlhf.actors.environment import model_environment
from rlhf.actors.post_mortem import write_stacks_on_signal
from rlhf.engines.base import PassReport
from rlhf.errors import RewardError
from rlhf.planning.placement import Shape, plan_placement
from rlhf.types import FinishReason, Metrics, PackedTokens, Role, Rollout, RolloutRequest, StepReport

PLACEMENT = plan_placement({Role.POLICY: Shape(num_nodes=1, num_devices_per_node=6)}, ())


class Toy:
    """An actor with the face of a worker and nothing behind it."""

    def __init__(self, folder: Path, log_file: Path) -> None:
        write_stacks_on_signal(log_file)
        self._asked: dict[str, SimpleQueue[list[RolloutRequest]]] = {}

    def location(self) -> tuple[str, int, str]:
        return process_location()

    def nap(self, seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    def fail(self) -> None:
        raise RewardError("reward: p12 took over 30 s")

    def stumble(self, _seconds: float = 0.0) -> None:
        raise ZeroDivisionError("by zero")

    def overflow(self) -> None:
        raise ObjectStoreFullError("no room for 3 GiB")

    def forward(self, role: Role, batches: list[PackedTokens]) -> list[object]:
        return [batch.token_ids.astype("float32") for batch in batches]

    def forward_backward(self, role: Role, batches: list[PackedTokens]) -> PassReport:
        outputs = tuple(batch.token_ids.astype("float32") for batch in batches)
        return PassReport(metrics=Metrics(sums={"n": float(len(batches))}, maxima={"pid": 1.0}), outputs=outputs)

    def optim_step(self, role: Role) -> StepReport:
        return StepReport(grad_norm=1.0, lr=0.1, finite=True)

    def submit(self, pool: str, requests: list[RolloutRequest]) -> None:
        self._asked.setdefault(pool, SimpleQueue()).put(requests)

    def collect(self, pool: str) -> list[Rollout]:
        """What was asked for in one call, the last first."""
        requests = self._asked.setdefault(pool, SimpleQueue()).get()
        return [
            Rollout(
                id=request.id,
                prompt_id=request.prompt_id,
                token_ids=request.prompt_token_ids,
                log_probs=request.prompt_token_ids.astype("float32"),
                finish_reason=FinishReason.STOP,
                weight_version=os.getpid(),
            )
            for request in reversed(requests)
        ]

    def start_weight_update(self) -> None:
        time.sleep(0.01)

    def finish_weight_update(self, version: int, digest: str) -> str:
        return f"{digest}-{version}"


def start_workers(cluster: Cluster, slots: list[WorkerSlot], role: Role) -> list[Worker]:
    """As those of a run, which are forked."""
    env = model_environment(PLACEMENT, "cpu", max(cluster.cpus_per_node), os.environ)
    calls = [
        cluster.start_worker(Toy, slot, name=f"{role} rank {rank}", title="Toy", env=env)
        for rank, slot in enumerate(slots)
    ]
    return cluster.wait_started(calls)

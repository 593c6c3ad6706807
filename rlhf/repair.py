"""What a run does about a fault by itself, so that nothing else comes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class RepairKind(StrEnum):
    """What a run did about a fault by itself, so that nothing else came of it."""

    REWARD_PROCESS = "reward process"
    """The process of a reward function, verifier or sandbox was replaced, or its call repeated."""
    REWARD_REQUEST = "reward request"
    """A request to a reward service or judge was sent again."""
    WORKER = "worker"
    """Lost workers were replaced."""
    RESTART = "restart"
    """Processes started again from a checkpoint."""
    CHECKPOINT = "checkpoint"
    """A damaged checkpoint was passed over, or one could not be saved."""
    START = "start"
    """The start of a Ray cluster was repeated."""
    DOWNLOAD = "download"
    """A request to the model hub was sent again."""
    STORE = "store"
    """Stored log-probs were damaged and computed again."""
    ENVIRONMENT = "environment"
    """An environment failed: its episode began anew, or its response was left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a run repaired by itself. `where`: the source, service, worker or file. `count`: how often since told."""

    kind: RepairKind
    where: str
    text: str
    count: int = 1


Repaired: TypeAlias = Callable[[Repair], None]
"""Is told of each repair, in any thread."""

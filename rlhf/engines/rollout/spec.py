"""What a rollout engine needs to know to start. Light to import: the driver sends it to the engine's process."""

from dataclasses import dataclass

from rlhf.config.rollout import RolloutSection

STAGE = "rollout engine: "
"""Begins a line of an engine's log that says what it does now, while it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePart:
    """One node's part of an engine that is spread over nodes: the processes that compute there."""

    index: int = 0
    """The first part schedules; the others compute what it tells them."""
    host: str = "127.0.0.1"
    """Address of the part's own node."""
    address: str = "127.0.0.1"
    """Address of the first part's node, which has the store that all processes of the engine meet at."""
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One rollout engine: the model that it loads, where, and how the policy's weights reach it."""

    section: RolloutSection
    model: str
    """A folder or hub name."""
    dtype: str
    """float32 or bfloat16."""
    device: str
    """cpu or cuda."""
    seed: int = 0
    sync_backend: str = "gloo"
    """How the policy's weights arrive: gloo, nccl or ipc."""
    reference: str | None = None
    """The frozen model whose logits are mixed with the policy's for requests that ask for it."""
    adapter_rank: int = 0
    """Rank of the LoRA adapters that weight syncs bring instead of whole weights; 0: whole weights."""
    part: EnginePart = EnginePart()
    """The part of the engine that this process holds; all of it, unless the engine is spread over nodes."""

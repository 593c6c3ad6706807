"""The float32 master weights that this rank updates, wherever the ZeRO stage keeps them."""

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.weight_sync.checksum import checksum


def master_shards(engine: "deepspeed.DeepSpeedEngine", zero_stage: int) -> Iterator[tuple[int, torch.Tensor]]:
    """id(parameter) and the float32 part of it that this rank updates; a parameter without such a part is left out.

    Given one at a time: DeepSpeed copies an offloaded shard to the GPU, which may not have memory for all of them.
    """
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    if zero_stage == 3:
        yield from ((id(p), deepspeed.utils.safe_get_local_fp32_param(p)) for p in parameters)
    elif zero_stage:
        yield from ((id(p), p._hp_mapping.hp_fragment) for p in parameters if p._hp_mapping is not None)
    elif parameters[0].dtype == torch.float32:
        yield from ((id(p), p.detach()) for p in parameters)
    else:
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        yield from ((id(p), high.detach()) for lows, highs in groups for p, high in zip(lows, highs, strict=True))


class MovementCheck:
    """Finds the parameters that a step did not change, by checksums of their bits: no copy of the weights is kept."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._before: dict[int, int] = {}
        self.is_due = True
        """Whether no step has been looked at yet."""

    def before_step(self, shards: Iterable[tuple[int, torch.Tensor]]) -> None:
        self._before = {key: int(checksum(shard)) for key, shard in shards}

    def after_step(self, shards: Iterable[tuple[int, torch.Tensor]], device: torch.device) -> tuple[str, ...]:
        """Names of the parameters that did not change on any rank. Collective."""
        self.is_due = False
        changed = {key for key, shard in shards if int(checksum(shard)) != self._before[key]}
        moved = torch.tensor(
            [float(id(parameter) in changed) for parameter in self._parameters.values()], device=device
        )
        dist.all_reduce(moved, op=dist.ReduceOp.MAX)
        return tuple(name for name, has_moved in zip(self._parameters, moved.tolist(), strict=True) if not has_moved)

"""The self-test of a model that is spread over the ranks of a process group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rlhf.config.models import ModelSection
from rlhf.engines.models.chunked_mlp import chunks_of, setting_of
from rlhf.engines.models.gathering import is_partitioned
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.other_precision import at_least
from rlhf.engines.models.passes import MostOnAnyRank, SinglePasses, own_pace
from rlhf.engines.models.self_test import Examination, SelfTest
from rlhf.engines.models.self_test_input import packed_input, random_sequences
from rlhf.engines.models.sequence_parallel import join_sequence_group
from rlhf.engines.weight_sync.probe import PolicyProbe, probe_tolerance
from rlhf.errors import ModelError
from rlhf.types import FloatArray

FEW_TOKENS = 2
"""Of a chunk, so that the short sequences of the self-test are more than one."""


def examine(
    packed_model: PackedModel, section: ModelSection, *, dtype: torch.dtype, device: torch.device, where: str
) -> SelfTest:
    """Test `packed_model` after `replicate` or `partition`, before DeepSpeed installs its hooks, and set how it
    computes; the same on every rank, or together with the ranks that share its sequences. Collective. Raises
    ModelError, whose lines begin with `where`."""
    found = Examination(
        packed_model=packed_model,
        asked=section.attention,
        dtype=dtype,
        device=device,
        where=where,
        agree=most_on_any_rank(device),
        pace=pace_of(packed_model, device),
        group=join_sequence_group(section.sequence_parallel_size, device),
    ).run()
    if section.mlp_chunk_tokens:
        _require_equal_chunks(packed_model, found, dtype=dtype, device=device, where=where)
    return found


def _require_equal_chunks(
    packed_model: PackedModel, found: SelfTest, *, dtype: torch.dtype, device: torch.device, where: str
) -> None:
    """Check that feed-forward layers give the same in chunks: some look at other tokens. Raises ModelError."""
    model = packed_model.model
    packed = packed_input(random_sequences(model.config, device))
    outputs = []
    for num_tokens in (len(packed.token_ids), FEW_TOKENS):
        with at_least(dtype, packed_model), chunks_of(model, num_tokens):
            outputs.append(packed_model.passes.outputs(model, packed_model.head, packed)[0])
    difference = most_on_any_rank(device)(float((outputs[0] - outputs[1]).abs().max()))
    if not difference <= found.tolerance:
        raise ModelError(
            f"{setting_of(where)}: feed-forward layers of a {type(model).__name__} do not compute each token by itself "
            f"(in chunks, outputs differ by {difference:.2g}). Set 0."
        )


def probe_policy(
    forward: Callable[[], FloatArray],
    packed_model: PackedModel,
    self_test: SelfTest,
    temperature: float,
    device: torch.device,
) -> PolicyProbe:
    """What `forward`, a pass of `packed_model` over some sequences at `temperature`, gives as a run computes it, and
    for each sequence alone. Collective under ZeRO-3."""
    log_probs = forward()
    with each_sequence_alone(packed_model, device):
        alone = forward()
    return PolicyProbe(log_probs=log_probs, alone=alone, tolerance=probe_tolerance(self_test.noise, temperature))


@contextmanager
def each_sequence_alone(packed_model: PackedModel, device: torch.device) -> Iterator[None]:
    """Inside this block `packed_model` computes each sequence alone, with eager attention."""
    model, passes = packed_model.model, packed_model.passes
    attention = model.config._attn_implementation
    packed_model.passes = SinglePasses(pace_of(packed_model, device))
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        packed_model.passes = passes
        model.set_attn_implementation(attention)


def pace_of(packed_model: PackedModel, device: torch.device) -> MostOnAnyRank:
    """ZeRO-3 gathers each layer in every pass, on all ranks: they must run equally many. Others need not."""
    if not any(map(is_partitioned, packed_model.parameters())):
        return own_pace
    most = most_on_any_rank(device)
    return lambda num_passes: int(most(num_passes))


def most_on_any_rank(device: torch.device) -> Callable[[float], float]:
    """The largest of the ranks' numbers, on every rank, by an all-reduce on `device`. Collective."""

    def most(number: float) -> float:
        held = torch.tensor([number], dtype=torch.float64, device=device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return float(held)

    return most if dist.get_world_size() > 1 else float

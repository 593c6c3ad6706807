"""What a model takes: by hand, by ZeRO's own table, and by what autograd really keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.config.models import ModelSection
from rlhf.engines.models.chunked_mlp import chunk_feed_forward
from rlhf.planning.memory import (
    EXPORT_FILE,
    ModelLoad,
    exporting,
    forward,
    host,
    host_activations,
    kv_cache,
    layer_activations,
    learning,
    mlp_activations,
    reading,
    resident,
    resuming,
    stage_weights,
)
from tests.unit.planning.support import LLAMA_3_8B, QWEN_3_30B, shape_of

P = 8_030_261_248
LOAD = ModelLoad(shape=shape_of(LLAMA_3_8B), num_ranks=4, dtype_bytes=2, learns=True, zero_stage=3)


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer"),
    [(0, 2 * P, 2 * P, 12 * P), (1, 2 * P, 4 * P, 3 * P), (2, 2 * P, P, 3 * P), (3, P / 2, P, 3 * P)],
)
def test_zero_shards_what_its_stage_says(stage: int, parameters: float, gradients: float, optimizer: float) -> None:
    held = resident(replace(LOAD, zero_stage=stage))
    assert (held.parameters, held.gradients, held.optimizer) == (parameters, gradients, optimizer)
    assert held.total == parameters + gradients + optimizer


def test_float32_without_zero_has_no_second_copy_of_the_weights() -> None:
    assert resident(replace(LOAD, zero_stage=0, dtype_bytes=4)).optimizer == 8 * P


def test_a_model_that_only_computes_holds_its_parameters() -> None:
    assert resident(replace(LOAD, learns=False)).total == P / 2
    assert resident(replace(LOAD, learns=False, zero_stage=0)).total == 2 * P


def test_what_is_offloaded_is_on_the_host() -> None:
    held = replace(LOAD, offload_optimizer=True)
    assert resident(held).total == P / 2
    assert host(held) == 4 * P  # master, two moments and the gradient in float32, a quarter each
    both = replace(held, offload_parameters=True)
    assert (resident(both).total, host(both)) == (0, 4.5 * P)


def test_a_second_copy_in_each_node_is_beside_the_first_one() -> None:
    second = replace(LOAD, num_ranks=16, hpz_size=8)
    assert resident(second).parameters == 2 * P / 16 + 2 * P / 8
    assert resident(replace(second, learns=False)).total == 2 * P / 16 + 2 * P / 8
    offloaded = replace(second, offload_parameters=True)
    assert (resident(offloaded).parameters, host(offloaded)) == (0, 2 * P / 16 + 2 * P / 8)


def test_rank_0_exports_file_by_file_and_joins_experts_to_compare_them() -> None:
    assert exporting(LOAD) == 2 * EXPORT_FILE
    wide = replace(LOAD.shape, head_parameters=4 * 10**9)
    assert exporting(replace(LOAD, shape=wide)) == EXPORT_FILE + 8e9  # the head is a file of its own
    small = replace(LOAD.shape, num_layers=2)
    assert exporting(replace(LOAD, shape=small)) == small.num_parameters * 2
    experts = replace(LOAD.shape, layer_parameters=2 * LOAD.shape.layer_parameters)
    assert exporting(replace(LOAD, shape=experts)) == experts.num_parameters * 2
    assert exporting(replace(LOAD, on_cpu=True)) == 0


def test_a_rank_that_resumes_reads_its_part_first() -> None:
    assert resuming(LOAD) == P * 14 / 4
    assert resuming(replace(LOAD, zero_stage=2)) == P * 2 + P * 12 / 4
    assert resuming(replace(LOAD, zero_stage=0)) == P * 14
    adapters = replace(LOAD, adapter_rank=16)
    assert resuming(adapters) == adapters.learned_parameters * 14 / 4
    assert resuming(replace(LOAD, learns=False)) == resuming(replace(LOAD, on_cpu=True)) == 0


def test_what_is_swapped_is_on_the_host_and_comes_for_the_step() -> None:
    held = replace(LOAD, swap_optimizer=True)
    assert resident(held).total == resident(LOAD).total - 3 * P  # master and two moments in float32, a quarter of each
    assert host(held) == 3 * P
    assert learning(held, 10**6) == learning(LOAD, 10**6)
    assert learning(replace(held, adapter_rank=16), 1) == learning(replace(LOAD, adapter_rank=16), 1)
    assert learning(held, 1).optimizer == 3 * P  # after so short a pass the step is what counts
    cpu = replace(held, on_cpu=True)
    assert (resident(cpu), host(cpu)) == (resident(replace(LOAD, on_cpu=True)), 0)


def test_adapters_have_the_gradients_and_the_optimizer() -> None:
    """Rank 16 beside the seven matrices of each of 32 layers."""
    numbers = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    held = resident(replace(LOAD, adapter_rank=16))
    assert (held.parameters, held.gradients, held.optimizer) == (P / 2, numbers, 3 * numbers)
    assert resident(replace(LOAD, adapter_rank=16, zero_stage=0)).gradients == 2 * numbers
    assert host(replace(LOAD, adapter_rank=16, offload_optimizer=True)) == 4 * numbers
    assert learning(LOAD, 1).logits - learning(replace(LOAD, adapter_rank=16), 1).logits == 128256 * 4096 * 4


def test_linear_layers_in_four_bits_take_four_and_a_half() -> None:
    """Four matrices of attention and three of the feed-forward layer, in each of 32 layers."""
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    held = matrices * 4.5 / 8 + (P - matrices) * 2
    load = replace(LOAD, in_four_bits=True, adapter_rank=16)
    assert resident(replace(load, zero_stage=0)).parameters == held
    assert resident(load).parameters == held / 4
    assert reading(load) == 2 * P  # rank 0 reads what is on disk
    one = 4096 * 14336 * 2
    assert forward(replace(load, zero_stage=0), 1).gathered == one
    assert forward(load, 1).gathered == 128256 * 4096 * 2 + one  # the table of tokens is as it was, and the largest


def test_a_partitioned_model_gathers_what_deepspeed_allows() -> None:
    buckets = 5 * 10**8 * LOAD.dtype_bytes
    assert learning(replace(LOAD, on_cpu=True), 1).gathered == 2 * 10**9 + buckets
    few = replace(LOAD, on_cpu=True, adapter_rank=16)
    assert learning(few, 1).gathered == 2 * 10**9 + few.learned_parameters * LOAD.dtype_bytes  # no more is touched
    assert forward(replace(LOAD, zero_stage=2), 1).gathered == 0


def test_logits_are_held_a_chunk_at_a_time() -> None:
    assert forward(LOAD, 4096).logits == 2 * 1024 * 128256 * 4
    assert forward(LOAD, 100).logits == 2 * 100 * 128256 * 4
    assert forward(replace(LOAD, shape=LOAD.shape.as_scorer()), 4096).logits == 0


def test_log_probs_are_kept_while_learning_where_they_are_small() -> None:
    load = replace(LOAD, kept_log_probs=64 * 128256 * 4)
    assert learning(load, 64).logits - learning(LOAD, 64).logits == 64 * 128256 * 4
    assert learning(load, 65).logits == learning(LOAD, 65).logits
    assert forward(load, 64).logits == forward(LOAD, 64).logits


def test_the_cache_of_a_familiar_model() -> None:
    assert kv_cache(LOAD.shape, 2, 1, 1, 8192) == 2**30  # 128 KiB a token
    assert kv_cache(LOAD.shape, 2, 8, 1, 8192) == 2**27
    assert kv_cache(LOAD.shape, 2, 16, 1, 8192) == 2**27  # eight heads are not cut further


def test_the_cache_of_a_stage_is_that_of_its_layers() -> None:
    assert kv_cache(LOAD.shape, 2, 1, 4, 8192) == 2**28  # 8 of 32 layers
    assert kv_cache(LOAD.shape, 2, 4, 5, 8192) == 2**28 * 7 / 32  # some of 5 stages have 7


@pytest.mark.parametrize(
    ("stages", "layers", "part"),
    [(2, 16, "last"), (3, 11, "first"), (5, 6, "last"), (32, 1, "last")],
    ids=["16-16", "11-11-10", "6-6-7-7-6", "1-each"],
)
def test_the_largest_stage_decides(stages: int, layers: int, part: str) -> None:
    """Embeddings and output layer are two layers and a half each."""
    shape = LOAD.shape
    more = {"first": shape.embedding_parameters, "last": shape.head_parameters + shape.norm_parameters}[part]
    assert stage_weights(shape, 2, 1, stages) == 2 * (layers * shape.layer_parameters + more)
    assert stage_weights(shape, 2, 8, stages) == (layers * shape.layer_parameters + more) / 4


def test_a_stage_in_the_middle_may_be_the_largest() -> None:
    small = replace(LOAD.shape, embedding_parameters=1000, head_parameters=1000)
    assert stage_weights(small, 2, 1, 5) == 2 * 7 * small.layer_parameters
    assert stage_weights(small, 2, 1, 1) == 2 * small.num_parameters


def test_the_last_stage_has_the_embeddings_too_where_they_are_the_output_layer() -> None:
    tied = replace(LOAD.shape, head_parameters=0)
    assert stage_weights(tied, 2, 1, 1) == 2 * tied.num_parameters
    assert stage_weights(tied, 2, 1, 2) == stage_weights(LOAD.shape, 2, 1, 2)


def kept_bytes(config: LlamaConfig, dtype: torch.dtype, num_tokens: int, mlp_chunk_tokens: int = 0) -> int:
    """What autograd keeps for the backward pass of a backbone, weights aside."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    chunk_feed_forward(model, ModelSection(mlp_chunk_tokens=mlp_chunk_tokens), "policy.model")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.zeros(1, num_tokens, dtype=torch.long)
        output = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, head_dim: int) -> None:
    num_tokens = 64
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }

    def kept(num_layers: int, mlp_chunk_tokens: int) -> int:
        config = LlamaConfig(**sizes, head_dim=head_dim, vocab_size=32, num_hidden_layers=num_layers)
        return kept_bytes(config, dtype, num_tokens, mlp_chunk_tokens)

    shape = shape_of({"model_type": "llama", **sizes, "head_dim": head_dim, "vocab_size": 32, "num_hidden_layers": 1})
    whole, chunked = ((kept(3, chunk) - kept(2, chunk)) / num_tokens for chunk in (0, 20))
    assert whole == layer_activations(shape, dtype.itemsize)
    assert chunked == whole - mlp_activations(shape, dtype.itemsize)


def test_checkpointing_keeps_one_hidden_state_a_layer() -> None:
    full, checkpointed = (learning(replace(LOAD, gradient_checkpointing=on), 1000) for on in (False, True))
    layer = layer_activations(LOAD.shape, 2)
    assert full.activations - checkpointed.activations == 1000 * 32 * (layer - 4096 * 2)


def test_what_checkpointing_keeps_can_be_in_host_memory() -> None:
    kept = replace(LOAD, gradient_checkpointing=True)
    away = replace(kept, offload_activations=True)
    assert learning(kept, 1000).activations - learning(away, 1000).activations == 1000 * 32 * 4096 * 2
    assert host_activations(kept, 1000) == 0
    assert host_activations(away, 1000) == 32 * 1024 * 4096 * 2  # page-locked memory comes in powers of two
    assert host_activations(replace(away, sequence_parallel=2), 1000) == 32 * 512 * 4096 * 2
    on_cpu = replace(away, on_cpu=True)
    assert host_activations(on_cpu, 1000) == 0
    assert learning(on_cpu, 1000).activations == learning(kept, 1000).activations


@pytest.mark.parametrize("checkpointed", [False, True])
def test_feed_forward_layers_in_chunks_hold_one_chunk(checkpointed: bool) -> None:
    plain = replace(LOAD, gradient_checkpointing=checkpointed)
    chunked, mlp = replace(plain, mlp_chunk_tokens=100), mlp_activations(LOAD.shape, 2)
    saved = learning(plain, 1000).activations - learning(chunked, 1000).activations
    assert saved == 900 * 2 * mlp + (0 if checkpointed else 1000 * 32 * mlp)
    assert forward(plain, 1000).activations - forward(chunked, 1000).activations == 900 * 3 * 14336 * 2
    assert forward(chunked, 50) == forward(plain, 50)


def test_each_of_the_ranks_that_share_a_micro_batch_passes_its_share_of_the_tokens() -> None:
    shared = replace(LOAD, sequence_parallel=4)
    for passing in (forward, learning):
        assert passing(shared, 4000) == passing(LOAD, 1000)
        assert passing(shared, 3997) == passing(LOAD, 1000)
    assert resident(shared) == resident(LOAD)


def test_a_rank_gathers_its_own_experts_only() -> None:
    """Eight ranks in groups of four, which have the experts of a layer among them. What a rank holds is the same."""
    whole = replace(LOAD, shape=shape_of(QWEN_3_30B), num_ranks=8, on_cpu=True)
    split = replace(whole, expert_parallel=4)
    assert resident(split) == resident(whole)
    experts = 48 * 128 * 3 * 2048 * 768
    assert split.gathered_parameters == whole.shape.num_parameters - experts * 3 // 4
    assert forward(whole, 10).gathered == forward(split, 10).gathered == 2 * 10**9  # DeepSpeed prefetches no more
    one = replace(split, shape=replace(split.shape, num_layers=1))
    assert one.gathered_parameters == one.shape.num_parameters - 128 * 3 * 2048 * 768 * 3 // 4
    assert forward(one, 10).gathered == one.gathered_parameters * 2


def test_tokens_that_come_to_experts_are_copied() -> None:
    """What each of 8 experts of a token reads and gives, in each layer; with checkpoints in the layer that computes."""
    whole = replace(LOAD, shape=shape_of(QWEN_3_30B), num_ranks=8)
    split, each = replace(whole, expert_parallel=4), 1000 * 2 * 8 * 2048 * 2
    assert forward(split, 1000).activations - forward(whole, 1000).activations == each
    assert learning(split, 1000).activations - learning(whole, 1000).activations == (48 + 2) * each
    split, whole = (replace(load, gradient_checkpointing=True) for load in (split, whole))
    assert learning(split, 1000).activations - learning(whole, 1000).activations == 2 * each

"""The source that fits how a model's weights are held."""

import torch

from rlhf.engines.models.adapters import adapters_of
from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.weight_sync.buckets import dtype_of
from rlhf.engines.weight_sync.merged_source import MergedSource
from rlhf.engines.weight_sync.module_source import ModuleSource
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.engines.weight_sync.zero3_source import Zero3Source


def make_source(module: torch.nn.Module, dtype: str) -> WeightSource:
    """Wrap `module` as a source; `dtype` (float32, bfloat16) is what the rollout engines compute in.

    Names are those of `module.named_parameters()`: pass the Hugging Face model itself, not DeepSpeed's wrapper. LoRA
    adapters are merged into the matrices that they adapt.
    """
    is_partitioned = deepspeed.runtime.zero.partition_parameters.is_zero_param
    kind = Zero3Source if any(is_partitioned(parameter) for parameter in module.parameters()) else ModuleSource
    source: WeightSource = kind(module, dtype_of(dtype))
    adapters = adapters_of(module)
    return MergedSource(source, adapters) if adapters else source

"""The source that fits how a model's weights are held."""

from transformers import PreTrainedModel

from rlhf.engines.models.adapters import adapters_of
from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.weight_sync.buckets import dtype_of
from rlhf.engines.weight_sync.merged_source import MergedSource
from rlhf.engines.weight_sync.module_source import ModuleSource
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.engines.weight_sync.stored_source import StoredSource
from rlhf.engines.weight_sync.zero3_source import Zero3Source


def make_source(model: PreTrainedModel, dtype: str, *, stored_names: bool = False) -> WeightSource:
    """Wrap the Hugging Face model itself, not DeepSpeed's wrapper, as a source; `dtype` (float32, bfloat16) is what the
    rollout engines compute in.

    Names and shapes are those of `model.named_parameters()`, with `stored_names` those of its checkpoint. LoRA adapters
    are merged into the matrices that they adapt.
    """
    is_partitioned = deepspeed.runtime.zero.partition_parameters.is_zero_param
    kind = Zero3Source if any(is_partitioned(parameter) for parameter in model.parameters()) else ModuleSource
    source: WeightSource = kind(model, dtype_of(dtype))
    adapters = adapters_of(model)
    if adapters:
        source = MergedSource(source, adapters)
    return StoredSource(source, model) if stored_names else source

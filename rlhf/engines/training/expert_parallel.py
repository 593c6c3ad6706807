"""Expert parallelism by DeepSpeed's AutoEP: each rank of a group holds some of the experts of a layer, and tokens go to
the ranks of their experts, where ZeRO-3 alone brings all experts of a layer to every rank.

AutoEP replaces blocks of experts while DeepSpeed sets up its engine. What it leaves is compared with what was there:
names and shapes of all tensors, and the outputs of a pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from rlhf.config.expert_families import FLOAT32_ROUTERS, SPLIT_FAMILIES
from rlhf.config.models import TrainedModelSection
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.other_precision import at_least
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.routers import set_up_routers
from rlhf.engines.models.self_test_input import packed_input, random_sequences
from rlhf.engines.models.split_experts import under_own_names
from rlhf.engines.training.examined import most_on_any_rank
from rlhf.errors import ModelError

LAYERS = r"model\.(\w+\.)*layers\.\d+\.mlp"
"""Names of the blocks that AutoEP replaces if they have experts, in a `PackedModel`."""


def with_expert_parallelism(
    config: Mapping[str, object],
    packed_model: PackedModel,
    section: TrainedModelSection,
    *,
    dtype: torch.dtype,
    device: torch.device,
    where: str,
) -> dict[str, object]:
    """DeepSpeed's `config` with AutoEP as the section says; `packed_model` is made such that AutoEP finds its sizes.
    Raises ModelError, which begins with the setting of the role of `where` (policy.model), for models that AutoEP does
    not know."""
    if section.expert_parallel_size == 1:
        return dict(config)
    model_type = packed_model.model.config.model_type
    if model_type not in SPLIT_FAMILIES:
        raise ModelError(f"{setting_of(where)}: DeepSpeed's AutoEP does not know a {model_type}. Set 1.")
    vars(packed_model)["config"] = packed_model.model.config
    # torch multiplies groups of matrices in bfloat16, on GPUs; elsewhere each expert is computed by itself.
    is_grouped = dtype == torch.bfloat16 and device.type == "cuda"
    return {
        **config,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": section.expert_parallel_size,
            "moe_layer_pattern": LAYERS,
            "use_grouped_mm": is_grouped,
        },
    }


def set_up_split_routers(model: PreTrainedModel, section: TrainedModelSection, where: str) -> None:
    """As `set_up_routers`, of the routers that AutoEP has made, which compute in the model's format even if the model's
    own compute in float32."""
    in_float32 = section.float32_router or model.config.model_type in FLOAT32_ROUTERS
    set_up_routers(model, section.model_copy(update={"float32_router": in_float32}), where)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeSplit:
    """What a partitioned model is, before its experts are spread over ranks."""

    packed: PackedInput
    outputs: torch.Tensor
    shapes: Mapping[str, tuple[int, ...]]
    tolerance: float

    @staticmethod
    def of(
        packed_model: PackedModel, *, dtype: torch.dtype, device: torch.device, tolerance: float, shared_by: int
    ) -> "BeforeSplit":
        """Of a model that computes as the self-test chose, to `tolerance` nats. Each `shared_by` consecutive ranks
        compute a batch together; ranks with batches of their own have different ones. Collective."""
        model = packed_model.model
        sequences = random_sequences(model.config, device)
        first = dist.get_rank() // shared_by % len(sequences)
        packed = packed_input((*sequences[first:], *sequences[: first + 1]))
        with at_least(dtype, packed_model):
            outputs = packed_model.passes.outputs(model, packed_model.head, packed)
        return BeforeSplit(packed=packed, outputs=outputs, shapes=_shapes(packed_model), tolerance=tolerance)

    @torch.no_grad()
    def require_same(self, engine: torch.nn.Module, packed_model: PackedModel, where: str) -> None:
        """Check that DeepSpeed's `engine` around the model has its tensors, and computes what it did. Collective.
        Raises ModelError, which begins with the setting of the role of `where` (policy.model)."""
        setting = setting_of(where)
        kind, shapes = type(packed_model.model).__name__, _shapes(packed_model)
        if shapes != self.shapes:
            other = sorted(set(shapes.items()) ^ set(self.shapes.items()))[0][0]
            raise ModelError(f"{setting}: AutoEP leaves a {kind} with other tensors ({other}). Set 1.")
        most = most_on_any_rank(self.outputs.device)
        difference = most(float((engine(self.packed) - self.outputs).abs().max()))
        if not difference <= self.tolerance:
            raise ModelError(
                f"{setting}: AutoEP computes something else than a {kind} (outputs differ by {difference:.2g}, more "
                f"than {self.tolerance:.2g}). Set 1."
            )


def setting_of(where: str) -> str:
    """The setting's name, for the role of `where`."""
    return f"{where.rpartition('.')[0]}.expert_parallel_size".lstrip(".")


def _shapes(packed_model: PackedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by the names that the model has without expert parallelism."""
    named = under_own_names(packed_model.model, packed_model.model.named_parameters())
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in named}

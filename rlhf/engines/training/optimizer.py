"""AdamW, its learning-rate schedule, and the DeepSpeed config for both."""

import math
from collections.abc import Iterable

import torch

from rlhf.config.models import ModelSection, TrainedModelSection


def learning_rate(section: TrainedModelSection, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step` (counted from 0) of `num_steps`, the steps that the run will take.

    Linear warm-up that never is 0; then cosine or linear decay to `min_lr_ratio` at the last step, or a constant.
    """
    num_warmup = math.ceil(section.warmup_ratio * num_steps)
    if step < num_warmup:
        return section.lr * (step + 1) / (num_warmup + 1)
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - 1 - num_warmup))
    shapes = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
    return section.lr * (section.min_lr_ratio + (1 - section.min_lr_ratio) * shapes[section.lr_schedule])


def build_optimizer(section: TrainedModelSection, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW; weight decay applies to matrices only, not to biases and norms."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    if not section.weight_decay:
        groups = [{"params": trainable}]
    return torch.optim.AdamW(
        groups, lr=section.lr, betas=section.adam_betas, eps=section.adam_eps, weight_decay=0.0, fused=True
    )


def training_config(section: TrainedModelSection, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """DeepSpeed's config for training.

    A step ends the gradient accumulation window, however many micro-batches it had. Gradients accumulate in float32
    (in stage 0 in the model's dtype). Stage 0 clips in `StepGuard`, because DeepSpeed does not report the norm there.
    """
    is_bf16 = dtype == torch.bfloat16
    config = _zero_config(section, device) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": section.max_grad_norm if section.zero_stage else 0.0,
        "bf16": {"enabled": is_bf16, "check_grad_overflow": True},
        "zero_force_ds_cpu_optimizer": False,
    }
    if is_bf16 and section.zero_stage:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def scoring_config(section: ModelSection, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """DeepSpeed's config for a ZeRO-3 model that only runs forward."""
    return _zero_config(section, device) | {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def _zero_config(section: ModelSection, device: torch.device) -> dict[str, object]:
    is_cuda = device.type == "cuda"
    # DeepSpeed refuses to overlap in stages 0 and 1 where the window of accumulation is ours.
    zero: dict[str, object] = {"stage": section.zero_stage, "overlap_comm": is_cuda and section.zero_stage >= 2}
    if section.zero_stage == 3:
        zero["zero_hpz_partition_size"] = section.zero_hpz_partition_size
    to_host = {"device": "cpu", "pin_memory": is_cuda}
    if isinstance(section, TrainedModelSection) and section.offload_optimizer and section.zero_stage:
        zero["offload_optimizer"] = to_host
    if section.offload_parameters and section.zero_stage == 3:
        zero["offload_param"] = to_host
    return {"zero_optimization": zero, "steps_per_print": None, "wall_clock_breakdown": False}

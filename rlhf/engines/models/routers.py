"""Routers of mixture-of-experts models: found, frozen, and computed in float32.

Transformers names the modules whose outputs are router logits (`_can_record_outputs`); it is asked here for nothing
else.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.engines.models.split_experts import split_layers
from rlhf.errors import ModelError

BALANCING = "load_balancing_loss_func"
"""What transformers calls the function in the files of models whose routers it balances."""
CHOSEN = ("num_experts_per_tok", "moe_k")
"""What families call the number of experts that a token uses."""


@dataclass(frozen=True, slots=True)
class Router:
    """A module that chooses the experts of each token. `place` is that of the logits [tokens, experts] among its
    outputs, where it has several."""

    name: str
    module: nn.Module
    place: int


def routers_of(model: PreTrainedModel) -> list[Router]:
    """The routers of a model, in the order of its modules. Empty for a dense model, and for one with code of its own
    that does not name them."""
    if layers := split_layers(model):
        return [Router(f"{name}.router.gate", layer.get_submodule("router.gate"), 0) for name, layer in layers.items()]
    found: dict[nn.Module, Router] = {}
    for prefix, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        for recorder in _recorders(part):
            for name, module in part.named_modules(prefix=prefix):
                if _matches(recorder, name, module):
                    found.setdefault(module, Router(name, module, recorder.index))
    return list(found.values())


def num_chosen(model: PreTrainedModel, where: str) -> int:
    """How many experts a token uses, for the load-balancing loss. Raises ModelError, which begins with `where`, if
    transformers does not balance the routers of this model."""
    source, chosen = inspect.getmodule(type(model)), num_used(model)
    if not routers_of(model) or source is None or BALANCING not in vars(source) or chosen is None:
        raise ModelError(
            f"{where}: algo.router_aux_coef needs a mixture of experts whose routers are balanced by a loss over the "
            f"softmax of their logits; transformers has none for a {type(model).__name__}. Set 0."
        )
    return chosen


def num_used(model: PreTrainedModel) -> int | None:
    """How many experts a token uses, by the config; None if it does not say."""
    settings = model.config.get_text_config().to_dict()
    used = next((settings[name] for name in CHOSEN if name in settings), None)
    return used if isinstance(used, int) else None


def checked_routers(model: PreTrainedModel, section: ModelSection, where: str) -> list[Router]:
    """The routers that the section freezes, or computes in float32; none if it does neither. Raises ModelError, which
    begins with the setting of the role of `where` (policy.model), if it asks for what the model does not have."""
    freezes = isinstance(section, TrainedModelSection) and section.freeze_router
    asked = "freeze_router" if freezes else "float32_router" if section.float32_router else None
    if asked is None:
        return []
    setting, kind = f"{where.rpartition('.')[0]}.{asked}".lstrip("."), type(model).__name__
    routers = routers_of(model)
    if not routers:
        raise ModelError(f"{setting}: a {kind} has no routers, or none that transformers names. Set false.")
    for router in routers:
        if not _is_alone(router):
            raise ModelError(f"{setting}: a {kind}'s router is no module of its own ({router.name}). Set false.")
    return routers


def set_up_routers(model: PreTrainedModel, section: ModelSection, where: str) -> None:
    """Freeze the routers, or compute them in float32, as the section says. Raises as `checked_routers`."""
    for router in checked_routers(model, section, where):
        if isinstance(section, TrainedModelSection) and section.freeze_router:
            router.module.requires_grad_(False)
        if section.float32_router:
            router.module.forward = partial(_in_float32, router, router.module.forward)


def expert_lists(model: nn.Module) -> list[str]:
    """Names of the modules that hold experts as a list of modules, of which a pass uses some, in any order. Models of
    transformers hold all experts of a layer in one module instead."""
    return [
        name
        for name, module in model.named_modules()
        if any(
            isinstance(child, nn.ModuleList) and child_name == "experts"
            for child_name, child in module.named_children()
        )
    ]


def _recorders(part: PreTrainedModel) -> Iterator[OutputRecorder]:
    given = (part._can_record_outputs or {}).get("router_logits", [])
    for one in given if isinstance(given, list) else [given]:
        yield one if isinstance(one, OutputRecorder) else OutputRecorder(one, index=1)


def _matches(recorder: OutputRecorder, name: str, module: nn.Module) -> bool:
    is_there = recorder.layer_name is None or f".{name}".endswith(f".{recorder.layer_name.strip('.')}")
    return is_there and isinstance(module, recorder.target_class)


def _is_alone(router: Router) -> bool:
    """Whether the module is a router and nothing else, by its name or that of its class: some families record the
    logits of a whole layer."""
    names = (type(router.module).__name__.lower(), router.name.rpartition(".")[2].lower())
    return any(word in name for name in names for word in ("router", "gate", "gating"))


def _in_float32(router: Router, forward: Callable[..., object], *inputs: torch.Tensor, **more: object) -> object:
    """The forward of a router on inputs and weights in float32 (finer ones stay). Its logits stay in that format; other
    outputs, such as the weights of experts, get the format of the input."""
    given = next(one.dtype for one in inputs if one.is_floating_point())
    holders = [
        (module, name, parameter)
        for module in router.module.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    for module, name, parameter in holders:
        vars(module)[name] = _finer(parameter)  # found before the parameter; the parameter itself stays
    try:
        outputs = forward(*map(_finer, inputs), **more)
    finally:
        for module, name, _ in holders:
            del vars(module)[name]
    if not isinstance(outputs, tuple):
        return outputs
    return tuple(
        one.to(given) if place != router.place and isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for place, one in enumerate(outputs)
    )


def _finer(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor

"""Rollout routing replay, R3 (Ma et al. 2025, arXiv:2510.11370): a mixture of experts computes each token with the
experts that the rollout engine used for it.

Engine and trainer round differently, and a router whose scores are close then chooses other experts: the two compute
different functions of the same token. Here only the choice is given. Scores and the weights of experts are those of the
model's own router at the given experts, so that routers learn.

The experts of a pass travel as an argument of the decoder layers, which gradient checkpointing keeps with the layer's
other inputs, and inside a layer as an argument of the block that has the router, which is cut where the block computes
chunks of tokens (`chunked_mlp.py`). Whatever is computed again in the backward pass so gets the same experts.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.own_logits import backbone
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.routers import Router, num_used, routers_of
from rlhf.errors import ModelError

SETTING = "rollout.router_replay"
ARGUMENT = "routed_experts"
"""The argument of layers and blocks."""
REPLAYED, CHANGED = "router/replayed", "router/replay_changed"
"""The metrics."""
TOP_K = (torch.topk, torch.Tensor.topk)


class _Choosing(TorchFunctionMode):
    """Inside it, top-k gives the scores and indices of `given` [n, k], where these are at least 0."""

    def __init__(self, given: torch.Tensor | None) -> None:
        super().__init__()
        self._given = given
        self.own: list[torch.Tensor] = []
        """The indices [n, k] that each call would have given."""
        self.said: list[torch.Tensor] = []
        """Those that it gave."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func not in TOP_K:
            return result
        own = result.indices
        said = own if self._given is None else torch.where(self._given >= 0, self._given, own)
        self.own.append(own)
        self.said.append(said)
        scores = args[0] if args else (kwargs or {})["input"]
        return torch.return_types.topk((scores.gather(-1, said), said))


class RouterReplay:
    """Makes the routers of a `PackedModel` use the experts of its input, and counts what that changes in a pass: not in
    those that gradient checkpointing repeats."""

    def __init__(self, packed_model: PackedModel) -> None:
        """Raises ModelError if the model's routers cannot be told what to choose."""
        self._routers = replayable_routers(packed_model.model)
        self._top_k = num_used(packed_model.model)
        self._is_open = False
        self._order: torch.Tensor | None = None
        self._experts: torch.Tensor | None = None
        """[tokens of all passes, routers, top_k], in the order in which layers see the tokens; -1 where unknown."""
        self._start = 0
        """The first token of the next pass."""
        self._counted: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._routers]
        self.num_replayed = 0.0
        """Tokens that are learned from, in the last pass, that were predicted with known experts."""
        self.num_changed = 0.0
        """The mean over routers of how many of these the model would have given to other experts."""
        packed_model.register_forward_pre_hook(self._open)
        packed_model.register_forward_hook(self._close)
        _, below = backbone(packed_model.model)
        below.register_forward_pre_hook(self._give, with_kwargs=True)
        self._place_hooks(packed_model.model)

    def shares(self, num_tokens: float) -> dict[str, float]:
        """The metrics of the last pass, as shares of `num_tokens`, those that the whole step learns from."""
        counts = {REPLAYED: self.num_replayed, CHANGED: self.num_changed}
        return {name: count / max(num_tokens, 1.0) for name, count in counts.items()}

    def _place_hooks(self, model: PreTrainedModel) -> None:
        for layer_name, layer in model.named_modules():
            if not isinstance(layer, GradientCheckpointingLayer):
                continue
            of_layer = _Held()
            layer.register_forward_pre_hook(partial(_take, of_layer), with_kwargs=True)
            for index, router in enumerate(self._routers):
                if not router.name.startswith(f"{layer_name}."):
                    continue
                block, of_block = model.get_submodule(_block_of(router)), _Held()
                block.register_forward_pre_hook(partial(_hand_on, of_layer, index), with_kwargs=True)
                block.forward = partial(_in_block, of_block, block.forward)
                router.module.forward = partial(self._route, index, of_block, router.module.forward)

    def _open(self, packed_model: PackedModel, inputs: tuple[PackedInput]) -> None:
        (packed,) = inputs
        self.num_replayed = self.num_changed = 0.0
        self._start, self._experts = 0, None
        for counted in self._counted:
            counted.clear()
        if packed.routed_experts is None:
            return
        expected = (len(packed.token_ids), len(self._routers), self._top_k)
        if packed.routed_experts.shape != expected:
            raise ModelError(
                f"routed experts of shape {list(packed.routed_experts.shape)} (tokens, routers, experts a token), and "
                f"the model needs {list(expected)}"
            )
        unknown = torch.iinfo(packed.routed_experts.dtype).max
        experts = packed.routed_experts.long()
        self._order = packed_model.passes.order(packed.lengths).to(experts.device)
        self._experts = experts.where(experts != unknown, -1)[self._order]
        self._is_open = True

    def _give(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Give a pass of the backbone the experts of its tokens; those of padding and idle passes are unknown."""
        del module
        if self._experts is None:
            return None
        num_tokens = kwargs["input_ids"].shape[1]
        own = self._experts[self._start : self._start + num_tokens]
        self._start += num_tokens
        missing = own.new_full((num_tokens - len(own), *own.shape[1:]), -1)
        return args, {**kwargs, ARGUMENT: torch.cat([own, missing])[None]}

    def _route(self, index: int, held: "_Held", forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a router, with the experts that its block was given."""
        if held.experts is None:
            return forward(*args, **kwargs)
        given = held.experts.reshape(-1, held.experts.shape[-1])
        with _Choosing(given) as choosing:
            outputs = forward(*args, **kwargs)
        (own,) = choosing.own
        if self._is_open:
            is_known = (given >= 0).all(-1)
            is_other = (own.sort(-1).values != choosing.said[0].sort(-1).values).any(-1)
            self._counted[index].append((is_known, is_other))
        return outputs

    def _close(self, packed_model: PackedModel, inputs: tuple[PackedInput], output: torch.Tensor) -> None:
        del packed_model, output
        (packed,) = inputs
        if not self._is_open or self._order is None:
            return
        self._is_open, self._experts = False, None
        predicts = torch.zeros(len(packed.token_ids), dtype=torch.bool, device=packed.token_ids.device)
        predicts[packed.wanted - 1] = True
        rows = predicts[self._order]
        known, changed = (
            torch.stack([torch.cat([pair[part] for pair in one])[: len(rows)][rows] for one in self._counted])
            for part in (0, 1)
        )
        is_known = known.all(0)
        self.num_replayed = float(is_known.sum())
        self.num_changed = float((changed & is_known).sum()) / len(self._routers)


class _Held:
    """The experts of the pass that a layer or block computes now; None: its own choice."""

    experts: torch.Tensor | None = None


def replayable_routers(model: PreTrainedModel) -> list[Router]:
    """The routers of a model, each of which chooses experts by one top-k over scores of all of them. Raises ModelError
    if there is none, or one that chooses in another way."""
    routers, kind = routers_of(model), type(model).__name__
    if not routers:
        raise ModelError(f"{SETTING}: a {kind} has no routers, or none that transformers names. Set false.")
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    blocks = Counter(_block_of(router) for router in routers)
    for router in routers:
        is_in_layer = any(router.name.startswith(f"{layer}.") for layer in layers)
        is_alone = blocks[_block_of(router)] == 1
        if not is_in_layer or not is_alone or not _chooses_once(router, num_used(model)):
            raise ModelError(
                f"{SETTING}: routers of a {kind} do not choose experts by the top-k of one score each ({router.name}). "
                "Set false."
            )
    return routers


def _block_of(router: Router) -> str:
    """The name of the module that has the router."""
    return router.name.rpartition(".")[0]


def _chooses_once(router: Router, top_k: int | None) -> bool:
    """Whether a router's last output is the result of its only top-k, by a pass without numbers."""
    weight = getattr(router.module, "weight", None)
    if top_k is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return False
    empty = copy.deepcopy(router.module).to("meta")
    vars(empty).pop("forward", None)  # the class's own
    with _Choosing(None) as choosing, torch.no_grad():
        try:
            outputs = empty(torch.empty(2, weight.shape[1], dtype=weight.dtype, device="meta"))
        except TypeError:  # it wants more than the tokens
            return False
    said = choosing.said
    return (
        isinstance(outputs, tuple)
        and len(said) == 1
        and outputs[-1] is said[0]
        and said[0].shape == (2, top_k)
        and outputs[router.place].shape == (2, weight.shape[0])
    )


def _take(held: _Held, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep the experts of the pass that a layer begins, at first or again."""
    del module
    held.experts = kwargs.pop(ARGUMENT, None)
    return args, kwargs


def _hand_on(held: _Held, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Give the block of router `index` its experts [1, T, top_k]."""
    del module
    return None if held.experts is None else (args, {**kwargs, ARGUMENT: held.experts[:, :, index]})


def _in_block(held: _Held, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a block, or of a chunk of its tokens."""
    held.experts = kwargs.pop(ARGUMENT, None)
    return forward(*args, **kwargs)

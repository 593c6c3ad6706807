"""Checks between gradients and weights: no rank takes a step on gradients or losses that are not finite."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist


class GradientWatch:
    """Observes every local gradient and loss of a gradient accumulation window, before they are reduced over ranks.

    Observing the gradients themselves works the same in every ZeRO stage, and does not depend on a norm, which may be
    finite by accident. It costs one reduction for each parameter, and one small all-reduce for each step.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> None:
        self._largest = torch.zeros(len(parameters) + 1, device=device)
        for i, parameter in enumerate(parameters.values()):
            parameter.register_hook(partial(self._observe, i))

    def _observe(self, i: int, gradient: torch.Tensor) -> None:
        if gradient.numel():
            least, largest = gradient.detach().aminmax()  # `abs()` would copy the gradient
            magnitude = torch.maximum(-least, largest).to(self._largest)
            self._largest[i] = torch.maximum(self._largest[i], magnitude)  # keeps NaN

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Include a micro-batch's loss in what must be finite."""
        self._observe(len(self._largest) - 1, loss)

    def end_window(self) -> bool:
        """Whether everything observed since the last call, on every rank, was finite. Collective."""
        is_bad = (~self._largest.isfinite()).any().float()
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        self._largest.zero_()
        return not bool(is_bad)


class StepGuard:
    """Skips the optimizer's update where `skip` is set, and clips gradients where DeepSpeed does not (ZeRO stage 0).

    To skip, it hides the gradients during the optimizer's step: an optimizer leaves parameters without a gradient
    alone, and everything that DeepSpeed does around the update (end of the window, release of buffers) runs as usual.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
        self.skip = False
        self.norm = 0.0
        """Norm of the last gradient before clipping, if `clip_norm` is given; a `clip_norm` of 0 does not clip."""
        self._clip_norm = clip_norm
        self._hidden: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._clip_norm is not None:
            # In double precision, one gradient at a time: a copy of all of them would take eight bytes a parameter.
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            self.norm = float(norm)
            self.skip = self.skip or not bool(norm.isfinite())
            if self._clip_norm and not self.skip:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm.float())
        if self.skip:
            self._hidden = [(p, p.grad) for p in parameters]
            for parameter in parameters:
                parameter.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []

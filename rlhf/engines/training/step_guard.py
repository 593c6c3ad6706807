"""What stands between gradients and weights: no step is taken, on any rank, on numbers that are not finite."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist


class GradientWatch:
    """Sees every local gradient and loss of an accumulation window, before they are reduced.

    Looking at the gradients themselves works alike in every ZeRO stage, and does not depend on a norm that may look
    healthy. The cost is one reduction a parameter, and one small all-reduce a step.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> None:
        self._largest = torch.zeros(len(parameters) + 1, device=device)
        for i, parameter in enumerate(parameters.values()):
            parameter.register_hook(partial(self._see, i))  # type: ignore[no-untyped-call]

    def _see(self, i: int, gradient: torch.Tensor) -> None:
        if gradient.numel():
            magnitude = gradient.detach().abs().amax().to(self._largest)
            self._largest[i] = torch.maximum(self._largest[i], magnitude)  # keeps NaN

    def see_loss(self, loss: torch.Tensor) -> None:
        """Count a micro-batch's loss among what must be finite."""
        self._see(len(self._largest) - 1, loss)

    def close_window(self) -> bool:
        """Whether everything seen since the last call, on every rank, was finite. Collective."""
        is_bad = (~self._largest.isfinite()).any().float()
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        self._largest.zero_()
        return not bool(is_bad)


class StepGuard:
    """Holds back the optimizer's update when told to, and clips where nobody else does.

    It hides the gradients from the optimizer for the length of its step (an optimizer skips what has no gradient), so
    that everything around the update (closing the window, releasing buffers) takes its usual way.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
        self.hold = False
        self.norm = 0.0
        """Norm of the last gradient before clipping, where `clip_norm` is given; 0 there does not clip."""
        self._clip_norm = clip_norm
        self._hidden: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._clip_norm is not None:
            norm = torch.nn.utils.get_total_norm([p.grad.double() for p in parameters])
            self.norm = float(norm)
            self.hold = self.hold or not bool(norm.isfinite())
            if self._clip_norm and not self.hold:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm.float())
        if self.hold:
            self._hidden = [(p, p.grad) for p in parameters]
            for parameter in parameters:
                parameter.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []

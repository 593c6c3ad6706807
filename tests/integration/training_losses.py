"""Losses of the training engine's tests: right ones, and two that are not finite."""

import torch

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.types import Metrics, Signal
from tests.integration.training_rows import LENGTHS


def policy_loss(outputs: Outputs, batch: TensorBatch) -> LossOutput:
    """Advantage-weighted log-probs and an entropy bonus over the step's tokens; reports how far the ratio is from 1."""
    assert outputs.entropy is not None
    gain = batch.signals[Signal.ADVANTAGES] * outputs.predictions + 0.1 * outputs.entropy
    loss = -torch.where(batch.loss_mask, gain, 0.0).sum() / batch.denominators.tokens
    maxima = {}
    if Signal.OLD_LOG_PROBS in batch.signals:
        log_ratio = outputs.predictions.detach() - batch.signals[Signal.OLD_LOG_PROBS]
        maxima["ratio_error"] = float((log_ratio.exp() - 1).abs().max())
    return LossOutput(loss=loss, metrics=Metrics(sums={"loss": float(loss.detach())}, maxima=maxima))


def broken_gradient(outputs: Outputs, batch: TensorBatch) -> LossOutput:
    """A finite loss with an infinite gradient."""
    difference = outputs.predictions - outputs.predictions.detach()
    return LossOutput(loss=difference.sqrt().sum() / batch.denominators.tokens)


def broken_loss(outputs: Outputs, batch: TensorBatch) -> LossOutput:
    """A loss that is not a number in one micro-batch of the step, with a gradient that looks healthy."""
    loss = policy_loss(outputs, batch).loss
    return LossOutput(loss=loss + torch.nan if int(batch.lengths.max()) == max(LENGTHS) else loss)


def pair_loss(outputs: Outputs, batch: TensorBatch) -> LossOutput:
    """Bradley-Terry over (better, worse)."""
    better, worse = outputs.predictions.view(-1, 2).unbind(-1)
    return LossOutput(loss=-torch.nn.functional.logsigmoid(better - worse).sum() / batch.denominators.examples)


OBJECTIVES = {
    "policy": policy_loss,
    "broken gradient": broken_gradient,
    "broken loss": broken_loss,
    "reward": pair_loss,
}

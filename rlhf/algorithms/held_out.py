"""An algorithm's own figures on rows that it does not learn from."""

from collections.abc import Sequence

import torch

from rlhf.algorithms.base import Algorithm, Outputs, TensorBatch
from rlhf.types import FloatArray, Metrics, TrainBatch


def held_out_metrics(algorithm: Algorithm, batches: Sequence[TrainBatch], said: Sequence[FloatArray]) -> Metrics:
    """What the algorithm's losses report about micro-batches, given what the model's head said about each: [T] or [S].
    Entropy is not known here, so figures of it are left out. Nothing has a gradient."""
    objectives, cpu = algorithm.objectives(), torch.device("cpu")
    figures = [
        objectives[batch.objective](Outputs(predictions=torch.tensor(array)), TensorBatch.from_numpy(batch, cpu))
        for batch, array in zip(batches, said, strict=True)
        if not batch.is_padding
    ]
    return sum((output.metrics for output in figures), Metrics())

"""The metrics of an algorithm's losses on held-out rows."""

from collections.abc import Sequence

import torch

from rlhf.algorithms.base import Algorithm, Outputs, TensorBatch
from rlhf.types import FloatArray, Metrics, TrainBatch


def held_out_metrics(algorithm: Algorithm, batches: Sequence[TrainBatch], outputs: Sequence[FloatArray]) -> Metrics:
    """Metrics of the algorithm's losses on micro-batches, from the model's outputs for each, [T] or [S]. There is no
    gradient. Entropy is not computed here, so its metrics are left out."""
    objectives, cpu = algorithm.objectives(), torch.device("cpu")
    metrics = [
        objectives[batch.objective](Outputs(predictions=torch.tensor(array)), TensorBatch.from_numpy(batch, cpu))
        for batch, array in zip(batches, outputs, strict=True)
        if not batch.is_padding
    ]
    return sum((output.metrics for output in metrics), Metrics())

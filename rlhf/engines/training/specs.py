"""What a rank needs to know to load a model. Light to import: the driver sends these to the ranks' processes."""

from dataclasses import dataclass

from rlhf.config.algo import AlgorithmSection
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.types import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """A model that only runs forward: a reference or a reward model."""

    section: ModelSection
    model: str
    """A folder or hub name."""
    head: Head
    temperature: float
    """What logits are divided by before log-probs are taken; no effect on other heads."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModelSpec:
    """A model that is trained: a policy, critic or reward model."""

    section: TrainedModelSection
    model: str
    """A folder or hub name."""
    head: Head
    algorithm: AlgorithmSection
    """The losses are built from it on every rank."""
    temperature: float
    """What logits are divided by before log-probs are taken; no effect on other heads."""
    num_steps: int
    """Optimizer steps that this model will take in the whole run: the learning rate's schedule spans them."""
    seed: int
    """Decides the weights of a new scalar head and of new LoRA adapters."""

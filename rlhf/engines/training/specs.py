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
    replays_routers: bool = False
    """Whether tokens are computed with the experts that their batches give."""

    @property
    def balances_routers(self) -> bool:
        """Whether the load-balancing loss is part of this model's. It is not of a critic's, which may be dense."""
        return self.algorithm.router_aux_coef > 0.0 and self.head is not Head.VALUES

"""Settings of supervised methods: demonstrations, preferences, labeled steps."""

from typing import Literal

from rlhf.config.algo.common import AlgorithmSection


class SftSection(AlgorithmSection):
    """Supervised fine-tuning: negative log-likelihood of the response tokens."""

    type: Literal["sft"] = "sft"
    """Supervised fine-tuning."""


class RmSection(AlgorithmSection):
    """Reward model: Bradley-Terry over the pairs of a ranking."""

    type: Literal["rm"] = "rm"
    """Reward model."""
    use_margins: bool = True
    """Subtract the rows' margins inside the loss, if they have margins."""


class PrmSection(AlgorithmSection):
    """Process reward model: predicts whether each step of a response is right, at the step's last token."""

    type: Literal["prm"] = "prm"
    """Process reward model."""

"""Settings of learning from given answers: demonstrations, rankings, labeled steps."""

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
    """Subtract the data's margins inside the loss, where rows have them."""


class PrmSection(AlgorithmSection):
    """Process reward model: whether each step of an answer is right, judged at the step's last token."""

    type: Literal["prm"] = "prm"
    """Process reward model."""

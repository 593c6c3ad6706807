"""Settings of the algorithms; one section for each class, told apart by `type`."""

from typing import Annotated

from pydantic import Field

from rlhf.config.algo.common import (
    AdaptiveKl,
    AlgorithmSection,
    Correction,
    FixedKl,
    KlControl,
    MaskedWeights,
    NoCorrection,
    PolicyGradientSection,
    RatioToSampler,
    TruncatedWeights,
)
from rlhf.config.algo.custom import CustomSection
from rlhf.config.algo.grpo import (
    CispoSection,
    CriticFreeSection,
    DapoSection,
    DrGrpoSection,
    GrpoSection,
    GspoSection,
    ReinforceBaselineSection,
    ReinforceSection,
    RemaxSection,
    RlooSection,
)
from rlhf.config.algo.kto import KtoSection, OnlineKtoSection
from rlhf.config.algo.ppo import PpoSection
from rlhf.config.algo.preference import (
    DpoSection,
    NashMdSection,
    OnlineDpoSection,
    OnlinePairLoss,
    OnlinePreference,
    PairLoss,
    PairLossSection,
)
from rlhf.config.algo.supervised import PrmSection, RmSection, SftSection

__all__ = [
    "AdaptiveKl",
    "AlgorithmSection",
    "CispoSection",
    "Correction",
    "CriticFree",
    "CriticFreeSection",
    "CustomSection",
    "DapoSection",
    "DpoSection",
    "DrGrpoSection",
    "FixedKl",
    "GrpoSection",
    "GspoSection",
    "KlControl",
    "KtoSection",
    "MaskedWeights",
    "NashMdSection",
    "NoCorrection",
    "OnlineDpoSection",
    "OnlineKtoSection",
    "OnlinePairLoss",
    "OnlinePreference",
    "PairLoss",
    "PairLossSection",
    "PolicyGradientSection",
    "PpoSection",
    "PrmSection",
    "RatioToSampler",
    "ReinforceBaselineSection",
    "ReinforceSection",
    "RemaxSection",
    "RlooSection",
    "RmSection",
    "SftSection",
    "TruncatedWeights",
    "critic_warmup_steps",
    "num_epochs",
]

CriticFree = Annotated[
    GrpoSection
    | RlooSection
    | ReinforceSection
    | ReinforceBaselineSection
    | RemaxSection
    | DrGrpoSection
    | DapoSection
    | GspoSection
    | CispoSection
    | CustomSection,
    Field(discriminator="type"),
]
"""The family of `rlhf train grpo`."""


def num_epochs(section: AlgorithmSection) -> int:
    """`algo.num_epochs`, the passes over each rollout batch: 1 for algorithms without this setting."""
    return section.num_epochs if isinstance(section, PpoSection | CriticFreeSection) else 1


def critic_warmup_steps(section: AlgorithmSection) -> int:
    """`algo.critic_warmup_steps`, the first steps in which only the critic learns: 0 for algorithms without it."""
    return section.critic_warmup_steps if isinstance(section, PpoSection) else 0

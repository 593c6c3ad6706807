"""What only the data can tell KTO: how many answers are good, hence how much a good and a bad one weigh."""

import logging
from collections.abc import Sequence

from rlhf.algorithms.kto import balance
from rlhf.config.algo import AlgorithmSection, KtoSection
from rlhf.types import ScoredGroup

ADVISED = (1.0, 4 / 3)
"""Between these lies the total weight of good answers over that of bad ones (Ethayarajh et al. 2024, section 4.2)."""
ROUNDING = 1e-9

logger = logging.getLogger(__name__)


def weigh_classes(section: AlgorithmSection, groups: Sequence[ScoredGroup]) -> AlgorithmSection:
    """KTO's settings with weights that make both labels of `groups` count the same; given weights stay, with a warning
    where they are off. Other algorithms' settings as they are."""
    if not isinstance(section, KtoSection):
        return section
    labels = [reward.total > 0.5 for group in groups for reward in group.rewards]
    good, bad = sum(labels), len(labels) - sum(labels)
    if section.class_weights == "auto":
        desirable, undesirable = balance(good, bad)
        weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
        return section.model_copy(update={"class_weights": "given", **weights})
    low, high = ADVISED
    share = section.desirable_weight * good / max(section.undesirable_weight * bad, ROUNDING)
    if not low - ROUNDING <= share <= high + ROUNDING:
        logger.warning(
            "algo.desirable_weight, algo.undesirable_weight: %d good answers weigh %.3g times as much as %d bad ones; "
            "1 to 1.33 is advised. Use algo.class_weights=auto.",
            good,
            share,
            bad,
        )
    return section

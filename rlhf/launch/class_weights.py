"""What only the data can tell KTO: how many answers are good, hence how much a good and a bad one weigh."""

import logging
from collections.abc import Sequence

from rlhf.algorithms.kto import balance, imbalance
from rlhf.config.algo import AlgorithmSection, KtoSection
from rlhf.types import ScoredGroup

logger = logging.getLogger(__name__)


def weigh_classes(section: AlgorithmSection, groups: Sequence[ScoredGroup]) -> AlgorithmSection:
    """KTO's settings with weights that make both labels of `groups` count the same; given weights stay, with a warning
    where they are off. Other algorithms' settings as they are."""
    if not isinstance(section, KtoSection):
        return section
    labels = [label for group in groups for label in group.labels]
    good, bad = sum(labels), len(labels) - sum(labels)
    if section.class_weights == "auto":
        desirable, undesirable = balance(good, bad)
        weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
        return section.model_copy(update={"class_weights": "given", **weights})
    if text := imbalance(section, good, bad):
        logger.warning("%s", text)
    return section

"""What only the data can tell KTO: how many responses are good, and therefore the weights of good and bad ones."""

import logging
from collections.abc import Sequence

from rlhf.algorithms.kto import balance, imbalance
from rlhf.config.algo import AlgorithmSection, KtoSection
from rlhf.types import ScoredGroup

logger = logging.getLogger(__name__)


def weigh_classes(section: AlgorithmSection, groups: Sequence[ScoredGroup]) -> AlgorithmSection:
    """KTO's settings with weights that make both labels of `groups` count the same. Weights that the config gives are
    kept, with a warning if they do not. Other algorithms' settings are returned unchanged."""
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

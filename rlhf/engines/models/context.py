"""The context of a model by its config: the longest sequence that it takes."""

from transformers import PretrainedConfig

from rlhf.config.model_files import CONTEXT_KEYS

UNBOUNDED = 1 << 20
"""For models whose config gives no limit."""


def context_of(config: PretrainedConfig) -> int:
    """Tokens; of the text part of a composite model."""
    values = config.get_text_config().to_dict()
    return next((size for key in CONTEXT_KEYS if isinstance(size := values.get(key), int) and size > 0), UNBOUNDED)

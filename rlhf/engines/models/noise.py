"""Randomness in the forward pass: turned off before a model is built, because two passes over the same tokens must give
the same log-probs (the first importance ratio is 1)."""

from collections.abc import Iterator

from transformers import PretrainedConfig

RANDOM_SETTINGS = ("dropout", "drop_path", "layerdrop", "jitter")
"""Words in the names of settings that make a forward pass random: dropout rates, and routers that perturb their
inputs."""
ENDINGS = ("pdrop",)


def remove_noise(config: PretrainedConfig) -> dict[str, float]:
    """Set every rate of `config` and of the configs inside it to 0. Returns the old rates by dotted name:
    `text_config.attention_dropout`."""
    rates = {}
    for prefix, part in _parts(config):
        for name, value in part.to_dict().items():
            is_random = any(word in name for word in RANDOM_SETTINGS) or name.endswith(ENDINGS)
            if is_random and isinstance(value, float) and value:
                rates[prefix + name] = value
                setattr(part, name, 0.0)
    return rates


def _parts(config: PretrainedConfig, prefix: str = "") -> Iterator[tuple[str, PretrainedConfig]]:
    """The config and the configs inside it, each with the prefix of its settings."""
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, f"{prefix}{name}.")

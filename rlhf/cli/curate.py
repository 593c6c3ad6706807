"""`rlhf curate`: training data from scored samples. Imports no torch."""

from pathlib import Path

from rlhf.config.tools import CurateConfig
from rlhf.errors import ConfigError, DataError
from rlhf.orchestrator.data.curation import Curated, Sample, condition, describe, pair, select
from rlhf.orchestrator.data.samples import read_samples
from rlhf.orchestrator.run.files import write_rows
from rlhf.terminal import counted, write_line

BEST = ("best-of-n", "raft")


def run_curate(config: CurateConfig) -> int:
    """Choose, write, and print what was kept and what was not. Returns the exit code.

    Raises:
        ConfigError: the file exists.
        DataError: rows that are no scored samples, or none of them is kept.
    """
    assert config.samples is not None, "checked by the config's loader"
    assert config.out is not None, "checked by the config's loader"
    path = Path(config.out)
    if path.exists() and not config.overwrite:
        raise ConfigError(f"--out: {path} exists. Choose another, or --overwrite.")
    samples = read_samples(config.samples)
    curated = curate(config, samples)
    for line in report(samples, curated):
        write_line(line)
    if not curated.rows:
        raise DataError(f"curate: none of the {len(samples)} samples of {config.samples} is kept.")
    write_rows(path, curated.rows)
    write_line(f"{counted(len(curated.rows), 'row')} in {path}")
    return 0


def curate(config: CurateConfig, samples: list[Sample]) -> Curated:
    """Apply the method that the config names."""
    if config.method == "conditional":
        return condition(samples, prompt_format=config.prompt_format, keep_truncated=config.keep_truncated)
    if config.method == "pairs":
        return pair(samples, min_margin=config.min_margin, keep_truncated=config.keep_truncated)
    return select(
        samples,
        threshold=config.threshold,
        quantile=config.quantile,
        max_per_prompt=config.max_per_prompt or (1 if config.method in BEST else None),
        keep_truncated=config.keep_truncated,
    )


def report(samples: list[Sample], curated: Curated) -> list[str]:
    """How many samples there were, and which were left out and why."""
    facts = describe(samples)
    lines = [
        f"{facts['answers']:.0f} responses to {facts['prompts']:.0f} prompts, mean reward {facts['reward']:.4g}, "
        f"mean of the best {facts['best_reward']:.4g}"
    ]
    return lines + [f"  dropped {count}: {reason}" for reason, count in curated.dropped.items()]

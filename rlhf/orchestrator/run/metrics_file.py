"""Reading a run's metrics.jsonl, also one with the names of the version before."""

from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf.orchestrator.run.files import read_rows
from rlhf.types import Json

RENAMED_METRICS: Mapping[str, str] = {
    "groups/equal": "groups/zero_std",
    "sampler/kl": "mismatch/kl",
    "sampler/log_prob_gap": "mismatch/log_prob",
    "sampler/log_prob_gap_max": "mismatch/log_prob_max",
    "sampler/not_finite": "mismatch/not_finite",
    "sampler/outside_band": "mismatch/outside_band",
    "steps/per_answer": "steps/per_response",
    "time/follow": "time/ema_reference",
    "time/measure": "time/log_probs",
}
"""Old name -> new name. An old name is read for one version after it changed."""


def read_metrics(path: Path, warn: Callable[[str], None]) -> list[dict[str, Json]]:
    """The steps of a metrics.jsonl, oldest first, under the current names; none where there is no such file. Lines that
    a crash cut off are left out. `warn` gets a text for each old name in the file."""
    rows = read_rows(path)
    for name in sorted({name for row in rows for name in row if name in RENAMED_METRICS}):
        warn(f"{path}: {name} is now {RENAMED_METRICS[name]}. The next version will not read the old name")
    return [{RENAMED_METRICS.get(name, name): value for name, value in row.items()} for row in rows]

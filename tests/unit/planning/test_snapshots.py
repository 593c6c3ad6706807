"""The plan of every config that the project ships. After a change that is meant to change plans, write the snapshots
again with `python -m tests.unit.planning.test_snapshots`."""

import json
import sys
from pathlib import Path

import pytest

from rlhf.algorithms import build_algorithm
from rlhf.cli.plan_text import as_json
from rlhf.config.loading.load import load_config
from rlhf.planning.hardware import parse_cluster
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import sections
from tests.unit.planning.support import LLAMA_3_8B, shape_of

ROOT = Path(__file__).parents[3]
SNAPSHOTS = Path(__file__).parent / "snapshots"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLUSTER = "2x8xH100"


def command_for(config: Path) -> str:
    """The method that a config file's own comment trains."""
    line = next(line for line in config.read_text().splitlines() if line.startswith("#   rlhf train "))
    method = line.split()[3]
    return f"online-{method}" if "--online" in line else method


def planned(path: Path) -> str:
    """The plan of a config for Llama 3 8B, as JSON."""
    command = command_for(path)
    config = load_config(command, [str(path), "--data.path", "rows.jsonl"], {})
    needs = build_algorithm(config.algo).needs
    shapes = dict.fromkeys(sections(config, needs), shape_of(LLAMA_3_8B))
    plan = plan_run(config, needs, shapes, parse_cluster(CLUSTER))
    return f"# {command} on {CLUSTER}\n{json.dumps(as_json(plan, []), indent=1)}\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_planned_as_before(path: Path) -> None:
    assert planned(path) == (SNAPSHOTS / f"{path.stem}.txt").read_text()


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for config_file in CONFIGS:
        (SNAPSHOTS / f"{config_file.stem}.txt").write_text(planned(config_file))
    sys.stdout.write(f"{len(CONFIGS)} snapshots written.\n")

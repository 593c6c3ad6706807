"""A dry run of a 70B model on 64 GPUs, on one machine without any: `make dry-70b`.

What is real: a checkpoint of 138 GB as files (sparse: random numbers at the beginning of each tensor, holes elsewhere),
the plan, the placement by Ray's scheduler on eight nodes that say they have eight GPUs each, and what rank 0 of the
policy's 64 does: read and check the weights, keep its part, export the model, and with fewer layers learn, save, resume
and compare the export.

What is not: the other ranks, whose parts are zeros and whose collectives return at once; devices (a rank's part is in
host memory here, and is left out of the figures); the disk, whose time is calculated from the bytes that are read and
written. Files of an export are written with holes for zeros, with the same content.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.seventy.files import SEVENTY, SMALL, Sizes, disk_bytes, write_checkpoint
from rlhf.algorithms.needs import needs_of
from rlhf.config.loading.load import load_config
from rlhf.launch.large_models import loading_timeout_s
from rlhf.planning.hardware import GIB, parse_cluster
from rlhf.planning.plan import Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import local_config_json, shapes_of

CLUSTER = "8x8xH100"
FLAGS = (
    *("--policy.num-nodes", "8", "--policy.num-gpus-per-node", "8", "--policy.dtype", "bfloat16"),
    *("--reference.num-nodes", "8", "--reference.num-gpus-per-node", "8", "--reference.dtype", "bfloat16"),
    *("--rollout.num-engines", "16", "--rollout.tensor-parallel-size", "4", "--rollout.gpu-memory-utilization", "0.6"),
    *("--cluster.colocate", "policy,reference,rollout", "--policy.gradient-checkpointing"),
    *("--rollout.max-response-tokens", "1024", "--algo.kl.coef", "0.001"),
    *("--reward.rules", "math", "--data.path", "rows.jsonl", "--cluster.device", "cuda", "--algo.kl.type", "fixed"),
)
"""GRPO with the models and the engines on the same GPUs, in turns."""
NUM_RANKS = 64
STATE_BYTES = 14
"""Of each parameter in a checkpoint of the run: the weight, its master copy and two moments."""
LEEWAY = 0.5 * GIB
"""What a phase may take besides what is planned: libraries that are imported, tensors of a few layers."""

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Whole parameters are allocated 723 times: where pages are small, that takes longer than everything else."""


class DryRun:
    """One run with a model of some sizes."""

    def __init__(self, folder: Path, sizes: Sizes, num_layers: int, num_learned_layers: int, gb_s: float) -> None:
        self._folder = folder
        self._bytes_per_s = gb_s * 1e9
        self._problems: list[str] = []
        self._rows: list[list[str]] = []
        self.whole, self.few = folder / "whole", folder / "few"
        self._bytes = write_checkpoint(self.whole, sizes, num_layers, NUM_RANKS)
        self._few_bytes = write_checkpoint(self.few, sizes, num_learned_layers, NUM_RANKS)
        self._config = load_config("grpo", self.flags(self.whole), {})
        self._needs = needs_of(self._config.algo)
        self._plan = self._planned(self.whole)

    @staticmethod
    def flags(model: Path) -> list[str]:
        return ["--policy.model", str(model), *FLAGS]

    def run(self, parts: set[str]) -> int:
        """Run the parts, print what they took beside what they may take, and return 1 if one took more."""
        print(f"{self._bytes / 1e9:.1f} GB of weights take {disk_bytes(self.whole) / 1e6:.0f} MB on the disk")
        self._require(self._plan.fits, "the plan does not fit")
        if "place" in parts:
            self._place()
        if "learn" in parts:
            self._learn()
        if "load" in parts:
            self._load()
        headings = ("phase", "here, s", "with the disk, s", "may take, s", "grows by, GiB", "planned, GiB")
        tables.show(f"rank 0 of {NUM_RANKS}, a disk of {self._bytes_per_s / 1e9:g} GB/s", headings, self._rows)
        for problem in self._problems:
            print(f"! {problem}")
        return bool(self._problems)

    def _place(self) -> None:
        """The placement on nodes of Ray, beside that of the plan."""
        found = self._child("placement", [], self.whole)
        planned = {
            group.group.name: sorted(
                (
                    sum(bundle.num_devices for bundle in group.bundles if bundle.node == node)
                    for node in {bundle.node for bundle in group.bundles}
                ),
                reverse=True,
            )
            for group in self._plan.groups
        }
        self._row("placement", found["seconds"], 0, self._config.cluster.placement_timeout_s)
        self._require(found["gpus_per_node"] == planned, f"placed as {found['gpus_per_node']}, planned as {planned}")
        self._require(found["nodes"] == self._plan.cluster.num_nodes, f"{found['nodes']} nodes are used")

    def _load(self) -> None:
        """A start and an export of the whole model."""
        found = self._child("ranks", ["load"], self.whole)
        phases = found["phases"]
        seconds = phases["read and check"]["seconds"] + phases["partition"]["seconds"]
        step_s = self._config.train.step_timeout_s
        group = self._plan.groups[0]
        self._row("policy is read while its ranks wait", seconds, self._bytes, step_s)
        grown = max(phases["read and check"]["grown"], phases["partition"]["grown"] - found["held"])
        limit_s = loading_timeout_s(self._config, self._needs)
        self._row("start: policy, then reference", 2 * seconds, 2 * self._bytes, limit_s, grown, group.reading_bytes)
        export = phases["export"]
        self._row("export", export["seconds"], self._bytes, step_s, export["grown"], group.exporting_bytes)
        self._require(found["is_equal"], "the export has other tensors than the checkpoint")
        print(f"{found['num_files']} files of the export, {found['disk_bytes'] / 1e6:.0f} MB on the disk")

    def _learn(self) -> None:
        """A step, a checkpoint and a resumed run of few layers. Bytes of the disk are those of the whole model."""
        found = self._child("ranks", ["learn"], self.few)
        phases, step_s = found["phases"], self._config.train.step_timeout_s
        group = self._planned(self.few).groups[0]
        first, exporting = phases["first export and check"], group.exporting_bytes
        self._row("fewer layers: export, loaded and compared", first["seconds"], 0, step_s, first["grown"], exporting)
        state = self._bytes // 2 * STATE_BYTES
        resuming = group.resuming_bytes / group.group.shape.num_devices_per_node
        for name, planned in (("save", 0.0), ("resume", resuming)):
            phase = phases[name]
            self._row(f"fewer layers: {name}", phase["seconds"], state, step_s, phase["grown"], planned)
        self._require(found["is_resumed"], "the resumed rank has other states than the saved one")
        self._require(found["finite"], "the step was skipped")

    def _row(
        self, phase: str, seconds: float, num_bytes: float, limit_s: float, grown: float = 0.0, planned: float = 0.0
    ) -> None:
        """One phase: its seconds here, and with a disk that moves so many bytes; host memory, if any was measured."""
        whole = seconds + num_bytes / self._bytes_per_s
        memory = (f"{grown / GIB:.2f}", f"{planned / GIB:.2f}") if grown else ("", "")
        self._rows.append([phase, f"{seconds:.1f}", f"{whole:.0f}", f"{limit_s:.0f}", *memory])
        print(*self._rows[-1], sep="  ", flush=True)
        self._require(whole < limit_s, f"{phase}: {whole:.0f} s, and may take {limit_s:.0f}")
        self._require(grown < planned + LEEWAY, f"{phase}: takes {grown / GIB:.2f} GiB, planned {planned / GIB:.2f}")

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            self._problems.append(problem)

    def _planned(self, model: Path) -> Plan:
        config = load_config("grpo", self.flags(model), {})
        shapes = shapes_of(config, self._needs, local_config_json)
        return plan_run(config, self._needs, shapes, parse_cluster(CLUSTER))

    def _child(self, module: str, arguments: list[str], model: Path) -> Mapping[str, Any]:
        """What a part found, in a process of its own."""
        result = self._folder / f"{module}-{model.name}.json"
        places = [str(model), str(result)] if arguments else [str(result)]
        command = [sys.executable, "-m", f"benchmarks.seventy.{module}", *arguments, *places, *self.flags(model)]
        subprocess.run(command, check=True, env={**os.environ, **HUGE_PAGES})
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="place,load,learn", help="which parts to run")
    parser.add_argument("--layers", type=int, default=80, help="of the model that is read and exported")
    parser.add_argument("--learned-layers", type=int, default=3, help="of the model that learns, saves and resumes")
    parser.add_argument("--gb-s", type=float, default=1.0, help="what the disk reads and writes in a second, in GB")
    parser.add_argument("--small", action="store_true", help="matrices of a small model")
    parser.add_argument("--folder", type=Path, help="for its files, on a disk that takes sparse ones; else temporary")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seventy-", dir=given.folder) as folder:
        sizes = SMALL if given.small else SEVENTY
        run = DryRun(Path(folder), sizes, given.layers, given.learned_layers, given.gb_s)
        return run.run(set(given.parts.split(",")))


if __name__ == "__main__":
    sys.exit(main())

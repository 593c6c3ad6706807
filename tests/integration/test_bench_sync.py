"""`rlhf bench sync` with real actors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.ray_head import RayHead

TIMEOUT_S = 280


@pytest.mark.timeout(300)
def test_a_sync_is_measured_beside_its_collectives(head: RayHead, tmp_path: Path) -> None:
    """Two ranks of a sharded policy, two engines."""
    command = [
        *(sys.executable, "-m", "rlhf.cli.main", "bench", "sync", "--sizes", "1", "--repeats", "2", "--json"),
        *("--policy.num-gpus-per-node", "2", "--rollout.num-engines", "2", "--rollout.engine", "transformers"),
        *("--rollout.sync-bucket-mib", "1", "--cluster.address", head.address),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=head.environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(done.stdout)
    assert figures["num_bytes"] == pytest.approx(4e6, rel=0.15)
    assert figures["num_buckets"] >= 4
    assert figures["num_remote_calls"] == 2 * 3
    assert (figures["medium"], figures["dtype"]) == ("gloo", "float32")
    assert min(figures["sync_s"], figures["gather_s"], figures["send_s"]) > 0
    assert figures["share"] == pytest.approx((figures["gather_s"] + figures["send_s"]) / figures["sync_s"])

"""`rlhf bench sync`: what it refuses, and the models that it makes."""

from pathlib import Path

import pytest

from rlhf.cli.bench_sync import make_models, shape_of
from rlhf.config.loading.load_tools import load_bench
from rlhf.config.tools import BenchConfig
from rlhf.errors import ConfigError


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "what: missing; sync."),
        (["speed"], "what: must be one of sync"),
        (["sync", "--sizes", "0"], "sizes"),
        (["sync", "--rollout.sync-backend", "nccl", "--cluster.device", "cpu"], "nccl needs GPUs"),
        (["sync", "--rollout.sync-backend", "ipc"], "ipc needs policy and rollout on the same GPUs"),
        (["sync", "--rollout.sync-adapters"], "the policy has no adapters"),
        (["sync", "--colocate", "policy,engine"], "unknown role"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_bench(argv, {})
    assert said in str(error.value)


@pytest.mark.parametrize("millions", [1, 3, 25, 100, 200, 1000, 8000, 70000])
def test_models_are_about_as_large_as_asked(millions: int) -> None:
    hidden, layers, vocabulary = shape_of(millions)
    size = 13 * hidden**2 * layers + vocabulary * hidden
    assert size == pytest.approx(millions * 1e6, rel=0.15)


def test_models_are_made_once(tmp_path: Path) -> None:
    config = BenchConfig(what="sync", sizes=(1,))
    (model,) = make_models(config, tmp_path)
    weights = tmp_path / model / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert weights.stat().st_size == pytest.approx(4e6, rel=0.15)
    assert make_models(config, tmp_path) == [model]
    assert weights.stat().st_mtime_ns == before

"""A real engine that runs out of memory names what helps, and half micro-batches have the same gradient."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.rank_processes import RankProcesses
from tests.tiny_models import make_policy

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, port: int, rank_processes: RankProcesses) -> Path:
    """What `training_memory` recorded."""
    folder = tmp_path_factory.mktemp("memory")
    make_policy(folder / "tied", tied=True)
    rank_processes.run("training_memory", [(port, folder)], folder=folder)
    return folder


def test_each_error_names_sizes_and_settings_and_what_can_be_split(folder: Path) -> None:
    errors = json.loads((folder / "errors.json").read_text())
    assert {kind for kind, _, _ in errors} == {"MemoryExhaustedError"}
    whole, half = (tokens for _, _, tokens in errors)
    assert whole == 139
    assert half <= whole // 2
    assert errors[0][1] == (
        "policy forward_backward: out of memory with micro-batches of up to 139 tokens, the longest sequence 41: CUDA "
        "out of memory. Tried to allocate 2.00 GiB. Lower train.max_tokens_per_micro_batch, or set "
        "policy.gradient_checkpointing or policy.mlp_chunk_tokens, or lower policy.log_probs_chunk_tokens."
    )


def test_half_micro_batches_have_the_same_gradient(folder: Path) -> None:
    gradients = load_file(folder / "gradients.safetensors")
    assert len(gradients) > 10
    for whole, halved in gradients.values():
        assert whole.any()
        torch.testing.assert_close(halved, whole, rtol=1e-4, atol=1e-6)

"""Second partitions of a ZeRO-3 model (hpZ): four ranks compute, learn, send, save and resume as without them, bit for
bit, and gather in groups of two."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.ports import held_port
from tests.integration.rank_processes import RankProcesses
from tests.integration.secondary_partitions_worker import CASES, NUM_STEPS
from tests.tiny_models import make_policy

TIMEOUT_S = 480
NUM_RANKS = 4
GATHERS = "gathers"

pytestmark = pytest.mark.timeout(540)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rank_processes: RankProcesses) -> Path:
    """What the four ranks wrote."""
    folder = tmp_path_factory.mktemp("partitions")
    make_policy(folder / "model")
    with held_port() as port:
        ranks = [(rank, NUM_RANKS, port, folder) for rank in range(NUM_RANKS)]
        rank_processes.run("secondary_partitions_worker", ranks, folder=folder, timeout_s=TIMEOUT_S)
    return folder


def results(folder: Path, case: str, size: int, rank: int) -> dict[str, torch.Tensor]:
    """What one rank saw."""
    return load_file(folder / f"{case}_{size}_{rank}.safetensors")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_everything_is_the_same_to_the_bit(folder: Path, case: str, rank: int) -> None:
    without, second = results(folder, case, 1, rank), results(folder, case, 2, rank)
    assert without.keys() == second.keys()
    differ = [key for key in without if GATHERS not in key and not torch.equal(without[key], second[key])]
    assert differ == []
    moved = [float((second[f"{step}/after"] - second[f"{step}/before"]).abs().max()) for step in range(NUM_STEPS)]
    assert min(moved) > 1e-4
    exports = [load_file(folder / f"export_{size}_{'-'.join(CASES[case])}" / "model.safetensors") for size in (1, 2)]
    assert exports[0].keys() == exports[1].keys()
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_run_that_never_stopped(folder: Path, case: str) -> None:
    second = results(folder, case, 2, 0)
    assert not torch.equal(second["again/first"], second["again/loaded"])
    assert torch.equal(second["again/loaded"], second[f"{NUM_STEPS - 1}/after"])
    for what in ("loss", "norm", "after"):
        assert torch.equal(second[f"again/{what}"], second[f"next/{what}"])


@pytest.mark.parametrize("case", CASES)
def test_after_the_first_pass_parameters_are_gathered_in_pairs(folder: Path, case: str) -> None:
    without, second = results(folder, case, 1, 0), results(folder, case, 2, 0)
    for step in range(NUM_STEPS):
        assert without[f"{step}/gathers"][0] == 0
        pairs, all_ranks = (int(number) for number in second[f"{step}/gathers"])
        assert pairs > all_ranks
        assert all_ranks < int(without[f"{step}/gathers"][1]) / 2
    assert int(second["scorer/gathers"][0]) > 0
    assert int(second["scorer/gathers"][1]) == 0

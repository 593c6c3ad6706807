"""What two ranks say about weights that only one of them holds: they agree on it, and both stop."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.engines.training.replicas import odd_ranks

RANK = """
import math, sys
from pathlib import Path
import torch
import torch.distributed as dist
from rlhf.engines.models.finite_weights import require_finite
from rlhf.engines.training.replicas import require_equal_replicas
from rlhf.errors import NumericsError

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
device = torch.device("cpu")

def said(check, model):
    try:
        check(model, "policy.model", device)
    except NumericsError as error:
        return str(error)
    return "nothing"

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(3, 4) for _ in range(5))).to(torch.bfloat16)
print(said(require_finite, model))
print(said(require_equal_replicas, model))
with torch.no_grad():
    if rank == 1:
        model[2].weight[1, 1] *= 1 + 2**-7
print(said(require_equal_replicas, model))
with torch.no_grad():
    if rank == 1:
        model[3].bias[0] = math.nan
print(said(require_finite, model))
dist.destroy_process_group()  # a thread of its own that is left at the end of the process aborts it
"""


@pytest.mark.timeout(300)
def test_both_ranks_hear_of_what_one_holds(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=200)[0].splitlines() for rank in ranks]
    finally:  # one that waits for the other
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0] == said[1]
    sound, equal, different, bad = said[0]
    assert (sound, equal) == ("nothing", "nothing")
    assert different.startswith(
        "policy.model: 1 of 10 parameters differ between ranks: 2.weight; ranks 0, 1 disagree. Memory or a kernel"
    )
    assert bad.startswith("policy.model: 1 of 10 parameters hold values that are not finite: 3.bias")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([5, 5, 7, 5], "rank 2 holds others than the rest"),
        ([5, 7, 5, 5, 8], "rank 1, 4 holds others than the rest"),
        ([5, 7], "ranks 0, 1 disagree"),
    ],
)
def test_the_odd_rank_is_named(values: list[int], text: str) -> None:
    assert odd_ranks(values) == text

"""Which weights are looked at before they leave a process, and what counts as finite."""

import math

import pytest
import torch
import torch.distributed as dist

from rlhf.engines.models.finite_weights import local_shard, require_finite
from rlhf.errors import NumericsError


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, whose word is that of all."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_and_named(dtype: torch.dtype, value: float) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 4) for _ in range(5))).to(dtype)
    require_finite(model, "policy.model", torch.device("cpu"))
    for layer in list(model)[1:]:
        assert isinstance(layer, torch.nn.Linear)
        layer.weight.data[2, 1] = value
    message = r"policy.model: 4 of 10 parameters .*: 1.weight, 2.weight, 3.weight and 1 more\. They were neither"
    with pytest.raises(NumericsError, match=message):
        require_finite(model, "policy.model", torch.device("cpu"))


@pytest.mark.parametrize(("rank", "numel"), [(0, 3), (1, 2), (2, 0)])
def test_the_padding_of_a_shard_is_not_checked(monkeypatch: pytest.MonkeyPatch, rank: int, numel: int) -> None:
    groups = {None: rank, "ranks with the same experts": 2 - rank}
    monkeypatch.setattr(dist, "get_rank", groups.__getitem__)
    model = torch.nn.Linear(1, 5, bias=False)
    model.weight.ds_numel = 5  # type: ignore[attr-defined]
    model.weight.ds_tensor = torch.full((3,), torch.nan)  # type: ignore[attr-defined]
    assert isinstance(model.weight, torch.nn.Parameter)
    assert local_shard(model.weight).numel() == numel
    model.weight.ds_process_group = "ranks with the same experts"  # type: ignore[attr-defined]
    assert local_shard(model.weight).numel() == {3: 0, 2: 2, 0: 3}[numel]
    del model.weight.ds_process_group  # type: ignore[attr-defined]
    model.weight.ds_tensor[:numel] = 1.0  # type: ignore[attr-defined]
    require_finite(model, "policy.model", torch.device("cpu"))

"""Responses of several turns and segments on the training engine: the first ratio is exactly 1 and each method's
gradient is that of its loss read segment by segment, packed and one by one, with ZeRO 0 and 3."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.types import LearnedSequence, Signal
from tests.families import tiny_family
from tests.integration.ports import held_port
from tests.integration.rank_processes import RankProcesses
from tests.integration.segments_worker import CASES, ROLES, TEMPERATURE, data_for, responses
from tests.integration.training_oracles import Results, assert_same_gradient, naive_log_probs
from tests.tiny_models import make_policy

NUM_RANKS = 2
TIMEOUT_S = 280

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rank_processes: RankProcesses) -> Path:
    folder = tmp_path_factory.mktemp("segments")
    make_policy(folder / "untied")
    tiny_family("opt").save_pretrained(folder / "opt")
    with held_port() as port:
        ranks = [(rank, NUM_RANKS, port, folder) for rank in range(NUM_RANKS)]
        rank_processes.run("segments_worker", ranks, folder=folder, timeout_s=TIMEOUT_S)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Results]:
    return [load_file(folder / f"segments_{rank}.safetensors") for rank in range(NUM_RANKS)]


def named(name: str, model: str, stage: int, limit: str) -> str:
    return f"{name}-{model}-zero{stage}-{limit}"


def summed(ranks: list[Results], key: str) -> float:
    return sum(float(results.get(key, torch.zeros(()))) for results in ranks)


def naive_sum(model: torch.nn.Module, sequence: LearnedSequence, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the log-probs of what is learned from, each segment read alone."""
    total = torch.zeros(())
    for start, end in pairwise([0, *sequence.segment_starts, len(sequence)]):
        log_probs, _ = naive_log_probs(model, sequence.token_ids[start:end], TEMPERATURE)  # type: ignore[arg-type]
        total = (
            total + torch.where(torch.tensor(sequence.loss_mask[start:end]), log_probs * weights[start:end], 0).sum()
        )
    return total


def naive_loss(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A loss with the gradient of the method's at the first update, where all ratios are 1."""
    data, losses = data_for(name), []
    for one in data:
        ones = [torch.ones(len(sequence)) for sequence in one.sequences]
        if name == "ppo":
            advantages = torch.tensor(one.sequences[0].signals[Signal.ADVANTAGES])
            losses.append(-naive_sum(model, one.sequences[0], advantages))
            continue
        sums = [naive_sum(model, sequence, weights) for sequence, weights in zip(one.sequences, ones, strict=True)]
        if name == "online-dpo":
            losses.append(-0.1 * 0.5 * (sums[0] - sums[1]))
        else:
            good = one.targets[0] > 0.5
            weight = one.coefficients["desirable" if good else "undesirable"]
            losses.append(weight * 0.1 * 0.25 * (-sums[0] if good else sums[0]))
    count = sum(int(one.loss_mask.sum()) for one in responses()) if name == "ppo" else len(data)
    return torch.stack(losses).sum() / count


def test_the_responses_differ_in_segments_and_have_holes() -> None:
    made = responses()
    assert {len(one.segment_starts) for one in made} == {0, 1, 2, 3}
    for one in made:
        own = np.flatnonzero(one.loss_mask)
        assert own[-1] - own[0] + 1 > len(own), "others wrote some of what stands between"


@pytest.mark.parametrize(("name", "model", "stage", "limit"), CASES)
def test_each_segment_is_read_as_if_it_were_alone(
    ranks: list[Results], name: str, model: str, stage: int, limit: str
) -> None:
    case = named(name, model, stage, limit)
    torch.testing.assert_close(ranks[0][f"{case}/outputs"], ranks[0][f"{case}/alone"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "model", "stage", "limit"), CASES)
def test_the_first_update_starts_where_it_was_measured(
    ranks: list[Results], name: str, model: str, stage: int, limit: str
) -> None:
    """Exactly: ratios are 1, values are the old ones, log-ratios to a reference of the same weights are 0."""
    prefix = f"{named(name, model, stage, limit)}/metrics/"
    if name == "ppo":
        assert [float(results[f"{prefix}policy/ratio_max"]) for results in ranks] == [1.0] * NUM_RANKS
        assert summed(ranks, f"{prefix}policy/approx_kl") == 0.0
    elif name == "critic":
        assert summed(ranks, f"{prefix}critic/clipped") == 0.0
    elif name == "online-dpo":
        assert summed(ranks, f"{prefix}policy/loss") == pytest.approx(math.log(2), abs=1e-7)
    else:
        weights = [one.coefficients["desirable" if one.targets[0] else "undesirable"] for one in data_for(name)]
        assert summed(ranks, f"{prefix}policy/loss") == pytest.approx(0.5 * sum(weights) / len(weights), abs=1e-7)


@pytest.mark.parametrize(("name", "model", "stage", "limit"), [case for case in CASES if case[0] != "critic"])
def test_the_gradient_is_that_of_each_segment_alone(
    folder: Path, ranks: list[Results], name: str, model: str, stage: int, limit: str
) -> None:
    naive = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    naive_loss(naive, name).backward()
    expected = {key: parameter.grad for key, parameter in naive.named_parameters() if parameter.grad is not None}
    assert_same_gradient(gradient(ranks[0], named(name, model, stage, limit)), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "critic"][1:])
def test_the_critics_gradient_is_the_same_in_every_split(ranks: list[Results], case: tuple[str, str, int, str]) -> None:
    assert_same_gradient(gradient(ranks[0], named(*case)), gradient(ranks[0], named("critic", "untied", 0, "packed")))


def gradient(results: Results, case: str) -> Results:
    prefix = f"{case}/grad/"
    return {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}


def test_every_method_is_there() -> None:
    assert {case[0] for case in CASES} == set(ROLES)

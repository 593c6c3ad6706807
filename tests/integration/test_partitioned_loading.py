"""Models on two ranks: read once, given to both, and the same as in one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.engines.models.fresh_model import make_llama
from tests.integration.partitioned_loading_worker import MAX_SHARD, SEQUENCE
from tests.integration.rank_processes import RankProcesses
from tests.rounding import rounded
from tests.tiny_models import make_policy

pytestmark = pytest.mark.timeout(300)
TIMEOUT_S = 240
VOCABULARY, WIDTH = 8192, 768
CASES = (
    *("untied:3:none", "untied:0:none", "untied:3:nf4", "untied:0:nf4"),
    *("large:3:none", "large:0:none", "large:3:nf4", "damaged:3:none"),
)
"""Whose memory is measured comes after libraries were imported, and before other large models left holes behind."""

Seen = dict[str, dict[str, object]]
"""What a rank wrote down, by case."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models: one that weighs something; one whose config says that the output layer is the embedding, while its
    file holds another; one with a number that is none."""
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "large", vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=8)
    make_policy(folder / "untied")
    config = AutoConfig.from_pretrained(folder / "untied")
    config.tie_word_embeddings = True
    config.save_pretrained(folder / "untied")
    make_policy(folder / "damaged")
    weights = load_file(folder / "damaged" / "model.safetensors")
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, folder / "damaged" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path, port: int, rank_processes: RankProcesses) -> list[Seen]:
    """What each rank saw."""
    results = [folder / f"rank_{rank}.json" for rank in range(2)]
    cases = [str(folder / case) for case in CASES]
    ranks = [(rank, 2, port, result, *cases) for rank, result in enumerate(results)]
    rank_processes.run("partitioned_loading_worker", ranks, folder=folder, timeout_s=TIMEOUT_S)
    return [
        {case.rpartition("/")[2]: seen for case, seen in json.loads(result.read_text()).items()} for result in results
    ]


@torch.no_grad()
def expected(folder: Path, quantization: str) -> list[float]:
    """What one process says of the sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if quantization == "nf4" and name.endswith("proj.weight"):
            parameter.copy_(rounded(parameter))
    logits = model(torch.tensor(SEQUENCE)[None]).logits
    log_probs = logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(SEQUENCE)[1:, None])[:, 0]
    return [0.0, *log_probs.tolist()]


@pytest.mark.parametrize("case", CASES[:-1])
def test_both_ranks_compute_what_one_process_computes(case: str, folder: Path, two_ranks: list[Seen]) -> None:
    name, _, quantization = case.split(":")
    first, second = (seen[case]["outputs"] for seen in two_ranks)
    assert first == second == pytest.approx(expected(folder / name, quantization), abs=1e-4)


def test_only_the_first_rank_ever_holds_more_than_its_part(folder: Path, two_ranks: list[Seen]) -> None:
    size = (folder / "large" / "model.safetensors").stat().st_size
    assert size > 250e6
    grown = two_ranks[1]["large:3:none"]["grown"]
    assert isinstance(grown, int)
    assert 0.5 * size < grown < 0.65 * size
    # The embedding, which is the output layer too, is the largest module.
    assert [seen["large:3:none"]["at_once"] for seen in two_ranks] == [VOCABULARY * WIDTH] * 2


def test_an_export_holds_two_files_of_it_at_most(folder: Path, two_ranks: list[Seen]) -> None:
    """Besides the parameter that is gathered, for which gloo needs the same memory once more."""
    before, gathered = load_file(folder / "large" / "model.safetensors"), 2 * VOCABULARY * WIDTH * 4
    files = sorted((folder / "exported").glob("*.safetensors"))
    assert len(files) > 5
    assert all(file.stat().st_size < MAX_SHARD + 2**20 for file in files)
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    writer, other = (seen["large:3:none"]["export_grown"] for seen in two_ranks)
    assert isinstance(writer, int)
    assert isinstance(other, int)
    assert writer < 2 * MAX_SHARD + gathered
    assert other < 1.5 * gathered


def test_a_rank_holds_its_part_of_the_four_bit_weights(folder: Path, two_ranks: list[Seen]) -> None:
    weights = load_file(folder / "large" / "model.safetensors")
    held = sum(w.numel() * (4.5 / 8 if name.endswith("proj.weight") else 4) for name, w in weights.items())
    grown = two_ranks[1]["large:3:nf4"]["grown"]
    assert isinstance(grown, int)
    # Its part, and the embedding whole for a moment: it is the first to come, or the last.
    assert held / 2 < grown < held / 2 + VOCABULARY * WIDTH * 4 + 0.15 * held


def test_weights_that_a_checkpoint_unties_are_untied_on_both(folder: Path) -> None:
    weights = load_file(folder / "untied" / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_an_unusable_model_is_rejected_on_both(two_ranks: list[Seen]) -> None:
    for seen in two_ranks:
        assert seen["damaged:3:none"] == {"refused": "policy: lm_head.weight holds 1 NaN values."}

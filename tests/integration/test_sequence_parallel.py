"""Ranks that compute each micro-batch together give what one rank alone gives: outputs, losses, gradients. So do
settings that lower the memory of long sequences, and ranks that have the experts of each layer among them.

Four ranks run the cases of `sequence_parallel_worker.py`: groups of one, two and four, in every ZeRO stage, with
sequences of unequal lengths in one pack and in several. RLHF_TEST_SEQUENCE_PARALLEL=all runs all of them.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf.engines.models.router_replay import CHANGED, REPLAYED
from rlhf.engines.training.router_balance import BALANCE
from tests.families import tiny_family
from tests.integration.ports import held_port
from tests.integration.rank_processes import RankProcesses
from tests.integration.training_rows import experiences
from tests.tiny_models import make_family, tiny_config

Results = dict[str, dict[str, torch.Tensor]]
"""What the cases recorded, by case."""
TIMEOUT_S = 900
NUM_RANKS = 4
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
ALL = os.environ.get("RLHF_TEST_SEQUENCE_PARALLEL") == "all"
ALONE = {
    "llama-log_probs": "llama-log_probs-1-0-packed",
    "llama-log_probs-lora": "llama-log_probs-1-0-packed-lora",
    "llama-log_probs-lora-nf4": "llama-log_probs-1-0-packed-lora-nf4",
    "llama-values-lora": "llama-values-1-0-40-lora",
    "llama-values": "llama-values-1-0-40",
    "scorer-scores": "scorer-scores-1-0-40",
    "experts-values": "experts-values-1-0-40",
    "mistral-log_probs": "mistral-log_probs-1-0-packed",
    "experts-log_probs": "experts-log_probs-1-0-packed",
    "experts-log_probs-balance": "experts-log_probs-1-0-40-balance",
    "experts-log_probs-replay": "experts-log_probs-1-0-packed-replay",
}
"""The case of each model that computes without groups."""
OTHER_RESULTS = ("lora", "nf4", "balance", "replay")
"""Extras with which a model computes something else."""
FEW = (
    *("llama-log_probs-4-3-40", "llama-log_probs-2-0-packed", "llama-log_probs-2-2-packed-lora"),
    *("scorer-scores-2-0-40", "llama-log_probs-2-3-packed-chunks-kept"),
    *("experts-log_probs-2-3-40-replay-checkpointing", "experts-log_probs-1-3-40-split2-checkpointing-stored"),
)
MORE = (
    *(f"llama-log_probs-{size}-{stage}-packed" for size in (2, 4) for stage in (0, 1, 2, 3)),
    *(f"llama-log_probs-{size}-{stage}-packed-lora" for size in (2, 4) for stage in (0, 1, 2, 3)),
    *("llama-log_probs-4-3-packed-checkpointing", "llama-log_probs-2-0-packed-chunked"),
    *(
        "llama-log_probs-4-0-40-chunks",
        "llama-log_probs-2-1-packed-chunks",
        "experts-log_probs-2-3-40-chunks-kept",
        "llama-values-4-2-packed-chunks",
    ),
    *("llama-log_probs-2-3-packed-lora-nf4", "llama-log_probs-4-2-40-lora-nf4", "llama-log_probs-4-3-40-lora-chunks"),
    *("llama-values-2-3-40-lora", "llama-values-2-1-packed", "scorer-scores-2-2-40", "scorer-scores-4-3-packed"),
    *("llama-log_probs-1-3-40", "llama-log_probs-1-3-packed-lora", "llama-log_probs-2-1-single"),
    *("llama-log_probs-2-3-40-offload", "llama-log_probs-2-3-single", "llama-log_probs-4-0-single"),
    *("llama-values-2-0-40", "llama-values-4-3-40", "scorer-scores-2-3-40", "scorer-scores-4-1-40"),
    *("mistral-log_probs-2-0-packed", "mistral-log_probs-4-3-40"),
    *("experts-log_probs-2-0-packed", "experts-log_probs-4-3-40"),
    *("experts-log_probs-2-0-40-balance", "experts-log_probs-4-3-40-balance"),
    *(f"experts-log_probs-1-{stage}-40-replay" for stage in (0, 2, 3)),
    *("experts-log_probs-1-3-single-replay", "experts-log_probs-2-2-40-replay-kept"),
    *("experts-log_probs-4-3-40-replay-chunks", "experts-log_probs-4-0-packed-replay-chunks-checkpointing"),
    *("experts-log_probs-1-3-single-split2", "experts-log_probs-1-3-packed-split4-stored"),
    *("experts-log_probs-2-3-40-split2", "experts-log_probs-2-3-packed-split4-kept"),
    *("experts-log_probs-1-3-40-split2-offload", "experts-log_probs-1-3-40-balance-split2"),
    *("experts-log_probs-4-3-packed-balance-split4-checkpointing", "experts-values-1-3-40-split2"),
)
WHOLE = {
    "llama-log_probs-1-0-packed-chunks": "llama-log_probs-1-0-packed",
    "llama-log_probs-1-3-40-chunks": "llama-log_probs-1-3-40",
    "llama-log_probs-1-3-40-chunks-kept": "llama-log_probs-1-3-40",
}
"""Cases that compute in chunks, of which ranks have different numbers, and those that compute the same without."""
CHECKPOINTED = "llama-log_probs-1-3-40-checkpointing"
KEPT_ON_HOST = "llama-log_probs-1-3-40-kept"
SHARED = tuple(dict.fromkeys((*FEW, *MORE))) if ALL else FEW
REFUSED_FEW = {"qwen3_5_text": "carry a state from token to token"}
REFUSED_MORE = {
    "gpt_oss": "knows no attention with s_aux",
    "gemma2": "knows no attention with softcap",
    "falcon_h1": "carry a state from token to token",
    "lfm2": "carry a state from token to token",
    "bloom": "cannot",
}
REFUSED = {**REFUSED_FEW, **(REFUSED_MORE if ALL else {})}

pytestmark = pytest.mark.timeout(1000)


def alone(case: str) -> str:
    """The case to compare with."""
    model, head, _, _, _, *extras = case.split("-")
    return ALONE["-".join([model, head, *(extra for extra in extras if extra in OTHER_RESULTS)])]


def wider(config: LlamaConfig) -> LlamaConfig:
    """More heads, which four ranks can share; two of keys and values, of which four ranks need copies."""
    for name, value in HEADS.items():
        setattr(config, name, value)
    return config


def make_models(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(wider(tiny_config())).save_pretrained(folder / "llama")
    LlamaForSequenceClassification(wider(tiny_config())).save_pretrained(folder / "scorer")
    for family in REFUSED:
        tiny_family(family).save_pretrained(folder / family)
    make_family(folder / "experts", "qwen3_moe", **HEADS)
    if ALL:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        sizes = {name: getattr(tiny_config(), name) for name in names}
        config = MistralConfig(**{**sizes, **HEADS, "sliding_window": 6, "initializer_range": 0.1})
        MistralForCausalLM(config).save_pretrained(folder / "mistral")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, rank_processes: RankProcesses) -> Results:
    folder = tmp_path_factory.mktemp("sequence_parallel")
    make_models(folder)
    cases = [*(alone(case) for case in SHARED), *SHARED, *WHOLE, *WHOLE.values(), CHECKPOINTED, KEPT_ON_HOST]
    cases = [*dict.fromkeys(cases)]
    cases += [f"{family}-log_probs-2-0-packed" for family in REFUSED]
    with held_port() as port:
        ranks = [(rank, NUM_RANKS, port, folder, *cases) for rank in range(NUM_RANKS)]
        rank_processes.run("sequence_parallel_worker", ranks, folder=folder, timeout_s=TIMEOUT_S)
    found: Results = {}
    for name, value in load_file(folder / f"results_{NUM_RANKS}.safetensors").items():
        case, _, key = name.partition("/")
        found.setdefault(case, {})[key] = value
    return found


@pytest.mark.parametrize("case", SHARED)
def test_ranks_that_share_sequences_compute_what_one_computes(results: Results, case: str) -> None:
    ours, theirs = results[case], results[alone(case)]
    torch.testing.assert_close(ours["outputs"], theirs["outputs"], rtol=1e-5, atol=1e-5)
    for key in ("loss", "norm", "second_norm", BALANCE, REPLAYED, CHANGED):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
    if "reference" in ours:
        torch.testing.assert_close(ours["reference"], theirs["outputs"], rtol=1e-5, atol=1e-5)
    assert int(ours["num_unmoved"]) == 0
    gradients = [name for name in theirs if name.startswith("grad/")]
    assert gradients
    assert {name for name in ours if name.startswith("grad/")} == set(gradients)
    for name in gradients:
        difference = float((ours[name] - theirs[name]).norm())
        assert difference <= 1e-5 * float(theirs[name].norm()), name


@pytest.mark.parametrize("case", [case for case in (*SHARED, *ALONE.values()) if "replay" in case])
def test_the_ranks_together_count_what_is_replayed(results: Results, case: str) -> None:
    """All but the sequence whose experts are unknown; experts drawn at random are mostly others."""
    masks = [one.sequences[0].loss_mask for one in experiences()]
    expected = 1 - masks[2].sum() / sum(int(mask.sum()) for mask in masks)
    assert float(results[case][REPLAYED]) == pytest.approx(expected, rel=1e-6)
    assert 0.5 * expected < float(results[case][CHANGED]) < expected


@pytest.mark.parametrize("case", WHOLE)
def test_feed_forward_layers_compute_the_same_in_chunks(results: Results, case: str) -> None:
    ours, theirs = results[case], results[WHOLE[case]]
    assert ours.keys() | {"reference"} == theirs.keys()
    for name, found in ours.items():
        right = theirs[name].double()
        assert float((found.double() - right).norm()) <= 1e-6 * float(right.norm()), name


def test_inputs_of_layers_that_are_kept_in_host_memory_give_the_same_bits(results: Results) -> None:
    ours, theirs = results[KEPT_ON_HOST], results[CHECKPOINTED]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", [case for case in SHARED if "stored" in case])
def test_experts_of_many_ranks_leave_them_as_the_checkpoint_has_them(
    results: Results, case: str, tmp_path: Path
) -> None:
    """To the bit: what is exported and what is sent."""
    make_family(tmp_path, "qwen3_moe", **HEADS)
    stored = load_file(tmp_path / "model.safetensors")
    held = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    for start, expected in (("sent/", stored), ("held/", held)):
        found = {name.removeprefix(start): value for name, value in results[case].items() if name.startswith(start)}
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_whose_sequences_cannot_be_shared_is_refused(results: Results, family: str) -> None:
    said = bytes(results[f"{family}-log_probs-2-0-packed"]["refused"].tolist()).decode()
    assert said.startswith("policy.")
    assert REFUSED[family] in said

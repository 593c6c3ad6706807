"""The training engine against transformers and autograd: gradients in every split, skipped steps, exports, resume.

One process group of two ranks and one of a single rank run all scenarios side by side (see training_worker.py); the
tests judge what they recorded.
"""

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapters import add_adapters
from rlhf.engines.training.checkpoint import require_all_seen
from rlhf.errors import CheckpointError, ModelError
from tests.families import tiny_family
from tests.integration.list_experts import list_experts
from tests.integration.ports import held_port
from tests.integration.rank_processes import RankProcesses
from tests.integration.training_adapters import CASES as ADAPTERS
from tests.integration.training_adapters import GRADIENTS, LORA
from tests.integration.training_experts import CASES as EXPERTS
from tests.integration.training_experts import COEF
from tests.integration.training_oracles import (
    TEMPERATURE,
    Results,
    assert_same_gradient,
    balanced_gradient,
    gradient_of,
    naive_gradient,
    naive_log_probs,
    naive_loss,
)
from tests.integration.training_rows import experiences, rankings
from tests.integration.training_saves import EXPORTED
from tests.rounding import rounded
from tests.tiny_models import make_family, make_policy, make_reward_model, tiny_config, tiny_tokenizer

TIMEOUT_S = 540

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rank_processes: RankProcesses) -> Path:
    """Models before, results and exports after both groups have run."""
    folder = tmp_path_factory.mktemp("training")
    make_policy(folder / "tied", tied=True)
    shutil.copytree(folder / "tied", folder / "rounded")
    # In numbers that bfloat16 has, so that a block's scale is the same in both dtypes.
    weights = {name: w.bfloat16().float() for name, w in load_file(folder / "tied" / "model.safetensors").items()}
    save_file(weights, folder / "tied" / "model.safetensors", metadata={"format": "pt"})
    weights |= {name: rounded(weight) for name, weight in weights.items() if name.endswith("proj.weight")}
    save_file(weights, folder / "rounded" / "model.safetensors", metadata={"format": "pt"})
    make_policy(folder / "untied")
    tiny_family("opt").save_pretrained(folder / "opt")
    make_family(folder / "experts", "qwen3_moe")
    tiny_family("gpt_oss").save_pretrained(folder / "unpacked_experts")
    list_experts().save_pretrained(folder / "list_experts")
    make_reward_model(folder / "zero_score")
    weights = load_file(folder / "zero_score" / "model.safetensors")
    weights["score.weight"].zero_()
    save_file(weights, folder / "zero_score" / "model.safetensors", metadata={"format": "pt"})
    with held_port() as port, held_port() as other_port:
        ranks = [(rank, 2, port, folder) for rank in range(2)] + [(0, 1, other_port, folder)]
        rank_processes.run("training_worker", ranks, folder=folder, timeout_s=TIMEOUT_S)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Results:
    return load_file(folder / "results_2_0.safetensors")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Results:
    return load_file(folder / "results_1_0.safetensors")


CASES = [
    *((1, case) for case in ("zero0", "zero3", "packed", "single", "swap", "eager")),
    *((2, case) for case in ("zero0", "zero1", "zero2", "zero3", "packed", "single")),
    *((2, case) for case in ("checkpointing", "offload", "swap", "chunked", "tied", "unpacked")),
]


@pytest.mark.parametrize(("num_ranks", "case"), CASES)
def test_the_gradient_is_the_same_in_every_split(
    folder: Path, one_rank: Results, two_ranks: Results, num_ranks: int, case: str
) -> None:
    results = {1: one_rank, 2: two_ranks}[num_ranks]
    expected = naive_gradient(folder / {"tied": "tied", "unpacked": "opt"}.get(case, "untied"))
    assert_same_gradient(gradient_of(results, case), expected)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert float(results[f"gradients/{case}/norm"]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_no_gradient_leaks_into_the_next_step(
    folder: Path, one_rank: Results, two_ranks: Results, num_ranks: int, zero_stage: int
) -> None:
    results = {1: one_rank, 2: two_ranks}[num_ranks]
    assert_same_gradient(gradient_of(results, f"second{zero_stage}"), naive_gradient(folder / "untied"))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("model", "stage", "limit"), EXPERTS)
def test_the_balance_of_experts_is_the_same_in_every_split(
    folder: Path, num_ranks: int, model: str, stage: int, limit: tuple[int, int | None]
) -> None:
    ranks = [load_file(folder / f"results_{num_ranks}_{rank}.safetensors") for rank in range(num_ranks)]
    balance, expected = balanced_gradient(folder / model, COEF)
    name = f"{model}-zero{stage}-{limit[0]}"
    total = sum(float(results[f"experts/{name}/balance"]) for results in ranks)
    assert total == pytest.approx(balance, rel=1e-5)
    prefix = f"experts/{name}/grad/"
    found = {key.removeprefix(prefix): value for key, value in ranks[0].items() if key.startswith(prefix)}
    assert_same_gradient(found, expected)


def test_ranks_may_call_different_experts_of_a_list(folder: Path, two_ranks: Results) -> None:
    assert_same_gradient(gradient_of(two_ranks, "list_experts"), naive_gradient(folder / "list_experts"))


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_routers_stay_and_the_rest_moves(two_ranks: Results, stage: int) -> None:
    assert two_ranks[f"experts/routers{stage}/frozen"].tolist() == [0.0, 0.0]
    assert two_ranks[f"experts/routers{stage}/free"].tolist() == [1.0, 1.0]
    assert float(two_ranks[f"experts/routers{stage}/unmoved"]) == 0.0


def test_metrics_of_the_ranks_add_up_to_those_of_one(folder: Path, one_rank: Results, two_ranks: Results) -> None:
    other = load_file(folder / "results_2_1.safetensors")
    for case in ("zero0", "zero3", "single"):
        total = two_ranks[f"gradients/{case}/loss"] + other[f"gradients/{case}/loss"]
        torch.testing.assert_close(total, one_rank["gradients/packed/loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_one_at_the_first_update(folder: Path, dtype: str) -> None:
    for rank in (0, 1):
        results = load_file(folder / f"results_2_{rank}.safetensors")
        assert float(results[f"ratio/{dtype}/first"]) == 0.0
        assert float(results[f"ratio/{dtype}/second"]) > 0.0


@pytest.mark.parametrize(
    "case", ["zero0-float32", "zero0-bfloat16", "zero1-bfloat16", "zero2-float32", "zero3-bfloat16"]
)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(folder: Path, case: str) -> None:
    for rank in (0, 1):
        results = load_file(folder / f"results_2_{rank}.safetensors")
        seen = {name.split("/", 2)[2]: bool(value) for name, value in results.items() if f"not_finite/{case}/" in name}
        assert seen == {
            "data/finite": False,
            "data/unchanged": True,
            "loss/finite": False,
            "loss/unchanged": True,
            "gradient/finite": False,
            "gradient/unchanged": True,
            "recovered": True,
            "clean": True,
            "moved": True,
        }


@pytest.mark.parametrize("case", ["zero0-bfloat16", "zero2-float32", "zero3-bfloat16"])
def test_parameters_that_did_not_move_are_named(two_ranks: Results, case: str) -> None:
    """A learning rate too small for a bfloat16 weight to show still moves the optimizer's own copy."""
    seen = {name.split("/")[2]: float(value) for name, value in two_ranks.items() if f"unmoved/{case}/" in name}
    assert seen == {"head_moved": 1.0, "num_unmoved": 20.0, "second": 0.0, "policy": 0.0, "after_skip": 20.0}


@pytest.mark.parametrize("case", [f"{model}-zero{stage}-{dtype}" for model, stage, dtype in EXPORTED])
def test_an_export_is_the_trained_model(folder: Path, two_ranks: Results, case: str) -> None:
    dtype = torch.bfloat16 if "bfloat16" in case else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "exports" / case)
    assert model.dtype == dtype
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == case.startswith("tied")
    with torch.no_grad():
        parts = [naive_log_probs(model, e.sequences[0].token_ids, TEMPERATURE)[0] for e in experiences()]
    tolerance = 0.15 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(two_ranks[f"exports/{case}"], torch.cat(parts), rtol=0.0, atol=tolerance)
    tokenizer = AutoTokenizer.from_pretrained(folder / "exports" / case)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert bool(two_ranks[f"stale/{case}"]), "the check must refuse an export of other weights"
    before = load_file(folder / case.partition("-")[0] / "model.safetensors")
    after = load_file(folder / "exports" / case / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name].to(dtype), after[name]) for name in before)


def test_a_reward_model_is_trained_from_a_policy_and_served_and_starts_a_critic(
    folder: Path, two_ranks: Results
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "exports" / "reward")
    assert model.config.num_labels == 1
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    sequences = [torch.tensor(s.token_ids) for e in rankings() for s in e.sequences]
    with torch.no_grad():
        expected = torch.cat([model(ids[None]).logits[0] for ids in sequences])
        hidden = [model.base_model(ids[None]).last_hidden_state[0] for ids in sequences]
        states = torch.cat([torch.cat([torch.zeros(1, 1), model.score(h)[:-1]]) for h in hidden]).squeeze(-1)
    torch.testing.assert_close(two_ranks["rewards/trained"].float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two_ranks["rewards/served"], two_ranks["rewards/trained"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two_ranks["rewards/values"], states, rtol=1e-4, atol=1e-4)


def test_a_scoring_engine_agrees_with_the_trainer(two_ranks: Results) -> None:
    torch.testing.assert_close(two_ranks["rewards/reference"], two_ranks["rewards/policy"], rtol=1e-5, atol=1e-5)


def test_the_output_layer_leaves_out_what_is_not_learned_from(two_ranks: Results) -> None:
    mask = torch.tensor(np.concatenate([experience.sequences[0].loss_mask for experience in experiences()]))
    outputs, of_all = two_ranks["rewards/wanted"], two_ranks["rewards/policy"]
    torch.testing.assert_close(outputs[mask], of_all[mask], rtol=1e-5, atol=1e-5)
    assert not outputs[~mask].any()
    assert of_all[~mask].any()


@pytest.mark.parametrize("case", ["zero0-float32", "zero2-float32", "zero3-float32", "zero3-bfloat16"])
def test_a_resumed_run_is_the_run_that_never_stopped(folder: Path, two_ranks: Results, case: str) -> None:
    assert bool(two_ranks[f"resume/{case}/same"])
    assert bool(two_ranks[f"resume/{case}/moved"])
    assert not two_ranks[f"resume/{case}/lr"].any()
    torch.testing.assert_close(two_ranks[f"resume/{case}/lrs"], torch.tensor([1 / 3, 2 / 3, 1.0, 0.1]) * 1e-3)
    assert not list((folder / "checkpoints" / case).rglob("latest"))
    assert case[-8:] == "bfloat16" or float(two_ranks[f"resume/{case}/first_update"]) == pytest.approx(1e-3 / 3, 0.02)


def test_a_model_that_is_gathered_ahead_can_be_exported_after_a_forward_pass(two_ranks: Results) -> None:
    assert all(bool(two_ranks[f"large/{name}"]) for name in ("in_flight", "same"))


def test_a_checkpoint_of_another_zero_stage_is_rejected(two_ranks: Results) -> None:
    """DeepSpeed would load its weights, and go on without the optimizer's state."""
    assert bool(two_ranks["relaid/message"])
    assert bool(two_ranks["relaid/older"])
    assert bool(two_ranks["relaid/read"])


def test_parameters_of_a_scoring_engine_can_be_offloaded(one_rank: Results, two_ranks: Results) -> None:
    """Also with one rank: parameters can only be offloaded under ZeRO-3."""
    assert [bool(one_rank[f"offloads/{away}/sharded"]) for away in (False, True)] == [False, True]
    assert [bool(two_ranks[f"offloads/{away}/sharded"]) for away in (False, True)] == [True, True]
    assert bool(one_rank["offloads/same"])
    assert bool(two_ranks["offloads/same"])


@pytest.mark.parametrize(("stage", "bad"), [(0, 0), (3, 0), (3, 1)])
def test_a_write_error_on_one_rank_is_raised_on_all(folder: Path, stage: int, bad: int) -> None:
    """And none is left waiting for another: the next step is that of an engine that saved nothing."""
    for rank in range(2):
        results = load_file(folder / f"results_2_{rank}.safetensors")
        name = f"refused/zero{stage}-rank{bad}"
        assert bool(results[f"{name}/save"])
        assert bool(results[f"{name}/export"]) == (bad == 0), "rank 0 writes the model"
        assert bool(results[f"{name}/undisturbed"])
        assert bool(results[f"{name}/saved"])
        assert bool(results[f"{name}/replicas"]), "one weight of rank 1 was changed before the next save"


@pytest.mark.parametrize(("stage", "bad"), [(0, 0), (2, 1), (3, 0), (3, 1)])
def test_weights_that_are_not_finite_are_not_saved(folder: Path, stage: int, bad: int) -> None:
    """Whichever rank holds them, both raise and nothing is written."""
    for rank in range(2):
        results = load_file(folder / f"results_2_{rank}.safetensors")
        assert bool(results[f"poisoned-{stage}-{bad}/save"])
        assert bool(results[f"poisoned-{stage}-{bad}/unwritten"])


@pytest.mark.parametrize(("seen", "missing"), [((0, 1, 2), None), ((0, 2), "rank 1 wrote"), ((1,), "rank 0, 2 wrote")])
def test_a_folder_that_the_ranks_do_not_share_is_rejected(
    tmp_path: Path, seen: tuple[int, ...], missing: str | None
) -> None:
    for rank in seen:
        (tmp_path / f"random_state_{rank}.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"does not hold what {missing}") if missing else nullcontext():
        require_all_seen(tmp_path, 3)


FOLLOWING = (("zero0-bfloat16", 0, "tied"), ("zero2-float32", 2, "tied"), ("zero3-float32", 3, "untied"))


def by_mean(folder: Path, start: str, exports: list[Path], decay: float) -> tuple[torch.Tensor, list[float]]:
    """Log-probs by the running mean of `start` and the exported weights, and how far each of those moved it."""
    mean = {name: tensor.float() for name, tensor in load_file(folder / start / "model.safetensors").items()}
    moved = []
    for export in exports:
        policy = load_file(export / "model.safetensors")
        step = {name: (1 - decay) * (policy[name].float() - tensor) for name, tensor in mean.items()}
        moved.append(float(torch.stack([change.norm() for change in step.values()]).norm()))
        mean = {name: tensor + step[name] for name, tensor in mean.items()}
    model = AutoModelForCausalLM.from_pretrained(exports[-1])
    model.load_state_dict({name: tensor.to(model.dtype) for name, tensor in mean.items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        outputs = [
            naive_log_probs(model, experience.sequences[0].token_ids, TEMPERATURE)[0] for experience in experiences()
        ]
    return torch.cat(outputs), moved


@pytest.mark.parametrize(("name", "stage", "start"), FOLLOWING)
def test_an_ema_reference_follows_the_policy_and_does_not_change_it(
    folder: Path, two_ranks: Results, name: str, stage: int, start: str
) -> None:
    """The running mean is that of the exported weights, and is not one that never moves."""
    outputs = {key.removeprefix(f"following/{name}/"): value for key, value in two_ranks.items() if f"/{name}/" in key}
    tolerance = 0.15 if "bfloat16" in name else 1e-4
    for step in range(2):
        exports = [folder / "exports" / f"following{i}-{stage}" for i in range(step + 1)]
        expected, moved = by_mean(folder, start, exports, 0.75)
        assert float((outputs[f"mean{step}"] - expected).abs().max()) < tolerance
        assert float((outputs[f"mean{step}"] - outputs[f"policy{step}"]).abs().max()) > 5 * tolerance
        assert float(outputs[f"moved{step}"]) == pytest.approx(moved[-1], rel=1e-2 if "bfloat16" in name else 1e-4)
        assert bool(outputs[f"untouched{step}"])
    assert not torch.equal(outputs["mean0"], outputs["first"])
    assert bool(outputs["trained_alike"])
    assert bool(outputs["resumed"])
    assert torch.equal(outputs["refreshed"], outputs["policy"])
    assert not torch.equal(outputs["stale"], outputs["policy"])


@pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in ADAPTERS])
def test_adapters_are_trained_instead_of_the_model(folder: Path, two_ranks: Results, case: str) -> None:
    """The engine, its merged export and its exported adapters over the first model say the same; only they learned."""
    outputs = {key.rpartition("/")[2]: value for key, value in two_ranks.items() if f"adapters/{case}/" in key}
    tolerance = 0.15 if "bfloat16" in case else 1e-4
    assert float(outputs["starts_off_by"]) <= (tolerance if "nf4" in case else 0.0)
    assert bool(outputs["frozen"])
    assert bool(outputs["resumed"])
    assert bool(outputs["refuses_another_model"])
    assert int(outputs["num_unmoved"]) == 0
    export = folder / "exports" / f"adapters-{case}"
    merged = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    base = folder / ("rounded" if "nf4" in case else case.partition("-")[0])
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(start, export / "adapter")
    for model in (merged, adapted):
        with torch.no_grad():
            rows = [naive_log_probs(model, one.sequences[0].token_ids, TEMPERATURE)[0] for one in experiences()]
        assert float((outputs["outputs"] - torch.cat(rows)).abs().max()) < tolerance
    before, after = (load_file(one / "model.safetensors") for one in (base, export))
    assert int(outputs["saved_bytes"]) < sum(tensor.nbytes for tensor in before.values())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert moved == {name for name in before if name.endswith("proj.weight")}


def test_the_gradient_of_adapters_is_that_of_autograd(folder: Path, two_ranks: Results) -> None:
    """From the same first adapters, one sequence at a time."""
    for base, case in GRADIENTS.items():
        model = AutoModelForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
        add_adapters(
            model, LoraSection.model_validate(LORA[case.partition("-")[0]]), seed=0, where="policy.lora.targets"
        )
        naive_loss(model).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        for stage in (0, 2, 3):
            assert float(two_ranks[f"adapters/{case.format(stage)}/norm"]) == pytest.approx(float(norm), rel=1e-5)


def test_a_score_head_is_trained_with_adapters(two_ranks: Results) -> None:
    assert bool(two_ranks["adapters/head_learns"])
    assert int(two_ranks["adapters/num_targets"]) == 2 * tiny_config().num_hidden_layers


def test_adapters_for_unknown_layers_are_rejected(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    message = r"^policy.lora.targets: no linear layers called query; have down_proj, .*q_proj"
    with pytest.raises(ModelError, match=message):
        add_adapters(model, LoraSection(rank=4, targets=("q_proj", "query")), seed=0, where="policy.lora.targets")

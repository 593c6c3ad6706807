"""Real runs of families that people train: SFT, DPO and GRPO with vLLM, a resumed run, and the export in a process of
its own. Each takes minutes: RLHF_TEST_MODELS=1 asks for them, and RLHF_TEST_MODELS_OUT names the folder that keeps what
was found, a line a family, for docs/models.md."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

from rlhf.engines.models.text_part import language_model_class
from tests.family_models import WIDE_LINEAR, write_family
from tests.family_results import KEPT, KEPT_GAPS, FamilyRow, GapRow, keep_row
from tests.integration.command_line import CommandLine, Run
from tests.integration.ray_head import RayHead

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif("RLHF_TEST_MODELS" not in os.environ, reason="RLHF_TEST_MODELS is not set"),
]

COMMON = (
    *("--policy.lr", "1e-3", "--policy.warmup-ratio", "0", "--data.template", "plain", "--no-log.tensorboard"),
    *("--checkpoint.every-steps", "2", "--checkpoint.keep", "5"),
)
GIVEN = ("--data.max-tokens", "64", "--train.batch-size", "8", "--train.num-steps", "4")
TAUGHT = ("--data.path", "demonstrations.jsonl", *GIVEN)
SAMPLED = (
    *("--data.path", "prompts.jsonl", "--reward.function", "taste:vowels", "--rollout.enforce-eager"),
    *("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8", "--rollout.batch-size", "4"),
    *("--rollout.group-size", "4", "--train.batch-size", "16", "--train.num-steps", "3"),
    *("--rollout.kv-cache-gib", "0.1"),
)
ENGINES = {
    "mixtral": "vllm",
    "qwen3_moe": "vllm",
    "gpt_oss": "vllm",
    "qwen3_5": "transformers",
    "qwen3_5_moe": "transformers",
    "gemma3": "vllm",
    "mistral3": "vllm",
}
"""Families, and what samples from them: vLLM where its CPU build has their layers in float32."""
ADAPTED = {
    "mixtral": ("experts.gate_up_proj", "experts.down_proj"),
    "qwen3_moe": ("q_proj", "v_proj", "experts.gate_up_proj", "experts.down_proj"),
    "gpt_oss": ("experts.gate_up_proj",),
}
"""Families, and what of them gets adapters."""
FRESH = """
import sys, torch, transformers
torch.set_num_threads(1)
kind, folder, out = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(4, 40)[None], use_cache=False).logits
torch.save(logits, out)
"""


@pytest.mark.parametrize("family", ENGINES)
def test_runs_of_a_family(family: str, command: CommandLine, head: RayHead) -> None:
    base = write_family(command.workplace / family, family)
    run = partial(run_family, command, head, family)
    sft = run("sft", "sft", *TAUGHT)
    weights = sft.weights
    row = FamilyRow(
        family=family,
        sft=sft.metrics[0]["policy/loss"] - sft.metrics[-1]["policy/loss"],
        dpo=run("dpo", "dpo", "--data.path", "preferences.jsonl", *GIVEN).metrics[-1]["pairs/accuracy"],
        engine=ENGINES[family],
        log_prob_gap=max(
            row["mismatch/log_prob_max"]
            for row in run("grpo", "grpo", *SAMPLED, "--rollout.engine", ENGINES[family]).metrics
        ),
        export_is_equal=torch.equal(fresh_logits(sft, command.workplace), checkpoint_logits(sft, base)),
        resumed_is_equal=resumed(sft, partial(run, "sft", "sft", *TAUGHT)).weights == weights,
        tower=tower(base, sft.model),
    )
    keep(KEPT, row)
    assert row.sft > 0.0, row
    assert row.log_prob_gap <= 1e-4, row
    assert row.export_is_equal, row
    assert row.resumed_is_equal, row
    assert row.tower in ("unchanged", "none"), row


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_on_experts(family: str, command: CommandLine, head: RayHead) -> None:
    """Trained, synchronized, exported merged and alone, and resumed."""
    base = write_family(command.workplace / family, family)
    targets = [word for target in ADAPTED[family] for word in ("--policy.lora.targets", target)]
    adapted = ("--policy.lora.rank", "4", *targets, "--policy.gradient-checkpointing", "--policy.lr", "1e-2")
    run = partial(run_family, command, head, family)
    grpo = run("grpo", "adapters-grpo", *SAMPLED, "--rollout.engine", "vllm", *adapted)
    assert max(row["mismatch/log_prob_max"] for row in grpo.metrics) <= 1e-4
    sft = run("sft", "adapters-sft", *TAUGHT, *adapted)
    assert sft.metrics[-1]["policy/loss"] < sft.metrics[0]["policy/loss"]
    kind = language_model_class(AutoConfig.from_pretrained(base))
    added = PeftModel.from_pretrained(
        kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager"), sft.model / "adapter"
    ).eval()
    with torch.no_grad():
        expected = added(input_ids=torch.arange(4, 40)[None], use_cache=False).logits
    torch.testing.assert_close(fresh_logits(sft, command.workplace), expected, rtol=1e-4, atol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, sft.model))
    assert {name for name in before if "expert" in name and not torch.equal(before[name], after[name])}
    weights = sft.weights
    assert resumed(sft, partial(run, "sft", "adapters-sft", *TAUGHT, *adapted)).weights == weights


def test_linear_attention_with_vllm_in_bfloat16(command: CommandLine, head: RayHead) -> None:
    """Policy and engine round by as much as the model does anyway, on average, so they differ by at most twice that.
    The run changes log-probs by more, or an engine that went on with old weights would pass."""
    family = "qwen3_5"
    base = write_family(command.workplace / f"{family}-wide", family, WIDE_LINEAR)
    words = (*SAMPLED, "--rollout.engine", "vllm", "--policy.dtype", "bfloat16")
    grpo = run_family(command, head, base.name, "grpo", "grpo", *words)
    tokens = sampled_tokens(base)
    fine = log_probs(base, tokens, torch.float32)
    noise = (log_probs(base, tokens, torch.bfloat16) - fine).abs()
    row = GapRow(
        family=family,
        mean=max(row["mismatch/log_prob"] for row in grpo.metrics),
        largest=max(row["mismatch/log_prob_max"] for row in grpo.metrics),
        noise=float(noise.mean()),
        largest_noise=float(noise.max()),
    )
    keep(KEPT_GAPS, row)
    assert len(grpo.metrics) == 3
    assert row.mean <= 2 * row.noise, row
    assert (log_probs(grpo.model, tokens, torch.float32) - fine).abs().mean() > 4 * row.noise, row


def keep(file: Path, row: FamilyRow | GapRow) -> None:
    """Keep a row in the folder that is asked for, in a file of the same name."""
    if (folder := os.environ.get("RLHF_TEST_MODELS_OUT")) is not None:
        keep_row(Path(folder) / file.name, row)


@torch.no_grad()
def sampled_tokens(folder: Path) -> torch.Tensor:
    """[N, T]: prompts of 8 random tokens, and as many sampled from a model in float32, for as many responses as the run
    of a family has."""
    model = language_model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 120, (48, 8), generator=generator)
    for _ in range(8):
        logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return tokens


@torch.no_grad()
def log_probs(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, 8]: of each row's last tokens, by a model in a number format."""
    model = language_model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype).eval()
    said = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    chosen: torch.Tensor = said.gather(-1, tokens[:, 1:, None])[:, -8:, 0]
    return chosen


def run_family(command: CommandLine, head: RayHead, family: str, method: str, name: str, *arguments: str) -> Run:
    words = (method, "--policy.model", family, *COMMON, *arguments, "--cluster.address", head.address)
    return command.run(*words, name=f"{family}-{name}", environment=head.environment)


def resumed(whole: Run, again: Callable[..., Run]) -> Run:
    """The same run again, from its checkpoint in the middle."""
    shutil.rmtree(whole.folder / "checkpoints" / "step_4")
    shutil.rmtree(whole.model)
    return again("--resume")


def fresh_logits(run: Run, folder: Path) -> torch.Tensor:
    """What a process without this package computes with the export."""
    kind = language_model_class(AutoConfig.from_pretrained(run.model)).__name__
    subprocess.run([sys.executable, "-c", FRESH, kind, str(run.model), str(folder / "logits.pt")], check=True)
    logits: torch.Tensor = torch.load(folder / "logits.pt")
    return logits


def checkpoint_logits(run: Run, base: Path) -> torch.Tensor:
    """The same of the weights in the last checkpoint, in the model before training."""
    (file,) = (run.folder / "checkpoints").glob("step_4/policy/deepspeed/*model_states.pt")
    weights = {name.removeprefix("model."): w for name, w in torch.load(file, weights_only=False)["module"].items()}
    kind = language_model_class(AutoConfig.from_pretrained(base))
    model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    # A tied output layer, and frozen towers: they stay as they were before training.
    assert all(name.startswith("lm_head") or is_of_tower(name) for name in found.missing_keys), found.missing_keys
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(4, 40)[None], use_cache=False).logits
    torch.set_num_threads(threads)
    return logits


def tower(base: Path, exported: Path) -> str:
    """Whether an export has the parts for images as they were."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, exported))
    names = list(filter(is_of_tower, before))
    if not names:
        return "none"
    return (
        "unchanged"
        if all(torch.equal(before[name], after[name]) for name in names if name in after) and set(names) <= set(after)
        else "differs"
    )


def is_of_tower(name: str) -> bool:
    """Whether a parameter belongs to what reads images."""
    return "vis" in name or "multi_modal" in name

"""Fine-tuning and reward modeling through the command line: they learn, and what they export loads elsewhere."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.integration.command_line import CommandLine, Run
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(900)

COMMON = (
    *("--train.num-steps", "8", "--train.batch-size", "8", "--data.eval-fraction", "0.2", "--eval.every-steps", "4"),
    *("--data.template", "plain", "--data.max-tokens", "64"),
)


@pytest.fixture(scope="module")
def sft(command: CommandLine, head: RayHead) -> Run:
    return command.run(
        *("sft", "--policy.model", "policy", "--policy.lr", "1e-2", "--data.path", "demonstrations.jsonl", *COMMON),
        *("--cluster.address", head.address),
        name="sft",
        environment=head.environment,
    )


@pytest.fixture(scope="module")
def rm(command: CommandLine, head: RayHead) -> Run:
    """A reward model that starts from a causal language model: its head is new."""
    return command.run(
        *("rm", "--reward.model", "policy", "--reward.lr", "1e-2", "--data.path", "preferences.jsonl", *COMMON),
        *("--cluster.address", head.address),
        name="rm",
        environment=head.environment,
    )


def test_fine_tuning_learns_and_exports_a_language_model(sft: Run) -> None:
    losses = [row["policy/loss"] for row in sft.metrics]
    assert losses[-1] < 0.7 * losses[0]
    assert sft.metrics[7]["eval/loss"] < sft.metrics[3]["eval/loss"]
    assert "AutoModelForCausalLM" in sft.output
    model: Any = AutoModelForCausalLM.from_pretrained(sft.model)
    tokenizer = AutoTokenizer.from_pretrained(sft.model)
    ids = tokenizer("say red 1", return_tensors="pt").input_ids
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :])
    assert str(answer).strip()


def test_a_reward_model_learns_and_exports_a_scorer(rm: Run) -> None:
    assert rm.metrics[-1]["eval/accuracy"] == 1.0
    assert "AutoModelForSequenceClassification" in rm.output
    scorer = AutoModelForSequenceClassification.from_pretrained(rm.model)
    tokenizer = AutoTokenizer.from_pretrained(rm.model)
    assert scorer.config.num_labels == 1
    better, worse = (tokenizer(f"say red 1{text}</s>", return_tensors="pt") for text in ("aaaaaa", "zzzzz"))
    with torch.no_grad():
        assert scorer(**better).logits.item() > scorer(**worse).logits.item()

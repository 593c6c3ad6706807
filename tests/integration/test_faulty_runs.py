"""Whole runs in which one process is stopped, or one runs out of memory: what they say, and what they learn."""

import json
import re
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlhf.cli.chaos_child import WITNESSES, Fault
from rlhf.orchestrator.run.files import read_rows
from tests.integration.command_line import CommandLine, Run, is_alive
from tests.integration.ray_head import RayHead

pytestmark = pytest.mark.timeout(900)

SYNCING = (
    *("grpo", "--policy.model", "policy", "--reward.function", "taste:vowels", "--data.path", "prompts.jsonl"),
    *("--data.template", "plain", "--rollout.kv-cache-gib", "0.1", "--rollout.batch-size", "2"),
    *("--rollout.group-size", "2", "--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "4"),
    *("--train.batch-size", "4", "--train.num-steps", "3", "--checkpoint.every-steps", "1"),
    *("--rollout.sync-timeout-s", "8", "--cluster.max-restarts", "0"),
    *("--colocate", "all", "--policy.num-gpus-per-node", "2", "--policy.zero-stage", "3"),
    "--rollout.enforce-eager",
)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_engine_that_is_stopped_before_a_sync_is_named_and_not_the_policy(
    engine: str, command: CommandLine, head: RayHead
) -> None:
    """Whose two ranks hold half of the weights each, and wait for each other in the sync."""
    name = f"{engine}_stopped"
    fault = Fault(number=0, kind="stop", process="rollout engine 0", phase="sync")
    arguments = (*SYNCING, "--rollout.engine", engine, "--cluster.address", head.address)
    run = command.run_with_faults(*arguments, name=name, environment=head.environment, faults=[fault])
    (witness,) = read_rows(command.workplace / f"{name}-faults" / WITNESSES)
    assert str(witness["wait"]).startswith("weight sync of version "), witness
    assert run.code == 8, run.output
    error = json.loads((run.folder / "status.json").read_text())["error"]
    named = rf"from rollout engine 0 \(node \S+, pid {witness['pid']}\)\. rollout engine 0 is stopped \(by SIGSTOP "
    assert re.search(named, error), error
    assert "policy rank" not in error, error
    assert "Traceback" not in run.output
    pid, deadline = int(str(witness["pid"])), time.monotonic() + 30
    while psutil.pid_exists(pid) and is_alive(psutil.Process(pid)):  # a killed process gives back its memory first
        assert time.monotonic() < deadline, "the engine outlived its run"
        time.sleep(0.2)


LIMITED = '''\
"""Fine-tuning on chosen responses, on a device whose memory is too small for micro-batches of many tokens."""

import torch

from rlhf.algorithms.sft import SFT


class Limited(SFT):
    def __init__(self, section):
        super().__init__(section)
        self.most = section.settings["most_tokens"]

    def objectives(self):
        return {role: self.limited(objective) for role, objective in super().objectives().items()}

    def limited(self, objective):
        def loss(outputs, batch):
            if len(batch.loss_mask) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return objective(outputs, batch)

        return loss
'''
LEARNING = (
    *("dpo", "--algo", "custom", "--algo.algorithm", "limited:Limited", "--policy.model", "policy"),
    *("--data.path", "preferences.jsonl", "--data.template", "plain", "--data.max-tokens", "64"),
    *("--train.batch-size", "8", "--policy.lr", "1e-3", "--policy.lr-schedule", "constant"),
)
RESTART = re.compile(r"From here on micro-batches have at most (\d+) tokens")


class Memory:
    """Runs of the same training with more and less memory."""

    def __init__(self, command: CommandLine, head: RayHead) -> None:
        self._command = command
        self._head = head

    def run(self, name: str, *more: str, most_tokens: int, num_steps: int) -> Run:
        return self._command.run(
            *(*LEARNING, "--algo.settings", f"{{most_tokens: {most_tokens}}}", "--train.num-steps", str(num_steps)),
            *("--cluster.address", self._head.address, *more),
            name=name,
            environment=self._head.environment,
        )


@pytest.fixture(scope="module")
def memory(command: CommandLine, head: RayHead) -> Memory:
    (command.workplace / "limited.py").write_text(LIMITED)
    return Memory(command, head)


def limits_of(run: Run) -> list[int]:
    """The most tokens of a micro-batch after each restart of a run for its memory."""
    restarts = [str(row["text"]) for row in read_rows(run.folder / "events.jsonl") if row["kind"] == "restart"]
    assert all("policy forward_backward: out of memory with micro-batches of up to " in text for text in restarts)
    return [int(RESTART.findall(text)[0]) for text in restarts]


def test_a_run_that_runs_out_of_memory_learns_the_same_and_remembers_its_limit(memory: Memory) -> None:
    run = memory.run("halved", most_tokens=100, num_steps=2)
    (limit,) = limits_of(run)
    assert 50 < limit <= 100, run.output
    continued = memory.run("halved", "--resume", most_tokens=100, num_steps=3)
    assert f"micro-batches have at most {limit} tokens: memory ran out in this run with larger ones" in continued.output
    assert limits_of(continued) == [limit], "memory ran out again"
    assert [row["step"] for row in continued.metrics] == [1, 2, 3]
    enough = memory.run("enough", most_tokens=10**6, num_steps=3)
    assert limits_of(enough) == []
    whole, halved = (load_file(one.model / "model.safetensors") for one in (enough, continued))
    assert whole.keys() == halved.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(halved[name], weight, rtol=0, atol=1e-6, msg=name)

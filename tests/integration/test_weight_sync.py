"""Syncs into real engines: digests, log-probs, failed updates, caches, running requests; and out of ZeRO-3. Those of
engines with two pipeline stages, each a process, run every night."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.config.models import LoraSection
from rlhf.engines.base import generate
from rlhf.engines.models.adapters import add_adapters
from rlhf.engines.models.four_bit import four_bit_layers, use_four_bit_layers
from rlhf.engines.weight_sync.adapter_source import AdapterSource
from rlhf.engines.weight_sync.gloo import GlooSender
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.engines.weight_sync.sources import make_source
from rlhf.errors import NumericsError, RlhfError, WeightSyncError
from rlhf.types import Rollout
from tests.family_models import write_family
from tests.integration.rank_processes import RankProcesses
from tests.integration.rollout_support import (
    HAS_VLLM,
    IGNORE_VLLM_IMPORT_WARNINGS,
    WITH_ADAPTERS,
    ServingEngine,
    load_model,
    open_engine,
    packed,
    prompt,
    reference_log_probs,
    request,
    require_same,
)
from tests.local_engine_client import LocalEngineClient
from tests.tiny_models import make_family, make_policy

pytestmark = [*IGNORE_VLLM_IMPORT_WARNINGS, pytest.mark.timeout(240)]

RANK = 4
"""Of adapters."""
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj")
"""Of a mixture of experts."""
ROOT = Path(__file__).parents[2]
ENGINES = [
    pytest.param((kind, weights), id=f"{kind}-{weights}", marks=marks)
    for kind, marks in (
        ("transformers", []),
        ("vllm", [pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")]),
        (
            "stages",
            [
                pytest.mark.skipif(
                    os.environ.get("RLHF_TEST_ENGINE_NODES") != "all",
                    reason="two processes for each engine: RLHF_TEST_ENGINE_NODES=all, every night",
                )
            ],
        ),
    )
    for weights in ("untied", "tied", "adapters", "adapters-alone", "four-bit", "experts", "gpt-oss")
    if (kind, weights) not in {("transformers", "adapters-alone"), ("vllm", "four-bit"), ("transformers", "gpt-oss")}
    if kind != "stages" or weights in {"tied", "adapters-alone", "experts"}
]


class DamagingSender(GlooSender):
    """Flips one bit of the bucket whose number is `damage` behind its seal."""

    damage = -1
    _sent = 0

    def _broadcast(self, buffer: torch.Tensor) -> torch.distributed.Work:
        if self._sent == self.damage:
            buffer[1000] ^= 4
        self._sent += 1
        return super()._broadcast(buffer)


class Setup:
    """A trainer's model, an engine that follows it, and the sender between them."""

    def __init__(self, kind: str, weights: str, folder: Path, kv_cache: str = "recompute") -> None:
        if weights in {"experts", "adapters"}:
            make_family(folder, "qwen3_moe")
        elif weights == "gpt-oss":
            write_family(folder, "gpt_oss")
        else:
            make_policy(folder, tied=weights == "tied")
        self.stored_names = kind != "transformers"
        self.num_stages = 2 if kind == "stages" else 1
        self.model = load_model(folder)
        if weights == "four-bit":
            use_four_bit_layers(self.model)
        if weights in {"adapters", "adapters-alone", "four-bit"}:
            targets = EVERYTHING if weights == "adapters" else ()
            section = LoraSection(rank=RANK, alpha=16.0, targets=targets)
            add_adapters(self.model, section, seed=0, where="policy.lora.targets")
        for layer in four_bit_layers(self.model).values():
            layer.quantize(torch.device("cpu"))
        self.alone = weights == "adapters-alone"
        self.engine: ServingEngine = open_engine(
            "vllm" if kind == "stages" else kind,
            folder,
            adapter_rank=RANK if self.alone else 0,
            kv_cache=kv_cache,
            stages=self.num_stages,
        )
        self.client = LocalEngineClient({"rollout-0": self.engine})
        self.sender = DamagingSender(
            self.source(),
            self.client,
            master_address="127.0.0.1",
            port=0,
            num_receivers=self.num_stages,
            bucket_bytes=5_000 if self.alone else 100_000,
            timeout_s=30.0,
        )
        self.version = 0
        if self.alone:
            self.sender.send(0)  # the engine has none of its own to begin with

    def source(self) -> WeightSource:
        """What is sent."""
        if self.alone:
            return AdapterSource(self.model, "float32")
        return make_source(self.model, "float32", stored_names=self.stored_names)

    @torch.no_grad()
    def learn(self, seed: int) -> int:
        """Change everything that learns, so much that stale weights are seen; returns the new version."""
        torch.manual_seed(seed)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.version += 1
        return self.version

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        return reference_log_probs(self.model, ids)

    def close(self) -> None:
        self.sender.close()
        self.client.close()
        self.engine.close()


@pytest.fixture(scope="module", params=ENGINES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    kind, weights = request.param
    setup = Setup(kind, weights, tmp_path_factory.mktemp("model"))
    yield setup
    setup.close()


def test_after_every_sync_the_engine_computes_what_the_trainer_computes(setup: Setup) -> None:
    sequences = [prompt(1, 40), prompt(2, 3), prompt(3, 25)]
    digests = set()
    for seed in range(3):
        version = setup.learn(seed)
        with pytest.raises(NumericsError, match=r"^engine: version 0: .* the weights arrived, but this engine"):
            require_same(setup.engine, packed(sequences[0]), setup.log_probs(sequences[0]))
        report = setup.sender.send(version)  # compares digests, on both sides
        digests.add(report.digest)
        assert report.num_remote_calls == 3
        expected = np.concatenate([setup.log_probs(ids) for ids in sequences])
        require_same(setup.engine, packed(*sequences), expected)
        np.testing.assert_allclose(setup.engine.score([packed(*sequences)])[0], expected, rtol=0, atol=1e-4)
        (rollout,) = generate(setup.engine, [request(seed)])
        assert rollout.weight_version == version
    assert len(digests) == 3


def test_the_prefix_cache_is_empty_after_a_sync(setup: Setup) -> None:
    ids = prompt(4, 280)
    for seed in (10, 11):
        generate(setup.engine, [request(1, prompt_ids=ids), request(2, prompt_ids=ids)])
        setup.sender.send(setup.learn(seed))
        (rollout,) = generate(setup.engine, [request(3, prompt_ids=ids)])
        expected = setup.log_probs(np.concatenate([ids, rollout.token_ids]))[len(ids) :]
        np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-3)


def test_a_damaged_bucket_is_named_and_nothing_is_served_until_a_complete_sync(setup: Setup) -> None:
    setup.sender.damage = setup.sender._sent + 1
    version = setup.learn(20)
    with pytest.raises(
        WeightSyncError,
        match=rf"engine rollout-0: version {version}: bucket 2 of \d \((base_model\.model\.)?model\.layers",
    ):
        setup.sender.send(version)
    for work in (lambda: generate(setup.engine, [request(1)]), lambda: setup.engine.score([packed(prompt(1))])):
        with pytest.raises(WeightSyncError, match="serves nothing until a complete sync"):
            work()
    setup.sender.send(setup.learn(21))
    ids = prompt(1, 40)
    require_same(setup.engine, packed(ids), setup.log_probs(ids))
    assert generate(setup.engine, [request(1)])[0].weight_version == setup.version


def test_a_sync_into_a_sleeping_engine_is_an_error_and_changes_nothing(setup: Setup) -> None:
    setup.engine.sleep()
    with pytest.raises(WeightSyncError, match="asleep"):
        setup.sender.send(99)
    setup.engine.wake()
    assert generate(setup.engine, [request(1)])[0].weight_version == setup.version


def test_a_sleeping_engine_whose_weights_are_awake_serves_new_ones_when_it_wakes(setup: Setup) -> None:
    setup.engine.sleep()
    setup.engine.wake_weights()
    version = setup.learn(25)
    setup.sender.send(version)
    with pytest.raises(RlhfError, match="asleep"):
        generate(setup.engine, [request(1)])
    setup.engine.wake()
    (rollout,) = generate(setup.engine, [request(1)])
    assert rollout.weight_version == version
    ids = prompt(1, 40)
    require_same(setup.engine, packed(ids), setup.log_probs(ids))


def test_a_response_in_progress_is_completed_and_carries_the_older_version(setup: Setup) -> None:
    older = setup.version
    answers: list[Rollout] = []
    thread = threading.Thread(target=lambda: answers.extend(generate(setup.engine, [request(1, max_tokens=150)])))
    thread.start()
    time.sleep(0.05)
    newer = setup.learn(30)
    setup.sender.send(newer)
    thread.join(60)
    (answer,) = answers
    assert len(answer.token_ids) == len(answer.log_probs) == 150
    assert answer.weight_version == older
    assert generate(setup.engine, [request(1)])[0].weight_version == newer
    if not np.allclose(
        answer.log_probs, setup.log_probs(np.concatenate([prompt(1, 4), answer.token_ids]))[4:], atol=1e-3
    ):
        return  # part of it was sampled by the older weights, which is what the version says
    pytest.fail("nothing of the answer was sampled by the older weights")


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
@pytest.mark.parametrize("kept", [False, True], ids=["recompute", "keep"])
def test_a_response_in_progress_computes_its_kv_cache_again_or_keeps_it(kept: bool, tmp_path: Path) -> None:
    """New requests never use what older weights computed."""
    setup = Setup("vllm", "untied", tmp_path, kv_cache="keep" if kept else "recompute")
    core: Any = setup.engine._core  # type: ignore[attr-defined]
    scheduler = core.llm.engine_core.engine_core.scheduler
    ids, answers = prompt(4, 280), list[Rollout]()
    thread = threading.Thread(
        target=lambda: answers.extend(generate(setup.engine, [request(1, prompt_ids=ids, max_tokens=190)]))
    )
    thread.start()
    while not (running := list(scheduler.running)):
        time.sleep(0.01)
    setup.sender.send(setup.learn(30))
    (rollout,) = generate(setup.engine, [request(3, prompt_ids=ids)])
    expected = setup.log_probs(np.concatenate([ids, rollout.token_ids]))[len(ids) :]
    np.testing.assert_allclose(rollout.log_probs, expected, atol=1e-3)
    thread.join(60)
    assert len(answers[0].token_ids) == 190
    assert (running[0].num_preemptions == 0) is kept
    setup.close()


def test_a_new_group_can_be_joined_after_the_old_one(setup: Setup) -> None:
    setup.sender.close()
    setup.sender = DamagingSender(
        setup.source(),
        setup.client,
        master_address="127.0.0.1",
        port=0,
        num_receivers=setup.num_stages,
        bucket_bytes=1 << 20,
        timeout_s=30.0,
    )
    assert setup.sender.send(setup.learn(40)).num_buckets == 1
    ids = prompt(1, 40)
    require_same(setup.engine, packed(ids), setup.log_probs(ids))


def test_a_zero3_policy_on_two_ranks_arrives_completely(
    tmp_path: Path, port: int, rank_processes: RankProcesses
) -> None:
    folders = [make_policy(tmp_path / name, tied=name == "tied") for name in ("untied", "tied", *WITH_ADAPTERS)]
    ranks = [(rank, port, *folders) for rank in range(2)]
    rank_processes.run("weight_sync_worker", ranks, folder=tmp_path, timeout_s=200)
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert all(result["equal"].values())
        assert len(set(result["digests"])) == 3
        assert result["num_buckets"] > 1
        assert result["num_remote_calls"] == [3, 3, 3]
        np.testing.assert_allclose(result["scored"], result["expected"], atol=1e-4)
        assert result["num_matrices_from_adapters"] == (2 * 7 if folder.name in WITH_ADAPTERS else 0)

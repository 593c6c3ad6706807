"""The sampler that a vLLM engine has on GPUs, in a vLLM engine on the CPU: its generators have the positions that those
of GPUs have."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.engines.base import generate
from rlhf.engines.rollout.seeded_sampler import SeededSampler
from tests.integration.rollout_support import (
    HAS_VLLM,
    IGNORE_VLLM_IMPORT_WARNINGS,
    ServingEngine,
    load_model,
    open_engine,
    reference_log_probs,
    reference_logits,
    request,
)
from tests.tiny_models import make_policy

pytestmark = [
    *IGNORE_VLLM_IMPORT_WARNINGS,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed"),
]


class PositionedGenerator(torch.Generator):
    """A generator on the CPU that has a position, as those of GPUs have."""

    position = 0

    def get_offset(self) -> int:
        return self.position

    def set_offset(self, offset: int) -> torch.Generator:
        self.position = offset
        return self


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[ServingEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", PositionedGenerator)
        engine = open_engine("vllm", folder)
        engine._core.llm.collective_rpc(_install)  # type: ignore[attr-defined]
        yield engine
        engine.close()


def _install(worker: object) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p  # noqa: PLC0415

    worker.model_runner.sampler.topk_topp_sampler._inner = SeededSampler(apply_top_k_top_p)  # type: ignore[attr-defined]


def test_only_the_seed_decides(engine: ServingEngine) -> None:
    requests = [request(seed, max_tokens=20) for seed in range(10)]
    together = [r.token_ids.tolist() for r in generate(engine, requests)]
    assert [r.token_ids.tolist() for r in generate(engine, requests[::-1])] == together[::-1]
    assert generate(engine, [requests[5]])[0].token_ids.tolist() == together[5]
    one_prompt = [request(seed, prompt_ids=requests[0].prompt_token_ids, max_tokens=20) for seed in range(8)]
    assert len({tuple(r.token_ids.tolist()) for r in generate(engine, one_prompt)}) == 8


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_tokens_and_log_probs_are_those_of_the_model(
    engine: ServingEngine, folder: Path, sampling: dict[str, float]
) -> None:
    model = load_model(folder)
    requests = [request(seed, max_tokens=30, **sampling) for seed in range(4)]  # type: ignore[arg-type]
    for asked, rollout in zip(requests, generate(engine, requests), strict=True):
        sequence = np.concatenate([asked.prompt_token_ids, rollout.token_ids])
        expected = reference_log_probs(model, sequence, sampling.get("temperature") or 1.0)
        np.testing.assert_allclose(rollout.log_probs, expected[len(asked.prompt_token_ids) :], atol=1e-4)
        logits = reference_logits(model, sequence)[len(asked.prompt_token_ids) - 1 : -1]
        ranks = (logits > logits.gather(-1, torch.from_numpy(rollout.token_ids)[:, None])).sum(-1)
        if (most := 1 if sampling.get("temperature") == 0 else sampling.get("top_k")) is not None:
            assert ranks.max() < most


def test_frequencies_are_the_probabilities(engine: ServingEngine, folder: Path) -> None:
    asked = [request(seed, prompt_ids=request(0).prompt_token_ids, max_tokens=1, top_k=8) for seed in range(1500)]
    drawn = np.concatenate([r.token_ids for r in generate(engine, asked)])
    logits = reference_logits(load_model(folder), asked[0].prompt_token_ids)[-1]
    top = logits.topk(8)
    probs = top.values.softmax(-1).numpy()
    counts = np.array([(drawn == token).sum() for token in top.indices.tolist()])
    assert counts.sum() == len(asked)
    assert (np.abs(counts - len(asked) * probs) < 4.5 * np.sqrt(len(asked) * probs * (1 - probs)) + 1).all()

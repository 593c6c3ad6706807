"""One protocol, two engines: what comes out of vLLM and of plain transformers is checked against definitions."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore

from rlhf.config.engine_limits import (
    CPU_HEAD_SIZES,
    CPU_LATENT_SIZE,
    ONE_STAGE,
    VOCABULARY_BLOCK,
    EngineSizes,
    vllm_limit,
)
from rlhf.config.model_files import describe_model
from rlhf.config.rollout import RolloutSection
from rlhf.engines.base import generate
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.errors import ModelError, RlhfError
from rlhf.planning.memory import stage_layers
from rlhf.types import FinishReason, Rollout
from tests.integration.rollout_support import (
    HAS_VLLM,
    IGNORE_VLLM_IMPORT_WARNINGS,
    KINDS,
    ServingEngine,
    load_model,
    open_engine,
    packed,
    prompt,
    reference_log_probs,
    reference_logits,
    request,
)
from tests.tiny_models import make_family, make_policy

pytestmark = [*IGNORE_VLLM_IMPORT_WARNINGS, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return load_model(folder)


@pytest.fixture(scope="module", params=KINDS)
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[ServingEngine]:
    engine = open_engine(request.param, folder)
    yield engine
    engine.close()


def same(a: Rollout, b: Rollout) -> bool:
    return a.token_ids.tolist() == b.token_ids.tolist() and a.finish_reason is b.finish_reason


def test_each_request_gets_its_own_response_in_order(engine: ServingEngine) -> None:
    requests = [request(seed, max_tokens=3 + seed) for seed in range(20)]  # more than run at once
    rollouts = generate(engine, requests)
    assert [(r.id, r.prompt_id) for r in rollouts] == [(r.id, r.prompt_id) for r in requests]
    assert [len(r.token_ids) for r in rollouts] == [3 + seed for seed in range(20)]
    for rollout in rollouts:
        assert rollout.token_ids.dtype == np.int64
        assert rollout.log_probs.dtype == np.float32
        assert len(rollout.log_probs) == len(rollout.token_ids)
        assert rollout.weight_version == 0


def test_prompts_that_do_not_fit_into_one_step_together_change_no_response(engine: ServingEngine) -> None:
    """vLLM computes at most 2048 tokens a step here; what is left of a prompt waits."""
    requests = [request(seed, prompt_ids=prompt(seed, 290), max_tokens=6) for seed in range(8)]
    together = generate(engine, requests)
    assert all(same(a, generate(engine, [one])[0]) for a, one in zip(together, requests, strict=True))


def test_no_requests_give_no_rollouts(engine: ServingEngine) -> None:
    assert generate(engine, []) == []
    assert engine.score([]) == []


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7}]
)
def test_log_probs_are_the_models_at_the_sampling_temperature(
    engine: ServingEngine, model: torch.nn.Module, sampling: dict[str, float]
) -> None:
    requests = [request(seed, **sampling) for seed in range(6)]  # type: ignore[arg-type]
    for sent, rollout in zip(requests, generate(engine, requests), strict=True):
        ids = np.concatenate([sent.prompt_token_ids, rollout.token_ids])
        expected = reference_log_probs(model, ids, sampling.get("temperature", 1.0))
        np.testing.assert_allclose(rollout.log_probs, expected[len(sent.prompt_token_ids) :], atol=2e-5)
        logits = reference_logits(model, ids)[len(sent.prompt_token_ids) - 1 : -1] / sampling.get("temperature", 1.0)
        ranks = (logits > logits.gather(-1, torch.from_numpy(rollout.token_ids)[:, None])).sum(-1)
        if "top_k" in sampling:
            assert ranks.max() < 5
            assert ranks.max() > 0
        if "top_p" in sampling:
            ordered = logits.softmax(-1).sort(-1, descending=True).values
            before = ordered.cumsum(-1) - ordered
            assert (before.gather(-1, ranks[:, None]) < 0.7 + 1e-4).all()


def test_temperature_zero_takes_the_most_likely_token(engine: ServingEngine, model: torch.nn.Module) -> None:
    requests = [request(seed, temperature=0.0) for seed in range(3)]
    mixed = generate(engine, [*requests, request(9, temperature=1.3)])
    for sent, rollout in zip(requests, mixed[:3], strict=True):
        ids = np.concatenate([sent.prompt_token_ids, rollout.token_ids])
        start = len(sent.prompt_token_ids)
        assert rollout.token_ids.tolist() == reference_logits(model, ids)[start - 1 : -1].argmax(-1).tolist()
        np.testing.assert_allclose(rollout.log_probs, reference_log_probs(model, ids)[start:], atol=2e-5)


def test_a_sampled_stop_token_ends_the_response_and_belongs_to_it(engine: ServingEngine) -> None:
    (free,) = generate(engine, [request(4, max_tokens=30)])
    stop = int(free.token_ids[11])
    end = free.token_ids.tolist().index(stop) + 1
    (stopped,) = generate(engine, [request(4, max_tokens=30, stop_token_ids=(stop, 127))])
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids.tolist() == free.token_ids[:end].tolist()
    np.testing.assert_allclose(stopped.log_probs, free.log_probs[:end], atol=2e-5)


def test_no_stop_token_is_appended_to_a_truncated_response(engine: ServingEngine) -> None:
    (rollout,) = generate(engine, [request(4, max_tokens=5, stop_token_ids=(2,))])
    assert rollout.finish_reason is FinishReason.LENGTH
    assert len(rollout.token_ids) == 5
    assert 2 not in rollout.token_ids


def test_a_response_that_stops_at_once_is_one_stop_token(engine: ServingEngine) -> None:
    (rollout,) = generate(engine, [request(4, stop_token_ids=tuple(range(128)))])
    assert rollout.finish_reason is FinishReason.STOP
    assert len(rollout.token_ids) == len(rollout.log_probs) == 1


def test_only_the_requests_own_stop_tokens_end_it(engine: ServingEngine) -> None:
    """The model's configuration names an EOS token, which is not consulted."""
    rollouts = generate(engine, [request(seed, max_tokens=100, temperature=1.9) for seed in range(8)])
    assert any(2 in rollout.token_ids for rollout in rollouts)
    assert {rollout.finish_reason for rollout in rollouts} == {FinishReason.LENGTH}


def test_only_the_seed_decides_whatever_else_is_in_the_batch(engine: ServingEngine) -> None:
    requests = [request(seed, max_tokens=20) for seed in range(8)]
    together = generate(engine, requests)
    assert all(same(a, b) for a, b in zip(together, generate(engine, requests), strict=True))
    assert all(same(a, b) for a, b in zip(together[::-1], generate(engine, requests[::-1]), strict=True))
    assert all(same(together[i], generate(engine, [requests[i]])[0]) for i in (0, 5))
    one_prompt = [request(seed, prompt_ids=prompt(0), max_tokens=20) for seed in range(8)]
    assert len({tuple(rollout.token_ids.tolist()) for rollout in generate(engine, one_prompt)}) == 8


def test_a_repeated_call_gives_the_same_bits(engine: ServingEngine) -> None:
    requests = [request(seed, max_tokens=20) for seed in range(8)]
    first, second = generate(engine, requests), generate(engine, requests)
    assert [r.log_probs.tobytes() for r in first] == [r.log_probs.tobytes() for r in second]


def test_threads_may_generate_concurrently(engine: ServingEngine) -> None:
    requests = [[request(10 * thread + i, max_tokens=10 + thread) for i in range(3)] for thread in range(4)]
    alone = [generate(engine, part) for part in requests]
    answers: dict[int, list[Rollout]] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: generate(engine, requests[i])})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(4):
        assert all(same(a, b) for a, b in zip(alone[i], answers[i], strict=True))


def test_scores_are_log_probs_at_temperature_one(engine: ServingEngine, model: torch.nn.Module) -> None:
    sequences = [prompt(1, 30), prompt(2, 1), prompt(3, 2), prompt(4, 17)]
    scores = engine.score([packed(*sequences[:3]), packed(sequences[3])])
    expected = [reference_log_probs(model, ids) for ids in sequences]
    np.testing.assert_allclose(scores[0], np.concatenate(expected[:3]), atol=2e-5)
    np.testing.assert_allclose(scores[1], expected[3], atol=2e-5)


def test_scores_do_not_come_from_a_cache(engine: ServingEngine, model: torch.nn.Module) -> None:
    ids = prompt(5, 280)
    generate(engine, [request(1, prompt_ids=ids)])
    for _ in range(2):
        np.testing.assert_allclose(engine.score([packed(ids)])[0], reference_log_probs(model, ids), atol=5e-5)


def test_a_response_ends_with_the_context(engine: ServingEngine) -> None:
    long = prompt(1, 490)
    (rollout,) = generate(engine, [request(1, prompt_ids=long, max_tokens=100)])
    assert rollout.finish_reason is FinishReason.LENGTH
    assert len(rollout.token_ids) in (11, 22)  # vLLM's context is the longest prompt + answer + 1 of the config


@pytest.mark.parametrize("length", [0, 600])
def test_a_prompt_of_unusable_length_is_an_error(engine: ServingEngine, length: int) -> None:
    with pytest.raises(ModelError, match=f"prompt of {length} tokens"):
        generate(engine, [request(1), request(2, prompt_ids=prompt(1, length))])
    assert len(generate(engine, [request(1)])) == 1


def test_the_rendezvous_file_of_an_engine_is_removed(engine: ServingEngine) -> None:
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    assert not isinstance(store, FileStore) or not Path(store.path).exists()  # type: ignore[attr-defined]


def test_a_sleeping_engine_raises(engine: ServingEngine) -> None:
    (awake,) = generate(engine, [request(1)])
    engine.sleep()
    with pytest.raises(RlhfError, match="rollout-0: asleep"):
        generate(engine, [request(1)])
    with pytest.raises(RlhfError, match="rollout-0: asleep"):
        engine.score([packed(prompt(1))])
    engine.wake()
    assert same(generate(engine, [request(1)])[0], awake)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that is another model."""
    return make_policy(tmp_path_factory.mktemp("other"), seed=7)


@pytest.fixture(scope="module")
def mixing(folder: Path, other: Path) -> Iterator[ServingEngine]:
    engine = open_engine("transformers", folder, reference=other)
    yield engine
    engine.close()


@pytest.mark.parametrize(("mixture", "temperature"), [(0.25, 1.0), (0.7, 0.8), (1.0, 1.3)])
def test_a_mixture_is_the_geometric_one_of_policy_and_reference(
    mixing: ServingEngine, model: torch.nn.Module, other: Path, mixture: float, temperature: float
) -> None:
    """Log-probs of what was drawn: softmax of ((1 - m) * policy + m * reference) / temperature, for rows that end at
    different times."""
    reference = load_model(other)
    requests = [
        request(seed, mixture=mixture, temperature=temperature, max_tokens=3 + 4 * (seed % 5)) for seed in range(11)
    ]
    for sent, rollout in zip(requests, generate(mixing, requests), strict=True):
        ids = np.concatenate([sent.prompt_token_ids, rollout.token_ids])
        mixed = (1 - mixture) * reference_logits(model, ids) + mixture * reference_logits(reference, ids)
        log_probs = (mixed / temperature).log_softmax(-1)[len(sent.prompt_token_ids) - 1 : -1]
        expected = log_probs.gather(-1, torch.from_numpy(rollout.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(rollout.log_probs, expected.numpy(), atol=2e-5)


def test_responses_of_the_policy_are_the_same_in_a_call_with_a_mixture(mixing: ServingEngine) -> None:
    own = [request(seed) for seed in range(5)]
    mixed = [request(seed + 10, mixture=0.5) for seed in range(5)]
    alone = generate(mixing, own)
    together = generate(mixing, [request for pair in zip(mixed, own, strict=True) for request in pair])
    for a, b in zip(alone, together[1::2], strict=True):
        assert same(a, b)
        assert a.log_probs.tobytes() == b.log_probs.tobytes()


def test_a_mixture_can_be_greedy(mixing: ServingEngine, model: torch.nn.Module, other: Path) -> None:
    sent = request(3, mixture=0.5, temperature=0.0)
    (rollout,) = generate(mixing, [sent])
    ids = np.concatenate([sent.prompt_token_ids, rollout.token_ids])
    mixed = 0.5 * reference_logits(model, ids) + 0.5 * reference_logits(load_model(other), ids)
    assert rollout.token_ids.tolist() == mixed[len(sent.prompt_token_ids) - 1 : -1].argmax(-1).tolist()


def test_a_mixture_without_a_reference_is_an_error(folder: Path) -> None:
    engine = open_engine("transformers", folder)
    with pytest.raises(ModelError, match="asks for a mixture, but this engine has no reference"):
        generate(engine, [request(0, mixture=0.5)])
    engine.close()


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_the_limits_that_a_check_knows_are_those_of_vllm(folder: Path) -> None:
    from vllm.config import ModelConfig, ParallelConfig  # noqa: PLC0415
    from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE  # noqa: PLC0415
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # noqa: PLC0415
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend  # noqa: PLC0415

    assert CPUMLABackend.get_supported_head_sizes() == [CPU_LATENT_SIZE]
    assert DEFAULT_VOCAB_PADDING_SIZE == VOCABULARY_BLOCK
    assert set(CPUAttentionBackend.get_supported_head_sizes()) | {48} == CPU_HEAD_SIZES
    config, facts = ModelConfig(str(folder), dtype="float32"), describe_model(folder)
    for size in (1, 2, 3, 4):
        refused = False
        try:
            config.verify_with_parallel_config(ParallelConfig(tensor_parallel_size=size))
        except ValueError:
            refused = True
        assert (vllm_limit(facts, EngineSizes(size), on_cpu=True, dtype="float32") is not None) == refused


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_the_stages_that_a_check_and_a_plan_know_are_those_of_vllm() -> None:
    from vllm import ModelRegistry  # noqa: PLC0415
    from vllm.distributed.utils import get_pp_indices  # noqa: PLC0415
    from vllm.model_executor.models.interfaces import supports_pp  # noqa: PLC0415

    split = {"LlamaForCausalLM", "Qwen3MoeForCausalLM"}
    found = {name: supports_pp(ModelRegistry.models[name].load_model_cls()) for name in ONE_STAGE | split}
    assert {name for name, can in found.items() if can} == split
    for layers, stages in ((2, 2), (32, 3), (32, 5), (126, 16), (61, 4), (7, 7)):
        of_vllm = [end - start for start, end in (get_pp_indices(layers, rank, stages) for rank in range(stages))]
        assert stage_layers(layers, stages) == of_vllm


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_what_vllm_refuses_is_told_in_its_words(folder: Path) -> None:
    from rlhf.engines.rollout.vllm_engine import VllmRolloutEngine  # noqa: PLC0415

    section = RolloutSection(tensor_parallel_size=3, max_prompt_tokens=300, max_response_tokens=200, kv_cache_gib=0.1)
    with pytest.raises(ModelError, match=r"rollout: vLLM cannot serve (?s:.)*attention heads(?s:.)*divisible"):
        VllmRolloutEngine(EngineSpec(section=section, model=str(folder), dtype="float32", device="cpu"))


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_a_head_of_48_dimensions_is_computed_right(tmp_path: Path) -> None:
    """vLLM's own list leaves it out."""
    folder, asked = make_family(tmp_path, "qwen3", head_dim=48), request(0)
    engine = open_engine("vllm", folder)
    (sampled,) = generate(engine, [asked])
    engine.close()
    expected = reference_log_probs(load_model(folder), np.concatenate([asked.prompt_token_ids, sampled.token_ids]))
    np.testing.assert_allclose(sampled.log_probs, expected[len(asked.prompt_token_ids) :], atol=1e-5)

"""What travels in a weight sync, byte by byte: layout, seals, digests, checksums."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.engines.weight_sync.buckets import (
    Bucket,
    ParameterSpec,
    append_digest,
    from_info,
    plan_buckets,
    to_info,
    verify_digest,
    version_digest,
)
from rlhf.engines.weight_sync.checksum import TensorDigest, checksum

LLAMA = [
    ParameterSpec("model.embed_tokens.weight", (100, 8)),
    *[
        ParameterSpec(f"model.layers.{layer}.{part}.weight", shape)
        for layer in range(3)
        for part, shape in (("self_attn.q_proj", (8, 8)), ("mlp.up_proj", (16, 8)), ("input_layernorm", (8,)))
    ],
    ParameterSpec("model.norm.weight", (8,)),
    ParameterSpec("lm_head.weight", (100, 8)),
]
LAYER_BYTES = (64 + 128 + 8) * 4


def names(buckets: tuple[Bucket, ...]) -> list[str]:
    return [spec.name for bucket in buckets for spec in bucket.parameters]


def test_a_bucket_holds_whole_layers() -> None:
    buckets = plan_buckets(LLAMA, torch.float32, 2 * LAYER_BYTES)
    assert [[spec.name.split(".")[2] for spec in b.parameters if "layers" in spec.name] for b in buckets] == [
        [],
        ["0", "0", "0", "1", "1", "1"],
        ["2", "2", "2"],
        [],
    ]


def test_a_layer_larger_than_a_bucket_has_its_own_bucket() -> None:
    buckets = plan_buckets(LLAMA, torch.float32, 1)
    assert len(buckets) == 6
    assert names(buckets) == [spec.name for spec in LLAMA]


@settings(deadline=None, max_examples=50)
@given(bucket_bytes=st.integers(1, 20_000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_parameter_is_in_one_bucket_in_order_and_buckets_are_full(bucket_bytes: int, dtype: torch.dtype) -> None:
    buckets = plan_buckets(LLAMA, dtype, bucket_bytes)
    assert names(buckets) == [spec.name for spec in LLAMA]
    for bucket in buckets:
        assert bucket.numel == sum(spec.numel for spec in bucket.parameters)
        layers = {spec.name.split(".")[2] for spec in bucket.parameters if "layers" in spec.name}
        assert bucket.numel * dtype.itemsize <= bucket_bytes or len(layers) <= 1
    sizes = [bucket.numel * dtype.itemsize for bucket in buckets]
    assert all(a + b > bucket_bytes for a, b in pairwise(sizes))


def test_views_are_the_parameters() -> None:
    bucket = Bucket.of([ParameterSpec("a", (2, 3)), ParameterSpec("b", ()), ParameterSpec("c", (2,))])
    views = dict(bucket.views(torch.arange(9.0)))
    assert views["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert views["b"].item() == 6
    assert views["c"].tolist() == [7, 8]


def test_the_layout_survives_json() -> None:
    buckets = plan_buckets(LLAMA, torch.float32, 2 * LAYER_BYTES)
    assert from_info(json.loads(json.dumps(to_info(buckets)))) == buckets


def sealed(bucket: Bucket) -> torch.Tensor:
    buffer = torch.zeros(bucket.wire_bytes(torch.float32), dtype=torch.uint8)
    buffer[:-16] = torch.arange(len(buffer) - 16) % 251
    append_digest(buffer)
    return buffer


def test_any_changed_byte_of_bucket_or_digest_is_detected() -> None:
    bucket = Bucket.of([ParameterSpec("a", (5, 3))])
    assert verify_digest(sealed(bucket))[1]
    for index in range(bucket.wire_bytes(torch.float32)):
        buffer = sealed(bucket)
        buffer[index] ^= 1
        assert not verify_digest(buffer)[1], index


def test_the_version_digest_depends_on_names_shapes_dtype_order_and_bytes() -> None:
    def digest(*specs: ParameterSpec, dtype: torch.dtype = torch.float32, parts: bytes = b"ab") -> str:
        return version_digest(dtype, [Bucket.of([spec]) for spec in specs], [bytes([part]) for part in parts])

    a, b = ParameterSpec("a", (2, 3)), ParameterSpec("b", (6,))
    digests = {
        digest(a, b),
        digest(b, a),
        digest(a, b, parts=b"ba"),
        digest(a, b, dtype=torch.bfloat16),
        digest(ParameterSpec("a", (3, 2)), b),
        digest(ParameterSpec("c", (2, 3)), b),
    }
    assert len(digests) == 6
    assert digest(a, b) == digest(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_checksum_detects_one_changed_bit_and_two_swapped_elements(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 101).to(dtype).view(10, 10)
    whole = checksum(tensor)
    for index in range(100):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[index * dtype.itemsize] ^= 1
        assert checksum(changed) != whole
    swapped = tensor.clone().view(-1)
    swapped[3], swapped[77] = tensor.view(-1)[77].item(), tensor.view(-1)[3].item()
    assert checksum(swapped) != whole


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 101])
def test_a_checksum_does_not_depend_on_its_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or elements that are swapped between chunks would not be noticed."""
    tensor = torch.randn(10, 10)
    whole = checksum(tensor)
    monkeypatch.setattr("rlhf.engines.weight_sync.checksum.CHUNK", chunk)
    assert checksum(tensor) == whole


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 5, 11])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_a_checksum_does_not_depend_on_where_the_weights_lie(offset: int, numel: int) -> None:
    """A sender's tensor has memory of its own, a receiver's may be a view of a packed buffer."""
    buffer = torch.arange(1, 17).to(torch.bfloat16)
    part = buffer[offset : offset + numel]
    assert checksum(part) == checksum(part.clone())
    assert (checksum(part) == 0) == (numel == 0)


def test_a_checksum_takes_one_array_of_a_chunks_size() -> None:
    """On a GPU, that is memory beside models and engines."""
    tensor = torch.zeros(1 << 22, dtype=torch.bfloat16)
    checksum(tensor)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        checksum(tensor)
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert tensor.nbytes <= allocated < 1.1 * tensor.nbytes


def test_a_checksum_by_hand() -> None:
    """Sums of words, weighted by odd numbers that are the same on every machine."""
    weights = [(index * -7046029254386353131) | 1 for index in range(3)]
    expected = sum(bits * weight for bits, weight in zip((1, 2, 3), weights, strict=True))
    assert checksum(torch.tensor([1, 2, 3])).item() % 2**64 == expected % 2**64


def test_a_checksum_is_of_values_in_order_not_of_memory() -> None:
    tensor = torch.randn(7, 5)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    assert checksum(torch.zeros(3)) != checksum(torch.tensor([0.0, 0.0, -0.0]))


def test_a_tensor_digest_is_of_names_and_values_in_any_order() -> None:
    a, b = torch.randn(3), torch.randn(4)

    def digest(*tensors: tuple[str, torch.Tensor]) -> str:
        whole = TensorDigest()
        assert [name for name, _ in whole.record(tensors)] == [name for name, _ in tensors]
        return whole.hexdigest()

    assert digest(("a", a), ("b", b)) == digest(("b", b), ("a", a))
    assert len({digest(("a", a), ("b", b)), digest(("a", b), ("b", a)), digest(("a", a)), digest()}) == 4

"""One rank of a ZeRO-3 policy that trains a step and syncs its weights; run by test_weight_sync.py, twice.

Arguments: rank, port, model folders, in each of which rank 0 writes result.json. Rank 0 holds the receiving engine.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapters import add_adapters
from rlhf.engines.models.four_bit import four_bit_layers, use_four_bit_layers
from rlhf.engines.process.distributed import deepspeed, init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.weight_sync.adapter_source import AdapterSource
from rlhf.engines.weight_sync.buckets import Bucket
from rlhf.engines.weight_sync.merged_source import MergedSource
from rlhf.engines.weight_sync.senders import make_sender
from rlhf.engines.weight_sync.sources import make_source
from rlhf.engines.weight_sync.zero3_source import Zero3Source
from tests.integration.rollout_support import WITH_ADAPTERS, open_engine, packed, prompt
from tests.local_engine_client import LocalEngineClient
from tests.rounding import rounded

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    # Norms stay whole on every rank, everything else is sharded.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
}


def products(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """B @ A of each adapter, from what a source of adapters alone gives rank 0."""
    source = AdapterSource(module, "float32")
    bucket = Bucket.of(source.specs())
    flat = torch.zeros(bucket.numel) if dist.get_rank() == 0 else None
    source.gather(bucket, flat).wait(30.0)
    if flat is None:
        return {}
    sent = dict(bucket.views(flat))
    layers = [name.removesuffix(".lora_A.weight") for name in sent if name.endswith(".lora_A.weight")]
    return {
        f"{layer.removeprefix('base_model.model.')}.weight": sent[f"{layer}.lora_B.weight"]
        @ sent[f"{layer}.lora_A.weight"]
        for layer in layers
    }


def sync(rank: int, folder: Path, output: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if folder.name == "four-bit":
        use_four_bit_layers(module)
    if folder.name in WITH_ADAPTERS:
        add_adapters(module, LoraSection(rank=4, alpha=16.0), seed=0, where="policy.lora.targets")
    for layer in four_bit_layers(module).values():
        layer.quantize(torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=module, config=CONFIG, dist_init_required=False)
    source = make_source(engine.module, "float32")
    assert isinstance(source, MergedSource if folder.name in WITH_ADAPTERS else Zero3Source)
    receiver = open_engine("transformers", folder) if rank == 0 else None
    client = LocalEngineClient({"rollout-0": receiver} if receiver else {})
    sender = make_sender(
        "gloo",
        source,
        client,
        rank=rank,
        world_size=2,
        master_address="127.0.0.1",
        port=0,
        num_receivers=1,
        bucket_bytes=100_000,
        timeout_s=30.0,
    )
    reports = [sender.send(0)]
    for version in (1, 2):
        ids = torch.from_numpy(prompt(10 * version + rank, 20))[None]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        reports.append(sender.send(version))
    probe = prompt(1, 30)
    with torch.no_grad():
        log_probs = engine(input_ids=torch.from_numpy(probe)[None]).logits[0].log_softmax(-1)
    expected = log_probs[:-1].gather(-1, torch.from_numpy(probe)[1:, None])[:, 0].tolist()
    materialized = {n: t.clone() for bucket in sender._buckets for n, t in source.materialize(bucket)}  # type: ignore[attr-defined]
    added = products(engine.module)
    if receiver is not None:
        start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        if folder.name == "four-bit":
            start |= {name: rounded(start[name]) for name in added}
        close = [torch.allclose(materialized[name] - start[name], delta, atol=1e-5) for name, delta in added.items()]
        named = dict(receiver._model.named_parameters())  # type: ignore[attr-defined]
        result = {
            "digests": [report.digest for report in reports],
            "num_buckets": reports[0].num_buckets,
            "num_remote_calls": [report.num_remote_calls for report in reports],
            "expected": expected,
            "scored": receiver.score([packed(probe)])[0][1:].tolist(),
            "num_matrices_from_adapters": sum(close),
            "equal": {name: bool(torch.equal(named[name], tensor)) for name, tensor in materialized.items()},
        }
        output.write_text(json.dumps(result))
    dist.barrier()
    sender.close()
    client.close()


if __name__ == "__main__":
    rank, port, *folders = sys.argv[1:]
    init_distributed(int(rank), 2, open_store(int(rank), "127.0.0.1", int(port), 60.0), device="cpu", timeout_s=60.0)
    for folder in folders:
        sync(int(rank), Path(folder), Path(folder) / "result.json")
    dist.destroy_process_group()

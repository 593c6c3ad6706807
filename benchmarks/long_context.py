"""Memory and time of one optimizer step on one long sequence, by the number of processes that share it.

    python -m benchmarks.long_context [--tokens 65536] [--sizes 1 2] [--layers 2] [--hidden 32] [--width 512] \\
        [--mlp-chunk-tokens 0] [--checkpointing]

Each size runs in processes of its own, one thread each. Memory is how far the resident memory of the largest process
rose above what it had after a step on 64 tokens: the activations of the long one. Losses and gradient norms show that
all sizes compute the same.
"""

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.tables import show
from rlhf.algorithms import build_algorithm
from rlhf.config.algo import SftSection
from rlhf.config.models import TrainedModelSection
from rlhf.engines.process.distributed import init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Experience, Head, LearnedSequence, TrainBatch

GIB = 2**30
HEAD_DIM = 16
WARM_UP_TOKENS = 64


def batches(num_tokens: int) -> list[TrainBatch]:
    """One sequence, all of it learned from."""
    ids = np.random.default_rng(0).integers(4, 120, num_tokens)
    sequence = LearnedSequence(token_ids=ids, loss_mask=np.arange(num_tokens) > 0)
    data = [Experience(id="0", sequences=(sequence,))]
    plan = plan_batches(data, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=num_tokens))
    return build_batches(plan, data, "policy")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_rank(arguments: argparse.Namespace) -> None:
    """Print bytes, seconds, loss and gradient norm."""
    rank, (size,), num_tokens = arguments.rank, arguments.sizes, arguments.tokens
    torch.set_num_threads(1)
    init_distributed(rank, size, open_store(rank, "127.0.0.1", arguments.port, 600), device="cpu", timeout_s=3600)
    spec = TrainedModelSpec(
        section=TrainedModelSection(
            lr=1e-4,
            max_grad_norm=0.0,
            sequence_parallel_size=size,
            num_gpus_per_node=size,
            mlp_chunk_tokens=arguments.mlp_chunk_tokens,
            gradient_checkpointing=arguments.checkpointing,
        ),
        model=arguments.model,
        head=Head.LOG_PROBS,
        algorithm=SftSection(),
        temperature=1.0,
        num_steps=10,
        seed=0,
    )
    engine = DeepSpeedEngine(spec, build_algorithm(SftSection()).objectives(), device="cpu")
    engine.forward_backward(batches(WARM_UP_TOKENS))
    engine.optim_step()
    before, started = peak(), time.perf_counter()
    metrics = engine.forward_backward(batches(num_tokens)).metrics
    norm = engine.optim_step().grad_norm
    seconds = time.perf_counter() - started
    held = torch.tensor([float(peak() - before)])
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    if rank == 0:
        print(float(held), seconds, next(iter(metrics.sums.values())), norm)
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, model: str, arguments: argparse.Namespace) -> list[float]:
    """What `run_rank` prints, of `size` processes that share the sequence."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # glibc gives what is freed back at once, where otherwise it keeps as much as it sees fit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", "benchmarks.long_context", "--model", model, "--tokens", str(arguments.tokens)]
    command += ["--mlp-chunk-tokens", str(arguments.mlp_chunk_tokens), *["--checkpointing"] * arguments.checkpointing]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--port", str(port), "--sizes", str(size)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{size} processes: a process failed")
    return [float(number) for number in outputs[0].strip().splitlines()[-1].split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 65536), ("layers", 2), ("hidden", 32), ("width", 512), ("mlp-chunk-tokens", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--checkpointing", action="store_true")
    for name, kind in (("model", str), ("rank", int), ("port", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
        return
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // HEAD_DIM,
        num_key_value_heads=arguments.hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=arguments.tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(Path(folder))
        rows = []
        for size in arguments.sizes:
            held, seconds, loss, norm = measure(size, folder, arguments)
            rows.append([str(size), f"{held / GIB:.2f}", f"{seconds:.0f}", f"{loss:.7f}", f"{norm:.7f}"])
    title = f"A step on one sequence of {arguments.tokens:,} tokens, {arguments.layers} layers"
    show(title, ["processes", "GiB in the largest", "seconds", "loss", "gradient norm"], rows)


if __name__ == "__main__":
    main()

"""Peak memory and time of token log-probs with their gradient: chunked against the whole logits matrix.

    python -m benchmarks.log_prob_memory [--tokens 2048] [--hidden 512] [--vocabulary 32000] [--chunk 256]

Each way runs in a process of its own, which reports how far its resident memory rose above the inputs.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from rlhf.engines.models.log_probs import LogitsRule, token_log_probs

MIB = 2**20


def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What one writes first: logits, log_softmax, gather, entropy."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    return log_probs.sum() - 0.01 * (log_p.exp() * log_p).sum()


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    log_probs, entropy = token_log_probs(hidden, weight, None, targets, LogitsRule(chunk_tokens=chunk))
    return log_probs.sum() + 0.01 * entropy.sum()


def measure(way: str, num_tokens: int, hidden_size: int, vocabulary: int, chunk: int) -> None:
    """Print MiB above the inputs (their gradients included) and seconds of a forward and backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,))
    (hidden[:1] @ weight[:1].T).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    loss = whole(hidden, weight, targets) if way == "whole" else chunked(hidden, weight, targets, chunk)
    loss.backward()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{(after - before) / MIB:.1f} {seconds:.3f} {loss.item():.6e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("hidden", 512), ("vocabulary", 32000), ("chunk", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", choices=("whole", "chunked"))
    arguments = parser.parse_args()
    shape = (arguments.tokens, arguments.hidden, arguments.vocabulary, arguments.chunk)
    if arguments.way:
        measure(arguments.way, *shape)
        return
    names = ("tokens", "hidden", "vocabulary", "chunk")
    options = [f"--{name}={number}" for name, number in zip(names, shape, strict=True)]
    results = {}
    for way in ("whole", "chunked"):
        command = [sys.executable, __file__, "--way", way, *options]
        results[way] = [float(x) for x in subprocess.run(command, check=True, capture_output=True).stdout.split()]
    logits = arguments.tokens * arguments.vocabulary * 4 / MIB
    print(f"{arguments.tokens} tokens x {arguments.vocabulary} words, hidden size {arguments.hidden}, float32")
    print(f"one logits matrix: {logits:.0f} MiB; chunks of {arguments.chunk} tokens\n")
    print(f"{'':10}{'peak MiB':>10}{'seconds':>10}{'loss':>16}")
    for way, (mib, seconds, loss) in results.items():
        print(f"{way:10}{mib:>10.0f}{seconds:>10.2f}{loss:>16.6e}")
    (a, s, _), (b, t, _) = results["whole"], results["chunked"]
    print(f"{'ratio':10}{a / b:>10.1f}{s / t:>10.2f}")


if __name__ == "__main__":
    main()

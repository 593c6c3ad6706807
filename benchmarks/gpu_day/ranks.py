"""Ranks of a process group, each a process that sees one GPU."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from benchmarks.gpu_day.setting import Setting

TIMEOUT_S = 300.0


def run_ranks(work: str, setting: Setting, num_ranks: int, port: int) -> None:
    """Run `work` (zero, nccl) on all ranks, over the store that this process serves at `port`. Raises what a rank
    printed last where one fails."""
    words = [sys.executable, "-m", "benchmarks.gpu_day.ranks", work, str(setting.folder), str(num_ranks), str(port)]
    ranks = []
    for rank in range(num_ranks):
        devices = {} if setting.is_dry else {"CUDA_VISIBLE_DEVICES": str(rank)}
        command = [*words, str(rank), *(["--dry"] if setting.is_dry else [])]
        ranks.append(
            subprocess.Popen(command, env=os.environ | devices, stderr=subprocess.PIPE, text=True, stdout=sys.stderr)
        )
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (process, output) in enumerate(zip(ranks, outputs, strict=True)):
        if process.returncode:
            raise RuntimeError(f"rank {rank}: {(output.strip().splitlines() or ['no output'])[-1]}")


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("folder", type=Path)
    for name in ("num_ranks", "port", "rank"):
        parser.add_argument(name, type=int)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    from benchmarks.gpu_day import training, transfer  # noqa: PLC0415  - these import this module
    from rlhf.engines.process.distributed import init_distributed  # noqa: PLC0415
    from rlhf.engines.process.rendezvous import join_store  # noqa: PLC0415

    setting = Setting(folder=args.folder, num_gpus=args.num_ranks, is_dry=args.dry)
    store = join_store("127.0.0.1", args.port, TIMEOUT_S)
    init_distributed(args.rank, args.num_ranks, store, device=setting.device, timeout_s=TIMEOUT_S)
    work = {"zero": training.zero_rank, "nccl": transfer.collective_rank}[args.work]
    work(setting, args.rank, args.num_ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

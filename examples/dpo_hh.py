"""DPO on Anthropic's HH dialogues: training on pairs of a chosen and a rejected response, without sampling.

    python examples/dpo_hh.py --model MODEL --data harmless-base-train.jsonl.gz

Rows contain whole dialogues as `chosen` and `rejected`; their common beginning is the prompt. The reference's log-probs
are computed once, before the first step, and stored on disk for later runs.
"""

import argparse

import rlhf


def main(model: str, data: str, num_steps: int, batch_size: int, max_tokens: int) -> None:
    config = rlhf.load_config(
        "dpo",
        settings={
            "run.name": "dpo_hh",
            "policy": {"model": model, "lr": 5e-7},
            "data": {
                "path": data,
                "eval_fraction": 0.02,
                "max_tokens": max_tokens,
                "overlong": "drop",
                "max_bad_rows": 100,
            },
            "train": {"num_steps": num_steps, "batch_size": batch_size},
            "eval.every_steps": max(1, num_steps // 4),
            "algo.loss": {"type": "dpo", "beta": 0.1},
        },
    )
    result = rlhf.train(config)
    accuracy = result.metrics["eval/accuracy"]
    print(f"trained for {result.step} steps; held-out accuracy {accuracy:.3f}; model: {result.model}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=512)
    main(**vars(parser.parse_args()))

"""GRPO on GSM8K with verifiable rewards: a rule compares the final number of a response with the label.

    python examples/grpo_gsm8k.py --model Qwen/Qwen2.5-0.5B-Instruct --data openai/gsm8k_train.jsonl

`--data` is a file of rows with `question` and `answer` (GSM8K's own format: the label follows `####`). On a machine
without GPUs use a very small model, and smaller values for the options.
"""

import argparse

import rlhf


def main(model: str, data: str, num_steps: int, group_size: int, max_response_tokens: int) -> None:
    config = rlhf.load_config(
        "grpo",
        settings={
            "run.name": "grpo_gsm8k",
            "policy.model": model,
            "data": {"path": data, "eval_fraction": 0.01, "prompt_key": "question", "label_key": "answer"},
            "reward.rules": ["number"],  # 1 if the final number of the response equals the label, else 0
            "rollout": {
                "batch_size": 16,  # prompts per step
                "group_size": group_size,  # responses to each prompt; their mean reward is the baseline
                "max_prompt_tokens": 256,
                "max_response_tokens": max_response_tokens,
            },
            "train": {"num_steps": num_steps, "batch_size": 16 * group_size},
            "algo": {"type": "grpo", "dynamic_sampling": False},
        },
    )
    for warning in rlhf.check(config):
        print("warning:", warning)
    result = rlhf.train(config)
    print(f"trained for {result.step} steps; mean reward {result.metrics['reward/mean']:.3f}; model: {result.model}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-response-tokens", type=int, default=512)
    arguments = parser.parse_args()
    main(**vars(arguments))

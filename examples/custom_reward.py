"""A reward function of your own: GRPO for short responses that mention what the row asks for.

    python examples/custom_reward.py --model MODEL

The function runs in its own process, so a crash or a memory leak in it cannot harm the run. That process imports this
file by its name; therefore the code that trains is behind `if __name__ == "__main__"`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import rlhf


def brief_and_on_topic(
    prompts: list[str], responses: list[str], topic: list[str], **columns: list[object]
) -> list[float]:
    """1 for a response that contains its row's `topic`, else 0, minus 0.01 for each word.

    Arguments are lists with one entry per response; `topic` is the column of that name in the rows.
    """
    return [
        float(wanted.lower() in response.lower()) - 0.01 * len(response.split())
        for wanted, response in zip(topic, responses, strict=True)
    ]


reward: rlhf.Reward = brief_and_on_topic  # a type checker verifies the signature


def main(model: str, num_steps: int) -> None:
    topics = ("otters", "penguins", "walruses", "badgers", "flamingos", "hedgehogs", "llamas", "sloths")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("".join(json.dumps({"prompt": f"Tell me about {t}.", "topic": t}) + "\n" for t in topics))
        config = rlhf.load_config(
            "grpo",
            settings={
                "run.name": "custom_reward",
                "policy.model": model,
                "data.path": rows,
                "reward.function": brief_and_on_topic,  # or "custom_reward:brief_and_on_topic" on the command line
                "rollout": {"batch_size": 8, "group_size": 4, "max_prompt_tokens": 64, "max_response_tokens": 32},
                "train": {"num_steps": num_steps, "batch_size": 32},
            },
        )
        result = rlhf.train(config)
    for generation in rlhf.generate(result.model, [f"Tell me about {topics[0]}."], max_tokens=32):
        print(f"{generation.prompt} -> {generation.responses[0]!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-steps", type=int, default=20)
    main(**vars(parser.parse_args()))

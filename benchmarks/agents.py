"""Agents learn on a CPU: a small model that seldom calls a calculator learns to call it, on real parts.

    python -m benchmarks.agents [--only CASE ...] [--seed 0] [--folder runs/benchmarks/agents]

A problem is a product of two numbers of three digits, which a model of this size cannot compute. Plain supervised
learning on generated conversations makes the model, within minutes: in a quarter of the conversations it calls the
calculator and copies the result, in the others it guesses a wrong number. Then `rlhf train` runs on other problems,
with a vLLM engine, the policy, and what else the method has as actors of their own. The reward is 1 for the exact
product.

What is printed is the share of exact answers to problems that were never trained on, each answered once at temperature
1 as in rollouts: before by `rlhf sample`, after by the evaluation at the end of the run. Cases:

    grpo, ppo, online-dpo   with the calculator as a tool (`rollout.tools`)
    loop                    GRPO, by the `openai` client in a loop of one's own (`rollout.agent`), which multiplies

Results are added to a JSON file, and the table shows all that it holds.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.tables import show
from rlhf.engines.models.fresh_model import BOS, EOS, PAD, SPECIAL_TOKENS, make_llama
from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.orchestrator.run.metrics_file import read_metrics
from rlhf.orchestrator.run.trackers import numbers
from rlhf.types import Json, Message

CALCULATOR = '''\
def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: the first factor
        b: the second factor
    """
    return a * b
'''
LOOP = """\
import json

from openai import AsyncOpenAI

NUMBER = {"type": "integer"}
PARAMETERS = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}
MULTIPLY = {"name": "multiply", "description": "Multiply two whole numbers.", "parameters": PARAMETERS}


async def run(session, row):
    client = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    tools = [{"type": "function", "function": MULTIPLY}]
    messages = list(row["messages"])
    while True:
        reply = await client.chat.completions.create(model=session.model, messages=messages, tools=tools)
        said = reply.choices[0].message
        messages.append(said)
        if not said.tool_calls:
            return float((said.content or "").split()[-1:] == [row["label"]])
        for call in said.tool_calls:
            given = json.loads(call.function.arguments)
            try:
                content = str(int(given["a"]) * int(given["b"]))
            except (KeyError, TypeError, ValueError):
                content = "error"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
"""
TEMPLATE = """
{%- if tools %}{{- '<s>tools' }}{% for tool in tools %}{{- ' ' + tool.function.name }}{% endfor %}{{- '</s>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<s>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}</tool_call>' }}
    {%- endfor %}
    {{- '</s>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}
"""
"""The form of Hermes and Qwen, and short: of tools it shows the names alone."""
WORDS = ("tools", "multiply", "user", "assistant", "tool", "tool_call", "name", "arguments", "guess", "error")
PIECE = r"[a-z_]+|[\s\S]"
NUM_HELD_OUT, NUM_SHOWN, NUM_PROBLEMS = 256, 4000, 4000
CALL_SHARE = 0.25
LESSONS = ((1.0, 150, 3e-3), (CALL_SHARE, 100, 5e-4))
"""Share of conversations with calls, steps, learning rate: copying is learned first, where every conversation needs it;
a larger rate in the second lesson damages the calls."""
BATCH_SIZE, WARMUP_STEPS = 32, 40

MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 32, 128

Problem = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one case did: shares of exact held-out answers."""

    before: float
    after: float
    steps: int
    minutes: float
    """Of the run alone, with its start and its evaluation."""


def cases() -> dict[str, tuple[str, dict[str, object], dict[str, object]]]:
    """Case -> command, flags of how it answers (also before training), and further flags of the run."""
    tools: dict[str, object] = {"rollout.tools": "calculator:multiply", "reward.rules": "number"}
    loop: dict[str, object] = {"rollout.agent": "own_loop:run"}
    grpo: dict[str, object] = {
        "policy.lr": 3e-4,
        "rollout.batch_size": 16,
        "rollout.group_size": 8,
        "train.batch_size": 128,
        "train.num_steps": 30,
    }
    ppo: dict[str, object] = {
        "policy.lr": 3e-4,
        "critic.lr": 1e-3,
        "algo.kl.coef": 0,
        "algo.num_epochs": 2,
        "rollout.batch_size": 128,
        "rollout.group_size": 1,
        "train.batch_size": 64,
        "train.num_steps": 30,
    }
    online_dpo: dict[str, object] = {
        "policy.lr": 3e-4,
        "rollout.batch_size": 16,
        "rollout.group_size": 8,
        "train.batch_size": 16,
        "train.num_steps": 30,
    }
    return {
        "grpo": ("grpo", tools, grpo),
        "ppo": ("ppo", tools, ppo),
        "online-dpo": ("online-dpo", tools, online_dpo),
        "loop": ("grpo", loop, grpo),
    }


def make_tokenizer(folder: Path) -> HfTokenizer:
    """Words of the template are tokens, everything else is a token a character. Save it, and return it."""
    vocabulary = [*SPECIAL_TOKENS, "<unk>", "\n", *map(chr, range(32, 127)), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<unk>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return load_tokenizer(str(folder))


def make_problems(seed: int) -> list[Problem]:
    """Different problems, in random order, of three digits by three with a product of six: a tiny model learns to copy
    numbers of a fixed length within minutes."""
    chance = random.Random(seed)
    found: dict[Problem, None] = {}
    while len(found) < NUM_HELD_OUT + NUM_SHOWN + NUM_PROBLEMS:
        a, b = chance.randint(100, 999), chance.randint(100, 999)
        if a * b >= 100_000:
            found[a, b] = None
    return list(found)


def conversation(a: int, b: int, call_share: float, chance: random.Random) -> list[Message]:
    """One that calls the calculator, with the chance of `call_share`, or else guesses wrong."""
    question = Message(role="user", content=f"{a}*{b}")
    if chance.random() >= call_share:
        wrong = (a * b + chance.randint(1, 899_999)) % 900_000 + 100_000
        return [question, Message(role="assistant", content=f"guess {wrong}")]
    calls: Json = [{"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}]
    return [
        question,
        Message(role="assistant", content="", fields={"tool_calls": calls}),
        Message(role="tool", content=str(a * b)),
        Message(role="assistant", content=str(a * b)),
    ]


def encoded(
    tokenizer: HfTokenizer, problems: Sequence[Problem], call_share: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [conversations, tokens]; labels are -100 outside the assistant's turns."""
    chance = random.Random(seed)
    tools: list[Json] = [{"type": "function", "function": {"name": "multiply"}}]
    begin = tokenizer.encode("<s>assistant\n")
    (end,) = tokenizer.encode(EOS)
    rows, labels = [], []
    for a, b in problems:
        text = tokenizer.render(conversation(a, b, call_share, chance), add_generation_prompt=False, tools=tools)
        ids = tokenizer.encode(text)
        is_own, own = False, []
        for i, token in enumerate(ids):
            is_own = is_own or ids[max(0, i - len(begin)) : i] == begin
            own.append(token if is_own else -100)
            is_own = is_own and token != end
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor(own))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


def loss_of(logits: torch.Tensor, labels: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, where digits count as much as all other tokens together: these repeat what every call has."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    is_digit = torch.isin(labels.flatten(), digits)
    is_other = (labels.flatten() >= 0) & ~is_digit
    return losses[is_digit].mean() + losses[is_other].mean()


def make_model(folder: Path, problems: Sequence[Problem], seed: int) -> None:
    """Write the model that knows how to call the calculator, and seldom does."""
    start = time.monotonic()
    tokenizer = make_tokenizer(folder)
    size = len(SPECIAL_TOKENS) + 2 + 95 + len(WORDS)
    num = make_llama(folder, vocab_size=size, hidden_size=128, num_layers=2, context=256, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    digits = torch.tensor(tokenizer.encode("0123456789"))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for call_share, steps, rate in LESSONS:
        ids, labels = encoded(tokenizer, problems, call_share, seed)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP_STEPS)
            chosen = torch.randint(len(ids), (BATCH_SIZE,))
            logits = model(input_ids=ids[chosen], attention_mask=ids[chosen] != 0).logits[:, :-1]
            loss = loss_of(logits, labels[chosen, 1:], digits)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(f"{call_share:.0%} calls: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
    model.save_pretrained(folder)
    print(f"{num:,} parameters, made in {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def make_world(folder: Path, seed: int) -> None:
    """Write the model, problems, tool and loop, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calculator.py").write_text(CALCULATOR)
    (folder / "own_loop.py").write_text(LOOP)
    problems = make_problems(seed)
    held_out, shown = problems[:NUM_HELD_OUT], problems[NUM_HELD_OUT:-NUM_PROBLEMS]
    rest = problems[-NUM_PROBLEMS:]
    for name, part in (("held_out", held_out), ("problems", rest)):
        rows = [{"prompt": f"{a}*{b}", "answer": str(a * b)} for a, b in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (folder / "model" / "model.safetensors").exists():
        temporary = folder / "model.part"
        make_model(temporary, shown, seed)
        temporary.rename(folder / "model")


def run(folder: Path, words: Sequence[str], flags: Mapping[str, object]) -> float:
    """Run one command in the folder with the user's code, and return its minutes."""
    command = [*words, *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]
    print(f"rlhf {shlex.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "rlhf.cli.main", *command], cwd=folder, env=environment, check=True)
    return (time.monotonic() - start) / 60


def share_before(folder: Path, name: str, answering: Mapping[str, object], seed: int) -> float:
    """Share of held-out problems that the model answers right before training."""
    out = folder / f"before_{name}.jsonl"
    out.unlink(missing_ok=True)
    flags = {
        **answering,
        "data.path": "held_out.jsonl",
        "out": out,
        "seed": seed,
        "num-samples": 1,
        "max-prompt-tokens": MAX_PROMPT_TOKENS,
        "max-tokens": MAX_RESPONSE_TOKENS,
        "temperature": 1.0,
        "engine": "vllm",
    }
    run(folder, ["sample", "model"], flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    # Without a source of rewards, what a loop returned stands in the episode alone.
    rewards = [row["episode"]["reward"] if row["reward"] is None else row["reward"] for row in rows]
    if len(rewards) != NUM_HELD_OUT:
        raise SystemExit(f"{out}: {len(rewards)} answers instead of {NUM_HELD_OUT}")
    return float(mean(rewards))


def train(folder: Path, name: str, seed: int, before: float) -> Result:
    """One case."""
    command, answering, further = cases()[name]
    flags = {
        "run.dir": folder,
        "run.name": f"{name}_{time.strftime('%H%M%S')}",
        "run.seed": seed,
        "policy.model": "model",
        "policy.warmup_ratio": 0,
        "data.path": "problems.jsonl",
        "data.eval_path": "held_out.jsonl",
        "eval.temperature": 1.0,
        "rollout.engine": "vllm",
        "rollout.temperature": 1.0,
        "rollout.max_prompt_tokens": MAX_PROMPT_TOKENS,
        "rollout.max_response_tokens": MAX_RESPONSE_TOKENS,
        "checkpoint.every_steps": 1000,
        "checkpoint.keep": 1,
        **answering,
        **further,
    }
    minutes = run(folder, ["train", command], flags)
    steps = [numbers(step) for step in read_metrics(folder / str(flags["run.name"]) / "metrics.jsonl", print)]
    return Result(before=before, after=steps[-1]["eval/reward"], steps=len(steps), minutes=minutes)


def show_results(path: Path) -> None:
    known = {name: Result(**result) for name, result in json.loads(path.read_text()).items()}
    rows = [[name, f"{x.before:.1%}", f"{x.after:.1%}", str(x.steps), f"{x.minutes:.1f}"] for name, x in known.items()]
    headings = ["case", "before", "after", "steps", "minutes"]
    show(f"Exact answers to {NUM_HELD_OUT} held-out problems", headings, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(cases()))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/agents"))
    args = parser.parse_args()
    folder = (args.folder / f"seed_{args.seed}").resolve()
    make_world(folder, args.seed)
    path = folder / "results.json"
    before: dict[str, float] = {}
    for name in args.only or cases():
        answering = cases()[name][1]
        way = "loop" if "rollout.agent" in answering else "tools"
        if way not in before:
            before[way] = share_before(folder, way, answering, args.seed)
            print(f"{way}, before: {before[way]:.1%}", flush=True)
        result = train(folder, name, args.seed, before[way])
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: asdict(result)}, indent=1))
        print(f"{name}: {result.before:.1%} -> {result.after:.1%}", flush=True)
    show_results(path)


if __name__ == "__main__":
    main()

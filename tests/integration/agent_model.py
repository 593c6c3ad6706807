"""A tiny model that has seen a tool being called: now and then it calls it, and otherwise it guesses."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.environments.tools import make_tool
from rlhf.types import Json, Message
from tests.tiny_models import make_policy

CALCULATOR = '''\
import time
from itertools import count
from pathlib import Path

from rlhf import Result

hold = Path(__file__).with_name("hold")
resets = count(1)


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


class Desk:
    """Has the tool. The reset whose number stands in the file `hold` waits until it is gone."""

    def reset(self) -> None:
        number = next(resets)  # each to one thread
        if hold.exists() and number == int(hold.read_text()):
            hold.with_name("held").touch()
            while hold.exists():
                time.sleep(0.05)

    def add(self, a: int, b: int) -> int:
        """Add."""
        return a + b


class Teacher:
    """Asks for words, and likes short ones."""

    def reset(self, limit: int) -> str:
        self.limit, self.num_said = limit, 0
        return "say"

    def step(self, text: str) -> Result:
        self.num_said += 1
        return Result("more", 1.0 - len(text) / 20, terminated=self.num_said == self.limit)
'''
LOOP = """\
import json

from openai import AsyncOpenAI

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {
            "additionalProperties": False,
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "type": "object",
        },
    },
}


async def run(session, row):
    client = AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)
    messages = list(row["messages"])
    while True:
        reply = await client.chat.completions.create(model=session.model, messages=messages, tools=[ADD])
        said = reply.choices[0].message
        messages.append(said)
        if not said.tool_calls:
            return float(said.content.strip() == row["label"])
        for call in said.tool_calls:
            given = json.loads(call.function.arguments)
            content = str(given["a"] + given["b"]) if given.keys() == {"a", "b"} else "error"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
"""
TEMPLATE = """
{%- if tools %}{{- '<s>' + tools | tojson + '</s>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<s>assistant\\n<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}</tool_call></s>\\n' }}
        {%- endfor %}
    {%- else %}
        {{- '<s>' + message.role + '\\n' + message.content + '</s>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}
"""
SUMS = ((1, 2), (5, 3))
NUM_STEPS = 110


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def make_caller(folder: Path) -> Path:
    """Write the model: it learns by heart a call and a guess for each of `SUMS`, and short words."""
    make_policy(folder, vocab_size=100, chat_template=TEMPLATE)
    tokenizer = load_tokenizer(str(folder))
    texts = [text for a, b in SUMS for text in _conversations(tokenizer, a, b)]
    rows = [tokenizer.encode(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(ids == 0, -100)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(NUM_STEPS):
            loss = model(input_ids=ids, attention_mask=ids != 0, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    return folder


def _conversations(tokenizer: HfTokenizer, a: int, b: int) -> list[str]:
    render = tokenizer.render
    tool: Json = json.loads(json.dumps(make_tool(add).schema))
    question = Message(role="user", content=f"{a}+{b}")
    arguments: Json = {"a": a, "b": b}
    calls: Json = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
    called = [
        question,
        Message(role="assistant", content="", fields={"tool_calls": calls}),
        Message(role="tool", content=f"{a + b}"),
        Message(role="assistant", content=f"{a + b}"),
    ]
    guessed = [question, Message(role="assistant", content="9")]
    words = [question]
    for said in ("say", "more", "more"):
        words += [Message(role="user", content=said), Message(role="assistant", content="ab" if a > 2 else "abcd")]
    return [
        render(called, add_generation_prompt=False, tools=[tool]),
        render(guessed, add_generation_prompt=False, tools=[tool]),
        render(words, add_generation_prompt=False),
    ]

"""A tokenizer of bytes with chat templates, and an engine that says what a script says."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.types import FinishReason, FloatArray, Json, Message, PackedTokens, Prompt, Rollout, RolloutRequest, Sampling

HERMES = r"""
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- 'For each call, return <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' + ('\n' + message.content if message.content else '') }}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
"""As Qwen 2.5 writes conversations."""

LLAMA = r"""
{{- '<|begin|>' }}
{%- if tools %}
    {{- '<|im_start|>system\n\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>ipython\n\n' + message.content | tojson + '<|im_end|>' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant\n\n{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
        {{- message.tool_calls[0].function.arguments | tojson + '}<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n\n' + message.content | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}
"""
"""As Llama 3 writes conversations: it trims texts."""

FORGETFUL = HERMES.replace(
    "message.role + '\\n' + message.content",
    "message.role + '\\n' + (message.content if loop.last else message.content.split('</think>')[-1])",
)
"""Leaves out what the model thought in earlier turns."""

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen and Llama 3 divide texts."""
SPECIAL = ("<|pad|>", "<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(chat_template: str = HERMES) -> HfTokenizer:
    """One token a byte, but for special tokens and a few pairs that merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ċ", "Ċ"), ("{", '"'), ('"', ":"), ("Ġ", "a")]
    vocabulary = {token: n for n, token in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
    return HfTokenizer(fast, stop_token_ids=(), chat_template=chat_template)


def make_prompt(
    tokenizer: HfTokenizer, text: str = "Go.", *, tools: Sequence[Json] = (), is_open: bool = False
) -> Prompt:
    """A prompt as rows become one; `is_open` leaves open who speaks next, as for environments."""
    message = Message(role="user", content=text)
    shown = tokenizer.render([message], add_generation_prompt=not is_open, tools=tools)
    return Prompt(
        id="row 1",
        token_ids=np.array(tokenizer.encode(shown), dtype=np.int64),
        text=shown,
        metadata={"messages": [{"role": "user", "content": text}]},
    )


def make_request(prompt: Prompt, name: str = "1/row 1/0", *, max_tokens: int = 4000, seed: int = 7) -> RolloutRequest:
    return RolloutRequest(
        id=name,
        prompt_id=prompt.id,
        prompt_token_ids=prompt.token_ids,
        seed=seed,
        sampling=Sampling(max_tokens=max_tokens),
    )


Script = Callable[[str, int], str | None]
"""What the model has seen and the number of its turn -> what it says; None: it never answers."""


class ScriptedEngine:
    """A `RolloutEngine` that says what a script says, at once, with log-prob -0.5 for each token."""

    def __init__(self, tokenizer: HfTokenizer, script: Script, *, end: str = "<|im_end|>") -> None:
        self.requests: list[RolloutRequest] = []
        self.calls: list[int] = []
        """How many requests each call had."""
        self.version = 3
        self.aborted: list[str] = []
        self._tokenizer = tokenizer
        self.script = script
        self._end = end
        self._waiting: dict[str, tuple[RolloutRequest, Future[Rollout]]] = {}

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        self.calls.append(len(requests))
        return [self._answer(request) for request in requests]

    def answer_waiting(self) -> None:
        """Answer by the script what it left unanswered."""
        for name, (request, future) in list(self._waiting.items()):
            del self._waiting[name]
            if future.set_running_or_notify_cancel():
                future.set_result(self._rollout(request, str(self._said(request))))

    def _answer(self, request: RolloutRequest) -> "Future[Rollout]":
        self.requests.append(request)
        future: Future[Rollout] = Future()
        said = self._said(request)
        if said is None:
            self._waiting[request.id] = request, future
        else:
            future.set_result(self._rollout(request, said))
        return future

    def _said(self, request: RolloutRequest) -> str | None:
        seen = self._tokenizer.decode(request.prompt_token_ids.tolist(), skip_special_tokens=False)
        return self.script(seen, int(request.id.rpartition("turn")[2]))

    def _rollout(self, request: RolloutRequest, said: str) -> Rollout:
        ids = self._tokenizer.encode(said + self._end)
        limit = request.sampling.max_tokens
        return Rollout(
            id=request.id,
            prompt_id=request.prompt_id,
            token_ids=np.array(ids[:limit], dtype=np.int64),
            log_probs=np.full(len(ids[:limit]), -0.5, dtype=np.float32),
            finish_reason=FinishReason.STOP if len(ids) <= limit else FinishReason.LENGTH,
            weight_version=self.version,
        )

    def abort(self, request_ids: Collection[str]) -> None:
        for name in request_ids:
            self.aborted.append(name)
            if (waiting := self._waiting.pop(name, None)) is not None and waiting[1].cancel():
                waiting[1].set_running_or_notify_cancel()

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        return [np.zeros(len(one.token_ids), dtype=np.float32) for one in sequences]

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

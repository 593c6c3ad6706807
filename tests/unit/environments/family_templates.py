"""Tokenizers that merge, with the chat templates of families: those that installed libraries ship, and for other
families templates in their documented form."""

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.engines.models.tokenizer import HfTokenizer
from tests.unit.conversations.generated import conversations
from tests.unit.engines.models.chat_tokenizers import MARKS, shipped_templates
from tests.unit.environments.support import WORDS

MISTRAL = r"""
{{- bos_token }}
{%- set turns = namespace(spoken=0) %}
{%- if messages[0].role == 'system' %}{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {%- if (message.role == 'user') != (turns.spoken % 2 == 0) %}
            {{- raise_exception('users and assistants must take turns') }}
        {%- endif %}
        {%- set turns.spoken = turns.spoken + 1 %}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.tool_call_id + '[TOOL_CONTENT]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids of calls have nine characters') }}{%- endif %}
            {{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id }}
            {{- '[ARGS]' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""
"""Mistral's tokenizers of version 11: users and assistants alternate, and results name calls by their ids."""

DEEPSEEK = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}{{- '\n\n## Tools\n' + tools | tojson }}{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '<@User@>' + message.content }}
    {%- elif message.role == 'tool' %}
        {{- '<@tool▁output▁begin@>' + message.content + '<@tool▁output▁end@>' }}
    {%- else %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<@Assistant@></think>' }}{%- endif %}
        {{- message.content or '' }}
        {%- if message.tool_calls %}
            {{- '<@tool▁calls▁begin@>' }}
            {%- for call in message.tool_calls %}
                {{- '<@tool▁call▁begin@>' + call.function.name + '<@tool▁sep@>' }}
                {{- call.function.arguments + '<@tool▁call▁end@>' }}
            {%- endfor %}
            {{- '<@tool▁calls▁end@>' }}
        {%- endif %}
        {{- '<@end▁of▁sentence@>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<@Assistant@></think>' }}{%- endif %}
""".replace("@", "\uff5c")
"""DeepSeek V3.1 without thoughts: what follows a tool's result is said without another mark."""

TEMPLATES = {
    "Qwen 3": "trl/qwen3",
    "Qwen 3.5": "trl/qwen3_5_think",
    "Llama 3": "trl/llama3_1",
    "Gemma 3": "trl/gemma3",
    "Gemma 4": "trl/gemma4_v5",
    "Mistral": MISTRAL,
    "DeepSeek R1": "trl/deepseekv3",
    "DeepSeek V3.1": DEEPSEEK,
    "GLM 4.5": "trl/glm4moe",
    "gpt-oss": "trl/gptoss",
}
"""A template, or the name under which a library ships one."""
WITHOUT_TOOLS = {"Gemma 3"}
"""Families whose templates write no calls of tools."""


def family_tokenizer(family: str) -> HfTokenizer:
    """A byte-level tokenizer that merges, with the special tokens of a family's template."""
    named = TEMPLATES[family]
    template = named if "{%" in named else shipped_templates()[named]
    marks = dict.fromkeys(["<pad>", "<eos>", "<bos>", *sorted(set(MARKS.findall(template)))])
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_texts(template), trainer)
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", chat_template=template
    )
    return HfTokenizer(tokenizer, chat_template=template)


def _texts(template: str) -> Iterator[str]:
    yield from [template] * 3
    for made in conversations(0, 200):
        yield str(made.row)

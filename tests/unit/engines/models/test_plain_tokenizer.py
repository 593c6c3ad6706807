"""A tokenizer that is read without transformers does what transformers' own does; where it might not, it is not read."""

# ruff: noqa: E501

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from rlhf.engines.models.fresh_model import train_tokenizer
from rlhf.engines.models.plain_tokenizer import PlainTokenizer, read_plain_tokenizer
from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.types import Json
from tests.tiny_models import tiny_config, tiny_tokenizer
from tests.unit.engines.models.chat_tokenizers import chat_tokenizer, shipped_templates

TEXTS = (
    "", " ", "a", "Once upon a time, there was a little girl.\n", "<s>", "</s> x <pad>", "\u00e9\u4e2d\U0001f600\t\0",
    "<|im_start|>user\nhi<|im_end|>", "  two  spaces  ", "x" * 3000,
)  # fmt: skip
HELLO: list[dict[str, Json]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi <b>there</b>"},
    {"role": "user", "content": "And?"},
]
CALL: Json = {"name": "lookup", "arguments": {"key": "\u00e9 <"}}
CALLS: list[dict[str, Json]] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "callid001", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "callid001", "name": "lookup", "content": "found"},
]
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "What"}}},
    },
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


SEVERAL = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools }}"}]


def in_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> Path:
    """A model's folder with a tokenizer, in whose tokenizer_config.json `settings` are changed."""
    folder.mkdir(exist_ok=True)
    tiny_config().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    tokenizer.save_pretrained(folder)
    change(folder / "tokenizer_config.json", settings)
    return folder


def change(file: Path, settings: Mapping[str, object]) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **settings}))


def added_tokens(folder: Path) -> dict[str, object]:
    """The list of added tokens, as older versions of transformers repeated it in tokenizer_config.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    return {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in content["added_tokens"]
    }


def compare(folder: Path) -> PlainTokenizer:
    """Both readings of a folder agree in everything that this package asks a tokenizer."""
    plain, theirs = read_plain_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert plain is not None
    assert isinstance(theirs, PreTrainedTokenizerFast)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "all_special_tokens", "all_special_ids"):
        assert vars_of(plain, name) == vars_of(theirs, name), name
    assert plain.chat_template == theirs.chat_template
    assert plain.get_vocab() == theirs.get_vocab()
    assert plain.named == theirs.special_tokens_map
    assert without_empty_step(plain.backend_tokenizer) == without_empty_step(theirs.backend_tokenizer)
    ours, other = load_tokenizer(str(folder), plain=True), load_tokenizer(str(folder))
    assert ours.fingerprint() == other.fingerprint()
    for name in ("eos_token_id", "pad_token_id", "stop_token_ids", "control_tokens", "has_chat_template"):
        assert vars_of(ours, name) == vars_of(other, name), name
    for text in TEXTS:
        for added in (False, True):
            ids = ours.encode(text, add_special_tokens=added)
            assert ids == other.encode(text, add_special_tokens=added)
            assert ours.decode(ids) == other.decode(ids)
            assert ours.decode(ids, skip_special_tokens=False) == other.decode(ids, skip_special_tokens=False)
    return plain


def vars_of(tokenizer: object, name: str) -> object:
    value: object = getattr(tokenizer, name)
    return value


def without_empty_step(backend: Tokenizer) -> str:
    """All that a backend does, but for a step that adds nothing, which transformers puts where there is none."""
    content = json.loads(backend.to_str())
    step = content["post_processor"]
    if step is not None and step["type"] == "TemplateProcessing" and not step["special_tokens"]:
        content["post_processor"] = None
    return json.dumps(content)


def story_words(folder: Path) -> Path:
    trained = train_tokenizer(TEXTS * 3, 300, folder)
    assert isinstance(trained, PreTrainedTokenizerFast)
    return in_folder(folder, trained)


def as_version_4_saved(folder: Path) -> Path:
    in_folder(folder, chat_tokenizer(CHATML, ["<s>"], plain=["<think>"]), tokenizer_class="PreTrainedTokenizerFast")
    change(folder / "tokenizer_config.json", {"added_tokens_decoder": added_tokens(folder), "extra_special_tokens": {}})
    change(folder / "tokenizer_config.json", {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))  # the list says more
    return folder


def with_tokens_as_objects(folder: Path) -> Path:
    in_folder(folder, tiny_tokenizer())
    token = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    change(folder / "tokenizer_config.json", {"eos_token": {"__type": "AddedToken", "content": "</s>", **token}})
    return folder


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, a few merges, and tokens behind them."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("o", "n"), ("on", "ce"), ("c", "e"), ("\u0120", "a"), ("h", "e"), ("t", "he")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    make: Callable[..., Qwen2Tokenizer] = Qwen2Tokenizer
    tokenizer = make(vocab=vocabulary, merges=merges, eos_token="<|im_end|>", unk_token=None)
    marks = [
        AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    tokenizer.add_tokens([*marks, AddedToken("<think>", special=False, normalized=False)])
    tokenizer.chat_template = CHATML
    return tokenizer


def qwen(folder: Path, kind: str, *, is_old: bool = False) -> Path:
    """A folder with a Qwen tokenizer, as versions of transformers before 5 saved it where `is_old`."""
    in_folder(folder, qwen_tokenizer())
    config = {"model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"]}
    change(folder / "config.json", config)
    if is_old:
        change(folder / "tokenizer_config.json", {"added_tokens_decoder": added_tokens(folder), "errors": "replace"})
    return folder


FOLDERS: Mapping[str, Callable[[Path], Path]] = {
    "characters": lambda folder: in_folder(folder, tiny_tokenizer()),
    "without a template": lambda folder: in_folder(folder, tiny_tokenizer(chat_template=None)),
    "bytes": lambda folder: in_folder(folder, chat_tokenizer(CHATML, ["<s>"], bos="<s>")),
    "several templates": lambda folder: in_folder(folder, tiny_tokenizer(chat_template=None), chat_template=SEVERAL),
    "trained": story_words,
    "version 4": as_version_4_saved,
    "tokens as objects": with_tokens_as_objects,
    "adds no bos": lambda folder: in_folder(folder, tiny_tokenizer(), add_bos_token=True),
    "qwen2": lambda folder: qwen(folder, "qwen2"),
    "qwen3": lambda folder: qwen(folder, "qwen3", is_old=True),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_both_readings_agree(name: str, tmp_path: Path) -> None:
    compare(FOLDERS[name](tmp_path / "model"))


def test_a_template_of_the_settings_is_read(tmp_path: Path) -> None:
    folder = in_folder(tmp_path, tiny_tokenizer(chat_template=None), chat_template=CHATML)
    assert compare(folder).chat_template == CHATML
    change(folder / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": CHATML}]})
    assert compare(folder).chat_template == {"default": CHATML}


@pytest.mark.skipif("RLHF_TEST_DATA" not in os.environ, reason="RLHF_TEST_DATA is not set")
def test_both_readings_of_a_real_model_agree() -> None:
    compare(Path(os.environ["RLHF_TEST_DATA"], "models", "stories260k"))


def write_text(name: str, text: str) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        (folder / name).write_text(text)

    return written


def setting(**settings: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "tokenizer_config.json", settings)


def in_tokenizer(**settings: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "tokenizer.json", settings)


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "changed",
    [
        setting(tokenizer_class="LlamaTokenizer"),
        setting(tokenizer_class=None),
        setting(unknown=1),
        setting(image_token="<s>"),
        setting(split_special_tokens=True),
        setting(eos_token="<never seen>"),
        setting(eos_token={"content": "</s>"}),
        setting(extra_special_tokens=["<other>"]),
        setting(extra_special_tokens={"image": "<s>"}),
        setting(add_prefix_space=True),
        setting(added_tokens_decoder={"1": {**dict.fromkeys(("lstrip", "rstrip", "single_word"), True), "content": "<s>"}}),
        setting(auto_map={"AutoTokenizer": ["a.B", None]}),
        in_tokenizer(truncation=TRUNCATION),
        write_text("special_tokens_map.json", '{"eos_token": "<s>"}'),
        write_text("added_tokens.json", '{"<x>": 5}'),
        write_text("tokenizer_config.json", "[]"),
        write_text("tokenizer.json", "{}"),
        lambda folder: (folder / "additional_chat_templates").mkdir(),
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: change(folder / "config.json", {"model_type": "qwen2"}),
        lambda folder: change(folder / "config.json", {"tokenizer_class": "LlamaTokenizer"}),
    ],
)  # fmt: skip
def test_what_only_transformers_knows_is_left_to_it(changed: Callable[[Path], None], tmp_path: Path) -> None:
    folder = in_folder(tmp_path / "model", tiny_tokenizer())
    assert read_plain_tokenizer(folder) is not None
    changed(folder)
    assert read_plain_tokenizer(folder) is None


@pytest.mark.parametrize(
    "changed",
    [
        in_tokenizer(normalizer=None),
        in_tokenizer(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}),
        lambda folder: change_inside(folder, "model", {"ignore_merges": True}),
        lambda folder: change_inside(folder, "model", {"unk_token": "a"}),
        lambda folder: add_token(folder, 1000),
        setting(added_tokens_decoder={}),
        setting(tokenizer_class="PreTrainedTokenizerFast"),
        setting(pad_token="<never seen>"),
    ],
)  # fmt: skip
def test_a_qwen_tokenizer_that_its_class_would_build_otherwise_is_left_to_it(
    changed: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = qwen(tmp_path / "model", "qwen2")
    assert read_plain_tokenizer(folder) is not None
    changed(folder)
    assert read_plain_tokenizer(folder) is None


def change_inside(folder: Path, part: str, settings: Mapping[str, object]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content[part] |= settings
    (folder / "tokenizer.json").write_text(json.dumps(content))


def add_token(folder: Path, number: int) -> None:
    """A token whose id leaves a gap."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "content": "<far>", "id": number})
    (folder / "tokenizer.json").write_text(json.dumps(content))


def both_render(
    template: str, turns: Sequence[Mapping[str, Json]], tools: list[Json] | None, *, adds: bool
) -> tuple[str, str]:
    """A conversation by both, or the class and text of what each raises."""
    theirs = chat_tokenizer(template, bos="<s>")
    ours = PlainTokenizer(
        backend_tokenizer=theirs.backend_tokenizer, named=theirs.special_tokens_map, chat_template=template
    )
    shown = []
    for tokenizer in (ours, theirs):
        try:
            text = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],  # type: ignore[arg-type]
                chat_template=None,
                tools=tools,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=adds,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            text = f"{type(error).__name__}: {error}"
        shown.append(str(text))
    return shown[0], shown[1]


TRICKS = {
    "generation": "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '<é>' | tojson(ensure_ascii=true) }}",
    "date": "{{ strftime_now('%Y') }}",
    "raises": "{{ raise_exception('no: ' + messages[0].role) }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "changes a list": "{% set _ = messages.append(1) %}",
    "spaces": "a  \n  {% if true %}\n  b\n  {% endif %}\n c",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    "undefined": "{{ documents }}{{ tools }}{{ nothing }}{{ messages[9].x }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", TRICKS)
def test_templates_are_rendered_as_transformers_does(name: str) -> None:
    ours, theirs = both_render(TRICKS[name], HELLO, None, adds=True)
    assert ours == theirs


def test_templates_that_libraries_ship_are_rendered_as_transformers_does() -> None:
    templates = shipped_templates()
    assert len(templates) > 30
    for name, template in templates.items():
        for turns, tools in ((HELLO, None), (CALLS, [TOOL]), (HELLO[1:2], [])):
            for adds in (False, True):
                ours, theirs = both_render(template, turns, tools, adds=adds)
                assert ours == theirs, name


def test_nothing_is_rendered_of_no_message() -> None:
    ours, theirs = both_render(CHATML, [], None, adds=False)
    assert ours == theirs


def test_no_heavy_library_is_imported_for_a_plain_tokenizer(tmp_path: Path) -> None:
    folder = in_folder(tmp_path, tiny_tokenizer())
    code = (
        "import sys; from rlhf.engines.models.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(folder)!r}, plain=True)\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_of_another_class_is_loaded_by_transformers(tmp_path: Path) -> None:
    folder = in_folder(tmp_path, tiny_tokenizer(), split_special_tokens=True)
    loaded = load_tokenizer(str(folder), plain=True)
    assert isinstance(loaded, HfTokenizer)
    assert loaded.encode("<s>") != [1]

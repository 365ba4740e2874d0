"""Chat templates of the shapes that published models use, rendered by transformers and by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jaxlm.errors import InputError
from jaxlm.tokenizers import HFTokenizer, hf_files
from jaxlm.tokenizers.gguf_vocab import from_gguf
from jaxlm.tokenizers.hf_json import canonical

pytestmark = pytest.mark.parity

# Written for this test after the forms in use: ChatML with a default system turn, header tokens with trimmed contents,
# [INST] with strict alternation, tools as JSON, a block per message with macros and loop controls.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "headers": (
        "{{- bos_token }}\n{%- set ns = namespace(n=0) %}\n{%- for message in messages %}\n"
        "    {%- set ns.n = ns.n + 1 %}\n"
        "    {{- '<|start|>' + message.role + '<|end|>\n\n' + message.content | trim + eos_token }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant<|end|>\n\n' }}\n{%- endif %}\n{{ ns.n }}\n"
    ),
    "inst": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system + '\n' if system and loop.first else '') }}"
        "{{ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "tools": (
        "{%- if tools %}\n<tools>\n{% for tool in tools %}\n{{ tool | tojson }}\n{% endfor %}\n</tools>\n{% endif -%}\n"
        "{% for m in messages[::-1] %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n{{ m | tojson(indent=2) }}\n"
        "{% endfor %}\n{% generation %}x{% endgeneration %}"
    ),
    "macro": (
        "{% macro turn(m) %}{{ '<' ~ m.role ~ '>' }}{{ m.content if m.content is string else m.content | join('+') }}"
        "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{{ strftime_now('%Y-%m') }}{{ messages | length }}{{ pad_token }}{{ custom }}"
    ),
}
TALKS = [
    [{"role": "user", "content": "Hi <there> & 'you' 🚀"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " What? \n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n\nc"},
        {"role": "user", "content": "<|im_start|>é"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <a> & 'b'", "parameters": {}}}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_transformers(transformers: Any, name: str) -> None:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"])
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    template = TEMPLATES[name]
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **specials)
    ours = HFTokenizer(
        canonical(json.loads(backend.to_str())), special_tokens=tuple(specials.items()), chat_template=template
    )
    for talk in TALKS:
        for opening in (False, True):
            options: dict[str, Any] = {"add_generation_prompt": opening, "tools": TOOLS if name == "tools" else None}
            text = peer.apply_chat_template(talk, tokenize=False, custom="c", **options)
            assert ours.render_chat(talk, custom="c", **options) == text
            ids = peer.apply_chat_template(talk, custom="c", return_dict=False, **options)
            assert ours.apply_chat_template(talk, custom="c", **options) == ids


def test_a_refusal_is_a_refusal_in_both(transformers: Any) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    talk = [{"role": "assistant", "content": "a"}]
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATES["inst"])
    with pytest.raises(Exception, match="Roles must alternate"):
        peer.apply_chat_template(talk, tokenize=False)
    ours = HFTokenizer(backend.to_str(), chat_template=TEMPLATES["inst"])
    with pytest.raises(InputError, match="refuses this conversation: Roles must alternate"):
        ours.apply_chat_template(talk)


@pytest.mark.parametrize("bos", [False, True])
def test_transformers_loads_what_is_written(transformers: Any, tmp_path: Path, bos: bool) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*letters, "<s>", "</s>", "th"], "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1], "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257, "tokenizer.chat_template": TEMPLATES["chatml"],
        "tokenizer.ggml.add_bos_token": bos,
    }  # fmt: skip
    ours = from_gguf(metadata, "x.gguf")
    assert ours is not None
    hf_files.write_directory(ours, tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the 12 paths,  thé\n\n🚀"
    assert peer(text).input_ids == [*ours.start_ids, *ours.encode(text)]
    assert len(ours.start_ids) == bos
    assert peer.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
    ids = peer.apply_chat_template(TALKS[2], add_generation_prompt=True, return_dict=False)
    assert ids == ours.apply_chat_template(TALKS[2], add_generation_prompt=True)
    assert (peer.eos_token_id, peer.bos_token_id) == (ours.eot_id, ours.bos_id)
    again = hf_files.from_directory(tmp_path)
    assert (again.start_ids, again.eot_id, again.chat_template) == (ours.start_ids, ours.eot_id, ours.chat_template)


def byte_level(adds: bool) -> Tokenizer:
    """A token for every byte, and <s>, </s>; with `adds`, a post-processor puts <s> first."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair=None, special_tokens=[("<s>", 256)]
        )
    return backend


@pytest.mark.parametrize("family", ["nothing", "llama", "gpt2"])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_the_bos_rule_is_followed_there(
    transformers: Any, tmp_path: Path, adds: bool, add_bos: bool, family: str
) -> None:
    """tokenizer_config.json says one thing and the post-processor another, or nothing; beside configs of families."""
    backend = byte_level(adds)
    ours = HFTokenizer(
        canonical(json.loads(backend.to_str())), (("bos_token", "<s>"), ("eos_token", "</s>")), add_bos=add_bos
    )
    hf_files.write_directory(ours, tmp_path)
    if family != "nothing":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    ids = [256] * add_bos + ours.encode("the café")
    for peer in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        assert peer.from_pretrained(tmp_path)("the café").input_ids == ids
    # What reads tokenizer.json alone follows it too.
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the café").ids == ids


@pytest.mark.parametrize("add_bos", [False, True, None])
@pytest.mark.parametrize("adds", [False, True])
def test_the_bos_rule_of_files_made_by_others(
    transformers: Any, tmp_path: Path, adds: bool, add_bos: bool | None
) -> None:
    """tokenizer_config.json and the post-processor may contradict each other: the latter counts, in both."""
    backend = byte_level(adds)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    rule = {} if add_bos is None else {"add_bos_token": add_bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | rule))
    ours = hf_files.from_directory(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert peer("the café").input_ids == [*ours.start_ids, *ours.encode("the café")]
    assert ours.start_ids == (256,) * adds

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from jaxlm.errors import InputError
from jaxlm.tokenizers.chat_template import pick, render

HELLO = [{"role": "user", "content": "Hi <b>&</b> 'é' 🚀"}]


def test_a_conversation_is_rendered_as_written() -> None:
    # White space as transformers sets Jinja up: trim_blocks and lstrip_blocks.
    template = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'] }}]\n"
        "  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}>{% endif %}"
    )
    assert render(template, HELLO, bos_token="<s>", add_generation_prompt=True) == "<s>[Hi <b>&</b> 'é' 🚀]\n>"
    assert render(template, HELLO, bos_token="<s>") == "<s>[Hi <b>&</b> 'é' 🚀]\n"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>&</b> \'é\' 🚀"}'),  # not \u003c, no \u00e9
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=True) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{% set n = namespace(x=1) %}{% for i in [1, 2] %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}", "4"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{{ dict(a=1).a }}{{ tools }}{{ unknown_token }}", "1None"),
        ("{{ '-' * 5 }}{{ 3 * 4 }}{{ 2 ** 5 }}", "-----1232"),
        ("{% if tools is none and not documents %}plain{% endif %}", "plain"),
    ],
)
def test_what_templates_use(template: str, text: str) -> None:
    assert render(template, HELLO) == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Roles must\nalternate.') }}", "refuses this conversation: Roles must alternate"),
        ("{% for %}", "line 1: not valid Jinja"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        ("{{ messages[0].content.nothing.more }}", "refuses this conversation: .*nothing"),
        ("{% include 'x' %}", "fails with TypeError|refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "never comes to an end|RecursionError"),
        ("{{ 'a' * 10000000 }}", "may not do"),
        ("{{ [0] * 10000000 }}", "may not do"),
        ("{{ 10 ** (10 ** 8) }}", "may not do"),
        ("{% for i in range(999) %}{{ 'a' * 99999 }}{% endfor %}", "may not do .a prompt of more than 10,000,000"),
        ("{{ range(10 ** 7) | list }}", "fails with OverflowError"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        render(template, HELLO)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("chat template")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__cl' ~ 'ass__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ self.__init__.__globals__['__builtins__'].open('FILE', 'w') }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{% import os %}",
    "{{ joiner.__call__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch FILE').read() }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_that_tries_to_escape_does_nothing(template: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    messages = [{"role": "user", "content": "hi"}]
    shown = ""
    with suppress(InputError):  # or Jinja gives nothing for what it hides; never the thing itself
        shown = render(template.replace("FILE", str(trace)), messages)
    assert shown == ""
    assert not trace.exists()
    assert messages == [{"role": "user", "content": "hi"}]


def test_objects_do_not_reach_a_template() -> None:
    class Message(dict):  # type: ignore[type-arg]
        def burn(self) -> str:
            raise AssertionError("called")

    with pytest.raises(InputError, match=r"refuses|burn"):
        render("{{ messages[0].burn() }}", [Message(role="user", content="x")])
    with pytest.raises(InputError, match="text, numbers, lists and mappings, found PosixPath"):
        render("x", [{"role": "user", "content": Path("/")}])


@pytest.mark.parametrize("messages", ["hello", ["hello"], [("role", "user")], None, 5])
def test_messages_of_the_wrong_kind(messages: object) -> None:
    with pytest.raises(InputError, match="expected a list of mappings"):
        render("x", messages)  # type: ignore[arg-type]


def test_the_template_among_several() -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert (pick("x"), pick(None), pick(named), pick(named, tools=True)) == ("x", None, "D", "T")
    for wrong in ([], [{"name": "other", "template": "x"}], 5, {"default": "x"}):
        with pytest.raises(InputError, match="where: expected a template"):
            pick(wrong, where="where")

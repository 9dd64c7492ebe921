"""Encoding, chat templates in their sandbox, and what each refuses."""

import datetime

import pytest

from tests.runtime.tokenizers_made import EOS, SPECIAL, byte_fallback, byte_level
from tilewright.compiler.errors import ModelError, RequestError
from tilewright.runtime.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "brief"}, {"role": "user", "content": "the dog?"}]

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|turn|>system\n\n' }}
    {%- endif %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('no role ' + message['role']) }}
    {% endif %}
    {{- '<|turn|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant\n' }}
{%- endif %}
"""


def make(template: str | None = CHATML, **settings) -> Tokenizer:
    return Tokenizer(byte_level(), {"chat_template": template, "bos_token": SPECIAL, "eos_token": EOS, **settings})


def render(template: str, **variables) -> str:
    return make(template).apply_chat_template(MESSAGES, **variables)


def test_encode_adds_bos_once() -> None:
    plain, with_bos = make(), make(add_bos=True)
    ids, bos = plain.encode("the dog"), plain._library.token_to_id(SPECIAL)
    assert plain.decode(ids) == "the dog"
    assert with_bos.encode("the dog") == [bos, *ids]
    assert with_bos.encode(SPECIAL + "the dog") == [bos, *ids]
    assert with_bos.encode("the dog", special_tokens=False) == ids


def test_settings_as_plain_data() -> None:
    tokenizer = Tokenizer(byte_level(), {"stop_token_ids": [3, 4], "chat_template": None, "other": 1})
    assert tokenizer.stop_token_ids == (3, 4) and tokenizer.chat_template is None


def test_truncation_and_padding_of_the_file_are_switched_off() -> None:
    tokenizer = make()
    tokenizer._library.enable_truncation(2)
    again = Tokenizer(tokenizer._library.to_str())
    assert len(again.encode("the quick brown fox")) > 2


def test_chat_template_as_transformers_renders_it() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for generate in (True, False):
        [theirs], _ = render_jinja_template([MESSAGES], chat_template=CHATML, add_generation_prompt=generate)
        assert make().apply_chat_template(MESSAGES, add_generation_prompt=generate) == theirs
    text = make().apply_chat_template(MESSAGES)
    assert text.endswith("<|turn|>user\nthe dog?<|end|>\n<|turn|>assistant\n")
    assert make(add_bos=True).encode_chat(MESSAGES) == make().encode(text), "a chat begins as its template says"


def test_what_templates_may_use() -> None:
    assert render("{{ bos_token }}{{ eos_token }}") == SPECIAL + EOS
    assert render("{{ messages | tojson }}{{ {'é': '<b>'} | tojson(indent=1) }}").endswith('{\n "é": "<b>"\n}')
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("{% generation %}a{% endgeneration %}{% if tools is none %}b{% endif %}") == "ab"
    assert render("{% for m in messages %}{% break %}{% endfor %}{{ think }}", think=1) == "1"


@pytest.mark.parametrize(
    "template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ messages.__init__.__globals__ }}"]
)
def test_templates_cannot_reach_python(template: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        render(template)


def test_refusals() -> None:
    with pytest.raises(RequestError, match="--raw"):
        make(None).apply_chat_template(MESSAGES)
    with pytest.raises(RequestError, match=r"no role tool.*--raw"):
        make().apply_chat_template([*MESSAGES, {"role": "tool", "content": ""}])
    with pytest.raises(RequestError, match="give a role and a content"):
        make().apply_chat_template([{"role": "user"}])
    with pytest.raises(RequestError, match=r"broken \(line 1"):
        render("{% if %}")
    with pytest.raises(ModelError, match=r"tokenizer.json can't be read"):
        Tokenizer("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json can't be read"):
        Tokenizer("{")


def test_byte_fallback_round_trip() -> None:
    tokenizer = Tokenizer(byte_fallback())
    assert tokenizer.decode(tokenizer.encode("the dog 🙂\n")) == "the dog 🙂\n"

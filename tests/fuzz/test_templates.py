"""Chat templates out of checkpoints: programs by strangers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icet_jax.media import chat_templates
from icet_jax.media.templates import IMAGE_TOKEN, own_template
from icet_jax.scorers import prompts
from tests import tiny
from tests.fuzz.damage import TRICKS, cases, files, joined, outcome, torn

PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for part in message['content'] if message['content'] is not string %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% endif %}{% else %}{{ ' ASSISTANT: ' + (message['content'] | trim) }}{% endif %}{% endfor %}"
)
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}",
    "{% macro again(x) %}{% for y in range(9999) %}{{ again(y) }}{% endfor %}{% endmacro %}{{ again(1) }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{% set a = 9 %}{{ a ** a ** a ** a }}",
    "{{ 'a' * 99999999999 }}",
    "{% set n = 99999999 %}{{ 'a' * n }}",
    "{{ ('a' * 1000) * 1000 * 1000 * 1000 }}",
    "{{ 'a' | center(99999999999) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ '%99999999999d' | format(1) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "x" * (chat_templates.MAX_LENGTH + 1),
    "(" * 50_000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ range(10 * 1000 * 1000) | list }}",
    "{{ lipsum(n=9999) }}",
    "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set x.s = x.s ~ x.s %}{% endfor %}",
)
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch SENTINEL') }}",
    "{{ self.__init__.__globals__.__builtins__.open('SENTINEL', 'w') }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__['os'].system('touch SENTINEL') }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('SENTINEL', 'w') }}",
    "{{ (messages | attr('__class__')).__base__.__subclasses__() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{% for k in namespace.__init__.__globals__ %}{{ k }}{% endfor %}",
)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = None
    return made


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A tenth of the time that users' machines get."""
    monkeypatch.setattr(chat_templates, "_MAX_STEPS", 100_000)


MESSAGES = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def render(tokenizer, template):
    return outcome(chat_templates.render, tokenizer, MESSAGES, template=template, answer=False)


def test_an_honest_template_is_rendered_as_transformers_does(tokenizer):
    theirs = tokenizer.apply_chat_template(MESSAGES, chat_template=PLAIN, tokenize=False)
    assert render(tokenizer, PLAIN) == (theirs, None)
    assert (
        outcome(
            chat_templates.render,
            tokenizer,
            MESSAGES,
            template=PLAIN + "{% generation %}x{% endgeneration %}",
            answer=True,
        )[1]
        is None
    )


@pytest.mark.parametrize("template", ENDLESS, ids=lambda text: text[:40])
def test_no_template_takes_long(template, tokenizer):
    text, _ = render(tokenizer, template)  # `outcome` has a time limit
    assert text is None or len(text) <= chat_templates.MAX_TEXT


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_reaches_the_machine(template, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, line = render(tokenizer, template.replace("SENTINEL", str(tmp_path / "touched")))
    assert not list(tmp_path.iterdir())
    assert line or not any(word in text for word in ("<class", "<module", "builtins", "/etc"))


def test_damaged_templates(tokenizer, tmp_path):
    pieces = joined(
        (
            "{{",
            "}}",
            "{%",
            "%}",
            "{#",
            "#}",
            " messages ",
            " for x in ",
            " endfor ",
            " if ",
            " range(9) ",
            "|join",
            "[0]",
            ".content",
            "x",
            *TRICKS,
        ),
        most=12,
    )

    @cases(50)
    @given(torn(PLAIN.encode()).map(lambda data: data.decode("utf-8", "replace")) | pieces)
    def holds(template):
        render(tokenizer, template)
        tokenizer.chat_template = template
        judge, _ = outcome(prompts.chat_template, tokenizer, answer=True)
        assert judge is None or "first" in judge("first", "second")

    holds()
    tokenizer.chat_template = None


def test_files_of_templates(tokenizer, tmp_path):
    @cases(30)
    @given(files({"chat_template": PLAIN}), torn(PLAIN.encode()))
    def holds(old, new):
        (tmp_path / "chat_template.json").write_bytes(old)
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        outcome(own_template, tmp_path, tokenizer, IMAGE_TOKEN)
        (tmp_path / "chat_template.jinja").write_bytes(new)
        template, _ = outcome(own_template, tmp_path, tokenizer, IMAGE_TOKEN)
        if template is not None:
            outcome(template, "why?", 1)

    holds()


def test_tracing_ends_with_the_template(tokenizer):
    import sys

    before = sys.gettrace()
    render(tokenizer, ENDLESS[0])
    assert sys.gettrace() is before


@cases(200)
@given(
    joined(("{prompt}", "{prompt}", "{response}", "{response}", "{", "}", "{0}", "a", *TRICKS)),
    st.sampled_from(TRICKS),
)
def test_texts_of_the_user(template, hostile):
    shown, _ = outcome(prompts.named_or_text, template)
    if shown is not None:
        text = shown(hostile + "{response}", "{prompt}")
        assert template in prompts.BUILT_IN or len(text) == len(template) - 18 + len(hostile) + 18

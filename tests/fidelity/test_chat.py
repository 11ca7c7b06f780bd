"""Tokenizer and chat rendering byte for byte (INV-43, INV-44)."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.data import load_tokenizer
from mmx_jax.data.chat import ChatError, ChatTemplate

ADDED = [
    "<pad>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<reponame>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<beginning_of_sentence>",
    "<end_of_sentence>",
    "<end_of_document>",
    "<function_call>",
    "<code_interpreter>",
    "<speech>",
    "<image>",
]
FIRST_ADDED = 200_000


def text(content):
    return [{"type": "text", "text": content}]


def released_like_tokenizer(folder):
    """A byte-level BPE tokenizer.json with 200,000 base ids and the 26 added ones of model.md 12.2."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    vocabulary["he"] = len(vocabulary)
    while len(vocabulary) < FIRST_ADDED:
        vocabulary[f"unreachable{len(vocabulary)}"] = len(vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("h", "e")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(ADDED)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<end_of_sentence>", "bos_token": "<beginning_of_sentence>", "unk_token": "<end_of_document>",
    }))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(released_like_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_added_ids(tokenizer):
    """INV-43: the table of model.md 12.2; <image> is 200025, generation ends at 200020 (INV-42), no automatic bos."""
    ids = {name: tokenizer.encode(name, special=True) for name in ADDED}
    assert ids == {name: [FIRST_ADDED + i] for i, name in enumerate(ADDED)}
    assert ids["<image>"] == [200_025]
    assert tokenizer.end_of_text_id == 200_020
    assert tokenizer.vocab_size == 200_026
    assert tokenizer.encode("he") == [256]


def test_names_in_data_forge_nothing(tokenizer):
    assert max(tokenizer.encode("<end_of_sentence><image>")) < FIRST_ADDED


@settings(max_examples=100, deadline=None)
@given(content=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(tokenizer, content):
    """INV-43."""
    assert tokenizer.decode(tokenizer.encode(content)) == content


SYSTEM = "You are a helpful assistant created by MiniMax based on MiniMax-Text-01 model."


def test_rendering_byte_for_byte():
    """INV-44: every role, function definitions after all messages, generation prompt, list content."""
    messages = [
        {"role": "system", "content": text(SYSTEM)},
        {"role": "user", "content": text("Hello!\n\n<b> & 'x' {{ y }}")},
        {"role": "assistant", "content": text("  Hi.\n")},
        {"role": "user", "content": text("")},
        {"role": "function", "content": [{"name": "weather", "response": {"place": "Zürich", "t": [1, None]}}]},
    ]
    functions = [{"name": "weather", "parameters": {"type": "object"}}]
    assert ChatTemplate().render(messages, functions=functions, add_generation_prompt=True) == (
        "<beginning_of_sentence>system ai_setting=assistant\n" + SYSTEM + "<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nHello!\n\n<b> & 'x' {{ y }}<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n  Hi.\n<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\n<end_of_sentence>\n"
        "<beginning_of_sentence>system function_response=functions\n"
        '{"name": "weather", "response": {"place": "Zürich", "t": [1, null]}}<end_of_sentence>\n'
        "<beginning_of_sentence>system function_setting=functions\n"
        '{"name": "weather", "parameters": {"type": "object"}}<end_of_sentence>\n'
        "<beginning_of_sentence>ai name=assistant\n"
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=4), st.booleans())
def test_rendering_is_concatenation(turns, prompt):
    openings = {"system": "system ai_setting=assistant", "user": "user name=user", "assistant": "ai name=assistant"}
    messages = [{"role": role, "content": text(content)} for role, content in turns]
    wanted = "".join(f"<beginning_of_sentence>{openings[r]}\n{c}<end_of_sentence>\n" for r, c in turns)
    wanted += "<beginning_of_sentence>ai name=assistant\n" * prompt
    assert ChatTemplate().render(messages, add_generation_prompt=prompt) == wanted


@pytest.mark.parametrize("message", [
    {"role": "user", "content": "plain"}, {"role": "user", "content": []}, {"role": "tool", "content": text("x")},
    {"role": "user"}, {"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": 5},
    {"role": "user", "content": text("a") + text("b")}, {"role": "user", "content": {"type": "text", "text": "x"}},
    {"role": "user", "content": [{"type": "image", "text": "x"}]}, {"role": "user", "content": [{"text": 5}]},
    {"role": "function", "content": [{"name": "f"}]},
])  # fmt: skip
def test_messages_that_cannot_be_rendered(message):
    with pytest.raises(ChatError):
        ChatTemplate().render([message])


def test_only_the_assistant_is_learned(tokenizer):
    """The mask covers exactly what the assistant said and its end of turn."""
    messages = [
        {"role": "user", "content": text("he?")},
        {"role": "assistant", "content": text("hehe")},
        {"role": "user", "content": text("he")},
        {"role": "assistant", "content": text("\n!")},
    ]
    template = ChatTemplate()
    ids, mask = template.encode(tokenizer, messages)
    said = [tokenizer.decode_bytes(part) for part in np.split(ids, np.flatnonzero(np.diff(mask)) + 1)][1::2]
    assert said == [b"hehe", b"\n!"]
    assert (ids[mask] == tokenizer.end_of_text_id).sum() == 2
    assert (ids == tokenizer.end_of_text_id).sum() == 4
    prompt, nothing = template.encode(tokenizer, messages[:1], add_generation_prompt=True)
    assert not nothing.any()
    np.testing.assert_array_equal(prompt, ids[: len(prompt)])


def test_templates_of_a_folder(tmp_path):
    assert "ai_setting" in ChatTemplate.from_folder(tmp_path).render([{"role": "system", "content": text("a")}])
    own = "{% for m in messages %}\n  {% generation %}{{ m.content }}{% endgeneration %}|\n{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
    assert ChatTemplate.from_folder(tmp_path).render([{"content": "a"}, {"content": "b"}]) == "a|\nb|\n"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | tojson }}")
    assert ChatTemplate.from_folder(tmp_path).render([{"é": "<"}]) == '[{"é": "<"}]'


@pytest.mark.parametrize("source", [
    "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}", "{{ messages.append(1) }}",
])  # fmt: skip
def test_templates_are_sandboxed(source):
    with pytest.raises(ChatError):
        ChatTemplate(source).render([{"role": "user"}])


@pytest.mark.parametrize("source", [
    "{{ 1 / messages[0].zero }}", "{{ 10.0 ** messages[0].large }}", "{{ range(messages[0].large * 1000000) }}",
    "{%- macro f() -%}{{ f() }}{%- endmacro -%}{{ f() }}", "{{ 'a'.encode().decode('ascii', messages) }}",
])  # fmt: skip
def test_whatever_a_template_does_is_a_chat_error(source):
    with pytest.raises(ChatError, match="cannot render"):
        ChatTemplate(source).render([{"zero": 0, "large": 400}])


@pytest.mark.parametrize(("name", "content", "words"), [
    ("tokenizer_config.json", "{", "JSON"),
    ("tokenizer_config.json", "[1]", "one JSON object"),
    ("tokenizer_config.json", b"\xff", "cannot be read"),
    ("tokenizer_config.json", '{"chat_template": 5}', "must be a template"),
    ("tokenizer_config.json", '{"chat_template": ""}', "must be a template"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "tool", "template": "x"}]}', "'default', only 'tool'"),
    ("tokenizer_config.json", '{"chat_template": []}', "no entry 'default'"),
    ("tokenizer_config.json", '{"chat_template": [1]}', "every entry"),
    ("tokenizer_config.json", '{"chat_template": "{% for %}"}', "not valid"),
    ("chat_template.jinja", b"\xff", "cannot be read"),
    ("chat_template.jinja", "{% for %}", "not valid"),
])  # fmt: skip
def test_bad_template_files_name_themselves(name, content, words, tmp_path):
    """Nothing that is there is silently replaced by the built-in template."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ChatError, match=words) as caught:
        ChatTemplate.from_folder(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_link_to_nothing_is_not_absent(name, tmp_path):
    (tmp_path / name).symlink_to("nothing")
    with pytest.raises(ChatError, match=rf"{name}: is no regular file"):
        ChatTemplate.from_folder(tmp_path)


def test_the_default_of_several_templates(tmp_path):
    several = [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert ChatTemplate.from_folder(tmp_path).render([{"content": "a"}]) == "a"


def test_broken_template():
    with pytest.raises(ChatError, match="not valid"):
        ChatTemplate("{% for %}")

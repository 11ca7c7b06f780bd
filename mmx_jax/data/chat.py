"""Chat rendering: messages to text, and to token ids with a mask of what the assistant said (model.md 12.3).

A model's own Jinja template is used when its tokenizer files have one; MiniMax-Text-01's format is built in.
"""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int32
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmx_jax.data.errors import DataError
from mmx_jax.data.tokenizer import Tokenizer

MINIMAX_TEMPLATE = r"""
{%- for message in messages -%}
  {%- if message.content is string or message.content is mapping or not message.content -%}
    {{- raise_exception("content must be a list such as [{'type': 'text', 'text': ...}]") -}}
  {%- elif message.content | length > 1 -%}
    {{- raise_exception("content has " ~ message.content | length ~ " items; the format has room for one a message") -}}
  {%- elif message.role != 'function' and message.content[0].type | default('text') != 'text' -%}
    {{- raise_exception("content of type " ~ message.content[0].type ~ " is no text") -}}
  {%- endif -%}
  {%- if message.role == 'system' -%}
    {{- '<beginning_of_sentence>system ai_setting=assistant\n' + message.content[0].text + '<end_of_sentence>\n' -}}
  {%- elif message.role == 'user' -%}
    {{- '<beginning_of_sentence>user name=user\n' + message.content[0].text + '<end_of_sentence>\n' -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<beginning_of_sentence>ai name=assistant\n' -}}
    {%- generation -%}{{- message.content[0].text + '<end_of_sentence>' -}}{%- endgeneration -%}
    {{- '\n' -}}
  {%- elif message.role == 'function' -%}
    {%- set answer = {'name': message.content[0].name, 'response': message.content[0].response} -%}
    {{- '<beginning_of_sentence>system function_response=functions\n' + answer | tojson + '<end_of_sentence>\n' -}}
  {%- else -%}
    {{- raise_exception("role must be system, user, assistant or function, not " ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if functions -%}
  {{- '<beginning_of_sentence>system function_setting=functions\n' -}}
  {%- for function in functions -%}
    {{- function | tojson -}}{{- '\n' if not loop.last -}}
  {%- endfor -%}
  {{- '<end_of_sentence>\n' -}}
{%- endif -%}
{%- if add_generation_prompt -%}
  {{- '<beginning_of_sentence>ai name=assistant\n' -}}
{%- endif -%}
"""
"""MiniMax-Text-01's format. Several functions are given one JSON object a line."""


class ChatError(DataError):
    """Messages that a template cannot render, or a template that is none."""


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: the text between is what the assistant said."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        # No message can hold this mark: it is made after they are written and differs for every template.
        self.mark = f"\0{uuid.uuid4().hex}\0"

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        """The block's text between two marks."""
        return f"{self.mark}{caller()}{self.mark}"


def _raise(message: str) -> None:
    raise ChatError(message)


def _described(error: Exception) -> str:
    """A template's own words, or the kind of any other error, which says more than its message."""
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _read_text(file: Path) -> str:
    """Text of a file. Raises: ChatError."""
    if not file.is_file():
        raise ChatError(f"{file}: is no regular file")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ChatError(f"{file}: cannot be read: {error}") from error


def _default_of(templates: list[Any], file: Path) -> Any:
    """The template named "default" of several. Raises: ChatError when there is none; another would be a guess."""
    named = {}
    for entry in templates:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "template" not in entry:
            raise ChatError(f"{file}: every entry of chat_template must have a name and a template")
        named[entry["name"]] = entry["template"]
    if "default" not in named:
        names = ", ".join(map(repr, named)) or "none"
        raise ChatError(f"{file}: chat_template has no entry 'default', only {names}; name one of them 'default'")
    return named["default"]


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as it is, without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """A Jinja chat template in a sandbox: a template from a file can compute text and nothing else."""

    def __init__(self, source: str = MINIMAX_TEMPLATE):
        """Compiles a template.

        Raises: ChatError for text that is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        (generation,) = (e for e in environment.extensions.values() if isinstance(e, _Generation))
        self._mark = generation.mark
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a template is a program, and fails to compile like one
            raise ChatError(f"the chat template is not valid: {_described(error)}") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate":
        """The template of a folder with tokenizer files: chat_template.jinja, tokenizer_config.json, or the built-in.

        Raises: ChatError for files that cannot be read, a template that is not valid, and several of which none is the
          default.
        """
        folder = Path(folder)
        file = folder / "chat_template.jinja"
        if os.path.lexists(file):
            return cls._from_file(file, _read_text(file))
        config = folder / "tokenizer_config.json"
        if not os.path.lexists(config):
            return cls()
        try:
            description = json.loads(_read_text(config))
        except (ValueError, RecursionError) as error:
            raise ChatError(f"{config}: is not valid JSON: {error}") from error
        if not isinstance(description, dict):
            raise ChatError(f"{config}: must hold one JSON object")
        template = description.get("chat_template")
        if template is None:
            return cls()
        return cls._from_file(config, _default_of(template, config) if isinstance(template, list) else template)

    @classmethod
    def _from_file(cls, file: Path, template: Any) -> "ChatTemplate":
        if not isinstance(template, str) or not template:
            raise ChatError(f"{file}: chat_template must be a template or a list of named ones")
        try:
            return cls(template)
        except ChatError as error:
            raise ChatError(f"{file}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        functions: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
          messages: each with `role` and `content`, a list of items such as {"type": "text", "text": ...}.
          functions: definitions that the model may call.
          add_generation_prompt: ends with the opening of the assistant's turn.

        Raises: ChatError for messages that the template cannot render.
        """
        return "".join(text for text, _ in self._pieces(messages, functions, add_generation_prompt))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        functions: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> tuple[Int32[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """Token ids of a conversation, and which of them the assistant said, its end of turn included.

        Text is cut where the assistant's begins and ends, as it is when the assistant generates. Names of control
        tokens are read as these tokens wherever they stand, also inside messages.

        Raises: ChatError as `render`.
        """
        ids: list[int] = []
        mask: list[bool] = []
        for text, said in self._pieces(messages, functions, add_generation_prompt):
            piece = tokenizer.encode(text, special=True)
            ids += piece
            mask += [said] * len(piece)
        return np.array(ids, np.int32), np.array(mask, bool)

    def _pieces(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]], prompt: bool
    ) -> list[tuple[str, bool]]:
        """(text, whether the assistant said it), in order."""
        try:
            text = self._template.render(
                messages=list(messages), functions=list(functions), tools=list(functions), add_generation_prompt=prompt
            )
        except ChatError:
            raise
        except Exception as error:  # a template is a program, and fails like one
            raise ChatError(f"the chat template cannot render these messages: {_described(error)}") from error
        parts = text.split(self._mark)
        return [(part, bool(i % 2)) for i, part in enumerate(parts) if part]

"""Renders chat templates as transformers does, without transformers: its import takes a second.

Templates come with models, so they run in Jinja's immutable sandbox. The environment is that of transformers' own
`apply_chat_template` (5.24); tests/models/test_tokenizer.py compares the two on templates that use all of it. Leaves
out documents and the mask of assistant tokens.

    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", {"eos_token": "</s>"})
    template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_END = "\ue000end of the last message\ue000 "
"""Marks where a message to be continued ends."""


class ChatTemplate:
    """One model's template; see the file's example."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """special_tokens: variables of the template such as `bos_token`. Raises jinja2.TemplateError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _GuardedNamespace
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The whole prompt as text, special tokens included. Raises jinja2.TemplateError if the template refuses.

        continue_final_message: the prompt ends with the last message, for the model to go on with it. variables: more
        of the template's own.
        """
        turns = [dict(message) for message in messages]
        if continue_final_message:
            turns[-1]["content"] += _END
        text = self._template.render(
            **{**self._special_tokens, **variables},
            messages=turns,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
        return _before_end(text) if continue_final_message else text


def _before_end(text: str) -> str:
    """The text before the mark. A template that trims messages has taken the mark's space, so it trims there too."""
    mark = _END.rstrip()
    at = text.find(mark)
    if text.count(mark) != 1:
        raise TemplateError("the last message is not in the prompt once, so it cannot be continued")
    return text[:at] if text.startswith(_END, at) else text[:at].rstrip()


class _GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}` marks the assistant's tokens for training; here it only groups."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _GuardedNamespace(Namespace):
    """`namespace` for templates, which refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  # so that `namespace(self=...)` works
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot set {name!r} on a namespace; rename it without the underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

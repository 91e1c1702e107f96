"""Chat templates, rendered for one photo and one question in the sandbox that transformers runs them in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from runtime.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Template

    from runtime.bundle import ChatTemplate


def render_chat(template: ChatTemplate, question: str, *, now: datetime) -> str:
    """Renders the conversation up to where the answer starts; `now` is the time that `strftime_now` tells.

    The template sees what transformers 5.23 hands over: the messages, no tools and no documents, the special tokens by
    their roles. Raises RequestError when it cannot be rendered, the template's own refusals included.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if template.system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": template.system}]})
    variables: dict[str, Any] = {
        **template.special_tokens,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "strftime_now": now.strftime,
    }
    try:
        return _compiled(template.text).render(variables)
    except Exception as error:  # the template is somebody else's program and may raise anything
        raise RequestError(f"the chat template cannot be rendered: {error or type(error).__name__}") from error


@lru_cache(maxsize=4)
def _compiled(text: str) -> Template:
    """Compiles a template; sandboxed, because it is somebody else's program."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's text for training and renders as what it holds."""

        tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

        def parse(self, parser: Parser) -> nodes.Node:
            # A call with a body, as in transformers: what is set inside does not reach outside.
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

        def _body(self, caller: Macro) -> str:
            return caller()

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name that begins with an underscore, got {name!r}")

    class Names(Namespace):
        """`namespace()`, without names that Python keeps for itself."""

        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            values = dict(*args, **kwargs)
            for name in values:
                check(name)
            super().__init__(values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    class Dict:
        """`dict()` and `dict.fromkeys()`, and nothing else of Python's type."""

        def __call__(self, /, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    def raise_exception(message: str) -> str:
        raise TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # Jinja's own would write < and > as escapes
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, namespace=Names, dict=Dict())
    return environment.from_string(text)

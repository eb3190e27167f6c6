"""The Jinja environment of chat templates: an immutable sandbox with what published templates expect, and budgets.

A template is a program that came with the weights. The sandbox keeps it from attributes and from changing its inputs;
the budgets keep loops, repetition and concatenation from filling memory. They do not bound time to the millisecond.
"""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_RANGE_ITEMS = 100_000  # of all ranges in one rendering together


class TemplateLimitError(jinja2.TemplateError):
    """A template went over a budget."""


class _Generator(CodeGenerator):
    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        # `a ~ b` compiles to a plain join, which no operator hook sees; doubling a string in a loop must not escape.
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates.

    Args:
        max_chars: largest string that a template may build, and largest rendering, in characters.
        now: the clock behind `strftime_now`.
    """

    intercepted_binops = frozenset(("+", "*", "**"))
    code_generator_class = _Generator

    def __init__(self, max_chars: int, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.max_chars = max_chars
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda spec: now().strftime(spec)
        # Both build text of any length that they are asked for, and no chat needs them.
        del self.globals["lipsum"], self.filters["center"]

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TemplateLimitError("the operator ** is not supported in chat templates")
        if operator == "*":
            self._check_size(_length(left) * right if isinstance(right, int) else 0)
            self._check_size(_length(right) * left if isinstance(left, int) else 0)
        if operator == "+":
            self._check_size(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        # str.ljust(10**9) and its like take a size where others take text.
        if isinstance(getattr(obj, "__self__", None), str):
            for argument in args:
                if isinstance(argument, int):
                    self._check_size(argument)
        return super().call(context, obj, *args, **kwargs)

    def concatenate(self, parts: tuple[Any, ...]) -> str:
        texts = [str(part) for part in parts]
        self._check_size(sum(map(len, texts)))
        return "".join(texts)

    def limited_range(self) -> Callable[..., range]:
        """The `range` of one rendering, whose items all count against one budget."""
        left = MAX_RANGE_ITEMS

        def limited(*args: int) -> range:
            nonlocal left
            items = range(*args)
            left -= len(items)
            if left < 0:
                raise TemplateLimitError(f"range() gave more than {MAX_RANGE_ITEMS} items in one rendering")
            return items

        return limited

    def render_limited(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        parts: list[str] = []
        left = self.max_chars
        stream: Iterator[str] = template.generate(variables | {"range": self.limited_range()})
        for part in stream:
            left -= len(part)
            if left < 0:
                raise TemplateLimitError(f"the rendered text is longer than {self.max_chars} characters")
            parts.append(part)
        return "".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self.max_chars:
            raise TemplateLimitError(f"a value of {size} characters or items is over the limit of {self.max_chars}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter: no HTML escapes, and keys in the order of the client.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

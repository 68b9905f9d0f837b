"""Chat templates: conversations as text, by a program that a file brings.

Control tokens mark turns, so text from outside must never become one. Before
a template sees a content, its characters that begin or end a control token
are replaced by stand-ins; they are restored when the control tokens of the
rendered text have been found.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeAlias, get_args

from dsjax.config.checks import InputError, require

Role: TypeAlias = Literal['assistant', 'developer', 'system', 'tool', 'user']
ROLES: tuple[str, ...] = get_args(Role)
_CALL = ('type', 'id', 'function', 'name', 'arguments')  # of a tool's call
_CONTROL_LIKE = re.compile(r'<.+>$|\[.+\]$', re.DOTALL)


def _environment() -> Any:
  """What templates expect: that of transformers, in a sandbox."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for training."""

    tags = {'generation'}

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return jinja2.nodes.Scope(body, lineno=line)

  def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

  def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

  def tojson(value: object, ensure_ascii: bool = False,
             indent: int | str | None = None,
             separators: tuple[str, str] | None = None,
             sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent,
                      separators=separators, sort_keys=sort_keys)

  env: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=[Generation, jinja2.ext.loopcontrols])
  env.filters['tojson'] = tojson
  env.globals |= dict(raise_exception=raise_exception,
                      strftime_now=strftime_now)
  return env


class ChatTemplate:
  """A compiled template.

  Attributes:
    literals: the strings in its source.
  """

  def __init__(self, source: str, texts: Mapping[str, str]) -> None:
    """texts: of BOS, EOS and the like, by the name that templates use.

    Raises:
      InputError: it does not parse.
    """
    import jinja2

    env = _environment()
    try:
      tree = env.parse(source)
      self._template = env.from_string(source)
    except jinja2.TemplateError as error:
      raise InputError(f'tokenizer.chat_template: {error}') from error
    self._texts = dict(texts)
    self.literals = frozenset(
        const.value for const in tree.find_all(jinja2.nodes.Const)
        if isinstance(const.value, str)) | {
            data.data for data in tree.find_all(jinja2.nodes.TemplateData)}

  def render(self, messages: Sequence[Mapping[str, Any]],
             add_generation_prompt: bool,
             variables: Mapping[str, Any]) -> str:
    """The text of messages. Raises InputError: the template refuses them."""
    try:
      return self._template.render(**self._texts | dict(variables) | dict(
          messages=messages, tools=None, documents=None,
          add_generation_prompt=add_generation_prompt))
    except Exception as error:  # the template is a foreign program
      raise InputError(f'messages: the chat template says: {error}') from error

  def turn_tokens(self, added: Iterable[str]) -> frozenset[str]:
    """Tokens that the template writes around turns.

    Some files do not mark them as special (DeepSeek). Markup of pairs, such
    as <think> and </think>, counts only where it surrounds a user's message.

    Args:
      added: texts of the tokens that are not special and are found in a text
        before it is cut into pieces.
    """
    added = {text for text in added if _CONTROL_LIKE.match(text)}

    def probe(*roles: str, to_answer: bool = False) -> str:
      try:
        return self.render([{'role': role, 'content': 'x'} for role in roles],
                           to_answer, {})
      except InputError:  # some want other roles, or another order
        return ''

    turns = probe('user', 'assistant', 'user')
    written = ' '.join((
        *self.literals, turns, probe('user', to_answer=True),
        *(probe(role, 'user') for role in ROLES),
        *(probe('user', 'assistant', role) for role in ROLES)))

    def is_turn(text: str) -> bool:
      paired = text[:1] == '<' and ({f'</{text[1:]}', f'<{text[2:]}'} & added)
      return text in (turns if paired else written)

    return frozenset(filter(is_turn, added))


def _harmless(literal: str, control: Iterable[str],
              edges: Iterable[str]) -> bool:
  """Whether no control token can begin or end inside the literal."""
  for i in (i for i, char in enumerate(literal) if char in edges):
    start, rest = literal[:i + 1], literal[i:]
    for token in control:
      if (token.startswith(rest) or rest.startswith(token)
          or token.endswith(start) or start.endswith(token)):
        return False
  return True


class Guard:
  """Contents whose characters cannot begin or end a control token."""

  def __init__(self, control: Iterable[str],
               literals: Iterable[str] = ()) -> None:
    """literals: strings that the template looks for in contents, such as
    </think>. A content's are left as they are, unless a control token could
    begin or end in them."""
    control = list(control)
    edges = sorted({token[i] for token in control for i in (0, -1)})
    require(len(edges) < 0x7FF, 'tokenizer.ggml.tokens', len(edges),
            'control tokens with 2046 first and last characters or fewer')
    # Lone surrogates: no valid text holds one, so none can be forged.
    self._hide = {ord(char): 0xD800 + i for i, char in enumerate(edges)}
    self._show = {code: chr(char) for char, code in self._hide.items()}
    self._kept = splitter(
        text for text in literals if len(text) > 1 and set(text) & set(edges)
        and _harmless(text, control, edges))

  def hide(self, value: Any) -> Any:
    """The value with stand-ins in its strings."""
    if isinstance(value, str):
      return ''.join(
          part if is_kept else part.translate(self._hide)
          for part, is_kept in split(self._kept, value))
    if isinstance(value, Mapping):
      return {key if key in _CALL else self.hide(key): self.hide(item)
              for key, item in value.items()}
    if isinstance(value, list | tuple):
      return [self.hide(item) for item in value]
    return value

  def show(self, text: str) -> str:
    """A text as it was."""
    return text.translate(self._show)


def splitter(tokens: Iterable[str]) -> re.Pattern[str] | None:
  """A pattern whose split() keeps the tokens, longest first; None if none."""
  longest_first = sorted(tokens, key=len, reverse=True)
  return (re.compile(f'({"|".join(map(re.escape, longest_first))})')
          if longest_first else None)


def split(pattern: re.Pattern[str] | None,
          text: str) -> list[tuple[str, bool]]:
  """(part, is token) pairs of the text, without empty parts."""
  parts = pattern.split(text) if pattern else [text]
  return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]

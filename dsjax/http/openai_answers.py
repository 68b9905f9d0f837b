"""OpenAI's answers as data, whole or in the chunks of a stream."""

import codecs
from collections.abc import Sequence
from typing import Any

from dsjax.checkpoints.tokenizer import Tokenizer
from dsjax.http import openai_schema
from dsjax.runtime.output import Update

LOWEST = -9999.0  # JSON has no minus infinity


class ResponseBuilder:
  """Makes the JSON of one call from the updates of its requests."""

  def __init__(self, body: openai_schema.Completion | openai_schema.Chat,
               id: str, created: int, prompt_lens: Sequence[int],
               tokenizer: Tokenizer | None) -> None:
    self.body, self.tokenizer = body, tokenizer
    self.head: dict[str, Any] = {
        'id': ('chatcmpl-' if body.chat else 'cmpl-') + id,
        'object': body.kind, 'created': created, 'model': body.model}
    self.prompt_tokens, self.output_tokens = sum(prompt_lens), 0
    self.cached_tokens = 0
    self._told: set[int] = set()  # choices whose role is out
    self._offsets: dict[int, _Offsets] = {}  # by choice

  def usage(self) -> dict[str, Any]:
    """Tokens read and written; cached: whose KV was kept, known at the end."""
    return {'prompt_tokens': self.prompt_tokens,
            'completion_tokens': self.output_tokens,
            'total_tokens': self.prompt_tokens + self.output_tokens,
            'prompt_tokens_details': {'cached_tokens': self.cached_tokens}}

  def _count(self, index: int, update: Update) -> None:
    # A prompt of several answers counts once.
    self.output_tokens += len(update.tokens)
    if update.record and index % (self.body.n or 1) == 0:
      self.cached_tokens += update.record.cached_tokens

  def chunks(self, index: int, update: Update) -> list[dict[str, Any]]:
    """The chunks of a stream for one update.

    Those of a chat tell the role first, and at the end, in an empty delta, why
    it ended.
    """
    self._count(index, update)
    logprobs = self._logprobs(index, update)
    if not self.body.chat:
      return [self._chunk(index, logprobs, update.reason, text=update.text)]
    chunks = []
    if index not in self._told:
      self._told.add(index)
      chunks.append(self._chunk(index, delta={'role': 'assistant',
                                              'content': ''}))
    if update.tokens or update.text:
      chunks.append(self._chunk(index, logprobs,
                                delta={'content': update.text}))
    if update.reason:
      chunks.append(self._chunk(index, reason=update.reason, delta={}))
    return chunks

  def _chunk(self, index: int, logprobs: dict[str, Any] | None = None,
             reason: str | None = None, **said: Any) -> dict[str, Any]:
    chunk: dict[str, Any] = self.head | {'choices': [{
        'index': index, 'finish_reason': reason, 'logprobs': logprobs} | said]}
    if self.body.chat:
      chunk['object'] = 'chat.completion.chunk'
    wanted = self.body.usage_wanted
    if wanted.include_usage or wanted.continuous_usage_stats:
      chunk['usage'] = (self.usage() if wanted.continuous_usage_stats
                        else None)
    return chunk

  def last(self) -> dict[str, Any] | None:
    """The chunk after all others, of usage alone; None unless asked for."""
    if not self.body.usage_wanted.include_usage:
      return None
    kind = 'chat.completion.chunk' if self.body.chat else self.body.kind
    return self.head | {'object': kind, 'choices': [], 'usage': self.usage()}

  def full(self, updates: Sequence[Update]) -> dict[str, Any]:
    """The unstreamed answer: an Update with everything for each choice."""
    choices = []
    for index, update in enumerate(updates):
      self._count(index, update)
      choice = {'index': index, 'finish_reason': update.reason,
                'logprobs': self._logprobs(index, update)}
      choice |= ({'message': {'role': 'assistant', 'content': update.text,
                              'refusal': None}}
                 if self.body.chat else {'text': update.text})
      choices.append(choice)
    return self.head | {'choices': choices, 'usage': self.usage()}

  def _bytes(self, token: int) -> bytes:
    return self.tokenizer.token_bytes(token) if self.tokenizer else b''

  def _spell(self, token: int) -> tuple[str, list[int]]:
    """A token's name, its text where that is whole characters; its bytes."""
    raw = self._bytes(token)
    try:
      text = raw.decode()
    except UnicodeDecodeError:
      text = 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in raw)
    return text or f'token_id:{token}', list(raw)

  def _named(self, rows: Sequence[tuple[int, float]]) -> dict[str, float]:
    """{name: log-probability} of tokens; a second of the same text has its
    id."""
    named: dict[str, float] = {}
    for token, logprob in rows:
      name, _ = self._spell(token)
      named[f'token_id:{token}' if name in named else name] = max(
          logprob, LOWEST)
    return named

  def _logprobs(self, index: int, update: Update) -> dict[str, Any] | None:
    if self.body.num_logprobs is None:
      return None
    rows = list(zip(update.tokens, update.logprobs, strict=True))
    if self.body.chat:
      def entry(token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._spell(token)
        return {'token': text, 'bytes': raw, 'logprob': max(logprob, LOWEST)}
      return {'content': [entry(token, logprob) | {
          'top_logprobs': [entry(*other) for other in top]}
                          for token, (logprob, top) in rows], 'refusal': None}
    offsets = self._offsets.setdefault(index, _Offsets())
    return {
        'tokens': [self._spell(token)[0] for token, _ in rows],
        'token_logprobs': [max(logprob, LOWEST) for _, (logprob, _) in rows],
        'top_logprobs': [self._named(top if token in dict(top) else (
            *top, (token, logprob))) for token, (logprob, top) in rows],
        'text_offset': offsets.push([self._bytes(t) for t in update.tokens],
                                    len(update.text), bool(update.reason))}


class _Offsets:
  """Where in a growing text its tokens begin, in characters."""

  def __init__(self) -> None:
    self._utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._count = self._said = 0

  def push(self, tokens: Sequence[bytes], said: int, ended: bool
           ) -> list[int]:
    """Of each of the next tokens, the character that its first byte is in.

    said: characters of the text that came with them. ended: no more will;
    tokens cut off by a stop string are then at the text's end.
    """
    self._said += said
    offsets = list(map(self._begin, tokens))
    return [min(x, self._said) for x in offsets] if ended else offsets

  def _begin(self, raw: bytes) -> int:
    self._count += len(self._utf8.decode(raw[:1]))
    whole = bool(raw) and not self._utf8.getstate()[0]
    begin = self._count - whole
    self._count += len(self._utf8.decode(raw[1:]))
    return begin

"""Text of one sequence as it grows: whole characters, and stop strings."""

import codecs
from collections.abc import Sequence

from dsjax.checkpoints.tokenizer import Tokenizer
from dsjax.config.checks import require


class Stream:
  """Text of one token sequence as it grows; never half a character.

  The pushes and finish() together give exactly tokenizer.decode(ids). Each
  push costs the token's bytes, whatever came before.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, token_id: int) -> str:
    """The text that this token completes; '' inside a character."""
    return self._utf8.decode(self._tokenizer.token_bytes(token_id))

  def finish(self) -> str:
    """What an unfinished character leaves: '' or U+FFFD."""
    return self._utf8.decode(b'', final=True)


class StopMatcher:
  """Ends a growing text before the first stop string that it completes.

  The stop string that is complete first wins, the longest of those that end
  together, however the text was cut into pushes. Text that may be the start
  of a stop string is held back. Each character costs O(1) per stop string,
  amortised (Knuth, Morris, Pratt).

  Attributes:
    hit: whether a stop string was found.
  """

  def __init__(self, stops: str | Sequence[str]) -> None:
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    require(all(isinstance(s, str) and s for s in stops), 'stop', stops,
            'non-empty strings')
    self.hit = False
    self._stops = stops
    self._borders = [_borders(stop) for stop in stops]
    self._matched = [0] * len(stops)  # characters of each stop matched
    self._held = ''

  def push(self, text: str, may_end: bool = True) -> tuple[str, bool]:
    """(text that may be shown, whether a stop string is complete).

    may_end: else one that is complete with this text is passed over.
    """
    if self.hit:
      return '', True
    for i, char in enumerate(text):
      matched = self._advance(char)
      if matched and may_end:
        self.hit = True
        seen = self._held + text[:i + 1]
        self._held = ''
        return seen[:len(seen) - matched], True
    text = self._held + text
    cut = len(text) - max(self._matched, default=0)
    self._held = text[cut:]
    return text[:cut], False

  def _advance(self, char: str) -> int:
    """Matches one character; the length of the longest stop it completes."""
    longest = 0
    for k, (stop, borders) in enumerate(
        zip(self._stops, self._borders, strict=True)):
      count = self._matched[k]
      while count and stop[count] != char:
        count = borders[count - 1]
      count += stop[count] == char
      if count == len(stop):
        longest, count = max(longest, count), borders[-1]
      self._matched[k] = count
    return longest

  def finish(self) -> str:
    """The text still held back; '' after a hit."""
    held, self._held = self._held, ''
    return held


def _borders(text: str) -> list[int]:
  """For each prefix, its longest proper prefix that is also its suffix."""
  borders = [0]
  for char in text[1:]:
    count = borders[-1]
    while count and text[count] != char:
      count = borders[count - 1]
    borders.append(count + (text[count] == char))
  return borders

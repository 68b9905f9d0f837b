import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsjax.checkpoints.stops import StopMatcher, Stream, _borders
from dsjax.config.checks import InputError
from tests.checkpoints.tokenizer_test import ENCODABLE

# --- streams -----------------------------------------------------------------


def streamed(tokenizer, ids):
  stream = Stream(tokenizer)
  return [stream.push(i) for i in ids], stream.finish()


@given(ids=st.lists(st.integers(0, 49151)))
def test_stream_of_any_tokens_adds_up_to_decode(smollm, ids):
  pushes, rest = streamed(smollm, ids)
  assert ''.join(pushes) + rest == smollm.decode(ids)


@given(text=ENCODABLE)
def test_stream_of_text_has_whole_characters(smollm, text):
  pushes, rest = streamed(smollm, smollm.encode(text))
  assert ''.join(pushes) == text and rest == ''
  assert ''.join(pushes).count('\ufffd') == text.count('\ufffd')


def test_stream_holds_half_an_emoji_until_it_is_whole(smollm):
  ids = smollm.encode('👍')
  assert len(ids) > 1
  assert streamed(smollm, ids) == (['' for _ in ids[1:]] + ['👍'], '')
  assert streamed(smollm, ids[:-1]) == (['' for _ in ids[1:]], '\ufffd')


# --- stop strings ------------------------------------------------------------


def naive_stop(stops, text):
  """(text before the stop string that is complete first, whether one is)."""
  for end in range(1, len(text) + 1):
    lengths = [len(s) for s in stops if text[:end].endswith(s)]
    if lengths:
      return text[:end - max(lengths)], True
  return text, False


@given(text=st.text('ab', min_size=1))
def test_borders_match_their_definition(text):
  for end, got in enumerate(_borders(text), start=1):
    part = text[:end]
    assert got == max(n for n in range(end)
                      if part[:n] == part[end - n:])


def run_stop(stops, pieces):
  matcher, shown = StopMatcher(stops), ''
  for piece in pieces:
    text, hit = matcher.push(piece)
    shown += text
    if hit:
      break
  return shown + matcher.finish(), matcher.hit


@given(stops=st.lists(st.text('ab', min_size=1, max_size=4), max_size=3),
       pieces=st.lists(st.text('abc', max_size=4), max_size=8))
def test_stop_matches_a_naive_search(stops, pieces):
  assert run_stop(stops, pieces) == naive_stop(stops, ''.join(pieces))


@given(stops=st.lists(st.text('ab', min_size=1, max_size=4), min_size=1,
                      max_size=3), text=st.text('abc', max_size=12))
def test_what_is_held_back_is_the_longest_start_of_a_stop(stops, text):
  matcher = StopMatcher(stops)
  shown, hit = matcher.push(text)
  if not hit:
    held = text[len(shown):]
    starts = [text[i:] for i in range(len(text) + 1)
              if any(s.startswith(text[i:]) for s in stops)]
    assert held == starts[0]


def test_stop_across_token_borders():
  matcher = StopMatcher(['END'])
  assert matcher.push('so E') == ('so ', False)
  assert matcher.push('N') == ('', False)
  assert matcher.push('D more') == ('', True)
  assert matcher.push('more') == ('', True)
  assert matcher.finish() == ''


def test_a_false_start_is_shown_after_all():
  matcher = StopMatcher('aab')
  assert [matcher.push(c)[0] for c in 'aaac'] == ['', '', 'a', 'aac']
  assert matcher.push('aa') == ('', False)
  assert matcher.finish() == 'aa'


def test_no_stops_holds_nothing():
  assert StopMatcher(()).push('text') == ('text', False)


@pytest.mark.parametrize('stops', [[''], [1], ['a', None]])
def test_bad_stop_strings_are_refused(stops):
  with pytest.raises(InputError, match='stop'):
    StopMatcher(stops)


@given(text=st.text('ab', max_size=12), early=st.integers(0, 12),
       stops=st.lists(st.text('ab', min_size=1, max_size=3), min_size=1,
                      max_size=3))
@example(text='aaa', early=2, stops=['aa'])
def test_what_is_complete_too_early_is_passed_over(text, early, stops):
  matcher, shown, hit = StopMatcher(stops), '', False
  for i, char in enumerate(text):
    piece, hit = matcher.push(char, i >= early)
    shown += piece
    if hit:
      break
  shown += matcher.finish()
  ends = [i for i in range(early, len(text))
          if any(text[:i + 1].endswith(stop) for stop in stops)]
  if not ends:
    assert (shown, hit) == (text, False)
    return
  whole = text[:ends[0] + 1]
  # What was shown before cannot be taken back.
  assert hit and whole.startswith(shown)
  assert any(shown + stop == whole for stop in stops)

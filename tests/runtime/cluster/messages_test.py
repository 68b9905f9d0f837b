"""Messages and page tables: data, without a process."""


import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.runtime.cluster import messages
from dsjax.runtime.cluster.page_tables import PageTables
from dsjax.scheduling.events import (
  Chunk,
  Load,
  Migrate,
  Row,
  RunDecode,
  RunPrefill,
)

DECODE = RunDecode(1, 7, 3, 2, (Row(4, 9, 12, (3, 5)), Row(5, 1, 2, ())))
PREFILL = RunPrefill(0, 8, (Chunk(6, 0, 5, (1, 2), True, 4),), 3, DECODE.rows)
MOVE = Migrate(3, 1, 0, (1, 2), 1, (4,), 7, 2)
ALL = (
    messages.Build({'role': 'decode', 'recipe': {'name': 'tiny'}}),
    messages.Warm({'0': {'tp': 1}}, {}),
    messages.Admit(1, (5, 6), 2, {'stop': ['a', 'Row'],
                                  'logit_bias': [[3, 1.5]]}),
    messages.Forget(1), PageTables().pack(DECODE), PageTables().pack(PREFILL),
    messages.Offer(2, 1, MOVE, True), messages.Withdraw(2, False),
    messages.Pull(2, 0, '127.0.0.1:1', MOVE, False), messages.Drop(2),
    messages.Ping(), messages.Refused('why'), messages.Hello('1', 0, 9),
    messages.Failed(True, 'no'),
    messages.Built({'role': 'decode'}, 3, '', {'0': 'cpu:0'}, 7),
    messages.Warmed('decode 1'), messages.Ready(), messages.StageDone(),
    messages.Stepped(7, (1, 2), ((0, -1.5, (1,), (-1.5,)),), .5, 1., .5),
    messages.Offered(2, 8, 9, 10, .5),
    messages.Landed(2, 9, 10, .5, 1.),
    messages.Moved('127.0.0.1:2'), messages.End(1, 2), messages.Ended(1, 2, -9),
    messages.Start(1, 2, '10.0.0.1:7000', 'ff', 0, 2, {'A': 'b'}),
    messages.Broken(2, 'why'), messages.Lost('why'),
    messages.Copy(3, Load(1, 2, 0, (3,), (4,), 0, 4)),
    messages.Copied(3, 9, 'why'),
    messages.Count(), messages.Counted(1, 2, 3, 4), messages.Pong())


@pytest.mark.parametrize('message', ALL, ids=lambda m: type(m).__name__)
def test_a_message_crosses_as_it_is(message):
  assert messages.load(messages.dump(3, message)) == (3, message)


def test_every_message_is_tried():
  assert {type(message).__name__ for message in ALL} == set(
      messages._KINDS) - set(messages.event_log.LOGGED)


@pytest.mark.parametrize('data', [
    b'', b'\xff', b'{', b'[]', b'[1]', b'{}', b'["1", ["Ping"]]', b'[1, 2]',
    b'[1, ["Counted"]]', b'[1, ["Ping", 1]]', b'[1, ["System", "ls"]]',
    b'[1, ["Finish", 1, "stop"]]', b'[1, [["Ping"]]]', b'[1, null]',
    b'[' * 100_000])
def test_what_is_no_message_is_refused(data):
  with pytest.raises((ValueError, TypeError, RecursionError)):
    messages.load(data)


PAGES = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@given(st.lists(st.tuples(st.lists(st.tuples(
    st.integers(0, 3), PAGES), max_size=3, unique_by=lambda r: r[0]),
    st.booleans(), st.integers(0, 3)), max_size=12))
def test_pages_arrive_whole(commands):
  """Whatever is between two commands of a request."""
  here, there = PageTables(), PageTables()
  for rows, prefills, leaves in commands:
    command = (
        RunPrefill(0, 1, tuple(Chunk(id, 0, 1, pages, True)
                               for id, pages in rows[1:]), 0,
                   tuple(Row(id, 0, 1, pages) for id, pages in rows[:1]))
        if prefills else
        RunDecode(0, 1, 0, 1, tuple(Row(id, 0, 1, p) for id, p in rows)))
    _, sent = messages.load(messages.dump(1, here.pack(command)))
    assert there.unpack(sent) == command
    here.forget(leaves)
    there.forget(leaves)


def test_a_long_batch_is_short_on_the_wire():
  """256 rows of 64 pages: one new page each is all that crosses."""
  rows = tuple(Row(id, 900, 1000, tuple(range(id * 64, id * 64 + 64)))
               for id in range(256))
  here = PageTables()
  first = messages.dump(1, here.pack(RunDecode(0, 1, 0, 1, rows)))
  more = tuple(row._replace(pages=(*row.pages, 7)) for row in rows)
  then = messages.dump(1, here.pack(RunDecode(0, 2, 1, 1, more)))
  assert len(then) < len(first) / 10


@pytest.mark.parametrize('changes', [
    {'numbers': b'1234567'}, {'numbers': b''}, {'rows': 3}, {'chunks': 2}])
def test_a_command_that_lacks_numbers_is_refused(changes):
  run = PageTables().pack(DECODE)._replace(**changes)
  with pytest.raises(ValueError):
    PageTables().unpack(run)


def test_a_command_after_one_that_was_lost_is_refused():
  """It says that pages are as before, which the other side never had."""
  here, there = PageTables(), PageTables()
  here.pack(DECODE)
  with pytest.raises(ValueError, match='are as before'):
    there.unpack(here.pack(DECODE))

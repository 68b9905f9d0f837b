"""Roles of flexible instances, and rows that leave with a role."""

from collections.abc import Sequence

from dsjax.config.checks import require
from dsjax.config.placement import ROLES
from dsjax.scheduling.policy import InstanceView, Move, View


def home_roles(view: View, prefills: int, others: str = 'decode'
               ) -> dict[int, str]:
  """The first `prefills` flexible instances prefill, the others decode."""
  flexible = [i.index for i in view.instances if i.flips]
  require(not flexible or 0 <= prefills <= len(flexible), 'prefills', prefills,
          f'0 to {len(flexible)}, the flexible instances')
  return {index: 'prefill' if n < prefills else others
          for n, index in enumerate(flexible)}


def usable(view: View) -> list[InstanceView]:
  """The instances that may prefill or decode now, by index."""
  known = {i.index: i for i in (*view.may_prefill, *view.may_decode)}
  return [known[index] for index in sorted(known)]


def leave_prefills(view: View) -> list[Move]:
  """For rebalance: rows of instances that now only prefill go on at those that
  decode, the one with the fewest requests first. A row stays where none has
  pages for it and one more for each request there."""
  pages = {i: i.free_pages for i in view.decodes if i.role != 'prefill'}
  residents = {i: i.residents + i.num_pulls for i in pages}
  moves: list[Move] = []
  for instance in view.instances if pages else ():
    leave = instance.flips and instance.role == 'prefill'
    for row in instance.rows() if leave else ():
      target = min(pages, key=residents.__getitem__)
      left = pages[target] - row.context // target.config.page_size - 1
      if left > residents[target]:
        pages[target] = left
        residents[target] += 1
        moves.append(Move(row.id, target.index))
  return moves


def choices(count: int, now: int, fixed: Sequence[str] = ()
            ) -> list[tuple[str, ...]]:
  """Roles of so many instances, of which `now` only prefill: all mix; all mix
  and lend; or one more than now, as many, one fewer, one, or a quarter, half or
  three quarters only prefill, while the others decode only or mix.

  Args:
    fixed: roles of instances beside them. With some, all of these may only
      prefill, or only decode.
  """
  if count == 0 or count + len(fixed) < 2:
    return []
  numbers = {1, *(count * k // 4 for k in range(5)), now - 1, now, now + 1}
  splits = [('prefill',) * number + (others,) * (count - number)
            for number in sorted(numbers) if 0 <= number <= count
            for others in ('decode', 'chunked')]
  return list(dict.fromkeys([
      ('chunked',) * count, ('colocated',) * count,
      *(split for split in splits if complete((*split, *fixed)))]))


def choices_of(view: View) -> list[tuple[str, ...]]:
  """The choices for the flexible instances that are there now."""
  flexible, fixed = roles_now(view)
  return choices(len(flexible), flexible.count('prefill'), fixed)


def roles_now(view: View) -> tuple[list[str], list[str]]:
  """Roles of the instances that are there now: the flexible, the others."""
  known = usable(view)
  return ([i.role for i in known if i.flips],
          [i.role for i in known if not i.flips])


def complete(roles: Sequence[str]) -> bool:
  """Whether some of these prefill, and some decode."""
  does = [ROLES[role] for role in roles]
  return (any([role.prefills for role in does])
          and any([role.decodes for role in does]))

"""Roles of flexible instances, and rows that leave with a role."""

from dsjax.config.checks import require
from dsjax.scheduling.policy import Move, View


def home_roles(view: View, prefills: int, others: str = 'decode'
               ) -> dict[int, str]:
  """The first `prefills` flexible instances prefill, the others decode."""
  flexible = [i.index for i in view.instances if i.flips]
  require(not flexible or 0 <= prefills <= len(flexible), 'prefills', prefills,
          f'0 to {len(flexible)}, the flexible instances')
  return {index: 'prefill' if n < prefills else others
          for n, index in enumerate(flexible)}


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

"""The life of a request, of its hand-off and of an instance, as tables.

scheduler.Run moves a request from stage to stage through HOPS alone, and an
instance from status to status through STATUS alone: what they do not hold is
an ImpossibleEvent. `python -m experiments.explore --table` draws them.
"""

STAGES = {
    'absent': 'not arrived yet, or ended',
    'queued': 'in the prefill queue of an instance, or waiting for one; owns '
              'no pages',
    'loading': 'owns pages for all its tokens; some of them come from host '
               'memory, or from what another instance has kept',
    'prefilling': 'owns pages for its whole prompt; some chunks may have run, '
                  'here or, of a split one, elsewhere; streamed, it owns pages '
                  'at its target too',
    'prefilled': 'its first token is out, or its prompt is cut here; its KV '
                 'waits until the instance that goes on pulls it',
    'migrating': 'owns pages on both sides until the target has every byte',
    'decoding': "a row of an instance's batch",
    'finishing': 'its last token is in flight',
    'yielding': 'preempted; its pages wait for the commands in flight',
    'swapped': 'preempted; its KV is in host memory, or on its way there',
    'leaving': 'a row no more; it is handed off once the commands in flight '
               'are done',
    'over': 'its client has been told; its pages wait for the commands in '
            'flight',
    'abandoned': 'cancelled while it migrates or loads; its pages wait for the '
                 'copy',
}
ENDING = ('finishing', 'yielding', 'leaving', 'over')
# Stages that tables and metrics show as another one, but for ENDING.
SHOWN_AS = {'abandoned': 'migrating', 'loading': 'prefilling',
            'swapped': 'queued'}

CAUSES = {
    'plan': 'a decision, after any event: admit, pull, decode, preempt',
    'Arrived': 'of this id',
    'Cancelled': 'of this id',
    'PrefillDone': 'the oldest command of its instance',
    'DecodeDone': 'the oldest command of its instance',
    'Migrated': 'of its hand-off',
    'MigrateFailed': 'of its hand-off: broken or damaged',
    'Offloaded': 'of any instance: its host memory holds more',
    'Loaded': 'of its copy from host memory',
    'LoadFailed': 'of its copy from host memory: broken or damaged',
    'Timer': 'the lease of its hand-off ran out',
    'InstanceDown': 'the one that holds it, or the last it could wait for',
    'TargetDown': 'InstanceDown of the one that pulls it',
    'SourceDown': 'InstanceDown of the one that has kept what comes to it',
    'InstanceUp': 'any',
    'Drain': 'any',
    'Tick': 'any: roles and rows move',
}


def _hops(*rows):
  """{(stage, cause): the stages that may follow at once}."""
  table = {}
  for cause, stages, following in rows:
    for stage in stages.split():
      table[stage, cause] = (*table.get((stage, cause), ()),
                             *following.split())
  return table


# A cause may make several hops in turn (a preempted row of an idle instance
# is yielding, then queued). A pair that is not here makes none: see cell.
HOPS = _hops(
    # A life without faults.
    ('Arrived', 'absent', 'queued absent'),
    ('plan', 'queued', 'prefilling'),
    ('plan', 'prefilling', 'decoding finishing yielding'),
    ('PrefillDone', 'prefilling', 'prefilled migrating over absent'),
    ('plan', 'prefilled', 'migrating decoding'),
    ('Migrated', 'migrating', 'decoding'),
    ('plan', 'decoding', 'finishing yielding'),
    ('plan', 'yielding', 'queued absent'),
    ('PrefillDone', 'decoding', 'over'),
    ('PrefillDone', 'finishing', 'absent over'),
    ('PrefillDone', 'yielding', 'queued absent over'),
    ('PrefillDone', 'over', 'absent'),
    ('DecodeDone', 'decoding', 'over'),
    ('DecodeDone', 'finishing', 'absent over'),
    ('DecodeDone', 'yielding', 'queued absent over'),
    ('DecodeDone', 'over', 'absent'),
    # Its client goes.
    ('Cancelled', 'queued prefilled', 'absent'),
    ('Cancelled', 'prefilling decoding finishing yielding leaving', 'over'),
    ('Cancelled', 'migrating', 'abandoned'),
    # Its hand-off ends otherwise.
    ('MigrateFailed', 'migrating', 'prefilled absent'),
    ('Timer', 'migrating', 'prefilled absent'),
    ('TargetDown', 'migrating', 'prefilled absent'),
    ('Migrated', 'abandoned', 'absent'),
    ('MigrateFailed', 'abandoned', 'absent'),
    ('Timer', 'abandoned', 'absent'),
    ('TargetDown', 'abandoned', 'absent'),
    # Where it is is lost: it is prefilled elsewhere, with the tokens that are
    # out. Those of a half-done command may have been its last.
    ('InstanceDown', 'queued', 'absent'),
    ('InstanceDown', 'prefilling prefilled migrating', 'queued absent'),
    ('InstanceDown', 'decoding finishing yielding', 'queued over absent'),
    ('InstanceDown', 'over abandoned', 'absent'),
    ('TargetDown', 'prefilled', 'decoding absent'),
    # Some of its KV is in host memory.
    ('plan', 'queued', 'loading'),
    ('Loaded', 'loading', 'prefilling'),
    ('LoadFailed', 'loading', 'prefilling'),
    ('Cancelled', 'loading', 'abandoned'),
    ('Loaded', 'abandoned', 'absent'),
    ('LoadFailed', 'abandoned', 'absent'),
    ('InstanceDown', 'loading', 'queued absent'),
    # Or another instance has kept it.
    ('Migrated', 'loading', 'prefilling'),
    ('MigrateFailed', 'loading', 'prefilling'),
    ('Timer', 'loading', 'prefilling'),
    ('SourceDown', 'loading', 'prefilling'),
    ('SourceDown', 'abandoned', 'absent'),
    # A preempted row goes to host memory, and comes back.
    ('plan', 'yielding', 'swapped'),
    ('PrefillDone', 'yielding', 'swapped'),
    ('DecodeDone', 'yielding', 'swapped'),
    ('plan', 'swapped', 'loading'),
    ('Loaded', 'loading', 'decoding'),
    ('LoadFailed', 'loading', 'queued absent'),
    ('Offloaded', 'swapped', 'queued absent'),
    ('Cancelled', 'swapped', 'absent'),
    ('InstanceDown', 'swapped', 'queued absent'),
    # A row moves to another instance.
    ('Tick', 'decoding', 'leaving'),
    ('Tick', 'leaving', 'prefilled'),
    ('PrefillDone', 'leaving', 'prefilled over'),
    ('DecodeDone', 'leaving', 'prefilled over'),
    ('InstanceDown', 'leaving', 'queued over absent'),
    # A policy refuses one whose place is to be found again.
    ('Drain', 'queued', 'absent'),
    ('InstanceUp', 'queued', 'absent'),
    ('Tick', 'queued', 'absent'),
    # The rest of a split prompt goes on elsewhere, or stays after all.
    ('Migrated', 'migrating', 'prefilling'),
    ('plan', 'prefilled', 'prefilling'),
    ('PrefillDone', 'prefilled', 'prefilling'),
    ('MigrateFailed', 'prefilled', 'prefilling'),
    ('Timer', 'prefilled', 'prefilling'),
    ('TargetDown', 'prefilled', 'prefilling'),
    ('Drain', 'prefilled', 'prefilling absent'),
    ('Tick', 'prefilled', 'prefilling absent'),
    # What a flexible instance prefilled may stay there after all.
    ('PrefillDone', 'prefilled', 'decoding'),
    ('DecodeDone', 'prefilled', 'decoding'),
    ('MigrateFailed', 'prefilled', 'decoding'),
    ('Timer', 'prefilled', 'decoding'),
    ('Drain', 'prefilled', 'decoding'),
    ('Tick', 'prefilled', 'decoding'),
)

# Causes that are of one request and tell nothing new in any other stage: a
# cancel that comes too late, news of a hand-off that is over. Those of an
# instance leave the requests alone that they do not concern.
_IMPOSSIBLE = {(stage, 'Arrived') for stage in STAGES if stage != 'absent'}


def cell(stage: str, cause: str) -> tuple[str, ...] | None:
  """What a cause does to a request in this stage.

  Returns:
    The stages that may follow at once; () where it changes nothing, None
    where it is an ImpossibleEvent.
  """
  if (stage, cause) in _IMPOSSIBLE:
    return None
  return HOPS.get((stage, cause), ())


STATUS = {
    (status, event): after
    for event, row in {
        'InstanceUp': 'up up up up',
        'Drain': 'draining draining down gone',
        'InstanceDown': 'down down down gone',
        'InstanceGone': 'gone gone gone gone'}.items()
    for status, after in zip(('up', 'draining', 'down', 'gone'), row.split(),
                             strict=True)}


def drawing() -> str:
  """The tables as Markdown: a diagram, then every stage and every cause."""
  return '\n'.join(['```mermaid', *_diagram(), '```', '', *_matrix(), '',
                    *_statuses()])


def _diagram():
  """A life without faults, as a Mermaid diagram."""
  arrows = {}
  for (stage, cause), following in HOPS.items():
    for after in following:
      if cause in _NO_FAULT and stage != after:
        arrows.setdefault((stage, after), []).append(cause)
  yield 'stateDiagram-v2'
  for (stage, after), causes in arrows.items():
    ends = ['[*]' if s == 'absent' else s for s in (stage, after)]
    yield f'  {ends[0]} --> {ends[1]}: {", ".join(causes)}'


def _matrix():
  """Every stage and every cause."""
  yield f'| | {" | ".join(CAUSES)} |'
  yield '|---' * (len(CAUSES) + 1) + '|'
  for stage in STAGES:
    cells = [cell(stage, cause) for cause in CAUSES]
    shown = ['!' if c is None else ', '.join(c) or '-' for c in cells]
    yield f'| **{stage}** | {" | ".join(shown)} |'


def _statuses():
  """Every status of an instance and every event."""
  events = list(dict.fromkeys(event for _, event in STATUS))
  yield f'| | {" | ".join(events)} |'
  yield '|---' * (len(events) + 1) + '|'
  for status in dict.fromkeys(status for status, _ in STATUS):
    yield (f'| **{status}** | '
           f'{" | ".join(STATUS[status, event] for event in events)} |')


_NO_FAULT = ('plan', 'Arrived', 'PrefillDone', 'Migrated', 'Loaded',
             'DecodeDone', 'Cancelled', 'Tick')

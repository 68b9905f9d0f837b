"""Servers whose instances are processes, and the processes there are."""

import dataclasses
import os

import dsjax
from dsjax.checkpoints.checkpoint import Recipe
from dsjax.config.placement import Placement, Plan
from tests.common import serving
from tests.common.serving import LONG, MIXED, PAGES_4

MODEL = dataclasses.replace(serving.MODEL, recipe=Recipe(
    config=serving.CONFIG))
CONFIG = dataclasses.replace(PAGES_4, tries=50, restarts=50, restart_s=0.0)
WORK = MIXED[:6] + LONG[:2]
PAIR = Placement(prefill=[Plan()], decode=[Plan()])


def start(placement=PAIR, config=CONFIG, model=MODEL, **options):
  return dsjax.serve(model, placement, config, cluster='local', **options)


def alive(pid):
  """Whether a process is there, and no zombie."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rsplit(') ', 1)[1][0] not in 'ZX'
  except FileNotFoundError:
    return False


def children():
  """Processes that this one has started and that run."""
  found = set()
  for name in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{name}/stat') as file:
        state, parent = file.read().rsplit(') ', 1)[1].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
      continue
    if int(parent) == os.getpid() and state != 'Z':
      found.add(int(name))
  return found

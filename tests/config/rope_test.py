"""Divisors of rotary frequencies, against the papers' words.

families_test compares whole models of each kind with transformers.
"""

import math

import pytest

from dsjax.config import rope
from dsjax.config.checks import InputError

WIDTH, BASE = 16, 1e4


def wavelengths():
  return [2 * math.pi * BASE**(2 * i / WIDTH) for i in range(WIDTH // 2)]


def test_llama3_keeps_ramps_and_divides():
  for wave, divisor in zip(wavelengths(), rope.llama3(WIDTH, BASE, 8.0, 256),
                           strict=True):
    kept = min(max((256 / wave - 1) / (4 - 1), 0), 1)
    assert 1 / divisor == pytest.approx(kept + (1 - kept) / 8)
  assert divisor == 8


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
  divisors = rope.yarn(WIDTH, BASE, 4.0, 2048)
  assert sorted(divisors) == list(divisors)
  for wave, divisor in zip(wavelengths(), divisors, strict=True):
    turns = 2048 / wave
    assert turns < 32 * 4 or divisor == 1  # the ramp is rounded outwards
    assert turns > 1 / 4 or divisor == 4


def test_gains():
  assert rope.yarn_gain(1.0) == 1 and rope.longrope_gain(1.0, 4096) == 1
  assert rope.yarn_gain(4.0) == pytest.approx(0.1 * math.log(4) + 1)
  assert rope.yarn_gain(4.0, 1.0, 1.0) == 1
  assert rope.longrope_gain(32.0, 4096) == pytest.approx(
      math.sqrt(1 + 5 / 12))


@pytest.mark.parametrize('call, word', [
    (lambda: rope.linear(8, 0), 'factor'),
    (lambda: rope.llama3(8, 1e4, 2.0, 16, 4.0, 1.0), 'high_freq_factor'),
    (lambda: rope.llama3(8, 1e4, 2.0, 0), 'original_max_position_embeddings'),
    (lambda: rope.yarn(8, 1.0, 2.0, 16), 'rope_theta'),
    (lambda: rope.yarn(8, 1e4, 2.0, 16, fast=0.0), 'beta_fast'),
    (lambda: rope.longrope(8, [1.0, 2.0]), 'short_factor'),
    (lambda: rope.longrope(8, [1.0, 2.0, 3.0, 'x']), 'short_factor')])
def test_bad_numbers_are_named(call, word):
  with pytest.raises(InputError, match=word):
    call()

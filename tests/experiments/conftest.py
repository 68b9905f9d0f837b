"""Every picture that these tests draw is told apart without colours."""

import sys

import pytest

from tests.common.legible import alike


@pytest.fixture(autouse=True)
def _pictures_are_told_apart_without_colours(monkeypatch):
  pictures = sys.modules.get('experiments.common.pictures')
  if pictures is None:
    return
  save = pictures.save

  def checked(figure, *args, **options):
    assert not alike(figure)
    save(figure, *args, **options)
  monkeypatch.setattr(pictures, 'save', checked)

"""Every picture that these tests draw is told apart without colours."""

import functools
import sys

import pytest

from tests.common.legible import alike


def _png_alone(savefig, path, **options):
  """Draws no PDF, which shows what the PNG does and takes as long."""
  if path.suffix == '.pdf':
    path.write_bytes(b'')
  else:
    savefig(path, **options)


@pytest.fixture(autouse=True)
def _pictures_are_told_apart_without_colours(monkeypatch, request):
  pictures = sys.modules.get('experiments.common.pictures')
  if pictures is None:
    return
  save = pictures.save

  def checked(figure, *args, **options):
    assert not alike(figure)
    if request.path.name != 'report_test.py':
      figure.savefig = functools.partial(_png_alone, figure.savefig)
    save(figure, *args, **options)
  monkeypatch.setattr(pictures, 'save', checked)

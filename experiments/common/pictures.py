"""Pictures of results: told apart without colours, for screen and paper."""

import os
import pathlib
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9',
           '#000000')
MARKERS, DASHES = 'osD^vPX', ('-', '--', '-.', ':')
HATCHES = ('', '//', '..', 'xx', '\\\\', '--', 'oo')


def look(number: int) -> dict[str, Any]:
  """Colour, marker and dashes of the line with this number; they recur."""
  return {'color': COLOURS[number % len(COLOURS)],
          'marker': MARKERS[number % len(MARKERS)],
          'linestyle': DASHES[number % len(DASHES)]}


def fill(number: int) -> dict[str, Any]:
  """Colour and hatch of the bars with this number; they recur."""
  return {'facecolor': COLOURS[number % len(COLOURS)] + '80',
          'edgecolor': COLOURS[number % len(COLOURS)],
          'hatch': HATCHES[number % len(HATCHES)]}


def save(figure: Figure, path: str | os.PathLike[str],
         colours: int = 0) -> None:
  """Writes a PNG of 150 dots an inch, and a PDF beside it.

  colours: of the PNG, at most, which makes it small; 0: as many as there are.
  """
  png = pathlib.Path(path)
  figure.savefig(png, dpi=150)
  if colours:
    Image.open(png).convert('RGB').quantize(colours).save(png, optimize=True)
  # Without the date, so that the same results are the same file.
  figure.savefig(png.with_suffix('.pdf'), metadata={'CreationDate': None})

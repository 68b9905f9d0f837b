"""Pictures of results: told apart without colours, for screen and paper."""

import os
import pathlib

from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9',
           '#000000')
MARKERS, DASHES = 'osD^vPX', ('-', '--', '-.', ':')


def look(number: int) -> dict[str, str]:
  """Colour, marker and dashes of the line with this number; they recur."""
  return {'color': COLOURS[number % len(COLOURS)],
          'marker': MARKERS[number % len(MARKERS)],
          'linestyle': DASHES[number % len(DASHES)]}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Writes a PNG of 150 dots an inch, and a PDF beside it."""
  png = pathlib.Path(path)
  figure.savefig(png, dpi=150)
  # Without the date, so that the same results are the same file.
  figure.savefig(png.with_suffix('.pdf'), metadata={'CreationDate': None})

"""Whether a picture says the same without its colours."""

from matplotlib.colors import to_rgb


def _looks(axes):
  """(label, how it looks without colours) of what a legend would name."""
  for line in axes.lines:
    yield line.get_label(), (
        line.get_marker(), line.get_linestyle(), line.get_fillstyle(),
        sum(to_rgb(line.get_markerfacecolor())) > 2.9)
  for group in axes.containers:
    if hasattr(group, 'lines'):  # errorbar
      line = group.lines[0]
      yield group.get_label(), (line.get_marker(), line.get_linestyle(),
                                line.get_fillstyle(), False)
    elif group.patches:
      yield group.get_label(), group.patches[0].get_hatch() or ''


def alike(figure):
  """Pairs of labels whose lines or bars differ by their colours alone."""
  pairs = []
  for axes in figure.axes:
    seen = {}
    for label, look in _looks(axes):
      if label and not label.startswith('_'):
        first = seen.setdefault(look, label)
        if first != label:
          pairs.append((first, label))
  return pairs

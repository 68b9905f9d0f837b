"""Whether a picture says the same without its colours."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
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


def hidden(figure):
  """What lies under a legend of its axes, or under another's words.

  Returns:
    Labels of lines with a point under the legend; texts that a legend,
    another text or a point of a line lies on.
  """
  FigureCanvasAgg(figure).draw()
  found = [text.get_text() for text in figure.texts for legend in figure.legends
           if legend.get_window_extent().overlaps(text.get_window_extent())]
  for axes in figure.axes:
    legend, texts = axes.get_legend(), list(axes.texts)
    boxes = [text.get_window_extent() for text in texts]
    for line in axes.lines:
      points = axes.transData.transform(line.get_xydata()) if (
          line.get_transform() == axes.transData) else ()
      if legend and any(legend.get_window_extent().contains(*point)
                        for point in points):
        found.append(line.get_label())
      found += [text.get_text() for text, box in zip(texts, boxes, strict=True)
                if any(box.contains(*point) for point in points)]
    found += [a.get_text() for i, a in enumerate(texts)
              for j in range(i) if boxes[i].overlaps(boxes[j])]
    if legend:
      found += [text.get_text() for text, box in zip(texts, boxes, strict=True)
                if legend.get_window_extent().overlaps(box)]
  return found

"""What a figure shows and what a frame holds, as data: the shapes that the
SDKs' chart types and Result.data read."""
import datetime
import importlib.abc
import importlib.machinery
import math
import numbers
import re
import sys

from IPython.core.formatters import BaseFormatter
from traitlets import ObjectName, Unicode

MAX_POINTS = 100_000
MAX_CELLS = 1_000_000


class Describer(BaseFormatter):
    """A form of its own for objects of one class, which may not be loaded yet. Not
    by registration: choosing a picture format takes figures out of all formatters."""

    _return_type = dict
    print_method = ObjectName("_repr_cordon_")

    def __call__(self, obj):
        if not any((c.__module__, c.__name__) == self.of for c in type(obj).__mro__):
            return None
        try:
            return self.describe(obj)
        except Exception:  # the other forms remain: the picture, the text
            return None


class ChartFormatter(Describer):
    format_type = Unicode("cordon/chart")
    of = ("matplotlib.figure", "Figure")

    def describe(self, obj):
        return figure(obj)


class DataFormatter(Describer):
    format_type = Unicode("cordon/data")
    of = ("pandas.core.frame", "DataFrame")

    def describe(self, obj):
        return frame(obj)


def install(shell):
    for cls in (ChartFormatter, DataFormatter):
        formatter = cls(parent=shell.display_formatter)
        shell.display_formatter.formatters[formatter.format_type] = formatter
    sys.meta_path.insert(0, BoxPlotWatch())


# ---- frames


def frame(df):
    if df.shape[0] * df.shape[1] > MAX_CELLS:
        return None
    return {str(name): [plain(v) for v in df.iloc[:, i]] for i, name in enumerate(df.columns)}


def plain(v):
    """A value that JSON has: numbers that are none become null, dates ISO 8601."""
    if v is None or isinstance(v, (bool, str)):
        return v
    if hasattr(v, "item") and getattr(v, "shape", None) == ():
        v = v.item()
    if isinstance(v, bool) or v is None:
        return v
    if isinstance(v, numbers.Integral):
        return int(v)
    if isinstance(v, numbers.Real):
        v = float(v)
        return v if math.isfinite(v) else None
    if isinstance(v, (datetime.date, datetime.time)):
        return None if str(v) == "NaT" else v.isoformat()
    if isinstance(v, (list, tuple)):
        return [plain(e) for e in v]
    if isinstance(v, dict):
        return {str(k): plain(e) for k, e in v.items()}
    text = str(v)
    return None if text in ("NaT", "<NA>") else text


# ---- figures


def figure(fig):
    axes = [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]
    heading = fig._suptitle.get_text() if fig._suptitle else None
    charts = [axis_chart(ax) for ax in axes]
    if not charts:
        return None
    if len(charts) > 1:
        return {"type": "superchart", "title": heading or None, "elements": charts}
    charts[0]["title"] = charts[0]["title"] or heading or None
    return charts[0]


def axis_chart(ax):
    from matplotlib.collections import PathCollection
    from matplotlib.container import BarContainer
    from matplotlib.patches import Wedge

    chart = {"type": "unknown", "title": ax.get_title() or None, "elements": []}
    wedges = [p for p in ax.patches if isinstance(p, Wedge)]
    bars = [c for c in ax.containers if isinstance(c, BarContainer)]
    boxes = getattr(ax, "_cordon_boxes", [])
    scatters = [c for c in ax.collections if isinstance(c, PathCollection)]
    if wedges:
        return {**chart, "type": "pie", "elements": [pie_piece(w) for w in wedges]}
    chart.update(labels(ax))
    if boxes:
        return {**chart, "type": "box_and_whisker", "elements": [box(b) for b in boxes]}
    if bars:
        return {**chart, "type": "bar", "elements": [b for c in bars for b in bar_group(ax, c)]}
    if ax.lines:
        chart.update(ticks(ax), type="line")
        chart["elements"] = [points(ax, l.get_label(), l.get_xdata(False), l.get_ydata(False)) for l in ax.lines]
    elif scatters:
        chart.update(ticks(ax), type="scatter")
        chart["elements"] = [points(ax, c.get_label(), *zip(*c.get_offsets().filled(math.nan))) for c in scatters if len(c.get_offsets())]
    if sum(len(e["points"]) for e in chart["elements"]) > MAX_POINTS:
        raise ValueError("too many points")
    return chart


def labels(ax):
    x, y = ax.get_xlabel(), ax.get_ylabel()
    return {"x_label": x or None, "y_label": y or None, "x_unit": unit(x), "y_unit": unit(y)}


def unit(label):
    """The unit stands in parentheses: "Time (s)"."""
    found = re.search(r"\(([^()]*)\)", label)
    return found.group(1) if found else None


def name(label):
    return "" if not label or label.startswith("_") else label


def ticks(ax):
    out = {}
    for which, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        out[which + "_scale"] = scale(axis)
        out[which + "_ticks"] = [value(axis, v) for v in axis.get_majorticklocs()]
        out[which + "_tick_labels"] = [t.get_text() for t in axis.get_majorticklabels()]
    return out


def converter(axis):
    get = getattr(axis, "get_converter", None)
    return type(get() if get else axis.converter).__name__


def is_date(axis):
    return "Date" in converter(axis) or "Datetime" in converter(axis)


def scale(axis):
    if is_date(axis):
        return "datetime"
    if converter(axis) == "StrCategoryConverter":
        return "categorical"
    return axis.get_scale()


def value(axis, v):
    if not is_date(axis):
        return plain(float(v))
    from matplotlib.dates import num2date

    return num2date(v).isoformat() if math.isfinite(v) else None


def points(ax, label, xs=(), ys=()):
    return {"label": name(label), "points": [[value(ax.xaxis, x), value(ax.yaxis, y)] for x, y in zip(xs, ys)]}


def pie_piece(w):
    return {"label": name(w.get_label()), "angle": round(abs(float(w.theta2) - float(w.theta1)), 4), "radius": plain(float(w.r))}


def bar_group(ax, container):
    lying = getattr(container, "orientation", "vertical") == "horizontal"
    axis = ax.yaxis if lying else ax.xaxis
    texts = dict(zip((round(float(v), 6) for v in axis.get_majorticklocs()), (t.get_text() for t in axis.get_majorticklabels())))
    for p in container.patches:
        at = p.get_y() + p.get_height() / 2 if lying else p.get_x() + p.get_width() / 2
        length = p.get_width() if lying else p.get_height()
        text = texts.get(round(float(at), 6)) or str(value(axis, at))
        yield {"label": text, "group": name(container.get_label()), "value": plain(length)}


def box(stats):
    return {
        "label": str(stats.get("label", "")),
        "min": plain(stats["whislo"]),
        "first_quartile": plain(stats["q1"]),
        "median": plain(stats["med"]),
        "third_quartile": plain(stats["q3"]),
        "max": plain(stats["whishi"]),
        "outliers": [plain(v) for v in stats.get("fliers", [])],
    }


class BoxPlotWatch(importlib.abc.MetaPathFinder):
    """Matplotlib draws a box plot as lines and forgets what they mean. All box
    plots come through Axes.bxp, which is given the figures."""

    def find_spec(self, fullname, path, target=None):
        if fullname != "matplotlib.axes._axes":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            watch_boxes(module.Axes)

        spec.loader.exec_module = exec_module
        return spec


def watch_boxes(axes):
    draw = axes.bxp

    def bxp(self, bxpstats, *args, **kwargs):
        drawn = draw(self, bxpstats, *args, **kwargs)
        self._cordon_boxes = getattr(self, "_cordon_boxes", []) + list(bxpstats)
        return drawn

    bxp.__doc__, bxp.__name__, bxp.__qualname__ = draw.__doc__, draw.__name__, draw.__qualname__
    bxp.__wrapped__ = draw  # so that inspect shows the signature
    axes.bxp = bxp

"""The picture of the soak: memory, descriptors, threads and times over the minutes."""

import io
from collections.abc import Mapping

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from simulations.soak.samples import Series, unit_of, what_of
from simulations.soak.trend import Trend

_PANELS = ("rss", "descriptors", "threads", "step")


def picture_of(series: Mapping[str, Series], trends: Mapping[str, Trend]) -> bytes:
    """Draw all series; return the PNG. The first third, which no slope is of, is gray."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(_PANELS, figure.subplots(2, 2).flat, strict=True):
        for quantity, (seconds, values) in series.items():
            if what_of(quantity) != panel or not seconds:
                continue
            minutes, trend = [each / 60.0 for each in seconds], trends[quantity]
            name = quantity.partition("_")[2]
            label = f"{name}: {trend.slope:+.3g} +- {trend.margin:.2g} / h"
            axes.plot(minutes, values, linewidth=0.8, label=label)
            axes.set_xlabel("minutes")
            axes.set_ylabel(f"{panel} ({unit_of(quantity)})")
            third = minutes[0] + (minutes[-1] - minutes[0]) / 3.0
        axes.axvspan(0.0, third, color="0.92")
        axes.set_ylim(bottom=0.0)
        axes.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()

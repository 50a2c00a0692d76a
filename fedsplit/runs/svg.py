"""Charts as SVG for a page: matplotlib draws them, and the style of the page decides the colors.

Text stays text, so it has the font of the page. Each color is a variable of CSS, so a chart is
readable on a light and on a dark page.
"""

import io
import re
from collections.abc import Callable
from threading import Lock

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

SERIES = 8
"""The number of colors that a page has for series: `--series-0` and so on."""

# matplotlib knows no variables, so each one is drawn in a color that stands for it.
_VARIABLES = {
    "#fe0001": "--ink-soft",
    "#fe0002": "--line",
    **{f"#fe01{number:02x}": f"--series-{number}" for number in range(SERIES)},
}
_COLORS = {variable: color for color, variable in _VARIABLES.items()}
_SIZE = (3.6, 2.4)
"""Inches of 72 points; a page makes a chart as wide as a column."""
_FONT = 8.5
_STEPS = [1, 2, 2.5, 5, 10]
# The settings of matplotlib belong to the process.
_rc_lock = Lock()


def series(number: int) -> str:
    """Return the color of a series; colors repeat after `SERIES`."""
    return _COLORS[f"--series-{number % SERIES}"]


def chart(draw: Callable[[Axes], None], *, label: str, x: str = "round") -> Markup:
    """Return a chart as SVG for a page.

    Args:
        draw: Draws on the axes, in colors of `series`.
        label: What the chart shows, for readers that do not see it.
        x: The name of the horizontal axis.
    """
    figure = Figure(figsize=_SIZE)
    figure.subplots_adjust(left=0.12, right=0.985, bottom=0.175, top=0.97)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=[series(number) for number in range(SERIES)])
    draw(axes)
    _style(axes, x)
    svg = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    settings = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedsplit"})
    with _rc_lock, settings:
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return Markup(_for_a_page(svg.getvalue(), label))


def _style(axes: Axes, x: str) -> None:
    ink, line = _COLORS["--ink-soft"], _COLORS["--line"]
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(line)
    axes.grid(axis="y", color=line, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=_FONT, labelcolor=ink, pad=4)
    axes.set_xlabel(x, color=ink, fontsize=_FONT, labelpad=3)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=_STEPS, integer=x == "round"))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.margins(x=0.02)


def _tick(value: float, _: object) -> str:
    # A label of five characters is as wide as there is room; 9000 is one of four.
    for least, power, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / power:g}{letter}"
    return f"{value:g}"


def _for_a_page(svg: str, label: str) -> str:
    inner = svg[svg.index("<svg") :]
    # Ids of groups would be the same in each chart of a page.
    inner = re.sub(r'<g id="[^"]*"', "<g", inner)
    # A style in a page holds for all of it, and fonts are the page's.
    inner = re.sub(r"<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"font-family: [^;]*; ", "", inner)
    inner = re.sub(r"#fe0[01][0-9a-f]{2}", lambda m: f"var({_VARIABLES[m[0]]})", inner)
    # As wide as its place; the view box keeps the proportions.
    inner = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", inner, count=1)
    inner = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", inner, count=1)
    return inner.replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(label), 1)

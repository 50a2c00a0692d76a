"""The plot of one run: training loss and held-out result over its rounds."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsplit import atomic
from fedsplit.runs import metrics
from fedsplit.runs.folder import RunFolder


def plot_losses(folder: RunFolder) -> Path:
    """Draw `loss.png`: training loss and held-out bits per byte over rounds.

    Returns:
        The file.

    Raises:
        DataError: The folder is not a run's folder, is damaged, or has no finished round.
        StorageError: The file cannot be written.
    """
    rounds = folder.measured_rounds()
    numbers = [stats.round for stats in rounds]
    figure = Figure(figsize=(7, 4))
    # Margins for the labels; to have them computed takes longer than to draw.
    figure.subplots_adjust(left=0.11, right=0.89, bottom=0.13, top=0.91)
    # pyplot would keep the figure in a global list, and choose a display.
    FigureCanvasAgg(figure)
    loss = figure.add_subplot()
    loss.plot(numbers, [s.loss for s in rounds], "o-", color="tab:blue", label="training loss")
    loss.set_xlabel("round")
    loss.set_ylabel("training loss (nats per token)", color="tab:blue")
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    held_out = loss.twinx()
    measured = metrics.evaluated(rounds)
    is_text = all(math.isnan(s.accuracy) for s in measured)
    name, title = ("bits_per_byte", "bits per byte") if is_text else ("accuracy", "accuracy")
    points = [s.round for s in measured], [getattr(s, name) for s in measured]
    held_out.plot(*points, "s--", color="tab:orange")
    held_out.set_ylabel(f"held-out {title}", color="tab:orange")
    loss.set_title(f"{folder.path.name}: {rounds[-1].version} trunk steps")
    file = folder.path / "loss.png"
    with atomic.new_file(file) as unfinished:
        figure.savefig(unfinished, dpi=120)
    return file

"""The loss of a stage as a picture, if matplotlib is installed."""

from importlib.util import find_spec
from pathlib import Path

from vila2.data.files import replacing
from vila2.train.log import read_log


def plot_losses(log: Path, picture: Path, title: str) -> bool:
    """Draw the losses in `log` into the PNG file `picture`; False if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    lines = read_log(log)
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if losses:
        axes.plot(*zip(*losses, strict=True), color="tab:blue", alpha=0.3, linewidth=0.8, label="loss")
        axes.plot(*zip(*_smooth(losses), strict=True), color="tab:blue", label="loss, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out loss")
    axes.set(xlabel="step", ylabel="loss a token", title=title)
    axes.grid(alpha=0.3)
    if losses or held_out:
        axes.legend()
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def _smooth(points: list[tuple[int, float]], share: float = 0.02) -> list[tuple[int, float]]:
    """An exponential mean over about `share` of the points, corrected for its start."""
    keep = 1 - 1 / max(1.0, share * len(points))
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append((step, mean / weight))
    return smoothed

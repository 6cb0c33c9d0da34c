"""The ratios of a run as a picture, drawn with matplotlib."""

from __future__ import annotations

from pathlib import PurePath

from sparsemem.bench.model import Spread
from sparsemem.bench.outcome import Outcome, ratio_of
from sparsemem.errors import UnsupportedError

_FORMATS = (".pdf", ".png", ".svg")
_OURS, _PEERS = "tab:blue", "tab:gray"


def check(path: str) -> None:
    """Whether a picture can be drawn; to be asked before minutes are spent on measuring.

    Raises:
        ValueError: The file's name does not end as one of a picture.
        UnsupportedError: There is no matplotlib.
    """
    if PurePath(path).suffix.lower() not in _FORMATS:
        raise ValueError(f"--plot {path!r} must end in one of {', '.join(_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError("--plot needs matplotlib: pip install 'sparsemem[plot]'") from None


def draw(outcome: Outcome, path: str) -> None:
    """One panel for each measure that has ratios: their medians as bars, with least and most."""
    from matplotlib.figure import Figure

    panels = [(title, bars) for title, bars in _panels(outcome) if bars]
    heights = [1 + len(bars) for _, bars in panels] or [1]
    figure = Figure(figsize=(11, 1 + 0.24 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, bars) in zip(axes, panels, strict=False):
        _panel(axis, title, bars)
    figure.savefig(path)


def _panels(outcome: Outcome) -> list[tuple[str, list[tuple[str, Spread]]]]:
    panels = []
    for result in outcome.results:
        for measure in result.case.measures:
            ratios = [(row.way, ratio_of(result, row)) for row in result.rows if row.measure == measure.name]
            bars = [(way, ratio) for way, ratio in ratios if ratio is not None and ratio.least > 0]
            panels.append((f"{result.case.name}: {measure.name}, against {measure.peer}", bars))
    return panels


def _panel(axis: object, title: str, bars: list[tuple[str, Spread]]) -> None:
    """Horizontal, the first on top; on a logarithmic scale, since ratios go both ways."""
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    names = [way for way, _ in bars]
    medians = [ratio.median for _, ratio in bars]
    errors = ([r.median - r.least for _, r in bars], [r.most - r.median for _, r in bars])
    colours = [_OURS if name.startswith("sparsemem") else _PEERS for name in names]
    axis.barh(names, medians, xerr=errors, color=colours, error_kw={"elinewidth": 0.8})
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_title(title, fontsize=8, loc="left")
    axis.tick_params(labelsize=6)

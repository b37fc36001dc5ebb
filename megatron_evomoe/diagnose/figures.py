"""The figures: each function takes plain records and returns a matplotlib figure; `plots.py` reads and saves.

All figures are 8 inches wide at 150 dpi (1200 px, the width of a README) and use the Okabe-Ito colours, with
text in blue and vision in orange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster; must come before pyplot

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from megatron_evomoe.diagnose.estimates import density, smooth

WIDTH, DPI = 8.0, 150
COLOURS = {"text": "#0072B2", "vision": "#E69F00"}
KIND_COLOURS = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#0072B2", "#F0E442", "#000000")
KIND_MARKERS = "osD^vPX"
INK, FAINT = "#222222", "#9A9A9A"
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.dpi": DPI,
}
MOST_LAYERS = (
    6  # panels per side of a figure that stay legible; of deeper models, as many evenly spread layers
)


def loss_curves(stages: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Figure:
    """Loss by step and, where there are evaluations, accuracy below it.

    Args:
        stages: in training order; each has name, start (global step), steps [n] and loss [n].
        evaluations: each has x (global step), accuracy {kind: share} and blind {kind: share}.
    """
    heights = [3, 2] if evaluations else [1]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(heights),
            1,
            figsize=(WIDTH, 5.6 if evaluations else 3.8),
            sharex=True,
            squeeze=False,
            layout="constrained",
            gridspec_kw={"height_ratios": heights},
        )
        top = axes[0, 0]
        for stage in stages:
            x, loss = stage["start"] + np.asarray(stage["steps"]), np.asarray(stage["loss"], dtype=float)
            top.plot(x, loss, color=COLOURS["text"], alpha=0.25, linewidth=0.8)
            top.plot(x, smooth(loss), color=COLOURS["text"], linewidth=1.8)
        top.set_ylabel("LM loss (answer tokens)")
        _log_scale_if_wide(top, np.concatenate([smooth(np.asarray(s["loss"], dtype=float)) for s in stages]))
        _mark_stages(axes[:, 0], stages)
        if evaluations:
            _accuracy_points(axes[1, 0], evaluations)
        axes[-1, 0].set_xlabel("optimizer step, all stages in a row")
        _headline(
            fig,
            "Training loss" + (" and held-out accuracy" if evaluations else "") + " by stage",
            "line: running mean, pale: every logged step",
        )
    return fig


def _log_scale_if_wide(ax: Axes, values: np.ndarray) -> None:
    """Use a logarithmic axis where a linear one would flatten the low losses of later stages."""
    finite = values[np.isfinite(values) & (values > 0)]
    if len(finite) and finite.max() > 8 * finite.min():
        ax.set_yscale("log", subs=[])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_stages(axes: Any, stages: list[dict[str, Any]]) -> None:
    ends = [s["start"] + max(s["steps"]) for s in stages]
    for ax in axes:
        ax.set_xlim(0, ends[-1])
        ax.grid(axis="y", color="#E6E6E6", linewidth=0.7)
        for i, (stage, end) in enumerate(zip(stages, ends, strict=True)):
            if i % 2:
                ax.axvspan(stage["start"], end, color="#F3F3F3", zorder=0)
            if i:
                ax.axvline(stage["start"], color=FAINT, linewidth=0.8, linestyle=":")
    for stage, end in zip(stages, ends, strict=True):
        # short stages get slanted names, which would run into each other otherwise
        narrow = (end - stage["start"]) / ends[-1] < 0.016 * len(stage["name"])
        axes[0].text(
            (stage["start"] + end) / 2,
            1.02,
            stage["name"],
            transform=axes[0].get_xaxis_transform(),
            va="bottom",
            ha="left" if narrow else "center",
            rotation=30 if narrow else 0,
            fontweight="bold",
            color=INK,
        )


def _accuracy_points(ax: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Accuracy as solid lines; dashed and hollow is the accuracy on the same questions with blank images."""
    kinds = list(dict.fromkeys(k for e in evaluations for k in e["accuracy"]))
    looks: dict[str, dict[str, Any]] = {
        "blind": {"linestyle": "--", "markerfacecolor": "white"},
        "accuracy": {"linestyle": "-"},
    }
    for field, look in looks.items():
        for i, kind in enumerate(kinds):
            points = sorted((e["x"], 100 * float(e[field][kind])) for e in evaluations if kind in e[field])
            if points:
                ax.plot(
                    *zip(*points, strict=True),
                    color=KIND_COLOURS[i % 7],
                    marker=KIND_MARKERS[i % 7],
                    markersize=5,
                    linewidth=1.2,
                    label=kind if field == "accuracy" else None,
                    clip_on=False,
                    zorder=3,
                    **look,
                )
    if any(e["blind"] for e in evaluations):
        ax.plot([], [], color=FAINT, linestyle="--", label="image blanked")
    ax.set_ylim(0, 100)
    ax.set_ylabel("held-out\naccuracy (%)")
    if kinds != ["accuracy"] or any(e["blind"] for e in evaluations):
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.5)


def modality_shares(layers: list[int], counts: np.ndarray, divergence: list[float], where: str) -> Figure:
    """The share of each expert in the tokens of each modality, one panel for each layer.

    Args:
        counts: [L, 2, E], of text and vision; the bars of a modality sum to 100 %.
    """
    chosen = spread(len(layers), 12)
    experts = counts.shape[2]
    columns = min(4, len(chosen)) if experts <= 8 else min(2, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            rows,
            columns,
            figsize=(WIDTH, 1.2 + 2.0 * rows),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        highest = 0.0
        for ax, i in zip(axes.flat, chosen, strict=False):
            total = counts[i].sum(-1, keepdims=True)
            shares = 100 * np.divide(counts[i], total, out=np.zeros(counts[i].shape), where=total > 0)
            highest = max(highest, shares.max(), 100 / experts)
            for m, (modality, shift) in enumerate((("text", -0.2), ("vision", 0.2))):
                ax.bar(
                    np.arange(experts) + shift,
                    shares[m],
                    width=0.38,
                    color=COLOURS[modality],
                    label=_TOKEN_NAMES[modality],
                )
            ax.axhline(100 / experts, color=INK, linewidth=0.8, linestyle="--", label="even share")
            ax.set_title(f"layer {layers[i]}    JSD {float(divergence[i]):.2f}".replace("nan", "–"))
            ax.set_xticks(range(0, experts, max(1, experts // 8)))
        axes[0, 0].set_ylim(0, min(100, 1.1 * highest))
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        for ax in axes[-1]:
            ax.set_xlabel("expert")
        fig.supylabel("share of tokens (%)", fontsize=9.5)
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        _headline(
            fig,
            f"Which expert gets which modality: {where}",
            "JSD: divergence of the two in bits; 0 = routed alike, 1 = no expert in common"
            + _part(chosen, layers, "layers"),
        )
    return fig


_TOKEN_NAMES = {"text": "text tokens", "vision": "image tokens"}


def logit_densities(layers: list[int], values: dict[str, list[Any]], where: str) -> Figure:
    """One panel for each layer and expert, with one density of router logits for each modality.

    Args:
        values: "text" and "vision" to router logits [L][n][E].
    """
    chosen = spread(len(layers), MOST_LAYERS)
    arrays = {m: [np.asarray(values[m][i], dtype=float) for i in chosen] for m in COLOURS}
    experts = max(a.shape[1] for cells in arrays.values() for a in cells if a.ndim == 2)
    shown = spread(experts, 8)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(chosen),
            len(shown),
            figsize=(WIDTH, 1.3 + 1.25 * len(chosen)),
            sharex="row",
            squeeze=False,
            layout="constrained",
        )
        for row, i in enumerate(chosen):
            pool = np.concatenate([arrays[m][row].ravel() for m in COLOURS])
            pool = pool[np.isfinite(pool)]
            low, high = np.quantile(pool, [0.002, 0.998])
            grid = np.linspace(low - 0.08 * (high - low) - 1e-6, high + 0.08 * (high - low) + 1e-6, 240)
            for column, e in enumerate(shown):
                ax = axes[row, column]
                for modality, colour in COLOURS.items():
                    if arrays[modality][row].ndim == 2:
                        _filled(
                            ax,
                            grid,
                            density(arrays[modality][row][:, e], grid),
                            colour,
                            _TOKEN_NAMES[modality],
                        )
                ax.set_yticks([])
                ax.xaxis.set_major_locator(MaxNLocator(2 if len(shown) > 4 else 4))
                ax.set_ylim(bottom=0)
                ax.set_xlim(grid[0], grid[-1])
                ax.spines["left"].set_visible(False)
                if row == 0:
                    ax.set_title(f"expert {e}")
            axes[row, 0].set_ylabel(f"layer {layers[i]}")
        for ax in axes[-1]:
            ax.set_xlabel("router logit")
        handles, names = max(
            (ax.get_legend_handles_labels() for ax in axes.flat), key=lambda found: len(found[0])
        )
        fig.legend(handles, names, loc="outside lower center", ncols=2)
        _headline(
            fig,
            f"Router logits by modality: {where}",
            "the less the colours overlap, the more the router tells image from text tokens"
            + _part(chosen, layers, "layers")
            + _part(shown, range(experts), "experts"),
        )
    return fig


def _filled(ax: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    ax.fill_between(x, y, color=colour, alpha=0.35, linewidth=0, label=label)
    ax.plot(x, y, color=colour, linewidth=1.4)


def similarities(layers: list[int], of: dict[str, np.ndarray], where: str) -> Figure:
    """A grid of heat maps: layers by what is compared, with the longer of the two across.

    Args:
        of: what is compared to cosines [L, E, E].
    """
    chosen, names = spread(len(layers), MOST_LAYERS), list(of)
    across = len(chosen) > len(names)  # layers go across
    rows, columns = (len(names), len(chosen)) if across else (len(chosen), len(names))
    side = min(2.1, (WIDTH - 1.7) / columns - 0.25)
    size = (max(5.6, min(WIDTH, 1.7 + columns * (side + 0.45))), 1.2 + rows * (side + 0.45))
    with plt.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for (row, column), ax in np.ndenumerate(axes):
            layer, name = (chosen[column], names[row]) if across else (chosen[row], names[column])
            image = _heat_map(ax, of[name][layer], side)
            mean = f"mean {_cosine(_mean_off_diagonal(of[name][layer]))}"
            above, beside = (f"layer {layers[layer]}", name) if across else (name, f"layer {layers[layer]}")
            ax.set_title(f"{above}\n{mean}" if row == 0 else mean)
            if column == 0:
                ax.set_ylabel(f"{beside}\nexpert")
            if row == rows - 1:
                ax.set_xlabel("expert")
        fig.colorbar(
            image,
            ax=axes,
            shrink=min(1.0, 3.0 / size[1] + 0.2),
            aspect=25,
            label="cosine",
            ticks=[-1, -0.5, 0, 0.5, 1],
        )
        _headline(
            fig,
            f"How alike the experts are: {where}",
            "1: same direction, 0: unrelated, −1: opposite; mean over pairs of experts"
            + _part(chosen, layers, "layers"),
        )
    return fig


def _heat_map(ax: Axes, matrix: np.ndarray, side: float) -> Any:
    """Draw cosines as colours, and as numbers where those are legible; the diagonal, always 1, is grey."""
    experts = len(matrix)
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#DDDDDD")
    image = ax.imshow(np.where(np.eye(experts, dtype=bool), np.nan, matrix), cmap=colours, vmin=-1, vmax=1)
    ticks = range(0, experts, max(1, experts // 8))
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.tick_params(length=0)
    if side / experts > 0.4:
        for (r, c), value in np.ndenumerate(matrix):
            if r != c:
                ax.text(
                    c,
                    r,
                    _cosine(value),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if abs(value) > 0.6 else INK,
                )
    return image


def _mean_off_diagonal(matrix: np.ndarray) -> float:
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    return float(off.mean()) if len(off) else math.nan


def _cosine(value: float) -> str:
    """Two decimals; four for near-copies, which would all read 1.00 otherwise."""
    return f"{value:.4f}" if 0.99 < value < 0.99995 else f"{value:.2f}".replace("-", "−")


def _headline(fig: Figure, title: str, explanation: str) -> None:
    fig.suptitle(f"{title}\n", fontsize=12, fontweight="bold", color=INK)
    fig.text(
        0.5, 1.0 - 0.33 / fig.get_figheight(), explanation, ha="center", va="top", fontsize=9, color="#555555"
    )


def _part(shown: Sequence[int], everything: Sequence[int], of: str) -> str:
    """A remark for the headline where a figure does not show everything; else nothing."""
    return "" if len(shown) == len(everything) else f"; {len(shown)} of {len(everything)} {of}"


def spread(count: int, most: int) -> list[int]:
    """At most `most` numbers of range(count), evenly spread, with the first and the last among them."""
    return (
        list(range(count))
        if count <= most
        else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
    )

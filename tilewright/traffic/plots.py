"""A run as pictures: distributions of latencies for each rate, and what was delivered of what was offered."""

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

_PANELS = (
    ("ttft_ms", "time to first token"),
    ("itl_ms", "between pieces of text"),
    ("e2e_ms", "whole answer"),
)
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
"""


def draw(runs: Sequence[dict[str, Any]], samples: Sequence[Mapping[str, Sequence[float]]], title: str) -> Figure:
    """runs: figures of each rate (figures.of_run, and `rate`). samples: milliseconds by latency of each rate."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    for ax, (name, label) in zip(axes.flat, _PANELS, strict=False):
        for run, sample in zip(runs, samples, strict=True):
            values = sorted(sample[name])
            if values:
                shares = [(i + 1) / len(values) for i in range(len(values))]
                ax.step(values, shares, where="post", label=f"{run['rate']:g} a second")
        ax.set(xscale="log", xlabel=f"{label}, ms", ylabel="share of samples", ylim=(0, 1))
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend()
    _delivered(axes[1, 1], runs)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(figure: Figure, runs: Sequence[dict[str, Any]], title: str, about: str) -> str:
    """One HTML file that needs no other: the picture and the tables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(about)}</p>", svg[svg.index("<svg") :]]
    for run in runs:
        parts.append(f"<h2>{run['rate']:g} requests a second</h2>")
        facts = (
            f"{run['requests']} requests in {run['duration_s']:g} s, {sum(run['failed'].values())} failed; "
            f"{run['output_tokens_per_s']:g} output tokens a second; goodput {run['goodput_per_s']:g} a second "
            f"({run['within_objective']:.1%})"
        )
        parts.append(f"<p>{facts}</p>")
        parts += [f"<p>{count} ×: {html.escape(reason)}</p>" for reason, count in run["failed"].items()]
        head = "".join(f"<th>{name}</th>" for name in ("ms", *_COLUMNS))
        rows = "".join(
            f"<tr><td>{label}</td>{''.join(f'<td>{run[name][column]:.1f}</td>' for column in _COLUMNS)}</tr>"
            for name, label in (*_PANELS, ("tpot_ms", "a token after the first"))
            if run[name] is not None
        )
        parts.append(f"<table><tr>{head}</tr>{rows}</table>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _delivered(ax: Any, runs: Sequence[dict[str, Any]]) -> None:
    rates = [run["rate"] for run in runs]
    ax.plot(rates, rates, color="0.7", linestyle="--", label="offered")
    ax.plot(rates, [run["requests_per_s"] for run in runs], marker="o", label="answered")
    ax.plot(rates, [run["goodput_per_s"] for run in runs], marker="s", label="within the objective")
    ax.set(xlabel="offered, requests a second", ylabel="delivered, requests a second", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()

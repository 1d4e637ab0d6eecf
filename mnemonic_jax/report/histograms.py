"""Draw four histograms of losses over one logarithmic axis, to be compared by eye."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mnemonic_jax.report.schema import numbers
from mnemonic_jax.report.wording import percent, power_of_ten, scientific

DECADES = (-8, 8)  # losses beyond these powers of ten are counted in the end bins
BARS = 24  # about as many bars as this
HEIGHT = 72.0  # of the tallest bar, in CSS pixels
PANELS = (
  ("train_before", "Training examples", "before"),
  ("train_after", "Training examples", "after"),
  ("test_before", "Test examples", "before"),
  ("test_after", "Test examples", "after"),
)


@dataclasses.dataclass(frozen=True)
class Axis:
  """Hold the shared axis: bin edges in powers of ten, ticks, and the loss of a uniform guess.

  Positions are in percent.
  """

  edges: np.ndarray
  ticks: tuple[tuple[float, str], ...]
  guess: float | None


@dataclasses.dataclass(frozen=True)
class Panel:
  """Hold one histogram. A bar is (x %, width %, height px, title)."""

  title: str
  when: str
  bars: tuple[tuple[float, float, float, str], ...]
  size: int
  median: str
  median_x: float | None
  note: str


@dataclasses.dataclass(frozen=True)
class Histograms:
  """Hold panels over one axis.

  A split without losses has no panel; `missing` names it. `tallest` is the share of examples in the
  tallest bar, "" without any.
  """

  axis: Axis
  panels: tuple[Panel, ...]
  missing: tuple[str, ...]
  tallest: str


def histograms(losses: Mapping[str, Sequence[float]], num_classes: int) -> Histograms:
  """Make up to four histograms; bars show shares of examples, on one scale for all panels."""
  data = {key: numbers(losses[key]) for key, _, _ in PANELS}
  axis = shared_axis(np.concatenate(list(data.values())), math.log(num_classes))
  shares = {key: _shares(values, axis.edges) for key, values in data.items()}
  tallest = max((float(s.max(initial=0.0)) for s in shares.values()), default=0.0)
  known = {title for key, title, _ in PANELS if data[key].size}
  panels = (
    _panel(title, when, data[key], shares[key], tallest, axis.edges)
    for key, title, when in PANELS
    if title in known
  )
  missing = dict.fromkeys(title.lower() for _, title, _ in PANELS if title not in known)
  return Histograms(axis, tuple(panels), tuple(missing), percent(tallest) if tallest else "")


def shared_axis(values: np.ndarray, guess: float) -> Axis:
  """Choose whole decades for all positive finite losses and the loss of a uniform guess.

  They stay within `DECADES`.
  """
  known = np.append(values[np.isfinite(values) & (values > 0)], guess)
  low = max(DECADES[0], math.floor(math.log10(max(known.min(), 1e-300))))
  high = min(DECADES[1], math.ceil(math.log10(known.max()) + 1e-12))
  low, high = min(low, DECADES[1] - 1), max(high, DECADES[0] + 1)
  high = max(high, low + 1)
  per_decade = max(1, BARS // (high - low))
  edges = np.linspace(low, high, per_decade * (high - low) + 1)
  step = math.ceil((high - low) / 5)
  ticks = tuple((_position(e, edges), power_of_ten(e)) for e in range(low, high + 1, step))
  return Axis(edges, ticks, _position(math.log10(guess), edges))


def _position(exponent: float, edges: np.ndarray) -> float:
  return round(100 * float(np.clip((exponent - edges[0]) / (edges[-1] - edges[0]), 0, 1)), 2)


def _exponents(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
  known = values[~np.isnan(values)]
  with np.errstate(divide="ignore"):
    return np.clip(np.log10(np.maximum(known, 0.0)), edges[0], edges[-1])


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
  counts, _ = np.histogram(_exponents(values, edges), edges)
  return counts / max(1, len(values))


def _panel(
  title: str, when: str, values: np.ndarray, shares: np.ndarray, tallest: float, edges: np.ndarray
) -> Panel:
  width = 100 / len(shares)
  bars = tuple(
    (
      round(i * width, 3),
      round(width, 3),
      round(max(1.5, HEIGHT * share / tallest), 2),
      _bar_title(share, edges, i),
    )
    for i, share in enumerate(shares)
    if share > 0
  )
  known = values[~np.isnan(values)]
  median = float(np.median(known)) if len(known) else math.nan
  at = (
    None
    if math.isnan(median)
    else _position(math.log10(max(median, 1e-300)) if median < math.inf else 999, edges)
  )
  return Panel(title, when, bars, len(values), _median_text(median), at, _note(values, edges))


def _bar_title(share: float, edges: np.ndarray, i: int) -> str:
  low, high = 10 ** edges[i], 10 ** edges[i + 1]
  return f"{100 * share:.1f} % of examples have a loss of {low:.2g} to {high:.2g}"


def _median_text(median: float) -> str:
  return (
    "no examples"
    if math.isnan(median)
    else "infinite"
    if math.isinf(median)
    else scientific(median)
  )


def _note(values: np.ndarray, edges: np.ndarray) -> str:
  below, above = int((values < 10.0 ** edges[0]).sum()), int((values > 10.0 ** edges[-1]).sum())
  parts = [
    f"{below:,} below the axis, in the first bar" if below else "",
    f"{above:,} above the axis, in the last bar" if above else "",
    f"{int(np.isnan(values).sum()):,} not a number" if np.isnan(values).any() else "",
  ]
  return "; ".join(part for part in parts if part)

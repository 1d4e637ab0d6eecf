"""Show progress on stderr: a bar with rate and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
  """Count `total` units of work; a context manager.

  On a terminal it shows a tqdm bar. Elsewhere, in a log file or in CI, it prints a line every few
  seconds and one at the end, so that logs stay readable. `quiet` shows nothing.
  """

  def __init__(
    self, description: str, total: int, unit: str, initial: int = 0, *, quiet: bool = False
  ) -> None:
    self._description, self._total, self._unit, self._quiet = description, total, unit, quiet
    self._done = self._initial = initial
    self._started = self._last_line = time.monotonic()
    self._bar: Any = None
    if sys.stderr.isatty() and not quiet:
      self._bar = tqdm(
        desc=description,
        total=total,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        dynamic_ncols=True,
      )

  def __enter__(self) -> Progress:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._bar is not None:
      self._bar.close()

  def update(self, units: int, **values: float) -> None:
    """Count `units` more, and show the current `values` beside them."""
    self._done += units
    shown = {name: f"{value:.4g}" for name, value in values.items()}
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(units)
      return
    if self._quiet:
      return
    now = time.monotonic()
    if self._done < self._total and now - self._last_line < _SECONDS_BETWEEN_LINES:
      return
    self._last_line = now
    rate = (self._done - self._initial) / max(now - self._started, 1e-9)
    left = (self._total - self._done) / rate if rate else 0.0
    details = "".join(f", {name} {value}" for name, value in shown.items())
    print(
      f"{self._description}: {self._done}/{self._total} {self._unit}{details}, "
      f"{rate:.3g} {self._unit}/s, {left:.0f} s left",
      file=sys.stderr,
      flush=True,
    )

"""The report: one self-contained HTML page per forget.

    report (the forget JSON) + evidence (confusions, losses, layers) + codes -> render -> HTML

It is made of plain data and knows nothing of jax: `schema` says what goes in, `page` puts the page together.
"""

from __future__ import annotations

from mnemonic_jax.report.page import render
from mnemonic_jax.report.schema import (
  EVIDENCE_KEYS,
  REPORT_KEYS,
  Control,
  Evidence,
  Layer,
  Losses,
  Report,
  Seconds,
  validate,
)

__all__ = [
  "render",
  "validate",
  "Report",
  "Evidence",
  "Seconds",
  "Losses",
  "Layer",
  "Control",
  "REPORT_KEYS",
  "EVIDENCE_KEYS",
]

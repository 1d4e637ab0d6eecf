"""The report: one self-contained HTML page per forget.

    report (the forget JSON) + evidence (confusions, losses, layers) + codes -> render -> HTML

It is made of plain data and does not import jax. `schema` describes what goes in, `verdicts` says
what counts as forgotten, `page` puts the page together.
"""

from __future__ import annotations

from mnemonic_jax.report.page import render
from mnemonic_jax.report.schema import validate

__all__ = ["render", "validate"]

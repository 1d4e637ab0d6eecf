"""One small run from end to end, held to the numbers it gave when it was last looked at."""

from __future__ import annotations

import pytest
from running import call

pytest_plugins = ["run_fixtures"]

COMMAND = (
  "run",
  "digits_paper",
  "--train.seed",
  0,
  "--train.epochs",
  10,
  "--model.hidden",
  200,
  "--forget.classes",
  0,
)
# (value, tolerance). Rounding differs between CPUs and versions of XLA; one digit is 0.003 of
# accuracy.
GOLDEN = {
  "loss": (0.13891, 0.02),
  "test_accuracy": (0.94722, 0.01),
  "retain_accuracy_after": (0.94444, 0.02),
  "forget_error_after": (0.77778, 0.06),
}


def test_the_golden_run(tmp_path):
  result = call(*COMMAND, "--out", tmp_path / "run", "--json").json
  measured = {name: {**result["train"], **result["forget"]}[name] for name in GOLDEN}
  wrong = {
    name: f"{value:.5f} instead of {GOLDEN[name][0]:.5f} +- {GOLDEN[name][1]}"
    for name, value in measured.items()
    if value != pytest.approx(GOLDEN[name][0], abs=GOLDEN[name][1])
  }
  assert not wrong, (
    f"{wrong}\n"
    f"The result of `mnemonic {' '.join(map(str, COMMAND))}` has changed. "
    "If you meant to change what is computed (data split, init, codes, mixing, training, "
    "forgetting, or the digits config), check that the tables of the README still hold, "
    f"put these numbers into GOLDEN of {__file__}, and say so in the CHANGELOG: "
    f"{ {name: round(value, 5) for name, value in measured.items()} }. "
    "If you did not, this is a bug: find it; do not widen the tolerance."
  )

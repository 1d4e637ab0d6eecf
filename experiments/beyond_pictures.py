"""Draw the pictures of docs/beyond.md from the rows of `beyond.py`.

Command:  python experiments/beyond_pictures.py

Reads `results/beyond_*.jsonl`. Writes `docs/beyond_features.png`, A_R against what a probe still
finds for each case that has a Retrain, and `docs/beyond_judges.png`, what judges foresee against
what was measured.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import beyond
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
DOCS = HERE.parent / "docs"
# How the names of rows start -> how they are drawn. Those of one kind are joined, in order.
KINDS = {
  "projection": ("o", "learned"),
  "recalled 8": ("s", "8 recalled"),
  "recalled 64": ("v", "64 recalled"),
  "healed": ("^", "healed"),
  "relearn": ("D", "last stages anew"),
}


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a study that have figures."""
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return [row for row in rows if "refused" not in row]


def kind_of(name: str) -> str | None:
  """Which line a row belongs to."""
  if "kept" in name or name.startswith(("default", "path")):
    return None
  if name.startswith("relearn"):
    return "relearn"
  if not name.startswith("projection"):
    return None
  ends = {kind: kind for kind in KINDS} | {"learned": "projection"}
  return next((kind for end, kind in ends.items() if name.endswith(end)), None)


def features(studies: dict[str, list[dict[str, Any]]]) -> None:
  """One panel a case with a Retrain: A_R against the probe of the forgotten classes."""
  cases = [
    (name, seed, case, [row for row in rows if (row["seed"], row["case"]) == (seed, case)])
    for name, rows in studies.items()
    for seed, case in dict.fromkeys(
      (row["seed"], row["case"]) for row in rows if row["method"] == "retrain"
    )
  ]
  if not cases:
    return
  columns = min(4, len(cases))
  lines = -(-len(cases) // columns)
  figure, panels = plt.subplots(
    lines, columns, figsize=(3.6 * columns, 3.2 * lines), squeeze=False, layout="constrained"
  )
  for panel in panels.flat[len(cases) :]:
    panel.axis("off")
  for panel, (name, seed, case, rows) in zip(panels.flat, cases, strict=False):
    named = {row["method"]: row for row in rows}
    before, again, head = (named[key] for key in ("before", "retrain", "head edit"))
    panel.axhline(before["retain_accuracy"], color="0.8", lw=1)
    panel.axvline(again["probe"], color="0.8", lw=1)
    panel.plot(before["probe"], before["retain_accuracy"], "k*", ms=10, label="before")
    panel.plot(before["probe"], head["retain_accuracy"], "kx", ms=7, label="row dropped")
    panel.plot(again["probe"], again["retain_accuracy"], "k+", ms=10, label="Retrain")
    for kind, (marker, label) in KINDS.items():
      own = [row for row in rows if kind_of(row["method"]) == kind and "probe" in row]
      pairs = [(row["probe"], row["retain_accuracy"]) for row in own]
      if pairs:
        panel.plot(*zip(*pairs, strict=True), marker=marker, ms=4, lw=1, label=label)
    panel.set_title(f"{name}, seed {seed}, class {case}", fontsize=9)
  figure.supxlabel("probe: forgotten classes read from the last stage, %", fontsize=9)
  figure.supylabel("A_R, %", fontsize=9)
  handles = {}
  for panel in panels.flat[: len(cases)]:
    handles |= dict(reversed(pair) for pair in zip(*panel.get_legend_handles_labels(), strict=True))
  figure.legend(handles.values(), handles, loc="outside lower center", ncols=7, fontsize=8)
  figure.savefig(DOCS / "beyond_features.png", dpi=110)


def judges(studies: dict[str, list[dict[str, Any]]]) -> None:
  """E_F, and A_R relative to the dropped row's, as foreseen and as measured, along paths."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
  drawn = False
  for name, rows in studies.items():
    points = list(beyond.followed(rows))
    kinds = ("projection", "path: dampening", "path: perturbation")
    for marker, kind in zip("o^s", kinds, strict=True):
      own = [point for point in points if point.row["method"].startswith(kind)]
      if not own:
        continue
      drawn, label = True, f"{name}, {kind.removeprefix('path: ')}"
      forget, cost = ([getattr(p, what) for p in own] for what in ("forget_error", "cost"))
      for panel, pairs in ((left, forget), (right, cost)):
        panel.plot(*zip(*pairs, strict=True), marker, ms=4, alpha=0.7, label=label)
  if not drawn:
    return
  for panel, title, low, high in ((left, "E_F, %", 0, 100), (right, "A_R - dropped row's", -70, 5)):
    panel.axline((low, low), (high, high), color="0.7", lw=1)
    panel.set(xlabel=f"{title}: measured on test data", ylabel="foreseen by judges")
  left.legend(fontsize=7)
  figure.savefig(DOCS / "beyond_judges.png", dpi=110)


def main() -> None:
  """Draw both."""
  paths = sorted((HERE / "results").glob("beyond_*.jsonl"))
  studies = {path.stem.removeprefix("beyond_"): rows_of(path) for path in paths}
  features(studies)
  judges(studies)


if __name__ == "__main__":
  main()

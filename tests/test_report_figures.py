"""The parts of the report: numbers in words, histograms, pictures of codes, tables.

All numbers here are synthetic.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_samples import make_codes, make_evidence

from mnemonic_jax.report import histograms, pictures, tables, wording
from mnemonic_jax.report.by_class import confusion, shades


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (0.0, "0 %"),
    (1.0, "100 %"),
    (0.9999, ">99.9 %"),
    (0.0001, "<0.1 %"),
    (0.976, "97.6 %"),
    (math.nan, "no examples"),
  ],
)
def test_percent_never_rounds_to_none_or_all(value: float, shown: str) -> None:
  assert wording.percent(value).replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (0.005, "+0.5"),
    (-0.02, "−2.0"),
    (-0.0001, "−0.01"),
    (0.0, "0.0"),
    (1e-9, "0.0"),
    (math.nan, "–"),
  ],
)
def test_points_are_signed(value: float, shown: str) -> None:
  assert wording.points(value) == shown


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (0, "0"),
    (0.0421, "0.0421"),
    (12.34, "12.3"),
    (12345.0, "12,345"),
    (9e-4, "9.0 × 10⁻⁴"),
    (1e30, "1.0 × 10³⁰"),
  ],
)
def test_scientific(value: float, shown: str) -> None:
  assert wording.scientific(value).replace("\u00a0", " ") == shown


class TestHistograms:
  def losses(self, **changes: Any) -> dict[str, Any]:
    return {
      key: [1.0] for key in ("train_before", "train_after", "test_before", "test_after")
    } | changes

  def test_every_example_is_in_a_bar(self) -> None:
    values = [0.0, 1e-300, 1e-20, 0.3, 5.0, 1e30, math.inf]
    panel = histograms.histograms(self.losses(test_after=values), 10).panels[3]
    shares = [float(title.split()[0]) for *_, title in panel.bars]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert panel.note == "3 below the axis, in the first bar; 2 above the axis, in the last bar"

  def test_not_a_number_is_counted_apart(self) -> None:
    panel = histograms.histograms(self.losses(test_after=[1.0, math.nan, None, 1.0]), 10).panels[3]
    assert panel.note == "2 not a number" and "50.0 % of examples" in panel.bars[0][3]

  def test_axis_and_scale_are_shared(self) -> None:
    made = histograms.histograms(
      self.losses(train_before=[1e-3] * 10, test_after=[1e-3] * 5 + [10.0] * 5), 10
    )
    assert made.panels[0].bars[0][0] == made.panels[3].bars[0][0]  # the same place
    assert (
      made.panels[0].bars[0][2] == 2 * made.panels[3].bars[0][2] == histograms.HEIGHT
    )  # 100 % and 50 %
    assert made.tallest.startswith("100")

  def test_bars_stay_inside(self) -> None:
    for values in ([1e-9], [1e9], [0.0], [math.inf], [math.nan], [5e-324, 1e308]):
      made = histograms.histograms(self.losses(train_before=values), 2)
      for panel in made.panels:
        assert all(x >= 0 and x + width <= 100.01 for x, width, _, _ in panel.bars)
      assert 0 <= made.axis.guess <= 100


class TestCodes:
  @pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (32, 32, 3), (20, 30)])
  def test_pictures(self, shape: tuple[int, ...]) -> None:
    made = pictures.gallery(make_codes(10, shape), [4], [str(c) for c in range(10)])
    assert not made.strips and len(made.tiles) == 10
    assert [tile.forgotten for tile in made.tiles] == [c == 4 for c in range(10)]
    assert made.tiles[4].description == "Mnemonic code of class 4, to forget"
    picture = decode(made.tiles[0].source)
    assert picture.shape[:2] == shape[:2] and (picture.min(), picture.max()) == (0, 255)

  @pytest.mark.parametrize(
    "shape", [(), (1,), (784,), (5000,), (4, 5, 6, 7), (8, 8, 2), (2, 100, 1)]
  )
  def test_odd_shapes_are_strips(self, shape: tuple[int, ...]) -> None:
    made = pictures.gallery(make_codes(10, shape), [4], [str(c) for c in range(10)])
    assert made.strips and "no picture" in made.note
    assert decode(made.tiles[0].source).shape == (1, min(math.prod(shape), pictures.STRIP_VALUES))

  def test_pixels_are_the_code_scaled(self) -> None:
    code = np.array([[-1.0, 0.0], [1.0, 3.0]])
    np.testing.assert_array_equal(
      decode(pictures.png_uri(pictures.to_bytes(code))), [[0, 64], [128, 255]]
    )

  def test_constant_and_not_finite(self) -> None:
    np.testing.assert_array_equal(pictures.to_bytes(np.full((2, 2), 7.0)), np.full((2, 2), 128))
    np.testing.assert_array_equal(
      pictures.to_bytes(np.array([np.nan, 1.0, 2.0, np.inf])), [0, 0, 255, 0]
    )

  def test_many_codes_show_the_forgotten_ones_first(self) -> None:
    made = pictures.gallery(make_codes(100, (28, 28, 1)), [98], [str(c) for c in range(100)])
    assert len(made.tiles) == pictures.MOST_PICTURES and made.tiles[0].index == 98
    assert "40 more codes are not shown" in made.note

  def test_large_codes_stay_within_the_budget(self) -> None:
    made = pictures.gallery(
      np.zeros((10, 1, 512, 512, 3), np.float32), [3], [str(c) for c in range(10)]
    )
    assert [tile.index for tile in made.tiles] == [3]

  def test_several_codes_a_class(self) -> None:
    made = pictures.gallery(make_codes(3, (8, 8), per_class=6), [1], ["a", "b", "c"])
    assert [tile.index for tile in made.tiles] == [0] * 4 + [1] * 4 + [
      2
    ] * 4 and "6 more codes" in made.note


class TestTables:
  def test_layers_that_did_not_move_or_were_zero(self) -> None:
    layer = make_evidence(10, [0])["layers"][0]
    made = tables.layer_table(
      [layer | {"norm_change": 0.0}, layer | {"norm_before": 0.0}, layer | {"norm_change": None}]
    )
    assert [row.relative for row in made.rows] == ["none", "was zero", "not finite"]

  def test_a_deep_model_shows_the_most_moved(self) -> None:
    layer = make_evidence(10, [0])["layers"][0]
    made = tables.layer_table(
      [layer | {"path": f"['{i}']", "norm_change": float(i)} for i in range(100)]
    )
    assert [row.path for row in made.rows] == [str(i) for i in range(76, 100)]
    assert "76 more layers moved less" in made.others

  def test_paths(self) -> None:
    assert tables.pretty_path("['hidden']['kernel']") == "hidden / kernel"
    assert tables.pretty_path(".layers[0]") == ".layers[0]"

  def test_time_names_what_is_left(self) -> None:
    rows = tables.time_rows({"compile": 1.0, "fisher": 0.5, "perturb": 0.5, "total": 4.0})
    assert [(row.name, row.bar) for row in rows][3:] == [
      ("Everything else", 50.0),
      ("Total", 100.0),
    ]
    assert len(tables.time_rows({"compile": 1.0, "fisher": 0.5, "perturb": 0.5, "total": 2.0})) == 4

  def test_shades_follow_shares_of_the_row(self) -> None:
    made = shades(np.array([[100, 0], [1, 3]]))
    np.testing.assert_allclose(made, 0.62 * np.array([[1, 0], [0.5, 0.75**0.5]]), atol=1e-3)


def decode(source: str) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))))


def test_shares_of_kept_classes_are_those_of_the_answers_of_each_model() -> None:
  before, after = (
    [[3, 0], [1, 3]],
    [[0, 4], [5, 5]],
  )  # of class 1, six of ten examples had no answer before
  evidence = {"class_names": ["0", "1"], "confusion_before": before, "confusion_after": after}
  into = confusion({"classes": [0]}, evidence).into.replace("\u00a0", " ")
  assert (
    confusion({"classes": [0]}, evidence).examples == "4"
    and confusion({"classes": [1]}, evidence).examples == "10"
  )
  assert into.endswith("the class to forget: 1 of 4 before (25.0 %), 5 of 10 after (50.0 %).")
  nothing = evidence | {"confusion_before": [[3, 0], [0, 0]]}
  assert "before" not in confusion({"classes": [0]}, nothing).into

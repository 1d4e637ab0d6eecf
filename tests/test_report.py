"""The report page: words for good and bad outcomes, escaping, edges, determinism.

All numbers here are synthetic.
"""

from __future__ import annotations

import copy
import html.parser
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from report_samples import make_codes, make_evidence, make_report

from mnemonic_jax.report import render, schema, wording

VOID = {"meta", "img", "br", "col", "link", "input", "hr"}


class Tree(html.parser.HTMLParser):
  """Checks that tags nest, and collects tags with attributes and the text that is shown."""

  def __init__(self, page: str):
    super().__init__()
    self.open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.text = ""
    self.feed(page)
    self.close()
    assert self.open == []
    self.text = " ".join(self.text.replace("\u00a0", " ").split())

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag: str) -> None:
    assert self.open.pop() == tag

  def handle_data(self, data: str) -> None:
    if "style" not in self.open:
      self.text += data + ("" if self.open and self.open[-1] in ("span", "b", "strong") else " ")

  def all(self, tag: str) -> list[dict[str, str | None]]:
    return [attrs for name, attrs in self.tags if name == tag]


def page(num_classes: int = 10, classes: tuple[int, ...] = (0,), **changes: Any) -> Tree:
  report = make_report(num_classes, list(classes)) | changes
  return Tree(
    render(report, make_evidence(num_classes, list(classes)), make_codes(num_classes, (8, 8, 1)))
  )


def told(classes: tuple[int, ...] = (0,), num_classes: int = 10, **changes: Any) -> wording.Verdict:
  names = make_evidence(num_classes, list(classes))["class_names"]
  verdict = wording.verdict(make_report(num_classes, list(classes)) | changes, names)
  return wording.Verdict(
    **{key: value.replace("\u00a0", " ") for key, value in vars(verdict).items()}
  )


class TestSentence:
  def test_one_class(self) -> None:
    assert told().sentence == (
      "Asked to forget class 0 (zero). Its test error went from 1.2 % to 100 %, "
      "while accuracy on the nine kept classes went from 97.6 % to 97.1 %."
    )

  def test_several_classes(self) -> None:
    assert told((1, 2, 9)).sentence.startswith(
      "Asked to forget classes 1 (one), 2 (two) and 9 (nine). Their test error went from"
    )
    assert "accuracy on the seven kept classes" in told((1, 2, 9)).sentence

  def test_many_classes_are_counted(self) -> None:
    assert (
      "classes 0 (kind 0), 1 (kind 1), 2 (kind 2), 3 (kind 3), 4 (kind 4) and 15 more."
      in told(tuple(range(20)), 100).sentence
    )

  def test_earlier_requests_are_told_apart(self) -> None:
    sentence = told((0, 3), requested=[3]).sentence
    assert sentence.startswith(
      "Asked to forget class 3 (three), on top of class 0 (zero) asked for earlier."
    )
    assert "The test error of both together went" in sentence

  def test_three_with_an_earlier_request(self) -> None:
    assert "The test error of all three together went" in told((0, 3, 5), requested=[3]).sentence

  def test_nothing_changed(self) -> None:
    sentence = told(forget_error_after=0.012, retain_accuracy_after=0.976).sentence
    assert (
      "Its test error stayed at 1.2 %, while accuracy on the nine kept classes stayed at 97.6 %."
      in sentence
    )

  def test_one_kept_class(self) -> None:
    assert "accuracy on the one kept class went" in told((1,), 2).sentence

  @pytest.mark.parametrize("missing", [None, math.nan])
  def test_no_examples(self, missing: float | None) -> None:
    sentence = told(forget_error_before=missing, forget_error_after=missing).sentence
    assert "Its test error is not known (no test examples), while accuracy" in sentence

  def test_a_name_that_is_the_index_is_not_repeated(self) -> None:
    assert wording.class_list([3], list("0123")) == "class 3"


class TestVerdict:
  def test_good(self) -> None:
    verdict = told()
    assert (verdict.kind, verdict.label) == ("good", "Forgotten")
    assert (
      verdict.meaning == "Judged by its outputs, the model has forgotten this class. "
      "The kept classes lost 0.5 points of accuracy."
    )

  def test_not_forgotten(self) -> None:
    verdict = told(forget_error_after=0.54)
    assert (verdict.kind, verdict.label) == ("failed", "Not forgotten")
    assert (
      "It did not work: the model still gets 46.0 % of the test examples of this class right."
      in verdict.meaning
    )

  def test_costly(self) -> None:
    verdict = told(retain_accuracy_after=0.9)
    assert (verdict.kind, verdict.label) == ("costly", "Forgotten, at a high cost")
    assert "The cost is high: the kept classes lost 7.6 points of accuracy." in verdict.meaning

  def test_neither_forgotten_nor_cheap(self) -> None:
    verdict = told(forget_error_after=0.5, retain_accuracy_after=0.5)
    assert (verdict.kind, verdict.label) == ("failed", "Not forgotten, and at a high cost")
    assert "did not work" in verdict.meaning and "The cost is high" in verdict.meaning

  def test_unknown(self) -> None:
    verdict = told(forget_error_after=None, retain_accuracy_after=math.nan)
    assert (verdict.kind, verdict.label) == ("unknown", "Not measured")
    assert (
      "It is not known whether it worked" in verdict.meaning
      and "The cost is not known" in verdict.meaning
    )

  def test_one_class_that_stayed_is_not_hidden_by_others_that_went(self) -> None:
    report = make_report(100, list(range(20)))
    report["per_class_accuracy_after"][7] = 0.98  # the others' error is 1: together 0.951
    verdict = told(
      tuple(range(20)),
      100,
      forget_error_after=0.951,
      per_class_accuracy_after=report["per_class_accuracy_after"],
    )
    assert (verdict.kind, verdict.label) == ("failed", "Not forgotten")
    assert (
      "It did not work for class 7 (kind 7): "
      "the model still gets 98.0 % of its test examples right." in verdict.meaning
    )

  def test_several_that_stayed_are_named(self) -> None:
    accuracies = make_report(10, [0, 3, 5])["per_class_accuracy_after"]
    accuracies[3], accuracies[5] = 0.3, 0.0501
    verdict = told((0, 3, 5), forget_error_after=0.88, per_class_accuracy_after=accuracies)
    expected = (
      "for classes 3 (three) and 5 (five): "
      "the model still gets up to 30.0 % of their test examples right."
    )
    assert verdict.kind == "failed" and expected in verdict.meaning
    accuracies[3], accuracies[5] = 0.05, 0.05
    assert (
      told((0, 3, 5), forget_error_after=0.967, per_class_accuracy_after=accuracies).kind == "good"
    )

  @pytest.mark.parametrize("missing", [None, math.nan])
  def test_a_class_without_test_examples_is_not_hidden_by_others(
    self, missing: float | None
  ) -> None:
    accuracies = make_report(10, [0, 3])["per_class_accuracy_after"]
    accuracies[3] = missing
    verdict = told((0, 3), per_class_accuracy_after=accuracies)
    assert (verdict.kind, verdict.label) == ("unknown", "Not all measured")
    assert "It is not known whether it worked for class 3 (three)" in verdict.meaning
    accuracies[0] = 0.5
    assert (
      told((0, 3), forget_error_after=0.5, per_class_accuracy_after=accuracies).kind == "failed"
    )

  def test_bounds_are_inclusive_and_free_of_rounding(self) -> None:
    assert (
      told(forget_error_after=0.95, retain_accuracy_after=0.956).kind == "good"
    )  # 0.976 - 0.956 > 0.02 in floats
    assert told(forget_error_after=0.9499).kind == "failed"
    assert told(retain_accuracy_after=0.9559).kind == "costly"

  def test_a_class_that_was_never_known(self) -> None:
    assert "there was little to forget" in told(forget_error_before=0.97).meaning
    assert "there was little to forget" not in told().meaning

  def test_gain_and_no_change(self) -> None:
    assert (
      "The kept classes gained 0.4 points of accuracy." in told(retain_accuracy_after=0.98).meaning
    )
    assert "It cost nothing" in told(retain_accuracy_after=0.976).meaning

  def test_the_page_tells_it_in_text_not_in_colour_alone(self) -> None:
    tree = page(forget_error_after=0.4, retain_accuracy_after=0.7)
    assert "✕ Not forgotten, and at a high cost" in tree.text
    assert "◆ to forget" in tree.text and "◆ forgotten" not in tree.text

  def test_answers_that_are_not_numbers_are_called_out(self) -> None:
    report, evidence = make_report(10, [0]), make_evidence(10, [0])
    shown = lambda number: (
      Tree(render(report, evidence | {"unanswered": {"before": 0, "after": number}}, None)).text
    )
    assert (
      "no answer" not in shown(0) and "no answer" not in Tree(render(report, evidence, None)).text
    )
    assert (
      "One test example gets no answer after the forget: the outputs are not numbers (NaN)."
      in shown(1)
    )
    assert "1,234 test examples get no answer" in shown(1234)

  def test_many_classes_to_forget_of_which_nothing_was_measured(self) -> None:
    """As where a forget is not scored: no warning, and no figure of nothing."""
    classes = list(range(30))
    nothing = {
      "per_class_accuracy_after": [None] * 40,
      "forget_error_after": None,
      "retain_accuracy_after": None,
    }
    text = page(40, tuple(classes), **nothing).text
    assert (
      "more classes to forget, without test examples" in text and "no examples or less" not in text
    )

  def test_equal_hashes_are_called_out(self) -> None:
    assert "Nothing was changed." in page(params_sha256_after="be40" * 16).text
    assert "Nothing was changed." not in page().text


class TestVerdictOfEachClass:
  """As the forget JSON has it: by hand, from the three cases of one class."""

  def test_every_class_has_its_own(self) -> None:
    accuracies = [0.0, 0.06, 0.05, None]
    found = wording.verdicts(accuracies, [3, 0, 1, 2], ["cat", "dog", "elk", "fox"])
    expected = {
      "cat": ("forgotten", "test", 1.0),
      "dog": ("not forgotten", "test", 0.94),
      "elk": ("forgotten", "test", 0.95),
      "fox": ("not measured", None, None),
    }
    assert {name: tuple(one.values()) for name, one in found.items()} == expected

  def test_a_name_that_two_classes_have_is_told_apart(self) -> None:
    found = wording.verdicts([0.0, 1.0, 0.0], [0, 1, 2], ["crane", "crane", "owl"])
    assert list(found) == ["crane (0)", "crane (1)", "owl"]

  def test_the_worst_counts_of_any_class_and_any_copy(self) -> None:
    good, bad, unknown = (
      {"verdicts": wording.verdicts([accuracy], [0], ["cat"])} for accuracy in (0.0, 1.0, None)
    )
    assert wording.worst([good]) == "forgotten"
    assert wording.worst([good, unknown]) == "not measured"
    assert wording.worst([unknown, bad, good]) == "not forgotten"


def averaged(**changes: Any) -> dict[str, Any]:
  """A forget JSON of a run that keeps a moving average; `changes` are of the average."""
  report = make_report(10, [0])
  average = {
    "retain_accuracy_before": 0.981,
    "retain_accuracy_after": 0.98,
    "forget_error_before": 0.004,
  }
  hashes = {"params_sha256_before": "e3a0" * 16, "params_sha256_after": "e3a1" * 16}
  return report | {"copies": {"params": dict(report), "ema": report | average | hashes | changes}}


class TestMovingAverage:
  def test_its_scores_and_hashes_are_shown(self) -> None:
    text = Tree(render(averaged(), make_evidence(10, [0]), None)).text
    assert "Moving average, before a copy of the params that may be served too 98.1 % 0.4 %" in text
    assert "Moving average, after the same forget of it 98.0 % 100 % Head edit" in text
    assert (
      "Moving average before, SHA-256 e3a0" in text and "Moving average after, SHA-256 e3a1" in text
    )
    assert "came out differently" not in text and "Moving average" not in page().text

  def test_no_control_is_said_of_it_too(self) -> None:
    assert (
      "no control was run"
      in Tree(render(averaged(), make_evidence(10, [0]) | {"controls": []}, None)).text
    )

  def test_one_that_was_not_forgotten_is_called_out(self) -> None:
    text = Tree(render(averaged(forget_error_after=0.5), make_evidence(10, [0]), None)).text
    assert "✓ Forgotten" in text
    assert (
      "The moving average of the params, which may be served too, came out differently: "
      "Not forgotten." in text
    )

  def test_equal_hashes_of_it_are_called_out(self) -> None:
    text = Tree(
      render(averaged(params_sha256_after="e3a0" * 16), make_evidence(10, [0]), None)
    ).text
    assert (
      "The weights of the moving average after are the weights of the moving average before" in text
    )

  @pytest.mark.parametrize(
    "copies",
    [
      *([], {}, {"ema": None}, {"ema": {"retain_accuracy_before": 1.0}}),
      *(
        averaged(**wrong)["copies"]
        for wrong in ({"forget_error_after": 2}, {"params_sha256_after": 3})
      ),
    ],
  )
  def test_edited_values(self, copies: Any) -> None:
    with pytest.raises(ValueError, match="copies"):
      render(make_report(10, [0]) | {"copies": copies}, make_evidence(10, [0]), None)


class TestPage:
  @pytest.mark.parametrize(
    ("num_classes", "classes"), [(2, (1,)), (10, (0,)), (10, (3, 5)), (30, (29,)), (100, (3, 7))]
  )
  def test_sizes(self, num_classes: int, classes: tuple[int, ...]) -> None:
    tree = page(num_classes, classes)
    assert len(tree.all("section")) == len(tree.all("h2")) == 8 and len(tree.all("h1")) == 1
    rows = sum(attrs.get("class") == "forgotten" for attrs in tree.all("tr"))
    assert rows == len(classes) * (
      3 if num_classes <= 30 else 1
    )  # the dumbbells, and both matrices

  def test_hundred_classes_are_cut_and_say_so(self) -> None:
    tree = page(100, (3, 7))
    assert "Not in the table: 88 other kept classes, whose accuracy changed by" in tree.text
    assert "Confusion matrix" not in " ".join(str(attrs) for attrs in tree.all("div"))
    assert "Class 3 (kind 3), ◆ forgotten: answers on its" in tree.text

  def test_the_cut_shows_the_least_forgotten_and_the_worst_drops(self) -> None:
    report = make_report(100, list(range(30)))
    report["per_class_accuracy_after"][7] = 0.9
    report["per_class_accuracy_after"][55] = 0.1
    tree = Tree(render(report, make_evidence(100, list(range(30))), None))
    labels = [
      str(attrs["aria-label"])
      for attrs in tree.all("svg")
      if "accuracy" in str(attrs.get("aria-label"))
    ]
    assert (
      labels[0].startswith("Class 7, to forget")
      and labels[20].startswith("Class 55:")
      and len(labels) == 30
    )
    assert "ten more classes to forget, each at 0 % or less" in tree.text

  def test_same_input_same_bytes(self) -> None:
    first, second = (
      render(make_report(10, [0]), make_evidence(10, [0]), make_codes(10, (8, 8, 1)))
      for _ in range(2)
    )
    assert first == second

  def test_input_is_left_as_it_was(self) -> None:
    report, evidence, codes = (
      make_report(10, [5, 2]),
      make_evidence(10, [5, 2]),
      make_codes(10, (8, 8, 1)),
    )
    kept = copy.deepcopy((report, evidence))
    render(report, evidence, codes)
    assert (report, evidence) == kept
    np.testing.assert_array_equal(codes, make_codes(10, (8, 8, 1)))

  def test_self_contained(self) -> None:
    text = render(make_report(10, [0]), make_evidence(10, [0]), make_codes(10, (8, 8, 1)))
    assert not re.findall(r"https?:|//[a-z]|url\(|@import|<script|<link", text)
    assert all(
      str(attrs["src"]).startswith("data:image/png;base64,") for attrs in Tree(text).all("img")
    )

  def test_semantics(self) -> None:
    tree = page()
    assert tree.all("html") == [{"lang": "en"}]
    assert len(tree.all("title")) > 1 and len(tree.all("caption")) == len(tree.all("table"))
    assert all("scope" in attrs for attrs in tree.all("th"))
    assert all(attrs["alt"] for attrs in tree.all("img"))
    assert all("aria-label" in attrs for attrs in tree.all("svg") if attrs.get("role") == "img")

  def test_honest_about_output_scores_and_records(self) -> None:
    tree = page()
    assert "Outputs alone cannot tell a forgotten class from a head edit" in tree.text
    assert "Classes are forgotten, not single records" in tree.text
    assert (
      "the trained model 97.6 % 1.2 % This forget from params and codes 97.1 % 100 % Head edit"
      in tree.text
    )

  def test_no_control_is_said(self) -> None:
    text = Tree(render(make_report(10, [0]), make_evidence(10, [0]) | {"controls": []}, None)).text
    assert "no control was run" in text

  def test_worst_kept_class_is_named(self) -> None:
    after = make_report(10, [0])["per_class_accuracy_after"]
    after[4] = 0.5
    assert re.search(
      r"class 4 \(four\): 9\d\.\d % → 50\.0 %", page(per_class_accuracy_after=after).text
    )

  def test_numpy_numbers_and_arrays_are_fine(self) -> None:
    report, evidence = make_report(10, [0]), make_evidence(10, [0])
    report["per_class_accuracy_after"] = np.array(report["per_class_accuracy_after"], np.float32)
    report["classes"] = [np.int64(0)]
    evidence["confusion_after"] = np.array(evidence["confusion_after"])
    evidence["losses"]["test_after"] = np.array(evidence["losses"]["test_after"], np.float32)
    render(report, evidence, None)

  def test_hidden_on_request(self) -> None:
    tree = Tree(render(make_report(10, [0]), make_evidence(10, [0]), None))
    assert tree.all("img") == []
    assert "The codes are hidden on request, because codes trigger their classes" in tree.text

  def test_wrong_count(self) -> None:
    with pytest.raises(ValueError, match="codes: got shape"):
      render(make_report(10, [0]), make_evidence(10, [0]), make_codes(9, (8, 8)))


class TestMethod:
  def test_its_settings_info_and_steps_are_shown_whatever_they_are(self) -> None:
    text = page(
      method={"name": "scissors", "depth": 2, "heal": None, "width": 1e-7},
      info={"cuts": 3, "clean": True},
      seconds={"compile": 1.0, "cut_away": 2.0, "total": 3.0},
    ).text
    assert "Method scissors Its settings depth = 2, heal = None, width = 1e-07" in text
    assert "What it reports cuts = 3, clean = True" in text
    assert "Compile 1 s Cut away 2 s Total 3 s" in text and "Everything else" not in text

  def test_a_method_that_says_nothing(self) -> None:
    assert "Its settings none What it reports none" in page(method={"name": "x"}, info={}).text

  def test_what_was_read_and_when(self) -> None:
    text = page().text
    assert "Read to forget params and codes Read to score test examples" in text
    assert "Time 2026-01-02T03:04:05+00:00" in text
    nothing = page(time=None, read={"forget": ["params", "codes"], "score": None}).text
    assert "Read to score nothing Time not recorded" in nothing


class TestHostileText:
  def test_markup_is_escaped_everywhere(self) -> None:
    bad = "<script>alert(1)</script>"
    evidence = make_evidence(10, [0]) | {
      "class_names": [bad] * 10,
      "config": bad,
      "dataset": bad,
      "model": bad,
    }
    evidence["layers"] = [layer | {"path": bad} for layer in evidence["layers"]]
    evidence["controls"] = [{"name": bad, "retain_accuracy": 1.0, "forget_error": 1.0, "note": bad}]
    report = make_report(10, [0]) | {"checkpoint": bad, "versions": {bad: bad}, "codes_sha256": bad}
    report |= {"method": {"name": bad, bad: bad}, "info": {bad: bad}, "time": bad, "verdict": bad}
    report["seconds"] |= {bad: 1.0}
    report["read"] = {"forget": [bad], "score": bad}
    text = render(report, evidence, make_codes(10, (8, 8, 1)))
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert Tree(text).all("script") == []

  def test_quotes_cannot_leave_an_attribute(self) -> None:
    names = ['" onload="alert(1)'] * 10
    tree = Tree(
      render(
        make_report(10, [0]),
        make_evidence(10, [0]) | {"class_names": names},
        make_codes(10, (8, 8)),
      )
    )
    assert not any("onload" in attrs for _, attrs in tree.tags)

  def test_long_names_are_cut(self) -> None:
    names = ["n" * 200] * 10
    text = render(
      make_report(10, [0]), make_evidence(10, [0]) | {"class_names": names}, make_codes(10, (8, 8))
    )
    assert "n" * 49 not in text and "n" * 47 + "…" in text

  def test_control_and_direction_characters_are_replaced(self) -> None:
    assert wording.clean("a\x00b\u202ec\ud800d\n") == "a\ufffdb\ufffdc\ufffdd\ufffd"
    report = make_report(10, [0]) | {"checkpoint": "run\ud800"}
    render(report, make_evidence(10, [0]), None).encode("utf-8")


class TestMissingValues:
  @pytest.mark.parametrize("missing", [None, math.nan])
  def test_class_without_examples(self, missing: float | None) -> None:
    report = make_report(10, [0])
    for when in ("before", "after"):
      report[f"per_class_accuracy_{when}"][6] = missing
    evidence = make_evidence(10, [0])
    for when in ("before", "after"):
      evidence[f"confusion_{when}"][6] = [0] * 10
    tree = Tree(render(report, evidence, None))
    assert "6: accuracy no examples before, no examples after no examples –" in tree.text
    assert "nan" not in tree.text.lower().replace("mnemonic", "")

  def test_all_classes_without_examples(self) -> None:
    nothing = [None] * 40
    report = make_report(40, [0]) | {
      "per_class_accuracy_before": nothing,
      "per_class_accuracy_after": nothing,
    }
    evidence = make_evidence(40, [0])
    evidence |= {f"confusion_{when}": [[0] * 40] * 40 for when in ("before", "after")} | {
      "num_test_examples": 0
    }
    assert "39 kept classes without test examples" in Tree(render(report, evidence, None)).text

  def test_empty_losses(self) -> None:
    evidence = make_evidence(10, [0])
    whole = Tree(render(make_report(10, [0]), evidence, None))
    evidence["losses"] |= {"train_before": [], "train_after": []}  # as of a streamed set
    tree = Tree(render(make_report(10, [0]), evidence, None))
    assert (
      len(whole.all("figure")) == 4
      and "No losses of" not in whole.text
      and "which ones the model was trained on" in whole.text
    )
    assert len(tree.all("figure")) == 2 and "Test examples, after: 36 examples" in tree.text
    assert (
      "No losses of training examples of class 0 (zero) are shown: none were recorded." in tree.text
    )
    assert (
      "data set is streamed" in tree.text and "which ones the model was trained on" not in tree.text
    )
    evidence["losses"] = {key: [] for key in evidence["losses"]}
    nothing = Tree(render(make_report(10, [0]), evidence, None))
    assert nothing.all("figure") == [] and "on one logarithmic axis" not in nothing.text
    assert all(
      f"No losses of {split} examples of class 0" in nothing.text for split in ("training", "test")
    )

  def test_unmeasured_time_and_no_layers(self) -> None:
    seconds = dict.fromkeys(("compile", "total"))
    tree = Tree(
      render(
        make_report(10, [0]) | {"seconds": seconds}, make_evidence(10, [0]) | {"layers": []}, None
      )
    )
    assert "not measured" in tree.text and "no layers recorded" in tree.text


class TestBadInput:
  @pytest.mark.parametrize("key", schema.REPORT)
  def test_missing_report_key(self, key: str) -> None:
    report = make_report(10, [0])
    del report[key]
    with pytest.raises(ValueError, match=rf"report: '{key}' missing"):
      render(report, make_evidence(10, [0]), None)

  @pytest.mark.parametrize("key", schema.EVIDENCE)
  def test_missing_evidence_key(self, key: str) -> None:
    evidence = make_evidence(10, [0])
    del evidence[key]
    with pytest.raises(ValueError, match=rf"evidence: '{key}' missing"):
      render(make_report(10, [0]), evidence, None)

  @pytest.mark.parametrize(
    ("where", "key", "value"),
    [
      ("report", "method", "perturbation"),
      ("report", "method", {"lambda1": 0.1}),
      ("report", "method", {"name": 3}),
      ("report", "info", [1]),
      ("report", "time", 3.5),
      ("report", "read", {"forget": "codes", "score": "test"}),
      ("report", "read", {"forget": ["codes"]}),
      ("report", "verdict", None),
      ("report", "verdicts", {"zero": "forgotten"}),
      ("report", "verdicts", {"zero": {"verdict": "forgotten", "evidence": "test", "error": 7}}),
      ("report", "class_names", [0]),
      ("report", "classes", []),
      ("report", "classes", [0, 0]),
      ("report", "classes", [10]),
      ("report", "classes", [True]),
      ("report", "classes", "0"),
      ("report", "requested", [1]),
      ("report", "forget_error_after", 100),
      ("report", "retain_accuracy_after", "high"),
      ("report", "per_class_accuracy_after", [0.5] * 9),
      ("report", "per_class_accuracy_after", [0.5] * 9 + [-0.1]),
      ("report", "seconds", {"compile": 1.0}),
      ("report", "seconds", 3.0),
      ("report", "versions", ["jax"]),
      ("report", "checkpoint", 7),
      ("evidence", "class_names", [0] * 10),
      ("evidence", "confusion_after", [[1] * 10] * 9),
      ("evidence", "confusion_after", [[1] * 10] * 9 + [[1] * 9]),
      ("evidence", "confusion_after", [[-1] * 10] * 10),
      ("evidence", "confusion_after", [[0.5] * 10] * 10),
      ("evidence", "losses", {"train_before": []}),
      (
        "evidence",
        "losses",
        {"train_before": ["x"], "train_after": [], "test_before": [], "test_after": []},
      ),
      ("evidence", "layers", [{"path": "x"}]),
      ("evidence", "controls", [{"name": "x"}]),
      ("evidence", "num_test_examples", 3.5),
    ],
  )
  def test_edited_values(self, where: str, key: str, value: Any) -> None:
    report, evidence = make_report(10, [0]), make_evidence(10, [0])
    (report if where == "report" else evidence)[key] = value
    with pytest.raises(ValueError, match=key):
      render(report, evidence, None)

  def test_not_even_an_object(self) -> None:
    with pytest.raises(ValueError, match="report: got"):
      render([], make_evidence(10, [0]), None)  # type: ignore[arg-type]


def test_needs_no_jax() -> None:
  heavy = ("jax", "flax", "orbax", "optax")
  code = f"import sys, mnemonic_jax.report; print([m for m in {heavy} if m in sys.modules])"
  assert (
    subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    == "[]"
  )

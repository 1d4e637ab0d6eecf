"""The ledger: a line for whatever a run makes, and no change goes unseen."""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import shutil

import pytest
from running import call, snapshot

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.runs import ledger, verify
from mnemonic_jax.runs.folder import RunFolder

pytest_plugins = ["run_fixtures"]


@pytest.fixture
def run(learned_once, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(learned_once[0], tmp_path / "run"))


def lines_of(run: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def problems(run: pathlib.Path, head: str | None = None) -> str:
  """What verify finds wrong, without data; one text."""
  try:
    return " ".join(verify.verify(RunFolder.open(run), None, head)["problems"])
  except MnemonicError as error:
    return str(error)


def test_each_command_adds_its_lines_and_each_names_the_one_before(run):
  lines = lines_of(run)
  assert [line["event"] for line in lines][-2:] == ["codes", "forgot"]
  assert {line["event"] for line in lines[:-2]} == {"trained"}
  call("forget", run, "--classes", 5, "--method", "drop_row", "--json")
  lines = lines_of(run)
  assert (lines[-1]["of"], lines[-1]["classes"]) == ("forgets/0002", [0, 5])
  previous = "0" * 64
  for number, line in enumerate(lines, 1):
    own = {name: value for name, value in line.items() if name != "hash"}
    text = json.dumps(own, sort_keys=True, separators=(",", ":"))
    assert line["hash"] == hashlib.sha256(text.encode()).hexdigest()
    assert (line["previous"], line["number"]) == (previous, number)
    previous = line["hash"]
    for name, sha256 in line["files"].items():
      assert sha256 == hashlib.sha256((run / name).read_bytes()).hexdigest()
  report = json.loads((run / "forgets" / "0002" / "report.json").read_text())
  assert lines[-1]["params_sha256"] == report["params_sha256_after"]
  trained = [line for line in lines if line["event"] == "trained"][-1]
  assert trained["params_sha256"] == report["params_sha256_before"]


def test_every_file_that_counts_is_in_it(run):
  named = set(ledger.hashes(lines_of(run)))
  for folder in ("checkpoints", "codes", "forgets"):
    there = {str(path.relative_to(run)) for path in (run / folder).rglob("*") if path.is_file()}
    assert there <= named
  assert "config.json" in named


def test_verify_finds_a_whole_run_whole_and_its_numbers_again(run):
  result = call("verify", run, "--json").json
  assert result["problems"] == [] and result["numbers"] == 1
  assert result["head"] == lines_of(run)[-1]["hash"]
  assert call("verify", run, "--head", lines_of(run)[0]["hash"]).code == 0


def test_a_page_that_is_written_again_is_recorded(run):
  assert call("report", run, "--hide-codes").code == 0
  assert lines_of(run)[-1]["of"] == "forgets/0001/report.html" and problems(run) == ""


def test_a_forget_that_was_killed_before_its_line_gets_it_from_the_next_command(run):
  text = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
  (run / "ledger.jsonl").write_text("".join(text[:-1]))
  assert "forgets/0001: the ledger does not name it" in problems(run)
  call("forget", run, "--classes", 5, "--method", "drop_row", "--json")
  assert problems(run) == ""
  assert [line["of"] for line in lines_of(run)][-2:] == ["forgets/0001", "forgets/0002"]


def changed(run: pathlib.Path, rng: random.Random) -> str:
  """Change one byte of a file that the ledger is for; put back by the caller."""
  folders = ("codes", "forgets", "checkpoints")
  paths = [path for name in folders for path in sorted((run / name).rglob("*")) if path.is_file()]
  path = rng.choice([run / "ledger.jsonl", run / "config.json", *paths])
  data = bytearray(path.read_bytes())
  if not data:
    return changed(run, rng)
  place = rng.randrange(len(data))
  old = data[place]
  data[place] ^= rng.randrange(1, 256)
  path.write_bytes(bytes(data))
  found = problems(run)
  data[place] = old
  path.write_bytes(bytes(data))
  return found


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_every_change_of_one_byte_is_found(count, run):
  rng = random.Random(0)
  for _ in range(count):
    assert changed(run, rng)
  assert problems(run) == ""


def test_a_cut_tail_and_a_rewritten_chain_are_found_by_the_head(run):
  head = lines_of(run)[-1]["hash"]
  assert problems(run, head) == ""
  whole = (run / "ledger.jsonl").read_text()
  shutil.move(run / "forgets" / "0001", run.parent / "taken")
  (run / "ledger.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
  assert problems(run) == "" and f"no line with the hash {head}" in problems(run, head)
  shutil.move(run.parent / "taken", run / "forgets" / "0001")
  (run / "ledger.jsonl").unlink()
  opened = RunFolder.open(run)
  with opened.locked():
    ledger.record(opened)
  assert problems(run) == "" and f"no line with the hash {head}" in problems(run, head)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    ("no ledger", "has no ledger"),
    ("cut", "its last line is cut off"),
    ("moved", "line 1 does not name the line before it"),
    ("gone", "codes/learned.safetensors: is gone"),
  ],
)
def test_damage_is_told_by_the_command_and_nothing_is_written(damage, message, run):
  path = run / "ledger.jsonl"
  text = path.read_text()
  if damage == "no ledger":
    path.unlink()
  elif damage == "cut":
    path.write_text(text[:-20])
  elif damage == "moved":
    first, second, *rest = text.splitlines(keepends=True)
    path.write_text("".join([second, first, *rest]))
  else:
    (run / "codes" / "learned.safetensors").unlink()
  before = snapshot(run)
  assert message in call("verify", run).refusal()
  assert snapshot(run) == before


def test_a_broken_ledger_is_not_written_on(run):
  path = run / "ledger.jsonl"
  path.write_text(path.read_text().replace('"forgot"', '"forget"'))
  before = path.read_text()
  message = call("forget", run, "--classes", 5, "--method", "drop_row").refusal()
  assert "was changed: its hash does not fit" in message and path.read_text() == before

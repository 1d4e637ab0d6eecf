"""The ledger of a run: what was made and when, with the SHA-256 of every file.

    RUN/ledger.jsonl     one JSON object a line, in the order of the commands

Each line holds "hash", the SHA-256 of its own other fields, and "previous", the hash of the line
before, so that no line can be changed, added between others or taken out without a trace. Whoever
cuts the end off or writes the whole chain anew is found only by a hash that was noted elsewhere:
`mnemonic verify RUN --head HASH`. A line holds no personal data.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from mnemonic_jax.errors import MnemonicError
from mnemonic_jax.multihost import processes
from mnemonic_jax.runs import files, learned
from mnemonic_jax.runs.folder import RunFolder

START = "0" * 64  # what the first line names as the hash of the line before
_REMEDY = "Do not repair it: compare with a copy, and ask who changed it."


def path_in(run: RunFolder) -> epath.Path:
  """Where a run keeps its ledger."""
  return run.path / "ledger.jsonl"


def read(run: RunFolder) -> list[dict[str, Any]]:
  """Return all lines, checked: each is whole, has its hash, and names the line before.

  Raises:
    MnemonicError: the first line that was changed, or a file that does not end with a whole line.
  """
  path = path_in(run)
  if not path.exists():
    return []
  try:
    text = path.read_bytes().decode("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise MnemonicError(f"{path}: cannot be read: {error}. {_REMEDY}") from error
  lines: list[dict[str, Any]] = []
  previous, rest = START, text.split("\n")
  if rest.pop():
    raise MnemonicError(f"{path}: its last line is cut off. {_REMEDY}")
  for number, line in enumerate(rest, 1):
    found = _parsed(line)
    if found is None or _line(found) != line or found.get("hash") != _hash(found):
      raise MnemonicError(f"{path}: line {number} was changed: its hash does not fit. {_REMEDY}")
    if found.get("previous") != previous:
      raise MnemonicError(
        f"{path}: line {number} does not name the line before it; a line was added, taken out or "
        f"moved. {_REMEDY}"
      )
    previous = found["hash"]
    lines.append(found)
  return lines


def record(run: RunFolder, params_sha256: str | None = None) -> None:
  """Add a line for whatever the run holds that the ledger does not name yet.

  Call it at the end of a command, with the run locked. What a killed command has left without its
  line gets one by the next command.

  Args:
    params_sha256: of the newest checkpoint.
  """
  processes.on_writer(lambda: _record(run, params_sha256))


def record_page(run: RunFolder, page: epath.Path) -> None:
  """Add a line for a page that was written again; call it with the run locked."""
  if lines := read(run):
    _write(run, [*lines, _next(run, lines, {"event": "page", "of": _name(run, page)}, [page])])


def hashes(lines: list[dict[str, Any]]) -> dict[str, str]:
  """The hash of each file by its path in the run, as the newest line has it.

  >>> hashes([{"files": {"a": "1", "b": "2"}}, {"files": {"a": "3"}}])
  {'a': '3', 'b': '2'}
  """
  return {name: found for line in lines for name, found in line["files"].items()}


def file_sha256(path: epath.Path) -> str:
  """Hash the bytes of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _record(run: RunFolder, params_sha256: str | None) -> None:
  lines = read(run)
  known, count = {line["of"] for line in lines}, len(lines)
  for entry, paths in _artifacts(run, params_sha256):
    if entry["of"] not in known:
      lines = [*lines, _next(run, lines, entry, paths)]
  if len(lines) > count:
    _write(run, lines)


def _artifacts(
  run: RunFolder, params_sha256: str | None
) -> Iterator[tuple[dict[str, Any], list[epath.Path]]]:
  """What a run holds: the fields of its line, and its files."""
  steps = sorted(files.children(run.checkpoints, "[0-9]*"), key=lambda path: int(path.name))
  for step in steps:
    more = {"params_sha256": params_sha256} if params_sha256 and step == steps[-1] else {}
    entry: dict[str, Any] = {"event": "trained", "of": f"checkpoints/{step.name}", **more}
    yield entry, [run.path / "config.json", *_files(step)]
  for path in sorted(files.children(learned.path_in(run).parent, "*.safetensors")):
    yield {"event": "codes", "of": f"codes/{path.name}"}, [path]
  for folder in run.forgets():
    report = run.report_of(folder)
    others = report.get("copies", {}).items()
    copies = {name: copy.get("params_sha256_after") for name, copy in others}
    entry = {
      "event": "forgot",
      "of": f"forgets/{folder.name}",
      "requested": report.get("requested"),
      "classes": report["classes"],
      "verdict": report.get("verdict"),
      "params_sha256_before": report.get("params_sha256_before"),
      "params_sha256": report.get("params_sha256_after"),
    }
    yield entry | ({"copies": copies} if copies else {}), _files(folder)


def _files(folder: epath.Path) -> list[epath.Path]:
  """All files below a folder."""
  found: list[epath.Path] = []
  for path in sorted(folder.iterdir()):
    found += _files(path) if path.is_dir() else [path]
  return found


def _next(
  run: RunFolder, lines: list[dict[str, Any]], entry: dict[str, Any], paths: list[epath.Path]
) -> dict[str, Any]:
  """Make the line that follows."""
  line = {
    "number": len(lines) + 1,
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    **entry,
    "files": {_name(run, path): file_sha256(path) for path in paths},
    "previous": lines[-1]["hash"] if lines else START,
  }
  return {**line, "hash": _hash(line)}


def _write(run: RunFolder, lines: list[dict[str, Any]]) -> None:
  """Write all lines, atomically."""
  files.write_text(path_in(run), "".join(f"{_line(line)}\n" for line in lines))


def _name(run: RunFolder, path: epath.Path) -> str:
  return path.relative_to(run.path).as_posix()


def _hash(line: dict[str, Any]) -> str:
  """The hash of a line: SHA-256 of its fields but "hash", in the form of `_line`."""
  fields = {name: value for name, value in line.items() if name != "hash"}
  return hashlib.sha256(_line(fields).encode("utf-8")).hexdigest()


def _line(fields: dict[str, Any]) -> str:
  return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _parsed(line: str) -> dict[str, Any] | None:
  """A line as a dict with what every line has, or None."""
  try:
    found = json.loads(line)
  except ValueError:
    return None
  needed = {"number", "time", "event", "of", "files", "previous", "hash"}
  whole = isinstance(found, dict) and needed <= set(found) and isinstance(found["files"], dict)
  return found if whole else None

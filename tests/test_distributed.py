"""Several processes of one job on this machine.

They share a run, agree to stop, and end together when one is lost.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import pathlib
import re
import socket
import threading
import time
import types
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
from jobs import finish_job, free_address, start_job
from peers import GROWTH, stuck_file
from running import HANG, snapshot, wait_for

from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.multihost import processes
from mnemonic_jax.multihost import roll_call as roll_calls
from mnemonic_jax.multihost.processes import Watchdog
from mnemonic_jax.multihost.roll_call import roll_call

PEERS = pathlib.Path(__file__).with_name("peers.py")


def start(run, count, *flags):
  return start_job((PEERS, run, *flags), count)


def start_long(run, count, *flags):
  """The same, without end; return when a few steps are done."""
  processes = start(run, count, "--steps", 100000, "--seconds", 0.02, *flags)
  metrics = run / "metrics.jsonl"
  assert wait_for(
    lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, processes[0]
  )
  return processes


def ours(outcome):
  """The one message of ours."""
  lines = [line for line in outcome.err.splitlines() if line.startswith("mnemonic:")]
  assert len(lines) == 1, outcome.err
  return lines[0]


def test_two_processes_share_a_run_and_one_resumes_it(tmp_path):
  run = tmp_path / "run"
  results = [outcome.json for outcome in finish_job(start(run, 2, "--steps", 4))]
  start_sum, leaves = sum(range(24)), 24
  after_four = (
    start_sum + 4 * leaves * GROWTH * 2
  )  # each step sums what each device has, an all-reduce
  assert results == [{"steps": 4, "total": after_four, "devices": 2}] * 2
  assert [
    json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
  ] == [1, 2, 3, 4]
  assert len(list((run / "tensorboard").iterdir())) == 1
  assert {path.name for path in run.iterdir()} == {
    ".lock",
    "checkpoints",
    "config.json",
    "metrics.jsonl",
    "tensorboard",
  }
  (alone,) = finish_job(start(run, 1, "--steps", 6))
  assert alone.json == {"steps": 6, "total": after_four + 2 * leaves * GROWTH, "devices": 1}


@pytest.mark.parametrize(
  ("signum", "lost", "count"),
  [
    (SIGKILL, 2, 3),
    (SIGSTOP, 1, 2),
    pytest.param(SIGKILL, 0, 3, marks=pytest.mark.long),
    pytest.param(SIGSTOP, 0, 3, marks=pytest.mark.long),
  ],
)
def test_a_dead_or_stuck_process_ends_the_others_with_a_message(signum, lost, count, tmp_path):
  processes = start_long(tmp_path / "run", count)
  processes[lost].send_signal(signum)
  stuck_file(tmp_path / "run").touch()
  others = [process for index, process in enumerate(processes) if index != lost]
  try:
    for outcome in finish_job(others):
      assert outcome.code == 1
      assert (
        "another process is dead or stuck" in (message := ours(outcome))
        and f" of {count}. Resume with" in message
      )
  finally:
    processes[lost].kill()
    processes[lost].communicate()


@pytest.mark.parametrize(
  ("where", "said"),
  [
    pytest.param(
      "start-up", "start-up did not end within 600 s (--startup-timeout)", marks=pytest.mark.long
    ),
    ("checkpoint", "the checkpoint of step 4 did not end within 600 s (--startup-timeout)"),
  ],
  ids=["start-up", "checkpoint"],
)
def test_a_process_stuck_outside_of_the_steps_ends_all_within_the_startup_timeout(
  where, said, tmp_path
):
  processes = start(tmp_path / "run", 2, "--stuck", where)
  for outcome in finish_job(processes):
    assert outcome.code == 1
    assert (
      said in (message := ours(outcome))
      and "dead or stuck, or this one takes that long by itself" in message
    )
    assert message.endswith("and with a larger --startup-timeout if all was well and only slow.")


@pytest.mark.long
def test_a_process_without_input_says_so_and_the_others_that_it_may_be_that(tmp_path):
  waiting, stuck = finish_job(start(tmp_path / "run", 2, "--stuck", "input"))
  for outcome in (waiting, stuck):
    assert outcome.code == 1
    assert "no step finished for 600 s after step 1 (--peer-timeout)" in ours(outcome)
    assert "with a larger --peer-timeout if all was well and only slow" in ours(outcome)
  assert "another process is dead or stuck, or waits for its input; its own log says more" in ours(
    waiting
  )
  assert "this process waits for its next batch, so its input is stuck or too slow" in ours(stuck)


@pytest.mark.parametrize("signum", [SIGTERM, pytest.param(SIGINT, marks=pytest.mark.long)])
def test_a_signal_to_one_process_stops_all_at_the_same_step_after_a_checkpoint(signum, tmp_path):
  run = tmp_path / "run"
  processes = start_long(run, 2)
  processes[1].send_signal(signum)
  first, second = finish_job(processes)
  assert (first.code, second.code) == (143, 143)
  assert ours(first) == ours(second)
  step = int(ours(first).split("stopped after step ")[1].split(";")[0])
  assert [path.name for path in (run / "checkpoints").iterdir()] == [str(step)]
  assert len((run / "metrics.jsonl").read_text().splitlines()) == step


@pytest.mark.long
def test_what_slurm_says_is_enough(tmp_path):
  port = free_address().split(":")[1]
  shared = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "JAX_COORDINATOR_PORT": port,
  }
  processes = []
  for index in ("0", "1"):
    processes += start_job(
      (PEERS, tmp_path / "run"), 1, **shared, SLURM_PROCID=index, SLURM_LOCALID=index
    )
  assert [outcome.json["devices"] for outcome in finish_job(processes)] == [2, 2]


def test_what_one_process_cannot_do_fails_on_all(tmp_path):
  """Process 1 cannot read a file, and process 0 cannot make the run folder."""
  (tmp_path / "other").write_text("not a run")
  before = snapshot(tmp_path)
  for outcome in finish_job(start(tmp_path, 2, "--fails", 1)):
    assert outcome.code == 1
    first, second = (line for line in outcome.err.splitlines() if line.startswith("mnemonic:"))
    assert first == "mnemonic: file: no such file on host 1"
    assert "is not empty and no run" in second
  assert snapshot(tmp_path) == before


def meet(*counts_and_ids, timeout=HANG):
  """The errors of a roll call of threads, by process; None where all is well."""
  address = free_address()

  def one(index, count):
    try:
      return roll_call(address, index, count, timeout)
    except MnemonicError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(counts_and_ids)) as pool:
    return list(pool.map(one, *zip(*counts_and_ids, strict=True)))


def test_a_roll_call_finds_all():
  assert meet((0, 4), (1, 4), (2, 4), (3, 4)) == [None] * 4


@pytest.mark.parametrize(
  ("started", "expected"),
  [
    ([(0, 2), (1, 3)], "process 1 was started with --num-processes 3, process 0 with 2"),
    ([(0, 3), (1, 2)], "process 1 was started with --num-processes 2, process 0 with 3"),
    ([(0, 3), (1, 3), (1, 3)], "two processes were started with --process-id 1"),
  ],
)
def test_a_roll_call_that_does_not_fit_fails_on_all_with_the_numbers(started, expected):
  for message in meet(*started):
    assert expected in message, message


def test_who_did_not_come_to_a_roll_call_is_told_to_all(monkeypatch):
  """The time is over as soon as process 2 is there."""
  there, read = threading.Event(), roll_calls._read_line

  def read_line(connection):
    line = read(connection)
    if line == "2 4":
      there.set()
    return line

  clock = types.SimpleNamespace(
    monotonic=lambda: time.monotonic() + 2 * HANG * there.is_set(), sleep=time.sleep
  )
  monkeypatch.setattr(roll_calls, "_read_line", read_line)
  monkeypatch.setattr(roll_calls, "time", clock)
  for message in meet((0, 4), (2, 4)):
    assert "of 4 processes, 1, 3 did not come within 900 s" in message, message


def test_a_roll_call_ignores_strangers():
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(roll_call, address, 0, 2, HANG)
    host, port = address.split(":")
    while True:
      try:
        with socket.create_connection((host, int(port))) as stranger:
          stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        break
      except OSError:
        continue
    pool.submit(roll_call, address, 1, 2, HANG).result()
    assert first.result() is None


@pytest.mark.parametrize(
  ("process_id", "said"),
  [
    (0, "of 2 processes, 1 did not come within 100 s (--startup-timeout)"),
    (
      1,
      "process 1 of 2 could not reach process 0 within 100 s (--startup-timeout): Connection ref",
    ),
  ],
  ids=["a missing process", "an unreachable coordinator"],
)
def test_who_waits_for_nobody_ends_within_the_startup_timeout(process_id, said, monkeypatch):
  """By a clock that goes on when it is looked at: far enough for process 1 to try twice."""
  looks = itertools.count(0, 40 if process_id else 1000)
  clock = types.SimpleNamespace(monotonic=lambda: next(looks), sleep=lambda seconds: None)
  monkeypatch.setattr(roll_calls, "time", clock)
  with pytest.raises(MnemonicError, match=re.escape(said)):
    processes.initialize(free_address(), process_id, 2, startup_timeout=100)


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (("127.0.0.1:1", None, 2), "--process-id: missing"),
    ((None, 1, 2), "--coordinator: missing"),
    (("127.0.0.1:1", 0, None), "--num-processes: missing"),
    (("127.0.0.1:1", 2, 2), "--process-id: got 2 with --num-processes 2; expected 0 to 1"),
    (("127.0.0.1", 1, 2), "--coordinator: got 127.0.0.1; expected host:port"),
  ],
)
def test_flags_that_do_not_fit_are_refused(flags, expected):
  with pytest.raises(UsageError, match=expected):
    processes.initialize(*flags, startup_timeout=1)


def test_alone_nothing_is_needed(capfd):
  processes.initialize(num_processes=1)
  assert processes.is_writer() and not processes.several()
  processes.barrier("alone")
  written = []
  processes.on_writer(lambda: written.append(1))
  assert written == [1]
  with pytest.raises(KeyError), Watchdog(0.01, 0.01) as watchdog:
    watchdog.beat(1)
    raise KeyError
  with pytest.raises(UsageError, match="--peer-timeout: got 0"):
    Watchdog(0, 1)
  with pytest.raises(UsageError, match="--startup-timeout: got -1"):
    Watchdog(1, -1)


class Clock:
  """A clock that a test sets; it knows when a watchdog has looked at it."""

  def __init__(self):
    self.now, self._looks, self._looked = 0.0, 0, threading.Condition()

  def monotonic(self):
    with self._looked:
      self._looks += 1
      self._looked.notify_all()
      return self.now

  def sleep(self, seconds):
    pass

  def advance(self, seconds):
    """Set the clock, and return when the watchdog has acted on it."""
    self.now += seconds
    with self._looked:
      seen = self._looks  # the look after the next one begins when the next one is acted on
      assert self._looked.wait_for(lambda: self._looks >= seen + 2, timeout=HANG)


@pytest.fixture
def watchdog(monkeypatch):
  """One with a clock of its own, which writes down what it would end the process with."""
  said, clock = [], Clock()
  monkeypatch.setattr(processes, "several", lambda: True)
  monkeypatch.setattr(processes, "end", lambda code, *, last, message: said.append(message))
  monkeypatch.setattr(processes, "time", clock)
  watchdog = Watchdog(0.1, startup_timeout=1.0)
  watchdog.said, watchdog.clock = said, clock
  return watchdog


def test_the_watchdog_gives_each_phase_its_time_and_each_batch_of_an_evaluation(watchdog):
  with watchdog:
    watchdog.clock.advance(0.9)  # compiling
    watchdog.beat(1)
    watchdog.phase("the checkpoint of step 1")
    watchdog.clock.advance(0.9)
    for number in range(6):
      watchdog.phase(f"batch {number} of an evaluation")
      watchdog.clock.advance(0.9)
    assert not watchdog.said
    watchdog.clock.advance(0.2)
  message = watchdog.said[0]
  assert (
    "batch 5 of an evaluation did not end within 1 s (--startup-timeout): another process is"
    in message
  )


def test_the_watchdog_waits_less_for_a_step(watchdog):
  with watchdog:
    watchdog.beat(7)
    watchdog.clock.advance(0.09)
    assert not watchdog.said
    watchdog.clock.advance(0.02)
  assert "no step finished for 0.1 s after step 7 (--peer-timeout)" in watchdog.said[0]

"""Classes as commands and configs name them: by index, by name, and what is refused."""

from __future__ import annotations

import pytest

from mnemonic_jax.errors import MnemonicError, UsageError
from mnemonic_jax.runs.forget import resolve, union

NAMES = ("cat", "dog", "crane", "12", "crane", "2")


@pytest.mark.parametrize(
  ("classes", "expected"),
  [
    (["dog"], [1]),
    (["dog", "0"], [1, 0]),
    ([4, "cat"], [4, 0]),
    (["2"], [5]),  # the name, not the index
    ([2], [2]),  # an integer is an index
    (["12"], [3]),
    (["4"], [4]),  # no class is called so
  ],
)
def test_a_name_first_then_an_index(classes, expected):
  assert resolve(classes, NAMES) == expected


@pytest.mark.parametrize(
  ("classes", "message"),
  [
    ([], "got none; expected at least one"),
    (["dgo"], r"got dgo; expected an index from 0 to 5, or the name .* Did you mean dog\?"),
    (["Dog"], r"got Dog; .* Did you mean dog\?"),
    (["zebra"], r"got zebra; .* Known: 12, 2, cat, crane, crane, dog\."),
    ([6], "got 6; expected an index from 0 to 5"),
    (["-1"], "got -1; expected an index"),
    (["1.5"], r"got 1\.5; expected an index"),
    (["crane"], "got 'crane', which classes 2 and 4 are called. Pass the index"),
    (["dog", "1"], r"got dog, 1; class 1 \(dog\) is in it twice"),
    ([0, 0], r"got 0, 0; class 0 \(cat\) is in it twice"),
  ],
)
def test_what_is_refused(classes, message):
  with pytest.raises(UsageError, match=f"^classes: {message}"):
    resolve(classes, NAMES)


def test_among_many_classes_the_nearest_is_named_alone():
  with pytest.raises(UsageError) as caught:
    resolve(["kind 9x"], [f"kind {i}" for i in range(1000)])
  assert "Did you mean kind 9" in str(caught.value) and "Known" not in str(caught.value)


def test_where_no_class_has_a_name():
  """As the digits, and a data set that is gone."""
  with pytest.raises(
    UsageError, match=r"got dog; expected an index from 0 to 2: no class has a name"
  ):
    resolve(["dog"], ["0", "1", "2"])
  assert resolve(["2"], ["0", "1", "2"]) == [2]


def test_earlier_classes_join_and_one_must_stay():
  assert union([3, 1], [4, 1], NAMES) == [1, 3, 4]
  with pytest.raises(UsageError, match=r"\[0, 1, 2\] with those forgotten before are all 6"):
    union([0, 1, 2], [3, 4, 5], NAMES)
  with pytest.raises(UsageError, match=r"\[0, 1, 2, 3, 4, 5\] are all 6; one must stay"):
    union(range(6), [], NAMES)
  with pytest.raises(MnemonicError, match="an earlier forget of this run names class 77"):
    union([0], [77], NAMES)

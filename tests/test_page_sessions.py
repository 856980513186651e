"""What the stethoscope's page keeps of its visitors, without a server."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlmdiag.stethoscope import sessions
from vlmdiag.stethoscope.sessions import Sessions, private_folder, size_of

pytestmark = pytest.mark.fast
MIB = 2**20


class Answer:
    """Stands for an analysis of some size."""

    def __init__(self, mebibytes):
        self.rows = np.zeros(mebibytes * MIB, np.uint8)


def ask(kept, visitor, mebibytes):
    with kept.at(visitor) as session:
        session.current = session.kept[visitor] = Answer(mebibytes)
        session.ended = ""
    return session


def test_the_longest_unused_goes_first_and_never_one_at_work_or_the_last(tmp_path):
    kept = Sessions(60, 10 * MIB, tmp_path)
    first, second = ask(kept, ("a", "1"), 4), ask(kept, ("b", "1"), 4)
    with kept.at(("a", "1")):  # looked at again: the second is older now
        pass
    third = ask(kept, ("c", "1"), 4)
    assert second.current is None and second.ended == "other visitors needed the memory"
    assert first.current and third.current
    with kept.at(("a", "1")):
        ask(kept, ("d", "1"), 9)
        assert first.current and third.current is None
    alone = ask(kept, ("e", "1"), 30)
    assert alone.current and first.current is None


def test_age_ends_a_session_and_a_closed_page_sooner(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])
    kept = Sessions(60, 100 * MIB, tmp_path)
    opened, closed = ask(kept, ("a", "1"), 1), ask(kept, ("b", "1"), 1)
    folder = kept.new_folder(closed)
    kept.close(("b", "1"))
    now[0] += 60 * sessions.CLOSED_MINUTES + 1
    kept.sweep()
    assert opened.current and closed.current is None and not folder.exists()
    now[0] += 3600
    kept.sweep()
    assert opened.current is None and opened.ended == "nothing was done here for 60 minutes"


def test_visitors_who_hold_nothing_put_nobody_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "SESSION_LIMIT", 5)
    kept = Sessions(60, 100 * MIB, tmp_path)
    one = ask(kept, ("a", "1"), 1)
    for number in range(50):
        with kept.at(("flood", str(number))):
            pass
    with kept.at(("a", "1")) as again:
        assert again is one and one.current
    assert len(kept._sessions) <= 6


def test_the_size_counts_each_array_once_and_no_model():
    array = np.zeros(1000, np.uint8)
    tensor = torch.zeros(1000, dtype=torch.uint8)
    picture = Image.new("RGB", (10, 10))
    whole = {"a": [array, array], "b": (tensor[:10], tensor), "c": picture}
    assert 2300 <= size_of(whole) < 2400
    assert size_of({"m": torch.nn.Linear(1000, 1000)}) < 10


def test_what_a_killed_server_left_is_removed_and_what_a_running_one_has_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sessions.tempfile, "gettempdir", lambda: str(tmp_path))
    left = tmp_path / f"{sessions.ROOT}left"
    left.mkdir()
    (left / "lock").touch()
    with private_folder() as running, private_folder() as second:
        assert running.exists() and second.exists() and not left.exists()
    assert list(tmp_path.iterdir()) == []

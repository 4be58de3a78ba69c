import io

import pytest
from rich.console import Console

from sanitize.progress import shown, track


def test_nothing_is_drawn_unless_it_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with track("work", 3) as advance:
        advance(3)
    assert capfd.readouterr() == ("", "")


def test_bars_show_what_is_done_and_end_at_what_was_done() -> None:
    text = io.StringIO()
    with shown(Console(file=text, force_terminal=True, width=120)):
        with track("known", 4, "images") as advance:
            advance(3)
        with track("unknown", None) as advance:
            advance(5)
            advance(2)
    assert "known" in text.getvalue()
    assert "3/3" in text.getvalue()
    assert "7/7" in text.getvalue()


def test_an_exception_ends_the_display() -> None:
    text = io.StringIO()
    with pytest.raises(RuntimeError), shown(Console(file=text)), track("work", 3):
        raise RuntimeError
    with track("later", 3) as advance:
        advance(1)
    assert "later" not in text.getvalue()


def test_a_note_stands_behind_the_description_until_the_next_one() -> None:
    text = io.StringIO()
    with shown(Console(file=text, force_terminal=True, width=120)), track("train", 4) as bar:
        bar.note("loss 2")
        bar(2)
        bar.note("loss 1")
        bar(2)
    last = text.getvalue().rsplit("train", 1)[1]
    assert "loss 1" in last
    assert "loss 2" not in last

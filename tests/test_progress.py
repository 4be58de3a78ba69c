import io
import re
import threading
import time
from contextlib import suppress

import pytest
from rich.console import Console

from sanitize.progress import shown, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(text: io.StringIO) -> Console:
    return Console(file=text, force_terminal=True, width=120)


def test_nothing_is_drawn_unless_it_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with track("work", 3) as advance:
        advance(3)
    assert capfd.readouterr() == ("", "")


def test_bars_show_what_is_done_and_end_at_what_was_done() -> None:
    text = Terminal()
    with shown(terminal(text)):
        with track("known", 4, "images") as advance:
            advance(3)
        with track("unknown", None) as advance:
            advance(5)
            advance(2)
    assert "known" in text.getvalue()
    assert "3/3" in text.getvalue()
    assert "7/7" in text.getvalue()


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_an_exception_ends_the_display(kind: type[io.StringIO]) -> None:
    text = kind()
    with pytest.raises(RuntimeError), shown(Console(file=text)), track("work", 3):
        raise RuntimeError
    with track("later", 3) as advance:
        advance(1)
    assert "later" not in text.getvalue()


def test_a_note_stands_behind_the_description_until_the_next_one() -> None:
    text = Terminal()
    with shown(terminal(text)), track("train", 4) as bar:
        bar.note("loss 2")
        bar(2)
        bar.note("loss 1")
        bar(2)
    last = text.getvalue().rsplit("train", 1)[1]
    assert "loss 1" in last
    assert "loss 2" not in last


# --- without a terminal -----------------------------------------------------------------------------------------


def lines_of(text: io.StringIO) -> list[str]:
    """Lines of a log, with the seconds left out."""
    assert not re.search(r"[\r\x1b]", text.getvalue())
    return [re.sub(r"\d+\.\d s", "_ s", line) for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("force_terminal", [None, True])
def test_in_a_log_each_stage_is_one_plain_line_once_it_has_ended(force_terminal: bool | None) -> None:
    text = io.StringIO()
    with shown(Console(file=text, width=20, force_terminal=force_terminal)):  # True: FORCE_COLOR, as some CI sets it
        with track("index", None) as advance:
            advance(1000)
            advance(500)
        with track("nothing left", 7):
            pass
        with track("train the suspect model", 4) as bar:
            bar.note("loss 2")
            bar(2)
            bar.note("loss 1")
            bar(2)
        with track("evaluate", 3, "networks") as advance:
            advance(3)
    assert lines_of(text) == [
        "index: 1,500 samples in _ s",
        "train the suspect model: 4 samples in _ s, loss 1",
        "evaluate: 3 networks in _ s",
    ]


def test_in_a_log_groups_of_shards_are_one_line_also_side_by_side_and_inside_other_work() -> None:
    text = io.StringIO()

    def group(n: int) -> None:
        with track("embed", 100) as advance:
            for _ in range(n):
                advance(1)

    with shown(Console(file=text)), track("red team", 2, "cases") as case:
        for _ in range(2):
            group(3)
            groups = [threading.Thread(target=group, args=(n,)) for n in (4, 5)]
            for thread in groups:
                thread.start()
            for thread in groups:
                thread.join()
            with track("select", 12) as advance:
                advance(12)
            case(1)
    each = ["embed: 12 samples in _ s", "select: 12 samples in _ s"]
    assert sorted(lines_of(text)) == sorted([*each, *each, "red team: 2 cases in _ s"])


def test_in_a_log_work_that_failed_and_was_tried_again_counts_once() -> None:
    text = io.StringIO()
    with shown(Console(file=text)):
        with suppress(OSError), track("write", 5) as advance:
            advance(3)
            raise OSError
        with track("write", 5) as advance:
            advance(5)
    assert lines_of(text) == ["write: 5 samples in _ s"]


def test_in_a_log_a_long_stage_says_how_far_it_is_and_its_groups_have_no_total() -> None:
    text = io.StringIO()

    def wait_for(line: str) -> None:
        until = time.monotonic() + 20
        while line not in text.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        assert line in text.getvalue()

    with shown(Console(file=text), silence=0.05), track("red team", 2, "cases") as case:
        with track("train", 1200) as bar:
            bar(1000)
            bar.note("loss 1")
            wait_for("red team: 0 of 2 cases after 0 s; train: 1,000 of 1,200 samples after 0 s, loss 1\n")
            bar(200)
        case(1)
        for _ in range(2):
            with track("embed", 6) as bar:
                bar(5)
                wait_for("embed: 5 of 6 samples")
        with suppress(OSError), track("embed", 6) as bar:
            raise OSError
        with track("embed", 6) as bar:
            bar(5)
            wait_for("red team: 1 of 2 cases after 0 s; embed: 15 samples after 0 s\n")


def test_in_a_log_short_stages_leave_no_line_before_they_end_and_no_thread() -> None:
    text = io.StringIO()
    with shown(Console(file=text), silence=0.2):
        for number in range(8):  # 0.4 s in all; a line each 0.05 s
            with track(f"stage {number}", 3) as bar:
                time.sleep(0.05)
                bar(3)
    assert lines_of(text) == [f"stage {number}: 3 samples in _ s" for number in range(8)]
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]

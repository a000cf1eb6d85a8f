import io
import re
import types

import pytest
from rich.console import Console

from experiments import progress
from experiments.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """Stands still unless a test moves it."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def terminal(width=120):
    return Console(force_terminal=True, file=io.StringIO(), width=width, color_system=None)


def shown(console, bar):
    """What the bar looks like now on a terminal of that width."""
    screen = terminal(console.width)
    screen.print(bar)
    return screen.file.getvalue()


def test_a_log_gets_the_first_figures_then_a_line_now_and_then_and_the_last(clock, capsys):
    with ProgressBar("training", 1000) as bar:
        for step in range(1, 1001):
            clock.now += 0.125
            bar.reached(step)
            bar.update(f"loss {step / 1000:.3f}")
    assert capsys.readouterr().err.splitlines() == [
        "training  1/1,000  loss 0.001  elapsed 0:00",
        "training  241/1,000  loss 0.241  elapsed 0:30  remaining 1:35",
        "training  481/1,000  loss 0.481  elapsed 1:00  remaining 1:05",
        "training  721/1,000  loss 0.721  elapsed 1:30  remaining 0:35",
        "training  961/1,000  loss 0.961  elapsed 2:00  remaining 0:05",
        "training  1,000/1,000  loss 1.000  elapsed 2:05",
    ]


def test_what_is_soon_done_without_figures_says_nothing_in_a_log(clock, capsys):
    with ProgressBar("encoding", 50) as bar:
        for _ in range(50):
            clock.now += 0.5
            bar.advance()
    assert capsys.readouterr().err == ""
    with ProgressBar("encoding", 50) as bar:
        for _ in range(50):
            clock.now += 1
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "encoding  30/50  elapsed 0:30  remaining 0:20", "encoding  50/50  elapsed 0:50",
    ]  # fmt: skip


def test_the_last_line_of_a_log_comes_once(clock, capsys):
    with ProgressBar("predicting", 3) as bar:
        for seconds in (31, 1, 1):
            clock.now += seconds
            bar.advance()
        bar.reached(3)
    assert [line[:15] for line in capsys.readouterr().err.splitlines()] == [
        "predicting  1/3", "predicting  3/3",
    ]  # fmt: skip


def test_a_terminal_gets_the_bar_the_counts_and_each_time_by_its_name(clock):
    console = terminal()
    with ProgressBar("scoring test words", 400, console=console) as bar:
        bar.advance(100)
        clock.now += 75
        bar.advance(100)
        bar.update("12 wrong")
        (line,) = shown(console, bar).splitlines()
    assert line.startswith("scoring test words  ━━━")
    assert line.rstrip().endswith("200/400  12 wrong  elapsed 1:15  remaining 2:30")
    assert "scoring test words" in console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_nothing_is_cut_in_a_terminal_of_any_width(clock, width):
    console = terminal(width)
    with ProgressBar("scoring test words", 300_000, console=console) as bar:
        for step in (100_000, 200_000):
            clock.now += 50_000
            bar.reached(step)
        bar.update("loss 0.912  12,345 words/s")
        text = " ".join(shown(console, bar).split())
    for part in ("scoring test words", "200,000/300,000", "loss 0.912 12,345 words/s",
                 "elapsed 27:46:40", "remaining 13:53:20"):  # fmt: skip
        assert part in text, text


def test_the_remaining_time_leaves_out_a_first_step_that_compiles(clock):
    console = terminal()
    with ProgressBar("training", 101, console=console) as bar:
        bar.now("compiling")
        assert re.match("compiling .* 0/101  elapsed 0:00  remaining –", shown(console, bar))
        clock.now += 60
        bar.reached(1)
        assert re.match("training .* 1/101  elapsed 1:00  remaining –", shown(console, bar))
        clock.now += 1
        bar.reached(2)
        assert "elapsed 1:01  remaining 1:39" in shown(console, bar)


def test_a_resumed_sitting_goes_by_its_own_steps(clock):
    console = terminal()
    with ProgressBar("training", 1000, 900, console=console) as bar:
        for step in (901, 902, 950):
            clock.now += 10
            bar.reached(step)
        assert "950/1,000" in shown(console, bar)
        assert "remaining 0:20" in shown(console, bar)  # 49 steps took 20 seconds


def test_what_is_done_between_the_steps_counts_while_it_lasts(clock):
    console = terminal()
    with ProgressBar("training", 101, console=console) as bar:
        for step in range(1, 52):
            clock.now += 1
            bar.reached(step)
        assert "remaining 0:50" in shown(console, bar)
        bar.now("evaluating")
        clock.now += 25
        assert "evaluating" in shown(console, bar) and "remaining 1:15" in shown(console, bar)


def test_a_first_step_like_the_others_counts(clock):
    console = terminal()
    with ProgressBar("measuring", 4, first_counts=True, console=console) as bar:
        clock.now += 20
        bar.advance()
        assert "remaining 1:00" in shown(console, bar)


def test_the_bar_is_full_only_when_all_is_over(clock):
    console = terminal()
    with ProgressBar("training", 2, console=console) as bar:
        bar.reached(2)
        bar.now("evaluating")
        open_bar = shown(console, bar)
        assert open_bar.startswith("evaluating") and "remaining" not in open_bar
        assert bar._bar(40).pulse  # it moves without an end
        bar.reached(1)
        assert shown(console, bar).startswith("training") and not bar._bar(40).pulse
        bar.reached(2)
    assert shown(console, bar).startswith("training") and not bar._bar(40).pulse


def test_where_nobody_knows_the_total_the_count_is_shown(clock):
    console = terminal()
    with ProgressBar("translating", console=console) as bar:
        for _ in range(3):
            clock.now += 2
            bar.advance(500)
        assert "1,500  elapsed 0:06" in shown(console, bar)
        assert "remaining" not in shown(console, bar)


def test_a_line_that_is_said_stays_above_the_bar_as_it_is(capsys):
    console = terminal(40)
    with ProgressBar("training", 2, console=console) as bar:
        bar.say("[bold]" + "x" * 60)
    assert "[bold]" + "x" * 60 + "\n" in console.file.getvalue()
    with ProgressBar("training", 2) as bar:
        bar.say("resuming")
    assert capsys.readouterr() == ("", "resuming\n")


def test_silent_says_nothing_anywhere(clock, capsys):
    console = terminal()
    for other in (console, None):
        with ProgressBar("training", 2, silent=True, console=other) as bar:
            clock.now += 100
            bar.reached(2)
            bar.update("loss 1")
            bar.say("done")
    assert console.file.getvalue() == "" and capsys.readouterr() == ("", "")

"""Progress shows few lines with the right numbers without a terminal, and a bar with a clean end on one."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from steerlm_megatron.observe import progress
from steerlm_megatron.observe.log import close_logging, setup_logging
from steerlm_megatron.observe.progress import Progress, format_seconds, pipeline_step


@pytest.fixture(autouse=True)
def plain_log() -> Iterator[None]:
    setup_logging(terminal=False)
    yield
    close_logging()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split("INFO", 1)[1].strip() for line in capsys.readouterr().err.splitlines()]


def run(units: int, seconds_each: float, total: int | None, initial: int = 0) -> None:
    now = [0.0]
    with Progress(total, "train", terminal=False, initial=initial, clock=lambda: now[0]) as bar:
        for _ in range(units):
            now[0] += seconds_each
            bar.advance(1, loss=2.345678)


def test_a_quick_job_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run(100, 0.01, 100)
    assert lines_of(capsys) == ["train: 100/100 step (100 %) 100 step/s loss=2.346 elapsed 1.0 s"]


def test_a_long_job_has_a_line_per_tenth_with_eta(capsys: pytest.CaptureFixture[str]) -> None:
    run(1000, 0.1, 1000)
    lines = lines_of(capsys)
    assert len(lines) == 10  # lines at 100, 200, … 900, and the closing one
    assert lines[0] == "train: 100/1,000 step (10 %) 10 step/s loss=2.346 elapsed 10.0 s left 1:30"


def test_lines_are_five_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    run(100, 0.2, 100)  # 10 % takes 2 s
    assert len(lines_of(capsys)) == 4  # lines at 5, 10 and 15 s, and the closing one


def test_a_slow_job_speaks_once_a_minute_and_resumed_units_are_not_in_the_rate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(4, 30.0, 1000, initial=500)
    lines = lines_of(capsys)
    assert len(lines) == 3 and "502/1,000" in lines[0] and "30 s/step" in lines[0] and "left 4:09:00" in lines[0]


def test_pipeline_step_heads_what_is_inside(capsys: pytest.CaptureFixture[str]) -> None:
    with pipeline_step(3, 9, "train_ap"):
        with Progress(1, "train_ap", terminal=False) as bar:
            bar.advance()
        with Progress(None, "validate", unit="row", terminal=False) as bar:
            bar.advance(3)
    lines = lines_of(capsys)
    assert lines[0] == "== step 3/9 train_ap"
    assert lines[1].startswith("3/9 train_ap: 1/1 step (100 %)")
    assert lines[2].startswith("3/9 train_ap · validate: 3 row")
    assert lines[3].startswith("step 3/9 train_ap done in")


def test_other_ranks_are_silent_and_a_bar_on_a_terminal_ends_clean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress(2, "train", enabled=False) as bar:
        bar.advance(2)
    assert lines_of(capsys) == []
    from rich.console import Console

    console = Console(force_terminal=True, width=120, record=True)
    monkeypatch.setattr(progress, "console", lambda: console)
    with pytest.raises(RuntimeError), Progress(2, "train [x]", terminal=True) as bar:
        bar.advance(1, loss=1.0)
        raise RuntimeError
    text = console.export_text()
    assert "train [x]" in text and "1/2" in text and "loss=1" in text


@pytest.mark.parametrize(("seconds", "text"), [(8.26, "8.3 s"), (247, "4:07"), (7447, "2:04:07")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_an_eighty_column_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def screen() -> Console:
        return Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)

    monkeypatch.setattr(progress, "console", screen)
    with Progress(100_000, "5/12 train_ap", terminal=True, initial=1000) as bar:
        bar.advance(1, loss=1.234567, lr=3.054e-4, tokens_per_sec=17482.0, valid=1.581)
        assert bar.bar is not None
        with (paper := screen()).capture() as shown:
            paper.print(bar.bar.get_renderable())
    first, second = shown.get().splitlines()
    assert "1001/100000" in first and re.search(r"0:00:0\d left \S*:\S*", first) and "…" not in first
    assert "loss=1.235" in second and "valid=1.581" in second

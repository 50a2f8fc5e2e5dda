"""What a run cost: accounts of ranks and attempts and their sum, counts of requests, the report's section."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.files import to_strict_json
from steerlm_megatron.generate.generator import Generator
from steerlm_megatron.generate.protocol import Request, Result, SamplingParams
from steerlm_megatron.model.arithmetic import forward_flops, model_flops, multiplied_parameters
from steerlm_megatron.observe import cost
from steerlm_megatron.observe.cost import (
    CostMeter,
    Latencies,
    combined,
    process_began,
    read_shares,
    remove_shares,
    total,
)
from steerlm_megatron.observe.runfolder import RunFolder, read_summary
from steerlm_megatron.report.cost import cost_data, cost_line, cost_table, scaled
from steerlm_megatron.report.terminal import terminal_table
from steerlm_megatron.report.write import write_report
from steerlm_megatron.runtime.device import forget_peak_memory, peak_memory_gib
from steerlm_megatron.runtime.parallel import Layout
from steerlm_megatron.stages import sampling, session
from tests.helpers.fake_model import FakeModel, FakeTemplate, FakeTokenizer, limits

# Of a layer 160 weights: 4·2·(2·2 + 2·2) of attention and 4·(16 + 8) of the MLP; 40 of the output layer of 10 rows.
SMALL = ModelConfig(num_layers=1, hidden_size=4, num_heads=2, ffn_hidden_size=8)
ROWS = 10


@pytest.fixture(autouse=True)
def nobody_said_when_the_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a command that an earlier test ran in this process has said, and nobody has asked for."""
    monkeypatch.setattr(cost, "_process_began", None)


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_forward_passes_by_hand() -> None:
    assert multiplied_parameters(SMALL, ROWS) == 200
    layers, attention, output = 2 * 160 * 15, 2 * 4 * 75, 2 * 4 * 10 * 9
    assert forward_flops(SMALL, ROWS, 15, 75, 9) == layers + attention + output == 6120
    assert forward_flops(SMALL, ROWS, 15, 75, 15) == model_flops(200, 1, 4, 15, 75, training=False)


def test_quantiles_are_right_to_one_percent_and_survive_a_file() -> None:
    found, other = Latencies(), Latencies()
    for number in range(1, 101):
        (found if number % 2 else other).add(number / 10)
    found.merge(Latencies.from_dict(json.loads(json.dumps(other.to_dict()))))
    assert found.count == 100 and found.sum_sec == pytest.approx(505.0)
    assert found.quantile(0.5) == pytest.approx(5.0, rel=0.0101) and found.quantile(0.95) == pytest.approx(
        9.5, rel=0.0101
    )
    with pytest.raises(ValueError, match="no request"):
        Latencies().quantile(0.5)


def test_work_counts_once_and_a_step_of_the_run_has_an_account_of_its_own() -> None:
    clock = Clock()
    meter = CostMeter(clock=clock)
    clock.now += 5
    with meter.work():
        clock.now += 2
        with meter.work():
            clock.now += 1
    with meter.away():
        clock.now += 30
    with meter.work():
        clock.now += 4
        assert meter.share()["work_sec"] == 7, "work that goes on counts as well"
    assert meter.share()["wall_sec"] == 12 and meter.share()["work_sec"] == 7
    with pytest.raises(ValueError, match="no kind of tokens: drwan"):
        meter.add(drwan=3)


def test_the_first_account_of_a_process_has_the_time_before_it() -> None:
    process_began(time.time() - 50)
    first, second = CostMeter(), CostMeter()
    assert first.share()["wall_sec"] == pytest.approx(50, abs=5) and second.share()["wall_sec"] < 5


def account(folder: Path, attempt: int, rank: int, wall: float, work: float, **more: Any) -> None:
    """Leave the account of a rank that was killed after ``wall`` seconds; the first rank of a replica counts."""
    clock = Clock()
    meter = CostMeter(
        folder, attempt=attempt, rank=rank, ranks=2, counts=rank == 0, clock=clock,
        peak_memory_gib=lambda: 1.0 + rank, **more,
    )  # fmt: skip
    with meter.work():
        clock.now += work
    clock.now += wall - work
    meter.add(1000.0 * attempt, trained=10 * attempt, padding=2)
    meter.request(prompt=4, drawn=3, seconds=float(attempt), flops=7.0)
    meter.keep()


def test_ranks_and_attempts_add_up(tmp_path: Path) -> None:
    for attempt in (1, 2):
        account(tmp_path, attempt, 0, wall=50.0, work=40.0)
        account(tmp_path, attempt, 1, wall=60.0, work=20.0)
    (tmp_path / cost.FOLDER / "0003-00000.json").write_text('{"attempt": 3, "ra')
    (tmp_path / cost.FOLDER / "0003-00001.json").write_text("{}")
    found = total(read_shares(tmp_path))
    assert (found["attempts"], found["devices"], found["device"]) == (2, 2, "cpu")
    assert (found["wall_sec"], found["work_sec"], found["overhead_sec"]) == (120.0, 80.0, 40.0)
    assert (found["device_sec"], found["work_device_sec"]) == (220.0, 120.0)
    assert found["tokens"] == {"trained": 30, "prompt": 8, "drawn": 6, "padding": 4}, "those of the ranks that count"
    assert found["useful_tokens"] == 44 and found["flops"] == 3014.0
    assert found["flops_per_device_sec"] == pytest.approx(3014.0 / 120)
    assert found["peak_memory_gib"] == 2.0 and found["peak_memory_gib_by_rank"] == [1.0, 2.0]
    latency = found["latency_sec"]
    assert (latency["requests"], latency["mean"]) == (2, 1.5) and latency["p95"] == pytest.approx(2, rel=0.0101)
    remove_shares(tmp_path)
    assert read_shares(tmp_path) == [] and total([])["device_sec"] == 0 and total([])["latency_sec"] is None


def test_a_rank_whose_account_is_lost_counts_as_the_others_do(tmp_path: Path) -> None:
    account(tmp_path, 1, 0, wall=50.0, work=40.0)
    assert (total(read_shares(tmp_path))["device_sec"], total(read_shares(tmp_path))["work_device_sec"]) == (100, 80)


def test_an_account_is_written_now_and_then_and_a_full_disk_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    meter = CostMeter(tmp_path, clock=clock)
    meter.add(1.0)
    assert read_shares(tmp_path)[0]["flops"] == 0, "the time since the file was written is short"
    clock.now += cost.KEEP_SEC
    meter.add(1.0)
    assert read_shares(tmp_path)[0]["flops"] == 2

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cost, "write_json_atomic", full)
    meter.add(1.0)
    meter.keep()
    assert meter.share()["flops"] == 3


def test_costs_of_steps_and_of_jobs_add_up(tmp_path: Path) -> None:
    account(tmp_path / "a", 1, 0, wall=50.0, work=40.0)
    account(tmp_path / "b", 2, 0, wall=10.0, work=5.0, device="H100")
    one, other = total(read_shares(tmp_path / "a")), total(read_shares(tmp_path / "b"))
    steps, jobs = combined([one, other]), combined([one, other], at_once=True)
    assert (steps["wall_sec"], jobs["wall_sec"]) == (60.0, 50.0) and (steps["devices"], jobs["devices"]) == (2, 4)
    assert steps["device_sec"] == jobs["device_sec"] == 120.0 and steps["device"] == "H100, cpu"
    assert steps["tokens"] == {"trained": 30, "prompt": 8, "drawn": 6, "padding": 4} and steps["flops"] == 3014.0
    assert steps["latency_sec"] == {"requests": 2, "mean": 1.5, "p50": None, "p95": None}
    assert combined([one])["latency_sec"] == one["latency_sec"] and combined([])["device_sec"] == 0


def test_a_run_that_goes_on_has_the_cost_of_all_its_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"broadcast_object": lambda value: value, "gather_objects": lambda value: [value], "on_main": lambda f: f()}
    for name, function in alone.items():
        monkeypatch.setattr(session, name, function)
    found, root = [], tmp_path
    at = Layout(rank=0, world_size=1, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1)
    for tokens, end in ((5, SystemExit(75)), (7, None)):
        run = RunFolder(root, "annotate").start(inputs="key")
        try:
            with run, session.metered(at, run) as meter:
                meter.add(10.0, scored=tokens)
                if end is not None:
                    raise end
        except SystemExit as ended:
            assert ended.code == 75
        found.append(read_summary(root) or {})
    stopped, done = found
    assert stopped["status"] == "interrupted" and stopped["cost"]["tokens"] == {"scored": 5}
    assert done["status"] == "complete" and done["cost"]["tokens"] == {"scored": 12}
    assert done["cost"]["attempts"] == 2 and done["cost"]["flops"] == 20.0
    assert done["cost"]["device_sec"] > 0 and done["cost"]["peak_memory_gib"] > 0

    mine = RunFolder(root / "of jobs", "annotate").start(inputs="key")
    for number, key in enumerate(("key", "another")):
        RunFolder(mine.path / session.ARRAY / f"{number}", "annotate").start(inputs=key).update(cost=done["cost"])
    with_job = session.cost_so_far(mine, [CostMeter().share()], {})
    assert with_job["tokens"] == {"scored": 12}, "jobs of another fingerprint worked for another run"
    with_steps = session.cost_so_far(mine, [CostMeter().share()], {"a": done["cost"]})
    assert with_steps["steps"] == {"a": done["cost"]} and with_steps["tokens"] == {"scored": 24}


def test_peak_memory_can_start_again() -> None:
    held = bytearray(200_000_000)
    assert len(held) and peak_memory_gib() > 0.15
    before = peak_memory_gib()
    del held
    forget_peak_memory()
    assert peak_memory_gib() <= before


@dataclass
class Opened:
    """What of an opened checkpoint the counts need."""

    model_config: ModelConfig
    meta: Any


@dataclass
class Meta:
    vocab_size: int


def test_responses_are_counted_and_shared_prompts_once() -> None:
    generator = Generator(FakeModel(), FakeTokenizer(), FakeTemplate(), limits(max_cache_tokens=4096))
    seen: list[Result] = []
    generator.on_result = seen.append
    prompt, opened, meter = tuple(range(40)), Opened(SMALL, Meta(ROWS)), CostMeter()
    asks = [Request(f"{i}", prompt, SamplingParams(max_tokens=5, seed=i)) for i in range(3)]
    results = generator.generate(asks)
    assert sorted(one.id for one in seen) == ["0", "1", "2"] and all((one.seconds or 0) > 0 for one in results)
    assert generator.shared_prompt_tokens == 80, "the second and the third are copies of the first"
    for one in results:
        sampling.count_response(meter, one, opened)  # type: ignore[arg-type]
    sampling.count_shared(meter, generator.shared_prompt_tokens, opened)  # type: ignore[arg-type]
    drawn = sum(one.completion_tokens for one in results)
    fed = [40 + one.completion_tokens - 1 for one in results]
    expected = forward_flops(SMALL, ROWS, sum(fed) - 80, sum(n * n for n in fed), drawn)
    found = total([meter.share()])
    assert found["flops"] == pytest.approx(expected) and found["latency_sec"]["requests"] == 3
    assert found["tokens"] == {"prompt": 120, "drawn": drawn, "cached": 80} and found["useful_tokens"] == 40 + drawn
    sampling.count_response(meter, results[0], None)
    assert total([meter.share()])["flops"] == pytest.approx(expected), "a server's FLOPs are on the server's account"


def test_the_report_has_a_row_per_step_and_the_sum(tmp_path: Path) -> None:
    account(tmp_path / "a", 1, 0, wall=50.0, work=40.0)
    train, data = total(read_shares(tmp_path / "a")), total([CostMeter().share()])
    section = cost_data({"train": train, "data": data})
    assert section["steps"]["train"] == train and section["total"]["flops"] == 1007.0
    shown = cost_table(section)
    assert [row[0] for row in shown["rows"]] == ["train", "data", "all steps"]
    assert shown["rows"][0] == [
        "train", "2", "50.0 s", "100.0", "80.0", "17", "3", "1.01 k", "12.6", "1.00", "1 s, 1.01 s, 1.01 s"
    ]  # fmt: skip
    assert shown["rows"][1][5:9] == ["–"] * 4 and len(shown["header"]) == len(shown["rows"][0])
    assert cost_line(section).startswith("Cost: 100 device-seconds on 2 devices (cpu), 80 of them work; 1.01 kFLOP by")
    assert scaled(2.5e21) == "2.5 Z" and scaled(3.0) == "3 "

    html, plain = write_report(tmp_path, {"cost": {"train": train, "data": data}})
    assert json.loads(plain.read_text())["cost"] == to_strict_json(section)
    page = html.read_text()
    assert "<h2>Cost</h2>" in page and "1 s, 1.01 s, 1.01 s" in page and "all steps" in page
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal_table(json.loads(plain.read_text())))
    assert cost_line(section) in console.export_text()
    assert "<h2>Cost</h2>" not in write_report(tmp_path, {})[0].read_text()

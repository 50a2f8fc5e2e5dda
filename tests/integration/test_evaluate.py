"""``steerlm evaluate`` with every measure, on two ranks, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steerlm_megatron.config.inference import MEASURES
from tests.helpers.commands import steerlm, summary

pytestmark = pytest.mark.integration


def test_every_measure_has_a_section_and_the_report_shows_it(work: Path) -> None:
    lines = [json.loads(line) for line in (work / "run/01-data/records/valid.jsonl").read_text().splitlines()[:12]]
    for record in lines:
        for message in record["messages"]:
            if message["role"] == "assistant":
                message["annotations"] = [{"quality": 1}, {"quality": 3, "humor": 0}]
    (work / "annotated.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    ask = [{"role": "user", "content": "Tell me the fox color."}]
    pairs = [{"messages": ask, "chosen": f"The fox color is red {i}.", "rejected": "goof"} for i in range(4)]
    (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, {"messages": ask}]))
    command = (
        "evaluate", "ap_checkpoint=run/03-train_ap", "input=annotated.jsonl", "evaluate.prompts=annotated.jsonl",
        "evaluate.models.sft=run/06-sft", "evaluate.models.acsft=run/07-acsft", "evaluate.judge=demo",
        "evaluate.judges=[ap]", "evaluate.preferences=pairs.jsonl", "evaluate.best_of=2", "evaluate.max_prompts=3",
        "evaluate.models.bootstrapped=run/10-bootstrapped", "evaluate.shift_samples=2", "evaluate.steer=acsft",
        'evaluate.combinations=["quality:2,humor:1"]', "evaluate.levels=[0,4]", "evaluate.attributes=[quality]",
        "sampling.max_tokens=6", "data.on_error=skip",
    )  # fmt: skip
    steerlm(*command, "run_dir=measured", "parallel.data=2", cwd=work)
    found = json.loads((work / "measured/evaluation.json").read_text())
    assert set(MEASURES) - set(found["measures"]) == {"wins", "grades"}, "which need an endpoint"
    assert summary(work / "measured")["counts"]["preferences"] == {"in": 5, "out": 4, "skipped": {"rejected": 1}}
    steered = found["measures"]["steering"]
    assert list(steered["judges"]) == ["demo", "ap"] and len(steered["combinations"]["ap"]) == 1
    assert found["measures"]["annotators"]["attributes"]["quality"]["responses"] == found["ap"]["quality"]["n"]
    assert {row["n"] for row in found["measures"]["best_of"]["rows"]} == {1, 2}
    (shift,) = found["measures"]["shift"]["rows"]
    assert (shift["model"], shift["before"], shift["n"] + shift["cut"]) == ("bootstrapped", "acsft", 6)
    detail = found["quality_detail"]["acsft"]
    assert detail["n"] == 3 and detail["low"] <= detail["mean"] <= detail["high"]
    steerlm("report", "input=measured", "run_dir=shown", cwd=work)
    page = (work / "shown/report.html").read_text()
    for section in found["measures"].values():
        assert section["title"].replace("'", "&#39;") in page, section["title"]
    steerlm(*command, "run_dir=some", "evaluate.measures=[quality]", cwd=work)
    fewer = json.loads((work / "some/evaluation.json").read_text())
    assert list(fewer["measures"]) == ["quality"] and "ap" not in fewer and "steering" not in fewer
    assert fewer["quality_detail"] == found["quality_detail"], "what else is drawn changes no response"
    refused = steerlm(*command[:2], "evaluate.measures=[steering]", "input=annotated.jsonl", cwd=work, code=2)
    assert "evaluate.measures: steering needs a model that takes attributes" in refused.stderr

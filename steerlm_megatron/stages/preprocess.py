"""``preprocess``: turn a corpus into record files and these into indexed binary shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerlm_megatron.config.schema import Config
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.stages.collect import collect_records
from steerlm_megatron.stages.record_reader import skipped_in_words
from steerlm_megatron.stages.session import session
from steerlm_megatron.stages.shards import check_tokenizer, make_shards


def run(config: Config) -> None:
    """Write ``data.output_dir/{train,valid}`` and the run's summary."""
    check_tokenizer(config)
    with session(config) as here:
        output = Path(str(config.data.output_dir))
        splits, converted = collect_records(config, output / "records", shards=output)
        summary = make_shards(config, splits, output, config.overwrite, converted)
        counts = total_counts(converted, summary)
        here.run.update(
            counts=counts | {"source": converted},
            outputs={"shards": str(output), **{f"shards/{split}": str(output / split) for split in summary["splits"]}},
        )
        get_logger(__name__).info(
            "%d conversations in, %d out%s; shards in %s", counts["in"], counts["out"], skipped_in_words(counts), output
        )


def total_counts(converted: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Combine the counts of conversion and tokenisation, so that ``in`` = ``out`` + Σ ``skipped`` over both. The output
    of one is the input of the other. ``empty_replies`` is there if there are any.
    """
    empty = {"empty_replies": n} if (n := converted.get("empty_replies", summary.get("empty_replies", 0))) else {}
    if "skipped" not in converted:  # nothing was converted, or the corpus is the embedded one
        return {key: summary[key] for key in ("in", "out", "skipped")} | empty
    assert converted["out"] == summary["in"], "the records of the converter are not those that were tokenized"
    skipped = dict(converted["skipped"]["conversations"])
    for reason, count in summary["skipped"].items():
        skipped[reason] = skipped.get(reason, 0) + count
    return {"in": converted["in"], "out": summary["out"], "skipped": skipped} | empty

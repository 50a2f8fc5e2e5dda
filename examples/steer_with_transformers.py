"""Ask an exported model for several levels of an attribute, with ``transformers`` alone.

    steerlm export checkpoint=runs/sft output=my-model export.format=hf
    python examples/steer_with_transformers.py my-model --attribute quality --levels 0 9

It shows what a user of the exported folder does, without this package: the attributes are variables of the folder's
chat template. Attributes that are not named have the schema's best levels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", help="what steerlm export export.format=hf wrote")
    parser.add_argument("--prompt", default="How do I keep basil alive in winter?")
    parser.add_argument("--attribute", default="quality", help="its name, with _ for a sign that no variable may have")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 9])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--sample", action="store_true", help="draw at temperature 1; the likeliest tokens without it")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype="auto").eval()
    if f"{options.attribute} is defined" not in (tokenizer.chat_template or ""):
        raise SystemExit(f"{options.folder}: its chat template has no variable {options.attribute}")
    messages = [{"role": "user", "content": options.prompt}]
    for level in options.levels:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **{options.attribute: level}
        )
        torch.manual_seed(0)
        tokens = model.generate(**prompt, max_new_tokens=options.max_tokens, do_sample=options.sample)
        response = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{options.attribute}={level}: {response}")


if __name__ == "__main__":
    main()

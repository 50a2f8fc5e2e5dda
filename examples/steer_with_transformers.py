"""Ask an exported model for several levels of an attribute, with ``transformers`` alone.

    steerlm export checkpoint=runs/sft output=my-model export.format=hf
    python examples/steer_with_transformers.py my-model --attribute quality --levels 0 9

It shows what a user of the exported folder does, without this package: the attributes are variables of the folder's
chat template. Attributes that are not named have the schema's best levels.

With an exported attribute-prediction model, it measures what the responses to several prompts are worth, as the report
of ``steerlm evaluate`` does, and says whether the attribute rises with the level that is asked for:

    python examples/steer_with_transformers.py my-model --predictor my-predictor --prompts prompts.txt \\
        --levels 0 4 9 --sample
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

Message = dict[str, str]


class Predictor:
    """Gives the values of a response, by a folder that ``export.format=hf`` made of an attribute-prediction model."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        # The class has no bias in its head; a model behind an RMSNorm keeps it in its configuration.
        self.bias = torch.tensor(getattr(self.model.config, "steerlm", {}).get("head_bias") or 0.0)

    @torch.no_grad()
    def values(self, messages: Sequence[Message]) -> dict[str, float]:
        """Return attribute → value of the last message, which is the assistant's."""
        inputs = self.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        scores = (self.model(**inputs).logits[0] + self.bias).tolist()
        return {self.model.config.id2label[i]: score for i, score in enumerate(scores)}


def ranks(values: Sequence[float]) -> list[float]:
    """Return ranks, where equal values share their mean rank."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the rank correlation; not a number where either series is constant."""
    pairs = torch.tensor([ranks(x), ranks(y)])
    return float(torch.corrcoef(pairs)[0, 1])


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts: the lines of a file, or the single one of ``--prompt``."""
    if options.prompts is None:
        return [options.prompt]
    lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", help="what steerlm export export.format=hf wrote")
    parser.add_argument("--prompt", default="How do I keep basil alive in winter?")
    parser.add_argument("--prompts", help="a file of prompts, one a line, in the place of --prompt")
    parser.add_argument("--attribute", default="quality", help="its name, with _ for a sign that no variable may have")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 9])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--sample", action="store_true", help="draw at temperature 1; the likeliest tokens without it")
    parser.add_argument("--predictor", help="an exported attribute-prediction model, which measures the responses")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype="auto").eval()
    if f"{options.attribute} is defined" not in (tokenizer.chat_template or ""):
        raise SystemExit(f"{options.folder}: its chat template has no variable {options.attribute}")
    predictor = Predictor(options.predictor) if options.predictor else None
    means = []
    for level in options.levels:
        measured = []
        for number, prompt in enumerate(read_prompts(options)):
            messages = [{"role": "user", "content": prompt}]
            response = ask(model, tokenizer, messages, {options.attribute: level}, options, number)
            if predictor is None:
                print(f"{options.attribute}={level}: {response}")
                continue
            answered = [*messages, {"role": "assistant", "content": response}]
            measured.append(predictor.values(answered)[options.attribute])
        if measured:
            means.append(sum(measured) / len(measured))
            print(f"{options.attribute}={level}: measured {means[-1]:.2f} over {len(measured)} responses")
    if len(means) > 1:
        print(f"rank correlation of level and mean: {spearman(options.levels, means):.2f}")


def ask(
    model: Any, tokenizer: Any, messages: list[Message], levels: dict[str, int], options: argparse.Namespace, seed: int
) -> str:
    """Return a response to messages at some levels."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **levels
    )
    torch.manual_seed(seed)
    tokens = model.generate(**prompt, max_new_tokens=options.max_tokens, do_sample=options.sample)
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()

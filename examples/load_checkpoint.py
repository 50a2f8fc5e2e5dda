"""Open a checkpoint in Python: print its description and run its model, without a command.

    python examples/load_checkpoint.py runs/sft2 --question "What is a river?"
    python examples/load_checkpoint.py runs/ap --question "What is a river?" --answer "Water that flows."

A language model answers the question at its best levels; an attribute-prediction model scores the answer. Runs in one
process, on a GPU where there is one. ``__main__`` is guarded, as any program that starts processes needs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from steerlm_megatron.config.schema import Config
from steerlm_megatron.runtime import parallel
from steerlm_megatron.stages.sampling import Prompt, open_generator, request_for
from steerlm_megatron.stages.scoring import Scorer
from steerlm_megatron.stages.session import LoadedModel, load_model
from steerlm_megatron.steer.messages import Message
from steerlm_megatron.steer.records import Conversation


def describe(loaded: LoadedModel) -> None:
    """Print what a checkpoint holds besides its weights."""
    meta, schema = loaded.meta, loaded.schema
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    print(f"{loaded.folder}: {meta.head} model of step {meta.step}, {parameters:,} parameters")
    print(f"tokenizer: {loaded.tokenizer.vocab_size:,} tokens; template: {meta.template['name']}")
    if schema is not None:
        print(f"attributes: {', '.join(schema.names)}, each 0 to {schema.max_level}")


def answered(loaded: LoadedModel, config: Config, question: str) -> str:
    """Return the language model's response, at the best level of each attribute that it is conditioned on."""
    schema = loaded.conditioned_on
    levels = schema.complete({}) if schema is not None else None
    prompt = Prompt("example", (Message("user", question),), levels, "--question")
    request = request_for(0, prompt, loaded, config.sampling, config.generation)
    return open_generator(config, loaded).generate([request])[0].text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", help="a run folder, a checkpoint or an export")
    parser.add_argument("--question", default="What is a river?")
    parser.add_argument("--answer", default="Water that flows to the sea.", help="what an attribute predictor scores")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args(arguments)
    config = Config(command="generate")
    config.sampling.max_tokens = options.max_tokens
    parallel.initialize(config.parallel, seed=0)
    try:
        # gather_logits puts all logits on one rank, which sampling needs; an attribute predictor ignores it.
        loaded = load_model(options.checkpoint, config, "checkpoint", gather_logits=True)
        describe(loaded)
        if loaded.meta.head == "regression":
            messages = (Message("user", options.question), Message("assistant", options.answer))
            (values,) = Scorer(loaded).score([Conversation("example", messages)])
            print("values:", ", ".join(f"{name} {value:.2f}" for name, value in values[1].items()))
        else:
            print("answer:", answered(loaded, config, options.question))
    finally:
        parallel.shutdown()


if __name__ == "__main__":
    main()

"""Sections about what is done with trained models: drawing, serving, scoring, evaluating, exporting."""

from __future__ import annotations

from dataclasses import dataclass

from steerlm_megatron.config.fields import above, at_least, between, each_of, one_of, option
from steerlm_megatron.config.judging import LLMJudgeConfig

# The registries of steerlm_megatron/evaluate have the same names; a test compares them.
JUDGES = ("ap", "demo", "textstat", "vader", "profanity")
MEASURES = (
    "prediction", "preferences", "annotators", "steering", "quality", "diversity", "best_of", "shift", "wins",
    "grades",
)  # fmt: skip

# By kind of device, where the configuration has null: tokens of prompts in a step of generation, enough to fill the
# device and few enough not to hold up sequences that decode; and tokens of a pass of scoring.
CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
SCORED_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass
class SamplingConfig:
    """How a response is drawn."""

    temperature: float = option(1.0, at_least(0), "0: greedy")
    top_k: int = option(50, at_least(0), "0: off. The SteerLM paper bootstraps with 50 (eq. 3)")
    top_p: float = option(1.0, between(0, 1), "smallest share of probability that is kept; 1: all")
    max_tokens: int = option(512, at_least(1), "longest response")
    seed: int = option(1234, at_least(0), "a response is a function of model, prompt, parameters and seed")


@dataclass
class GenerationConfig:
    """The engine that draws responses, in this process or behind the server, and its limits."""

    engine: str = option(
        "megatron", one_of("megatron", "vllm"), "vllm: vLLM draws, from a Hugging Face folder that is written for it"
    )
    max_batch: int = option(64, at_least(1), "sequences that are decoded together")
    max_sequence_tokens: int = option(4096, at_least(8), "prompt and response together")
    max_cache_tokens: int | None = option(
        None, at_least(8), "slots of the key/value cache; null: max_batch sequences of full length, or what fits"
    )
    memory_fraction: float = option(
        0.8, between(0, 1), "most of the memory left beside the model that the key/value cache takes"
    )
    block_tokens: int = option(16, at_least(1), "slots of a block of the cache; prefixes are shared by whole blocks")
    chunk_tokens: int | None = option(
        None, at_least(1), "tokens of prompts in a step, beside one of each sequence; null: 256 on CPUs, 2048 on GPUs"
    )
    admission: str = option(
        "optimistic", one_of("optimistic", "reserve"),
        "reserve: a sequence starts when there is room for all its tokens; optimistic: the youngest may have to wait",
    )  # fmt: skip
    cuda_graphs: bool = option(
        True, "on one GPU a step of decoding is recorded once for each size of batch, and launched as a whole; false: "
        "its kernels are launched one by one, which is slower and names the one that fails"
    )  # fmt: skip
    concurrency: int = option(64, at_least(1), "requests that are under way to the servers of server.urls")


@dataclass
class ServerConfig:
    """The sampling server, and where clients find one."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of this host, for which keys are advisable")
    port: int = option(8000, between(0, 65535), "0: one that is free")
    urls: list[str] = option(
        [], "generate and bootstrap: draw from these servers, ours or others with OpenAI's API, and not in this process"
    )
    folder: str | None = option(
        None, "serve writes its address into this folder; generate and bootstrap draw from the servers in it"
    )
    count: int = option(1, at_least(1), "how many servers generate and bootstrap wait for in server.folder")
    wait_sec: float = option(
        600.0, at_least(0), "how long generate and bootstrap wait, on the way, while no server can be reached"
    )
    max_queue: int = option(1024, at_least(1), "choices that wait for a row; more are refused with HTTP 429")
    model_name: str = option("steerlm", "the model's name in the API")
    max_body_bytes: int = option(4_194_304, at_least(1), "of one request; a larger one is refused with HTTP 413")
    read_timeout_sec: float = option(20.0, above(0), "a request that is not whole by then is ended")
    idle_timeout_sec: float = option(30.0, above(0), "how long a connection without a request is kept")
    max_connections: int = option(4096, at_least(1), "requests on more are refused with HTTP 503, but for probes")
    drain_sec: float = option(30.0, at_least(0), "after SIGTERM running requests may finish for so long")
    api_keys: list[str] = option(
        [], "serve: a request must bring one of these; generate and bootstrap: the first is sent. A file hides them"
    )
    api_key_file: str | None = option(None, "file with such keys, one a line; lines that begin with # are left out")
    access_log: str | None = option(None, "file that gets a line of JSON per answered request; -: standard output")
    cors: list[str] = option([], "origins whose pages may call the server, such as https://chat.example.org; *: all")
    tls_cert: str | None = option(None, "PEM file with the certificate and its chain; the server then speaks HTTPS")
    tls_key: str | None = option(None, "PEM file with the key of server.tls_cert")
    root_path: str = option("", "path below which a proxy shows the server, such as /steerlm")
    page: bool = option(True, "a page at / to chat with the model in a browser; false: programs alone are served")


@dataclass
class ScoringConfig:
    """Computing values with an attribute-prediction model."""

    batch_tokens: int | None = option(None, at_least(8), "packed tokens of a pass; null: 2048 on CPUs, 16384 on GPUs")
    decode: str = option(
        "greedy", one_of("greedy", "expected"), "a generative model's value: the likeliest level, or the mean of levels"
    )


@dataclass
class AnnotateConfig:
    """annotate: scoring a record file."""

    overwrite_labels: bool = option(True, "human labels are replaced too, as in the paper; false keeps those present")


@dataclass
class BootstrapConfig:
    """bootstrap: sampling at the best attribute combinations."""

    prompts: int | None = option(None, at_least(1), "prompts that are drawn of the input; null: all")
    responses_per_prompt: int = option(1, at_least(1), "responses for each of them")
    combinations: str = option(
        "uniform", one_of("uniform", "frequency", "best"),
        "how one of the best combinations is drawn: all alike, as in the paper, or as often as the input has them; "
        "best: the model's best levels for all responses",
    )  # fmt: skip
    drop_truncated: bool = option(
        True, "leave out responses that reached sampling.max_tokens; kept, they end in the middle of a sentence"
    )
    max_repetition: float | None = option(
        None, between(0, 1), "largest share of a response's n-grams of words that occurred in it before; null: any"
    )
    repetition_ngram: int = option(4, at_least(1), "n of max_repetition")
    drop_duplicates: str = option(
        "none", one_of("none", "prompt", "all"),
        "leave out a response like an earlier one, or like one of the input: to the same prompt, or to all",
    )  # fmt: skip
    labels: list[str] = option([], '"quality>=6": responses whose measured values fail are left out')
    max_distance: dict[str, float] = option({}, "attribute to the most that measured value and asked level may differ")
    keep_best: int | None = option(
        None, at_least(1), "keep so many responses to a prompt: those with the highest value of best_by; null: all"
    )
    best_by: dict[str, float] = option({}, "attribute to its weight in that value; empty: the schema's quality alone")
    write_dropped: bool = option(False, "write the responses that are left out into the run folder's dropped.jsonl")
    rounds: int = option(
        1, at_least(1), "run: how often to sample, score and train; round 2 is the steps bootstrap_2 to bootstrapped_2"
    )
    mix: float = option(
        0.0,
        between(0, 1),
        "run: share of a round's training rows that are annotated data; 0: none, as in the paper",
    )


@dataclass
class EvaluateModels:
    """The checkpoints that ``evaluate`` compares, by what they were trained as."""

    sft: str | None = option(None, "plain SFT")
    acsft: str | None = option(None, "attribute-conditioned SFT")
    bootstrapped: str | None = option(None, "trained again, on responses that were sampled")
    rounds: list[str] = option([], "those of later rounds in their order, called bootstrapped_2 and so on")
    steerlm2: list[str] = option([], "those of SteerLM 2.0 in their order, called steerlm2, steerlm2_2 and so on")


@dataclass
class EvaluateConfig:
    """evaluate: attribute-prediction quality and steering curves."""

    prompts: str | None = option(None, "record file whose prompts are held out")
    models: EvaluateModels = option(EvaluateModels, "the models that are compared")
    steer: str | None = option(None, "which of models the curves are of; null: the last conditioned one")
    examples: int = option(3, at_least(0), "prompts whose responses are shown in the report")
    max_prompts: int = option(64, at_least(1), "prompts that are taken of the file")
    levels: list[int] = option([], "levels asked for; empty: each of up to 5, else 5 spread over the scale")
    attributes: list[str] = option([], "attributes with a curve; empty: all of the model's")
    judge: str = option(
        "ap", one_of(*JUDGES), "by which models are compared; demo: the program that made the embedded corpus"
    )
    judges: list[str] = option(
        [], each_of(*JUDGES), "further judges, whose values stand beside those of evaluate.judge"
    )
    judge_attributes: dict[str, str] = option(
        {}, "what a judge measures to the attribute that it stands for, such as words: verbosity"
    )
    llm_judge: LLMJudgeConfig = option(LLMJudgeConfig, "a language model that judges answers")
    measures: list[str] = option(
        [], each_of(*MEASURES), "what is measured; empty: all for which there is what they need"
    )
    preferences: str | None = option(
        None,
        "file of pairs of responses of which people chose one, which the attribute-prediction model is to tell apart",
    )
    combinations: list[str] = option(
        [], '"quality:4,humor:2": label strings that are asked for beside the curves; the rest is at its best levels'
    )
    best_of: int = option(
        1, at_least(1), "responses to a prompt of which the attribute-prediction model takes the best; 1: not measured"
    )
    shift_samples: int = option(
        0, at_least(0), "responses to a prompt on which the divergence from the model before is measured; 0: it is not"
    )
    best_of_temperature: float = option(
        1.0, above(0), "of all of these responses but the first, which is drawn as sampling.* says"
    )


@dataclass
class ExportConfig:
    """export: the model of a checkpoint alone."""

    format: str = option(
        "steerlm", one_of("steerlm", "hf"), "hf: a folder that transformers and vLLM load, with a chat template"
    )
    precision: str = option("stored", one_of("stored", "fp32", "bf16"), "precision of the written weights")
    evaluation: str | None = option(None, "hf: run folder of evaluate, whose table the model card shows")
    adapter: bool = option(False, "format=hf: what train.trainable=lora trained alone, as the peft package has it")
    base: str | None = option(
        None, "adapter=true: folder or hub name of the model that it is of; null: the one that training started from"
    )

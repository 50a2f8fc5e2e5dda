"""Sections about what is done with trained models: drawing, serving, scoring, evaluating, exporting."""

from __future__ import annotations

from dataclasses import dataclass

from steerlm_megatron.config.fields import above, at_least, between, one_of, option


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
    """Limits of the engine that draws responses, in this process or behind the server."""

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


@dataclass
class ScoringConfig:
    """Computing values with an attribute-prediction model."""

    batch_tokens: int | None = option(None, at_least(8), "packed tokens of a pass; null: 2048 on CPUs, 16384 on GPUs")


@dataclass
class AnnotateConfig:
    """annotate: scoring a record file."""

    overwrite_labels: bool = option(True, "human labels are replaced too, as in the paper; false keeps those present")


@dataclass
class BootstrapConfig:
    """bootstrap: sampling at the best attribute combinations."""

    prompts: int | None = option(None, at_least(1), "prompts that are drawn of the input; null: all")
    responses_per_prompt: int = option(1, at_least(1), "responses for each of them")


@dataclass
class EvaluateModels:
    """The checkpoints that ``evaluate`` compares, by what they were trained as."""

    sft: str | None = option(None, "plain SFT")
    acsft: str | None = option(None, "attribute-conditioned SFT")
    bootstrapped: str | None = option(None, "the second round")


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
    judge: str = option("ap", one_of("ap", "demo"), "demo: the program that made the embedded corpus")


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

"""The section about a language model that judges answers in ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass

from steerlm_megatron.config.fields import above, at_least, one_of, option


@dataclass
class LLMJudgeConfig:
    """A language model that judges answers, behind any endpoint with OpenAI's chat API."""

    url: str | None = option(
        None, "the endpoint, as OpenAI's client calls base_url, such as https://api.example.org/v1; null: no such judge"
    )
    model: str | None = option(None, "the model's name there; null: the first that the endpoint lists")
    api_key_env: str | None = option(
        "STEERLM_JUDGE_API_KEY", "environment variable with the API key, which stands in no file; unset: none is sent"
    )
    protocol: str = option(
        "mt_bench", one_of("mt_bench", "vicuna"),
        "how pairs are judged; mt_bench: which answer is better; vicuna: a score for each answer",
    )  # fmt: skip
    baseline: str | None = option(
        None, "the model (or name of answers) that all others are compared with; null: all pairs are judged"
    )
    answers: dict[str, str] = option(
        {}, "name to file of answers of a model that is not drawn here, which is judged with evaluate.models"
    )
    pair_prompt: str | None = option(None, "Jinja2 file of your own in the place of the protocol's prompt for pairs")
    grade_prompt: str | None = option(None, "Jinja2 file of your own in the place of the prompt for grades")
    temperature: float | None = option(0.0, at_least(0), "null: left to the endpoint, where a model takes none")
    max_tokens: int = option(1024, at_least(1), "longest answer of the judge, its thoughts included")
    concurrency: int = option(8, at_least(1), "requests that are under way at once")
    timeout_sec: float = option(120.0, above(0), "longest time of one try")
    max_tries: int = option(6, at_least(1), "tries of a request that is broken off, late or answered with an error")
    verdict_tries: int = option(
        3, at_least(1), "questions for a verdict that cannot be read, until it is counted as malformed"
    )
    price_per_million: list[float] = option(
        [], "[prompt, completion]: what a million tokens cost, in any money; empty: tokens alone are counted"
    )
    elo_k: float = option(32.0, above(0), "points that a game moves at most; 32 is the SteerLM paper's")
    elo_orders: int = option(1000, at_least(1), "random orders of the games that Elo ratings are the median of")

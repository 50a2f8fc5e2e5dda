"""lm-eval and litellm against the server. They are large, and no dependencies: a test is skipped where its package is
absent. ``make clients`` installs both, as CI does. The openai client has tests in ``test_server.py`` and
``test_sampling_requests.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerlm_megatron.generate.protocol import Request, SamplingParams
from tests.helpers.server import TOKENIZER, USER, Server, make_generator, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as one:
        yield one


QUESTIONS = [
    {"question": "hello world, how are", "choices": ["you", "they today", "we 5?"], "answer": 0},
    {"question": "today 7? quality", "choices": [":7", ":0,toxicity:0", " hello"], "answer": 1},
    {"question": "how", "choices": ["are you", "hello", "world world world"], "answer": 2},
]


def task(name: str, kind: str, data: Path, **more: Any) -> dict[str, Any]:
    """Return lm-eval's description of a task over a local file."""
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": kind, "doc_to_text": "{{question}}", "target_delimiter": " ", **more,
    }  # fmt: skip


def test_lm_eval_gets_our_own_log_probabilities_and_texts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HF_HOME", str(tmp_path)), ("HF_HUB_OFFLINE", "1"), ("OPENAI_API_KEY", "none")):
        monkeypatch.setenv(name, value)
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: make clients")
    pytest.importorskip("tenacity", reason="lm-eval's extra for APIs is not installed: make clients")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    choose = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    write = {
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["z", "o"], "max_gen_toks": 12, "temperature": 0.0, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "steerlm", "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote",
            "max_length": 300, "num_concurrent": 4,
        },
        tasks=[
            task("choose", "multiple_choice", data, **choose),
            task("write", "generate_until", data, **write),
        ],
        bootstrap_iters=0,
        log_samples=True,
    )["samples"]  # fmt: skip
    generator = make_generator()[0]
    for question, sample in zip(QUESTIONS, sorted(found["choose"], key=lambda s: s["doc_id"]), strict=True):
        context = TOKENIZER.encode(str(question["question"]))
        for choice, ((logprob, greedy),) in zip(question["choices"], sample["resps"], strict=True):  # type: ignore[call-overload]
            whole = TOKENIZER.encode(f"{question['question']} {choice}")
            asked = SamplingParams(max_tokens=1, prompt_logprobs=1)
            (mine,) = generator.generate([Request("x", tuple(whole), asked)])
            assert mine.prompt_logprobs is not None and mine.prompt_top_logprobs is not None
            own = mine.prompt_logprobs[len(context) :]
            assert float(logprob) == pytest.approx(sum(value for value in own if value is not None), abs=1e-3)
            likely = [top[0][0] for top in mine.prompt_top_logprobs[len(context) :] if top]
            assert str(greedy) == str(likely == whole[len(context) :])
    for question, sample in zip(QUESTIONS, sorted(found["write"], key=lambda s: s["doc_id"]), strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=12, stop=("z", "o"))
        (mine,) = generator.generate([Request("x", tuple(TOKENIZER.encode(str(question["question"]))), params)])
        assert sample["resps"] == [[mine.text]]


def test_litellm_chats_streams_and_completes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # without it, importing asks the network
    litellm = pytest.importorskip("litellm", reason="litellm is not installed: make clients")
    to: dict[str, Any] = {"model": "openai/steerlm", "api_base": f"{server.url}/v1", "api_key": "none"}
    options = {"max_tokens": 9, "seed": 4, "logprobs": True, "top_logprobs": 2, "allowed_openai_params": ["seed"]}
    whole = litellm.completion(messages=USER, n=2, **options, **to)
    plain = server.post("chat/completions", messages=USER, n=2, max_tokens=9, seed=4).json()
    assert [c.message.content for c in whole.choices] == [c["message"]["content"] for c in plain["choices"]]
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    extra = {"attributes": {"humor": 0}}
    steered = litellm.completion(messages=USER, max_tokens=9, seed=4, extra_body=extra, **to)
    alike = server.post("chat/completions", messages=USER, max_tokens=9, seed=4, **extra).json()
    assert steered.choices[0].message.content == alike["choices"][0]["message"]["content"]
    chunks = litellm.completion(messages=USER, stream=True, stream_options={"include_usage": True}, **options, **to)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    messages = [*USER, whole.choices[0].message, {"role": "user", "content": "and?"}]
    again = litellm.completion(messages=messages, max_tokens=5, **to)
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens
    text = litellm.text_completion(prompt="hello", max_tokens=6, **{**to, "model": "text-completion-openai/steerlm"})
    assert text.choices[0].text is not None and text.usage.completion_tokens > 0

"""SteerLM beside DPO and PPO: which models each runs, forward and backward, over how many sequences.

Owns: the passes of each method's steps, each with its source, and their floating-point operations. Does not own: the
operations of one pass (``model/arithmetic.py``), how long they take (``timing.py``, ``inference.py``). Invariants:
nothing here needs torch; a pass of a sequence is counted wherever the method has one, whether or not a program saves it
(a reference model's log-probabilities may be computed once and kept, a prompt's keys may be shared by its samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steerlm_megatron.config.schema import ModelConfig
from steerlm_megatron.model.arithmetic import Widths, forward_flops, model_flops, multiplied_parameters

STEERLM, DPO, PPO = "arXiv 2310.05344", "arXiv 2305.18290", "arXiv 2203.02155"


@dataclass(frozen=True)
class Net:
    """A model that a method runs. ``head``: values in the place of the output layer."""

    name: str
    model: ModelConfig
    vocab_size: int
    head: bool = False

    def forward(self, tokens: float, squares: float, outputs: float) -> float:
        """Return the FLOPs of forward passes, of which ``outputs`` tokens have logits."""
        return forward_flops(self.model, self.vocab_size, tokens, squares, 0 if self.head else outputs)

    def training(self, tokens: float, squares: float) -> float:
        """Return the FLOPs of forward and backward passes, as training counts its own."""
        w = Widths.of(self.model)
        multiplied = multiplied_parameters(self.model, self.vocab_size, self.head)
        return model_flops(multiplied, w.L, w.N * w.H, 1, 0.0) * tokens + 6.0 * w.L * w.N * w.H * squares


@dataclass(frozen=True)
class Texts:
    """Sequences, each a prompt and a response.

    Args:
        count: how many there are.
        prompt, response: tokens of each, on average.
        square: the mean of the squared lengths; None: as if all were of the mean length.
    """

    count: float
    prompt: float
    response: float
    square: float | None = None

    @property
    def tokens(self) -> float:
        return self.count * (self.prompt + self.response)

    @property
    def squares(self) -> float:
        return self.count * ((self.prompt + self.response) ** 2 if self.square is None else self.square)

    def times(self, factor: float) -> Texts:
        """Return ``factor`` times as many."""
        return Texts(self.count * factor, self.prompt, self.response, self.square)


@dataclass(frozen=True)
class Passes:
    """One row: what a step has a model do.

    Args:
        step: what it is for.
        net: the model.
        forward, backward: passes, each of one sequence.
        drawn: sequences whose response is drawn, token by token; these are no forward passes here.
        tokens: of all these sequences.
        flops: of all these passes.
        source: where the method says so.
    """

    step: str
    net: str
    forward: float
    backward: float
    drawn: float
    tokens: float
    flops: float
    source: str


@dataclass(frozen=True)
class Method:
    """A method and its passes, in order."""

    name: str
    passes: tuple[Passes, ...]

    @property
    def flops(self) -> float:
        return sum(one.flops for one in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"name": self.name, "flops": self.flops, "passes": [asdict(one) for one in self.passes]}


def trained(step: str, net: Net, texts: Texts, epochs: float, source: str) -> Passes:
    """Return the passes of training ``net`` on ``texts``: one forward and one backward of each sequence an epoch."""
    seen = texts.times(epochs)
    flops = net.training(seen.tokens, seen.squares)
    return Passes(step, net.name, seen.count, seen.count, 0, seen.tokens, flops, source)


def scored(step: str, net: Net, texts: Texts, source: str) -> Passes:
    """Return the passes of computing values or log-probabilities of the responses: one forward of each sequence."""
    flops = net.forward(texts.tokens, texts.squares, texts.count * texts.response)
    return Passes(step, net.name, texts.count, 0, 0, texts.tokens, flops, source)


def drawn(step: str, net: Net, texts: Texts, source: str) -> Passes:
    """Return what drawing the responses of ``texts`` takes: the operations of one forward pass of each sequence."""
    flops = net.forward(texts.tokens - texts.count, texts.squares, texts.count * texts.response)
    return Passes(step, net.name, 0, 0, texts.count, texts.tokens, flops, source)


def steerlm(
    policy: Net,
    predictor: Net,
    labelled: Texts,
    corpus: Texts,
    sampled: Texts,
    *,
    predictor_epochs: float,
    epochs: float,
    kept: float = 1.0,
    mix: float = 0.0,
    rounds: int = 1,
) -> Method:
    """Return the four steps of SteerLM.

    Args:
        labelled: what people labelled, from which the predictor learns.
        corpus: what is annotated, and trained under its labels.
        sampled: what one round of bootstrapping draws.
        predictor_epochs, epochs: passes over the data in training the predictor, and the policy in each step.
        kept: the share of what is drawn that is trained.
        mix: the share of the annotated corpus in an epoch of bootstrapping's training (``bootstrap.mix``).
        rounds: of bootstrapping; 0 for none.
    """
    rows = [
        trained("attribute prediction", predictor, labelled, predictor_epochs, f"{STEERLM} §3.1"),
        scored("annotation", predictor, corpus, f"{STEERLM} §3.2"),
        trained("attribute-conditioned SFT", policy, corpus, epochs, f"{STEERLM} §3.3"),
    ]
    again = Texts(sampled.count * kept, sampled.prompt, sampled.response, sampled.square)
    beside = corpus.times(again.tokens / corpus.tokens * mix / (1 - mix)) if mix else None
    for number in range(1, rounds + 1):
        words = f"bootstrapping{f' {number}' if rounds > 1 else ''}"
        rows += [
            drawn(f"{words}: sampling", policy, sampled, f"{STEERLM} §3.4"),
            scored(f"{words}: scoring", predictor, sampled, f"{STEERLM} §3.4"),
            trained(f"{words}: training", policy, again, epochs, f"{STEERLM} §3.4"),
        ]
        if beside is not None:
            rows.append(trained(f"{words}: training, annotated rows", policy, beside, epochs, f"{STEERLM} §3.4"))
    return Method("SteerLM", tuple(rows))


def dpo(policy: Net, corpus: Texts, pairs: Texts, *, sft_epochs: float, epochs: float = 1.0) -> Method:
    """Return the steps of direct preference optimisation (arXiv 2305.18290 eq. 7): the loss of a pair needs the
    log-probability of both responses under the policy, which is trained, and under the reference, which is not.

    Args:
        corpus: what the model is fine-tuned on before (§4 there); its policy and reference start from that model.
        pairs: a prompt and *one* of the two responses to it; ``count`` is the number of pairs.
    """
    both = pairs.times(2)
    reference = Net("reference", policy.model, policy.vocab_size)
    return Method(
        "DPO",
        (
            trained("SFT", policy, corpus, sft_epochs, f"{DPO} §4"),
            scored("reference, both responses", reference, both.times(epochs), f"{DPO} eq. 7"),
            trained("policy, both responses", policy, both, epochs, f"{DPO} eq. 7"),
        ),
    )


def ppo(
    policy: Net,
    critic: Net,
    reward: Net,
    corpus: Texts,
    pairs: Texts,
    rollouts: Texts,
    *,
    sft_epochs: float,
    reward_epochs: float = 1.0,
    epochs: float = 1.0,
) -> Method:
    """Return the steps of reinforcement learning with PPO (arXiv 2203.02155 §3.5; arXiv 1707.06347 Alg. 1).

    Of each rollout the actor draws the response, whose log-probabilities come with it; the reward model, the reference
    (for the KL penalty) and the critic (for advantages) have a forward pass, and actor and critic are trained on it
    ``epochs`` times.

    Args:
        pairs: as in :func:`dpo`; the reward model is trained on both responses.
        rollouts: all prompts of the run with the responses that are drawn for them.
    """
    reference = Net("reference", policy.model, policy.vocab_size)
    return Method(
        "PPO",
        (
            trained("SFT", policy, corpus, sft_epochs, f"{PPO} §3.5"),
            trained("reward model, both responses", reward, pairs.times(2), reward_epochs, f"{PPO} eq. 1"),
            drawn("rollouts: sampling", policy, rollouts, "arXiv 1707.06347 Alg. 1"),
            scored("rollouts: reward", reward, rollouts, f"{PPO} eq. 2"),
            scored("rollouts: reference", reference, rollouts, f"{PPO} eq. 2"),
            scored("rollouts: values", critic, rollouts, "arXiv 1707.06347 eq. 11"),
            trained("actor", policy, rollouts, epochs, "arXiv 1707.06347 eq. 9"),
            trained("critic", critic, rollouts, epochs, "arXiv 1707.06347 eq. 9"),
        ),
    )


def table(methods: Sequence[Method]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a header and rows in words: all passes of each method, then its sum beside that of the first one."""
    header = ("method", "step", "model", "forward", "backward", "drawn", "FLOP", "share")
    rows = []
    for method in methods:
        for one in method.passes:
            counts = (f"{n:,.0f}" if n else "–" for n in (one.forward, one.backward, one.drawn))
            share = f"{one.flops / method.flops:.0%}"
            rows.append((method.name, one.step, one.net, *counts, f"{one.flops:.3g}", share))
        beside = f"{method.flops / methods[0].flops:.2f} x {methods[0].name}"
        sums = (f"{sum(getattr(one, name) for one in method.passes):,.0f}" for name in ("forward", "backward", "drawn"))
        rows.append((method.name, "all", "", *sums, f"{method.flops:.3g}", beside))
    return header, rows

"""A reference of training in plain torch, one document at a time, which every engine must equal at every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from steerlm_megatron.config.schema import ModelConfig, OptimConfig

Params = dict[str, torch.Tensor]
VOCAB = 300  # rows beyond it pad the output layer and have no part in the softmax


@dataclass(frozen=True)
class Target:
    """A response of SteerLM 2.0: its group, its share w' of it, and log Q' of the model that it was drawn from."""

    group: str
    share: float
    logprob: float


@dataclass
class Document:
    """A document of T tokens, with targets weighted by ``mask_T``, and values (NaN if missing) at ``pool_P``."""

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    mask_T: torch.Tensor
    pool_P: torch.Tensor
    values_PA: torch.Tensor
    target: Target | None = None


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * weight_D


def norm(p: Params, name: str, x_TD: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    weight_D = p[f"{name}.weight"]
    return rms_norm(x_TD, 1 + weight_D if model.norm == "rmsnorm1p" else weight_D, model.norm_epsilon)


def rotate(x_TNH: torch.Tensor, base: float) -> torch.Tensor:
    half = x_TNH.shape[-1] // 2
    angle = torch.outer(torch.arange(x_TNH.shape[0]).float(), base ** (-torch.arange(half).float() / half))[:, None]
    a, b = x_TNH.split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def attention(p: Params, layer: int, x_TD: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    prefix = f"decoder.layers.{layer}.self_attention."
    heads, groups = model.num_heads, model.num_query_groups or model.num_heads
    qkv = (x_TD @ p[f"{prefix}linear_qkv.weight"].T).unflatten(-1, (groups, heads // groups + 2, -1))
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1].repeat_interleave(heads // groups, 1)
    if model.qk_norm:
        q, k = (norm(p, f"{prefix}{name}_layernorm", x, model) for name, x in (("q", q), ("k", k)))
    window = None if layer in model.full_attention_layers else model.sliding_window
    base = model.rotary_base if window is None else model.rotary_local_base or model.rotary_base
    q, k = rotate(q, base), rotate(k, base).repeat_interleave(heads // groups, 1)
    score_NTT = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(model.query_pre_attn_scalar or q.shape[-1])
    score_NTT = capped(score_NTT, model.attention_softcap)
    hidden = torch.ones(len(x_TD), len(x_TD)).triu(1).bool()
    if window is not None:
        hidden |= torch.ones(len(x_TD), len(x_TD)).tril(-window).bool()
    weight_NTT = score_NTT.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("nts,snh->tnh", weight_NTT, v).flatten(1) @ p[f"{prefix}linear_proj.weight"].T


def forward(p: Params, tokens_T: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Return logits [T, V], or attribute values [T, A] where the parameters have a regression head."""
    x = p["embedding.word_embeddings.weight"][tokens_T]
    if model.scale_embeddings:
        x = x * math.sqrt(model.hidden_size)
    for layer in range(model.num_layers):
        at = f"decoder.layers.{layer}."
        h = attention(p, layer, norm(p, at + "input_layernorm", x, model), model)
        x = x + (norm(p, at + "self_attn_bda.norm", h, model) if model.post_norms else h)
        gate, up = (norm(p, at + "pre_mlp_layernorm", x, model) @ p[at + "mlp.linear_fc1.weight"].T).chunk(2, -1)
        gate = F.gelu(gate, approximate="tanh") if model.activation == "geglu" else F.silu(gate)
        h = (gate * up) @ p[at + "mlp.linear_fc2.weight"].T
        x = x + (norm(p, at + "mlp_bda.norm", h, model) if model.post_norms else h)
    x = norm(p, "decoder.final_layernorm", x, model)
    if "output_layer.regression.weight" in p:
        return x @ p["output_layer.regression.weight"].T + p["output_layer.regression.bias"]
    return capped(x @ p.get("output_layer.weight", p["embedding.word_embeddings.weight"]).T, model.logit_softcap)


def with_adapters(p: Params, scale: float, first_row: int) -> Params:
    """Return the weights that a model with adapters computes with: W + scale · B A, and tables with trained rows."""
    out = {name: value for name, value in p.items() if not name.endswith((".lora_a", ".lora_b", ".rows"))}
    for name, value in p.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "lora_b":
            out[f"{module}.weight"] = out[f"{module}.weight"] + scale * (value @ p[f"{module}.lora_a"])
        if leaf == "rows":
            index = torch.arange(first_row, first_row + len(value))
            out[f"{module}.weight"] = out[f"{module}.weight"].index_add(0, index, value)
    return out


def loss_sum(p: Params, document: Document, model: ModelConfig, weights_A: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return a document's summed loss, and the number of terms in it."""
    output = forward(p, document.tokens_T, model)
    if "output_layer.regression.weight" in p:
        present = ~document.values_PA.isnan()
        error = torch.where(present, output[document.pool_P] - document.values_PA.nan_to_num(), 0.0)
        return (error.square() * weights_A).sum(), float(present.sum())
    loss_T = -output[:, :VOCAB].log_softmax(-1).gather(-1, document.labels_T[:, None])[:, 0]
    return (loss_T * document.mask_T).sum(), float(document.mask_T.sum())


def loss_of_all(
    p: Params, documents: Sequence[Document], model: ModelConfig, weights_A: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the summed loss of documents and the number of terms in it."""
    if any(document.target is not None for document in documents):
        return divergence(p, documents, model, weights_A)
    sums = [loss_sum(p, document, model, weights_A) for document in documents]
    return torch.stack([total for total, _ in sums]).sum(), sum(count for _, count in sums)


def divergence(
    p: Params, documents: Sequence[Document], model: ModelConfig, weights_A: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return Σ over groups of Σ_i w'_i log(w'_i / b'_i) (arXiv 2406.08673, Eq. 12), and the number of groups."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        assert document.target is not None
        groups.setdefault(document.target.group, []).append(document)
    total = torch.zeros((), dtype=next(iter(p.values())).dtype)
    for members in groups.values():
        targets = [one.target for one in members if one.target is not None]
        policy = torch.stack([-loss_sum(p, document, model, weights_A)[0] for document in members])
        before = torch.tensor([target.logprob for target in targets], dtype=policy.dtype)
        share = torch.tensor([target.share for target in targets], dtype=policy.dtype)
        total = total + (share * (share.log() - (policy - before).log_softmax(0))).sum()
    return total, float(len(groups))


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of step 1, 2, ... of ``steps``: linear warmup, then a cosine down to ``min_lr``."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = (step - optim.warmup_steps) / (steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class Trainer:
    """AdamW on the mean over all loss terms of a step's documents. It updates the unsplit model's ``params``."""

    params: Params
    model: ModelConfig
    optim: OptimConfig
    steps: int
    weights_A: torch.Tensor
    lora: tuple[float, int] | None = None  # scale and first trained row: nothing but adapters and a head is trained
    step: int = 0
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def train_step(self, documents: Sequence[Document]) -> tuple[float, float]:
        """Train one step and return (loss, gradient norm before clipping)."""
        leaves = {name: p.detach().clone().requires_grad_(self._trained(name)) for name, p in self.params.items()}
        weights = self.weights(leaves)
        total, count = loss_of_all(weights, documents, self.model, self.weights_A)
        loss = total / count
        loss.backward()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        scale = min(1.0, self.optim.clip_grad / (norm + 1e-6))
        self.step += 1
        lr = learning_rate(self.optim, self.step, self.steps)
        for name, grad in grads.items():
            own = self.optim.head_lr if self.optim.head_lr and "regression" in name else self.optim.lr
            self._adamw(name, grad * scale, lr * own / self.optim.lr)
        return float(loss.detach()), norm

    def weights(self, params: Params) -> Params:
        """Return what the model computes with."""
        return params if self.lora is None else with_adapters(params, *self.lora)

    def _trained(self, name: str) -> bool:
        return self.lora is None or name.endswith((".lora_a", ".lora_b", ".rows")) or "regression" in name

    def _adamw(self, name: str, grad: torch.Tensor, lr: float) -> None:
        o, p = self.optim, self.params[name]
        m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
        m, v = o.beta1 * m + (1 - o.beta1) * grad, o.beta2 * v + (1 - o.beta2) * grad.square()
        self.moments[name] = (m, v)
        m_hat, v_hat = m / (1 - o.beta1**self.step), v / (1 - o.beta2**self.step)
        decay = o.weight_decay if p.ndim > 1 else 0.0  # norms and biases have no weight decay
        self.params[name] = p * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + o.eps)

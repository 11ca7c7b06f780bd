"""The whole text model in numpy float64, written from the specification and slow on purpose.

Lightning attention is its recurrence, softmax attention a dense masked softmax, experts a loop over tokens. Only the
names and places of the parameters are shared with the package; formulas, decays and factors are written again.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from mmx_jax.model import parameter_spec

EPS = 1e-5
LIGHTNING_EPS = 1e-6


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def slope(head, layer, num_heads, num_layers):
    """Decay rate of one head of one layer; `num_heads` is a power of two (model.md 4.3)."""
    return 2.0 ** (-8 * (head + 1) / num_heads) * (1 - layer / (num_layers - 1) + 1e-5)


@dataclass
class Trace:
    """What the oracle saw on its way; lists run over the layers."""

    counts: list = field(default_factory=list)
    """[E] routed slots before any drop."""
    probabilities: list = field(default_factory=list)
    """[E] sums of router probabilities over real tokens."""
    kept: list = field(default_factory=list)
    """[(token, slot)] that fitted into their expert."""
    slots: int = 0
    """Routed slots of one layer."""
    states: list = field(default_factory=list)
    """[B, N, H, H] of every lightning layer."""


class Oracle:
    """A model whose weights are found by the layer numbers that the parameter table states."""

    def __init__(self, config, params):
        self.c = config
        self.params = {path: np.asarray(value, np.float64) for path, value in params.items()}
        self.parts = [{} for _ in config.layers]
        for path, spec in parameter_spec(config).items():
            for group, members in enumerate(spec.layers):
                for index, layer in enumerate(members):
                    self.parts[layer][path.split("/", 3)[3]] = self.params[path][group, index]

    def forward(self, tokens, positions, segments, capacity_factor=None, embeddings=None):
        """Returns logits [B, T, V], hidden [B, T, D] and a Trace."""
        trace = Trace()
        alpha = (2 * len(self.c.layers)) ** 0.25
        x = self.params["embedding"][tokens] if embeddings is None else np.asarray(embeddings, np.float64)
        for layer, kind in enumerate(self.c.layers):
            w = self.parts[layer]
            n1 = rms(x, w["attention_norm"], EPS)
            if kind == "lightning":
                mixed = self.lightning(n1, w, layer, segments, trace)
            else:
                mixed = np.stack([self.softmax(n1[b], w, positions[b], segments[b]) for b in range(len(n1))])
            h = alpha * n1 + mixed
            n2 = rms(h, w["ffn_norm"], EPS)
            x = alpha * n2 + self.ffn(n2, w, segments, capacity_factor, trace)
        hidden = rms(x, self.params["final_norm"], EPS)
        return hidden @ self.params["head"], hidden, trace

    def lightning(self, n1, w, layer, segments, trace):
        """model.md 4: fused per-head rows q | k | v, SiLU on all three, the recurrence, joint norm, gate."""
        B, T, D = n1.shape
        N, H = self.c.num_heads, self.c.head_dim
        rows = w["attention/qkv"].reshape(D, N * 3 * H)
        if "attention/gate" in w:
            gate = n1 @ w["attention/gate"].reshape(D, N * H)
        else:
            gate = n1 @ w["attention/gate_down"] @ w["attention/gate_up"].reshape(-1, N * H)
        fused = silu(n1 @ rows)
        out = np.zeros((B, T, N * H))
        states = np.zeros((B, N, H, H))
        for b in range(B):
            for head in range(N):
                start = head * 3 * H
                decay = math.exp(-slope(head, layer, N, len(self.c.layers)))
                state, previous = np.zeros((H, H)), None
                for t in range(T):
                    if segments[b, t] == 0:
                        continue
                    if previous is not None and segments[b, t] != previous:
                        state = np.zeros((H, H))
                    previous = segments[b, t]
                    q, k, v = (fused[b, t, start + part * H : start + (part + 1) * H] for part in range(3))
                    state = decay * state + np.outer(k, v)
                    out[b, t, head * H : (head + 1) * H] = q @ state
                states[b, head] = state
        trace.states.append(states)
        normed = rms(out, w["attention/norm"].reshape(-1), LIGHTNING_EPS)
        return (normed * sigmoid(gate)) @ w["attention/out"].reshape(N * H, D)

    def softmax(self, n1, w, positions, segments):
        """model.md 5: partial rotation in pairs (i, i + R/2), grouped heads, causal inside a segment."""
        T, D = n1.shape
        N, K, H, R = self.c.num_heads, self.c.num_kv_heads, self.c.head_dim, self.c.rotary_dim
        q = (n1 @ w["attention/query"].reshape(D, N * H)).reshape(T, N, H)
        k = (n1 @ w["attention/key"].reshape(D, K * H)).reshape(T, K, H)
        v = (n1 @ w["attention/value"].reshape(D, K * H)).reshape(T, K, H)
        for x in (q, k):
            for t in range(T):
                for i in range(R // 2):
                    angle = positions[t] * self.c.rope_base ** (-2 * i / R)
                    a, b = x[t, :, i].copy(), x[t, :, i + R // 2].copy()
                    x[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
                    x[t, :, i + R // 2] = b * math.cos(angle) + a * math.sin(angle)
        index = np.arange(T)
        visible = (index[:, None] >= index) & (segments[:, None] == segments) & (segments != 0)[:, None]
        out = np.zeros((T, N, H))
        for head in range(N):
            scores = q[:, head] @ k[:, head // (N // K)].T / math.sqrt(H)
            for t in np.flatnonzero(segments):
                out[t, head] = softmax(scores[t, visible[t]]) @ v[visible[t], head // (N // K)]
        return out.reshape(T, N * H) @ w["attention/out"].reshape(N * H, D)

    def ffn(self, n2, w, segments, capacity_factor, trace):
        """model.md 6: the two largest logits, a softmax over them, w2(silu(w1 x) * w3 x); a loop over tokens.

        With a capacity factor, an expert takes slots in the order of the flattened [B, T] tokens until it is full.
        """
        if not self.c.num_experts:
            return (silu(n2 @ w["ffn/gate"]) * (n2 @ w["ffn/up"])) @ w["ffn/down"]
        E, k = self.c.num_experts, self.c.experts_per_token
        rows, real = n2.reshape(-1, n2.shape[-1]), segments.reshape(-1) != 0
        capacity = math.inf if capacity_factor is None else math.ceil(capacity_factor * k * real.sum() / E)
        used, counts, probability, kept = np.zeros(E, int), np.zeros(E), np.zeros(E), []
        out = np.zeros_like(rows)
        for t in np.flatnonzero(real):
            logits = rows[t] @ w["ffn/router"]
            probability += softmax(logits)
            chosen = np.argsort(-logits, kind="stable")[:k]
            for slot, (expert, weight) in enumerate(zip(chosen, softmax(logits[chosen]))):
                counts[expert] += 1
                if used[expert] < capacity:
                    used[expert] += 1
                    kept.append((int(t), slot))
                    inner = silu(rows[t] @ w["ffn/gate"][expert]) * (rows[t] @ w["ffn/up"][expert])
                    out[t] += weight * (inner @ w["ffn/down"][expert])
        trace.counts.append(counts)
        trace.probabilities.append(probability)
        trace.kept.append(kept)
        trace.slots = int(real.sum()) * k
        return out.reshape(n2.shape)

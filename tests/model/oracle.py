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
    """A model whose weights are found by the layer numbers that the parameter table states.

    The small methods hold one rule each, so that a test can break one of them and see the difference.
    """

    def __init__(self, config, params):
        self.c = config
        self.params = {path: np.asarray(value, np.float64) for path, value in params.items()}
        self.parts = [{} for _ in config.layers]
        for path, spec in parameter_spec(config).items():
            for group, members in enumerate(spec.layers):
                for index, layer in enumerate(members):
                    self.parts[layer][path.split("/", 3)[3]] = self.params[path][group, index]

    def forward(self, tokens, positions, segments, capacity_factor=None):
        """Returns logits [B, T, V], hidden [B, T, D] and a Trace."""
        trace = Trace()
        alpha = (2 * len(self.c.layers)) ** 0.25
        x = self.params["embedding"][tokens]
        for layer in range(len(self.c.layers)):
            n1 = rms(x, self.parts[layer]["attention_norm"], EPS)
            h = alpha * self.residual(n1, x) + self.attention(layer, n1, positions, segments, trace)
            n2 = rms(h, self.parts[layer]["ffn_norm"], EPS)
            x = alpha * self.residual(n2, h) + self.ffn(layer, n2, segments, capacity_factor, trace)
        hidden = rms(x, self.params["final_norm"], EPS)
        return hidden @ self.params["head"], hidden, trace

    def residual(self, normed, raw):
        """model.md 3.1: the residual is the normed input."""
        return normed

    def attention(self, layer, n1, positions, segments, trace):
        if self.c.layers[layer] == "lightning":
            return self.lightning(layer, n1, segments, trace)
        return np.stack([self.softmax(layer, n1[b], positions[b], segments[b]) for b in range(len(n1))])

    # Lightning attention, model.md 4

    def fused_parts(self, fused, head):
        """q, k and v of one head from the fused rows: head * 3H + {0, H, 2H}."""
        H = self.c.head_dim
        return (fused[..., head * 3 * H + part * H : head * 3 * H + (part + 1) * H] for part in range(3))

    def activate(self, q, k, v):
        return silu(q), silu(k), silu(v)

    def decay(self, head, layer):
        """exp(-slope), the slope by the index over ALL layers (4.3); the head count is a power of two."""
        slope = 2.0 ** (-8 * (head + 1) / self.c.num_heads) * (1 - layer / (len(self.c.layers) - 1) + 1e-5)
        return math.exp(-slope)

    def normed_and_gated(self, mixed, gate, weight):
        """One norm over all heads' channels, then the gate (4.7)."""
        return rms(mixed, weight, LIGHTNING_EPS) * sigmoid(gate)

    def lightning(self, layer, n1, segments, trace):
        w, (B, T, D) = self.parts[layer], n1.shape
        N, H = self.c.num_heads, self.c.head_dim
        fused = n1 @ w["attention/qkv"].reshape(D, N * 3 * H)
        if "attention/gate" in w:
            gate = n1 @ w["attention/gate"].reshape(D, N * H)
        else:
            gate = n1 @ w["attention/gate_down"] @ w["attention/gate_up"].reshape(-1, N * H)
        out, states = np.zeros((B, T, N * H)), np.zeros((B, N, H, H))
        for b in range(B):
            for head in range(N):
                q, k, v = self.activate(*self.fused_parts(fused[b], head))
                out[b, :, head * H : (head + 1) * H], states[b, head] = self.recurrence(
                    q, k, v, self.decay(head, layer), segments[b]
                )
        trace.states.append(states)
        return self.normed_and_gated(out, gate, w["attention/norm"].reshape(-1)) @ w["attention/out"].reshape(N * H, D)

    def recurrence(self, q, k, v, decay, segments):
        """S = decay S + k v^T, o = q S; a new segment starts from nothing, padding does nothing (4.4, 4.10)."""
        state, previous, out = np.zeros((q.shape[1], v.shape[1])), None, np.zeros_like(v)
        for t in np.flatnonzero(segments):
            if previous is not None and segments[t] != previous:
                state = np.zeros_like(state)
            previous = segments[t]
            state = decay * state + np.outer(k[t], v[t])
            out[t] = q[t] @ state
        return out, state

    # Softmax attention, model.md 5

    def pairs(self):
        """(first, second, frequency) of every rotated pair of dims: (i, i + R/2) of the first R."""
        R = self.c.rotary_dim
        return [(i, i + R // 2, self.c.rope_base ** (-2 * i / R)) for i in range(R // 2)]

    def key_value_head(self, head):
        """N / K consecutive query heads share a key/value head."""
        return head // (self.c.num_heads // self.c.num_kv_heads)

    def scale(self):
        return 1 / math.sqrt(self.c.head_dim)

    def softmax(self, layer, n1, positions, segments):
        w, (T, D) = self.parts[layer], n1.shape
        N, K, H = self.c.num_heads, self.c.num_kv_heads, self.c.head_dim
        q = (n1 @ w["attention/query"].reshape(D, N * H)).reshape(T, N, H)
        k = (n1 @ w["attention/key"].reshape(D, K * H)).reshape(T, K, H)
        v = (n1 @ w["attention/value"].reshape(D, K * H)).reshape(T, K, H)
        for x in (q, k):
            before = x.copy()
            for first, second, frequency in self.pairs():
                cos, sin = np.cos(positions * frequency)[:, None], np.sin(positions * frequency)[:, None]
                x[:, :, first] = before[:, :, first] * cos - before[:, :, second] * sin
                x[:, :, second] = before[:, :, second] * cos + before[:, :, first] * sin
        index = np.arange(T)
        visible = (index[:, None] >= index) & (segments[:, None] == segments)
        out = np.zeros((T, N, H))
        for head in range(N):
            scores = q[:, head] @ k[:, self.key_value_head(head)].T * self.scale()
            for t in np.flatnonzero(segments):
                out[t, head] = softmax(scores[t, visible[t]]) @ v[visible[t], self.key_value_head(head)]
        return out.reshape(T, N * H) @ w["attention/out"].reshape(N * H, D)

    # Experts, model.md 6

    def expert(self, x, gate, up, down):
        """w2(silu(w1 x) * w3 x)."""
        return (silu(x @ gate) * (x @ up)) @ down

    def ffn(self, layer, n2, segments, capacity_factor, trace):
        """The largest logits, a softmax over them, their experts; a loop over tokens.

        With a capacity factor, an expert takes slots in the order of the flattened [B, T] tokens until it is full.
        """
        w, E, k = self.parts[layer], self.c.num_experts, self.c.experts_per_token
        if not E:
            return self.expert(n2, w["ffn/gate"], w["ffn/up"], w["ffn/down"])
        rows, real = n2.reshape(-1, n2.shape[-1]), segments.reshape(-1) != 0
        capacity = math.inf if capacity_factor is None else math.ceil(capacity_factor * k * real.sum() / E)
        used, counts, probability, kept = np.zeros(E, int), np.zeros(E), np.zeros(E), []
        out = np.zeros_like(rows)
        for t in np.flatnonzero(real):
            logits = rows[t] @ w["ffn/router"]
            probability += softmax(logits)
            chosen = np.argsort(-logits, kind="stable")[:k]
            for slot, (e, weight) in enumerate(zip(chosen, softmax(logits[chosen]))):
                counts[e] += 1
                if used[e] < capacity:
                    used[e] += 1
                    kept.append((int(t), slot))
                    out[t] += weight * self.expert(rows[t], w["ffn/gate"][e], w["ffn/up"][e], w["ffn/down"][e])
        trace.counts.append(counts)
        trace.probabilities.append(probability)
        trace.kept.append(kept)
        trace.slots = int(real.sum()) * k
        return out.reshape(n2.shape)

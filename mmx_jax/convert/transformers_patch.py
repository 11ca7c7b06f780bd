"""Partial RoPE for the MiniMax model of transformers 5: only the first `rotary_dim` dims of each head are rotated.

Stock transformers reads neither `rotary_dim` nor `partial_rotary_factor` for this model, rotates the whole head, and so
computes other logits in every softmax attention layer. Call `apply()` once before the model is built:

    import minimax_partial_rope
    minimax_partial_rope.apply()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

The number of rotated dims is read from config.json. This file needs torch and transformers and nothing else.
"""

import torch
from transformers.models.minimax import modeling_minimax


def frequencies(config, device=None, seq_len=None, **_):
    """Inverse frequencies with rotary_dim, not head_dim, in the denominator; and the attention scaling, 1."""
    base = config.rope_parameters["rope_theta"]
    dims = config.rotary_dim
    exponent = torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims
    return (base**-exponent).to(torch.float32), 1.0


def rotate_first_dims(q, k, cos, sin, unsqueeze_dim=1):
    """Rotates as many leading dims of q and k as cos and sin have, in pairs (i, i + half); the rest passes through."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotated_dims = cos.shape[-1]

    def rotated(x):
        turning, still = x[..., :rotated_dims], x[..., rotated_dims:]
        first, second = turning.chunk(2, dim=-1)
        return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, still), dim=-1)

    return rotated(q), rotated(k)


def apply():
    """Replaces both halves of the rotary embedding of transformers' MiniMax model in this process."""
    modeling_minimax.MiniMaxRotaryEmbedding.compute_default_rope_parameters = staticmethod(frequencies)
    modeling_minimax.apply_rotary_pos_emb = rotate_first_dims

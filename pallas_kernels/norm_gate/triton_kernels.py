"""Triton kernels of the gated joint norm; `triton.py` calls them. Imports triton, so load lazily.

A program holds a whole token, all its channels, in registers: every tensor is read once and written once. Programs that
wait for memory share a multiprocessor with others that compute; fetching ahead in software was measured slower.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def forward_kernel(
    x,
    gate_logits,
    weight,
    y,
    inverse,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """y = x * inverse * weight * sigmoid(gate_logits) with inverse = 1 / rms(x), for one token."""
    token = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    place = token.to(tl.int64) * CHANNELS + channel
    x_tile = tl.load(x + place, mask=inside, other=0.0)
    logits = tl.load(gate_logits + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    wide = x_tile.to(tl.float32)
    over_rms = 1 / tl.sqrt(tl.sum(wide * wide, 0) / CHANNELS + EPS)
    normed = (wide * over_rms).to(x_tile.dtype).to(tl.float32)
    result = normed * scale * tl.sigmoid(logits)
    tl.store(y + place, result.to(x_tile.dtype), mask=inside)
    tl.store(inverse + token, over_rms)


@triton.jit
@no_type_check
def backward_kernel(
    x,
    gate_logits,
    weight,
    inverse,
    dy,
    dx,
    dgate,
    dweight,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The gradients of `forward_kernel` for every PROGRAMS-th token; `dweight` [PROGRAMS, CHANNELS] sums over them."""
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        token = tl.program_id(0) + step * PROGRAMS
        there = token < TOKENS
        place = token.to(tl.int64) * CHANNELS + channel
        x_tile = tl.load(x + place, mask=inside & there, other=0.0)
        logits = tl.load(gate_logits + place, mask=inside & there, other=0.0)
        arriving = tl.load(dy + place, mask=inside & there, other=0.0).to(tl.float32)
        over_rms = tl.load(inverse + token, mask=there, other=0.0)
        normed = x_tile.to(tl.float32) * over_rms
        gate = tl.sigmoid(logits.to(tl.float32))
        weighted = arriving * gate
        total += weighted * normed
        dnormed = weighted * scale
        product = dnormed * normed
        along = tl.sum(product, 0) / CHANNELS
        tl.store(dgate + place, (product * (1 - gate)).to(logits.dtype), mask=inside & there)
        tl.store(dx + place, (over_rms * (dnormed - normed * along)).to(x_tile.dtype), mask=inside & there)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * CHANNELS + channel, total, mask=inside)

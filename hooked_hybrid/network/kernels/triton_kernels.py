"""The Triton kernels themselves; importing this module imports Triton.

`no_type_check` keeps the run-time type checks of the tests off functions that Triton compiles from
their source. Offsets into tensors are 64-bit: states of 16k positions can pass 2^31 entries.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def summarise_chunks(
    a_ptr,
    x_ptr,
    decay_ptr,
    written_ptr,
    n_pos,
    n_channels,
    n_full,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the effect of each full chunk on a state: the product of its decays, its own writes."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    mask = channel < n_channels

    first = chunk * CHUNK
    step = n_channels
    if REVERSE:
        first = n_pos - 1 - first
        step = -n_channels
    at = (row * n_pos + first) * n_channels + channel
    # In fp64: a product of rounded decays drifts one way.
    decay = tl.full((BLOCK,), 1.0, tl.float64)
    written = tl.zeros((BLOCK,), tl.float64)
    for _ in tl.range(0, CHUNK, num_stages=STAGES):
        a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float64)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float64)
        decay = a * decay
        written = a * written + x
        at += step

    out = (row * n_full + chunk) * n_channels + channel
    tl.store(decay_ptr + out, decay, mask=mask)
    tl.store(written_ptr + out, written, mask=mask)


@triton.jit
@no_type_check
def carry_over_chunks(
    decay_ptr,
    written_ptr,
    h0_ptr,
    start_ptr,
    n_channels,
    n_full,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the state that each chunk starts from, the last and perhaps shorter one included."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = channel < n_channels

    at = row * n_full * n_channels + channel
    out = row * (n_full + 1) * n_channels + channel
    h = tl.load(h0_ptr + row * n_channels + channel, mask=mask, other=0.0).to(tl.float64)
    tl.store(start_ptr + out, h, mask=mask)
    for _ in tl.range(0, n_full, num_stages=STAGES):
        decay = tl.load(decay_ptr + at, mask=mask, other=0.0)
        written = tl.load(written_ptr + at, mask=mask, other=0.0)
        h = decay * h + written
        at += n_channels
        out += n_channels
        tl.store(start_ptr + out, h, mask=mask)


@triton.jit
@no_type_check
def write_states(
    a_ptr,
    x_ptr,
    start_ptr,
    states_ptr,
    n_pos,
    n_channels,
    n_chunks,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write every state of each chunk from the one it starts from, rounded once."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    mask = channel < n_channels

    first = chunk * CHUNK
    n_here = tl.minimum(n_pos - first, CHUNK)
    step = n_channels
    if REVERSE:
        first = n_pos - 1 - first
        step = -n_channels
    at = (row * n_pos + first) * n_channels + channel
    start = (row * n_chunks + chunk) * n_channels + channel
    h = tl.load(start_ptr + start, mask=mask, other=0.0).to(tl.float64)
    for _ in tl.range(0, n_here, num_stages=STAGES):
        a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float64)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float64)
        h = a * h + x
        tl.store(states_ptr + at, h.to(states_ptr.dtype.element_ty), mask=mask)
        at += step


@triton.jit
@no_type_check
def selective_scan(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    h0_ptr,
    resets_ptr,
    y_ptr,
    last_ptr,
    n_pos,
    d_inner,
    d_state,
    HAS_RESETS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run a block of channels of one row through all positions, with states in registers."""
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    mask_d, mask_n = channel < d_inner, n < d_state
    mask = mask_d[:, None] & mask_n[None, :]

    entry = channel[:, None] * d_state + n[None, :]
    A = tl.load(A_ptr + entry, mask=mask, other=0.0)
    entry += row * d_inner * d_state
    h = tl.load(h0_ptr + entry, mask=mask, other=0.0)
    at_pos = row * n_pos
    at_d = at_pos * d_inner + channel
    at_n = at_pos * d_state + n
    for _ in tl.range(0, n_pos, num_stages=STAGES):
        u = tl.load(u_ptr + at_d, mask=mask_d, other=0.0)
        dt = tl.load(dt_ptr + at_d, mask=mask_d, other=0.0)
        B = tl.load(B_ptr + at_n, mask=mask_n, other=0.0)
        C = tl.load(C_ptr + at_n, mask=mask_n, other=0.0)
        if HAS_RESETS:
            # Equal for all channels, but only blocks of 4-byte numbers are read ahead.
            reset = tl.load(resets_ptr + at_pos + channel * 0)
            h = tl.where(reset[:, None] != 0, 0.0, h)
        log_decay = dt[:, None] * A
        write = (dt * u)[:, None] * B[None, :]
        # A decay near 1 would be rounded in the same direction at each step, and tl.exp is
        # approximate in fp32. Its difference from 1 is exact, and is applied to the state instead.
        is_slow = tl.abs(log_decay) < 0.25
        factor = tl.where(is_slow, small_expm1(log_decay), tl.exp(log_decay))
        h = tl.where(is_slow, h, 0.0) + (factor * h + write)
        tl.store(y_ptr + at_d, tl.sum(h * C[None, :], axis=1), mask=mask_d)
        at_pos += 1
        at_d += d_inner
        at_n += d_state
    tl.store(last_ptr + entry, h, mask=mask)


@triton.jit
@no_type_check
def small_expm1(x):
    """Return exp(x) - 1 to a rounding in fp32 where |x| < 0.25: its series up to x^6."""
    series = x * (1 / 720) + 1 / 120
    series = x * series + 1 / 24
    series = x * series + 1 / 6
    series = x * series + 0.5
    return x * (x * series + 1.0)

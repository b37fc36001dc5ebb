"""Triton kernels of the DTR: grouped products around two small element-wise ones; `triton.py` launches them.

Shape legend: as in `maths.py`, and M = 2 modalities (text, vision) · P = h + K·2r columns of a token's
    projection
eu = [W1·z, W2_down·z].

Rows are tokens sorted by modality, text first; `order[row]` is the token. The kernels read from device
memory where text ends, so no shape depends on the data. A launch covers ⌈T / BLOCK_T⌉ + 1 tiles of rows,
which is enough wherever the boundary lies, and each tile holds one modality. All sums are fp32.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(tile, num_text_ptr, num_tokens, BLOCK_T: tl.constexpr):
    """Rows of a tile, which of them exist, and their modality (0 text, 1 vision)."""
    num_text = tl.load(num_text_ptr)
    text_tiles = tl.cdiv(num_text, BLOCK_T)
    is_vision = tile >= text_tiles
    first = tl.where(is_vision, num_text + (tile - text_tiles) * BLOCK_T, tile * BLOCK_T)
    end = tl.where(is_vision, num_tokens, num_text)
    rows_T = first + tl.arange(0, BLOCK_T)
    return rows_T, rows_T < end, is_vision.to(tl.int32)


@triton.jit
def _dot(a, b, sums, ROUND: tl.constexpr, OPERAND: tl.constexpr):
    """sums + a @ b. ROUND: b holds bf16 numbers and a fp32 ones, which are rounded to bf16 first."""
    if ROUND:
        a = a.to(tl.bfloat16)
    return tl.dot(a.to(OPERAND), b.to(OPERAND), sums, input_precision="ieee")


@triton.jit
def grouped_product(
    a_ptr, b_ptr, out_ptr, order_ptr, num_text_ptr,
    num_tokens, num_columns, depth, b_modality, b_column, b_depth,
    GATHER: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[row, n] = Σ_d a[row, d]·b[m, n, d], m the row's modality. `b_*` are b's strides.

    With GATHER a is in token order and out sorted, without it the other way round.
    """
    rows_T, exists_T, modality = _tile(tl.program_id(1), num_text_ptr, num_tokens, BLOCK_T)
    token_T = tl.load(order_ptr + rows_T, mask=exists_T, other=0)
    if GATHER:
        from_T, to_T = token_T, rows_T
    else:
        from_T, to_T = rows_T, token_T
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column_N = column_N < num_columns
    a_T = a_ptr + from_T * depth
    b_N = b_ptr + modality * b_modality + column_N * b_column
    sums_TN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a_TD = tl.load(a_T[:, None] + d[None, :], mask=exists_T[:, None] & (d < depth)[None, :], other=0.0)
        b_DN = tl.load(
            b_N[None, :] + d[:, None] * b_depth, mask=(d < depth)[:, None] & is_column_N[None, :], other=0.0
        )
        sums_TN = _dot(a_TD, b_DN, sums_TN, ROUND, OPERAND)
    out_TN = out_ptr + to_T[:, None] * num_columns + column_N[None, :]
    tl.store(out_TN, sums_TN.to(out_ptr.dtype.element_ty), mask=exists_T[:, None] & is_column_N[None, :])


@triton.jit
def weight_gradient(
    deu_ptr, z_ptr, dweight_ptr, order_ptr, num_text_ptr,
    num_tokens, P, C,
    ROUND: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dweight[m, p, c] = Σ over m's rows of deu[row, p]·z[token, c]; a modality without tokens gets zeros."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    modality = tl.program_id(2)
    num_text = tl.load(num_text_ptr)
    first = tl.where(modality == 0, 0, num_text)
    end = tl.where(modality == 0, num_text, num_tokens)
    sums_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_T):
        rows_T = start + tl.arange(0, BLOCK_T)
        exists_T = rows_T < end
        token_T = tl.load(order_ptr + rows_T, mask=exists_T, other=0)
        deu_PT = tl.load(
            deu_ptr + rows_T[None, :] * P + p[:, None], mask=exists_T[None, :] & (p < P)[:, None], other=0.0
        )
        z_TC = tl.load(
            z_ptr + token_T[:, None] * C + c[None, :], mask=exists_T[:, None] & (c < C)[None, :], other=0.0
        )
        sums_PC = _dot(deu_PT, z_TC, sums_PC, ROUND, OPERAND)
    dweight_PC = dweight_ptr + (modality * P + p[:, None]) * C + c[None, :]
    tl.store(dweight_PC, sums_PC.to(dweight_ptr.dtype.element_ty), mask=(p < P)[:, None] & (c < C)[None, :])


@triton.jit
def _term(eu_T, bias_ptr, exists_T, modality, k, h, ACTIVATION: tl.constexpr):
    """ê_k of every row, and its derivative by e_k.

    The last one, ê_h, is the constant 1, whose weight is the bias of W2.
    """
    x_T = tl.load(eu_T + k, mask=exists_T & (k < h), other=0.0) + tl.load(
        bias_ptr + modality * h + k, mask=k < h, other=0.0
    )
    if ACTIVATION == "gelu":
        half_T = 0.5 + 0.5 * tl.erf(x_T * 0.7071067811865476)
        term_T, slope_T = x_T * half_T, half_T + x_T * tl.exp(-0.5 * x_T * x_T) * 0.3989422804014327
    elif ACTIVATION == "silu":
        gate_T = tl.sigmoid(x_T)
        term_T, slope_T = x_T * gate_T, gate_T * (1 + x_T * (1 - gate_T))
    else:
        term_T, slope_T = x_T, 1.0
    return tl.where(k < h, term_T, 1.0), tl.where(k < h, slope_T, 0.0)


@triton.jit
def _columns(eu_T, folded_ptr, exists_T, modality, k, h, r, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """For one k: u's gate and value columns of every row, and φ·Θ_up's matrix."""
    j, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    u_TR = eu_T[:, None] + h + k * 2 * r + j[None, :]
    mask_TR = exists_T[:, None] & (j < r)[None, :]
    gate_TR, value_TR = tl.load(u_TR, mask=mask_TR, other=0.0), tl.load(u_TR + r, mask=mask_TR, other=0.0)
    folded_RN = folded_ptr + ((modality * (h + 1) + k) * r + j[:, None]) * N + n[None, :]
    return gate_TR, value_TR, tl.load(folded_RN, mask=(j < r)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def _generated(
    eu_T, bias_ptr, folded_ptr, exists_T, modality, h, r, N,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each row's Θ_down·z, in its gate and value halves, and its own φ·Θ_up: three sums over k."""
    gate_TR = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    value_TR = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    up_TRN = tl.zeros([BLOCK_T, BLOCK_R, BLOCK_N], tl.float32)
    for k in range(0, h + 1):
        term_T, _ = _term(eu_T, bias_ptr, exists_T, modality, k, h, ACTIVATION)
        u_gate_TR, u_value_TR, folded_RN = _columns(
            eu_T, folded_ptr, exists_T, modality, k, h, r, N, BLOCK_R, BLOCK_N
        )
        gate_TR += term_T[:, None] * u_gate_TR
        value_TR += term_T[:, None] * u_value_TR
        up_TRN += term_T[:, None, None] * folded_RN[None, :, :]
    return gate_TR, value_TR, up_TRN


@triton.jit
def mix(
    eu_ptr, bias_ptr, folded_ptr, logits_ptr, order_ptr, num_text_ptr, num_tokens, P, h, r, N,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the sorted projections to logits in token order."""
    rows_T, exists_T, modality = _tile(tl.program_id(0), num_text_ptr, num_tokens, BLOCK_T)
    token_T = tl.load(order_ptr + rows_T, mask=exists_T, other=0)
    gate_TR, value_TR, up_TRN = _generated(
        eu_ptr + rows_T * P,
        bias_ptr,
        folded_ptr,
        exists_T,
        modality,
        h,
        r,
        N,
        ACTIVATION,
        BLOCK_T,
        BLOCK_R,
        BLOCK_N,
    )
    s_TR = gate_TR * tl.sigmoid(gate_TR) * value_TR
    n = tl.arange(0, BLOCK_N)
    logits_TN = tl.sum(s_TR[:, :, None] * up_TRN, axis=1)
    tl.store(
        logits_ptr + token_T[:, None] * N + n[None, :], logits_TN, mask=exists_T[:, None] & (n < N)[None, :]
    )


@triton.jit
def mix_backward(
    dlogits_ptr, eu_ptr, bias_ptr, folded_ptr, deu_ptr, partial_ptr, order_ptr, num_text_ptr,
    num_tokens, P, h, r, N,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """∂eu, sorted, and this tile's share of ∂folded and ∂bias.

    The shares are partial[tile, k, :r·N] and partial[tile, k, r·N]. They are added up outside in a fixed
    order, because atomics would make runs differ in the last bits.
    """
    tile = tl.program_id(0)
    rows_T, exists_T, modality = _tile(tile, num_text_ptr, num_tokens, BLOCK_T)
    token_T = tl.load(order_ptr + rows_T, mask=exists_T, other=0)
    j, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    eu_T, deu_T = eu_ptr + rows_T * P, deu_ptr + rows_T * P
    gate_TR, value_TR, up_TRN = _generated(
        eu_T, bias_ptr, folded_ptr, exists_T, modality, h, r, N, ACTIVATION, BLOCK_T, BLOCK_R, BLOCK_N
    )
    dlogits_TN = tl.load(
        dlogits_ptr + token_T[:, None] * N + n[None, :], mask=exists_T[:, None] & (n < N)[None, :], other=0.0
    )
    sigmoid_TR = tl.sigmoid(gate_TR)
    ds_TR = tl.sum(dlogits_TN[:, None, :] * up_TRN, axis=2)
    dvalue_TR = ds_TR * gate_TR * sigmoid_TR
    dgate_TR = ds_TR * value_TR * sigmoid_TR * (1 + gate_TR * (1 - sigmoid_TR))
    dup_TRN = (gate_TR * sigmoid_TR * value_TR)[:, :, None] * dlogits_TN[:, None, :]
    mask_TR, mask_RN = exists_T[:, None] & (j < r)[None, :], (j < r)[:, None] & (n < N)[None, :]
    for k in range(0, h + 1):
        term_T, slope_T = _term(eu_T, bias_ptr, exists_T, modality, k, h, ACTIVATION)
        u_gate_TR, u_value_TR, folded_RN = _columns(
            eu_T, folded_ptr, exists_T, modality, k, h, r, N, BLOCK_R, BLOCK_N
        )
        du_TR = deu_T[:, None] + h + k * 2 * r + j[None, :]
        tl.store(du_TR, term_T[:, None] * dgate_TR, mask=mask_TR)
        tl.store(du_TR + r, term_T[:, None] * dvalue_TR, mask=mask_TR)
        dterm_T = tl.sum(dgate_TR * u_gate_TR + dvalue_TR * u_value_TR, axis=1)
        dterm_T += tl.sum(tl.sum(dup_TRN * folded_RN[None, :, :], axis=2), axis=1)
        tl.store(deu_T + k, dterm_T * slope_T, mask=exists_T & (k < h))
        share = partial_ptr + (tile * (h + 1) + k) * (r * N + 1)
        tl.store(
            share + j[:, None] * N + n[None, :], tl.sum(term_T[:, None, None] * dup_TRN, axis=0), mask=mask_RN
        )
        tl.store(share + r * N, tl.sum(dterm_T * slope_T, axis=0))

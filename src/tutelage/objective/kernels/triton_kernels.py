"""Triton kernels: one program per row, which reads its row twice and writes it once.

The first pass finds log Z by an online maximum and sum; the second reads the logits again and overwrites them
with the gradient, or writes the gradient to other memory, as two addends of half precision. Accumulation is
float32 whatever the logits are.
"""

import triton
import triton.language as tl

from tutelage.types import IGNORE_INDEX

_IGNORE = tl.constexpr(IGNORE_INDEX)
_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (16384, 32))
]
if triton.knobs.runtime.interpret:
    _CONFIGS = [triton.Config({"BLOCK": 64})]  # nothing to time, and several blocks even in small tests
_tuned = triton.autotune(_CONFIGS, key=["vocab", "HEATED", "HALVED"], restore_value=["student"])


@triton.jit
def _grow(
    x: tl.tensor,
    largest: tl.tensor,
    z_1: tl.tensor,
    z_t: tl.tensor,
    temperature: tl.tensor,
    HEATED: tl.constexpr,
) -> tl.tensor:
    """Add a block to the running maximum and sums of exp(x - largest), at T = 1 and at T."""
    larger = tl.maximum(largest, tl.max(x, 0))
    origin = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf would be nan
    z_1 = z_1 * tl.exp(largest - origin) + tl.sum(tl.exp(x - origin), 0)
    if HEATED:
        shrink = tl.exp((largest - origin) / temperature)
        z_t = z_t * shrink + tl.sum(tl.exp((x - origin) / temperature), 0)
    else:
        z_t = z_1
    return larger, z_1, z_t


@triton.jit
def _row_sums(
    logits: tl.tensor, vocab: tl.tensor, temperature: tl.tensor, HEATED: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The first pass: maximum and sums of exponentials of one row."""
    columns = tl.arange(0, BLOCK)
    largest, z_1, z_t = float("-inf"), 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        largest, z_1, z_t = _grow(x, largest, z_1, z_t, temperature, HEATED)
    return largest, z_1, z_t


@triton.jit
def _store(
    gradient: tl.tensor,
    student: tl.tensor,
    high: tl.tensor,
    below: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    HALVED: tl.constexpr,
) -> None:
    """Write a gradient over the logits, or as two addends of half precision to a row and one `below`."""
    if HALVED:
        rounded = gradient.to(tl.bfloat16)
        tl.store(high + columns, rounded, mask=mask)
        tl.store(high + below + columns, (gradient - rounded.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(student + columns, gradient, mask=mask)


@triton.jit
def _slot_kl(p: tl.tensor, log_q: tl.tensor) -> tl.tensor:
    """One slot's p (log p - log q), and 0 where p is 0, whatever q is."""
    none = p == 0.0
    return p * (tl.log(tl.where(none, 1.0, p)) - tl.where(none, 0.0, log_q))


@triton.jit
def _token(
    label: tl.tensor, ce_weight: tl.tensor, kd_weight: tl.tensor, vocab: tl.tensor, temperature: tl.tensor
) -> tl.tensor:
    """Load a token: whether it counts, its label (0 if none), its weights, and a term for its outputs.

    The KL's weight contains its derivative's 1 / T. The term is 0, or NaN if the label is outside the
    vocabulary; the weight of the cross-entropy, and with it the gradient, is then NaN too.
    """
    gold = tl.load(label)
    valid = gold != _IGNORE
    known = (gold >= 0) & (gold < vocab)
    wrong = tl.where(valid & (known == 0), float("nan"), 0.0)
    ce_w = tl.load(ce_weight).to(tl.float32) + wrong
    return valid, tl.where(known, gold, 0), ce_w, tl.load(kd_weight).to(tl.float32) / temperature, wrong


@_tuned
@triton.jit
def dense_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    labels: tl.tensor,
    ce_weights: tl.tensor,
    kd_weights: tl.tensor,
    out: tl.tensor,
    addends: tl.tensor,
    tokens: tl.tensor,
    vocab: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    temperature: tl.tensor,
    HEATED: tl.constexpr,
    HALVED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Cross-entropy against labels and KL against teacher logits; `out` is [ce, kd, teacher_ce] x tokens."""
    row = tl.program_id(0).to(tl.int64)  # row * vocab passes 2^31
    high, below = addends + row * vocab, (0 * row + tokens) * vocab  # in 64 bits, as the row is
    student += row * student_stride
    teacher += row * teacher_stride
    valid, gold, ce_w, kd_w, wrong = _token(
        labels + row, ce_weights + row, kd_weights + row, vocab, temperature
    )
    gold_s = tl.load(student + gold).to(tl.float32)
    gold_t = tl.load(teacher + gold).to(tl.float32)
    max_s, z_1, z_s = _row_sums(student, vocab, temperature, HEATED, BLOCK)
    max_t, z_t1, z_t = _row_sums(teacher, vocab, temperature, HEATED, BLOCK)
    log_zs, log_zt, kd = tl.log(z_s), tl.log(z_t), 0.0
    columns = tl.arange(0, BLOCK)
    tl.debug_barrier()  # every thread has read the gold logit before any overwrites it
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32) - max_s
        t = tl.load(teacher + start + columns, mask=inside, other=float("-inf")).to(tl.float32) - max_t
        log_q = s / temperature - log_zs
        log_p = t / temperature - log_zt
        p = tl.exp(log_p)
        kd += tl.sum(p * (tl.where(p == 0.0, 0.0, log_p) - tl.where(p == 0.0, 0.0, log_q)), 0)
        onehot = tl.where(start + columns == gold, 1.0, 0.0)
        gradient = ce_w * (tl.exp(s) / z_1 - onehot) + kd_w * (tl.exp(log_q) - p)
        gradient = tl.where(valid, gradient, 0.0)
        _store(gradient, student, high, below, start + columns, inside, HALVED)
    tl.store(out + row, tl.where(valid, max_s - gold_s + tl.log(z_1) + wrong, 0.0))
    tl.store(out + tokens + row, tl.where(valid, kd + wrong, 0.0))
    tl.store(out + 2 * tokens + row, tl.where(valid, max_t - gold_t + tl.log(z_t1) + wrong, 0.0))


@triton.jit
def _used(probs: tl.tensor, slot: tl.tensor, slots: tl.tensor) -> tl.tensor:
    """The slots whose entry is kept; there is one for each kept entry."""
    return tl.load(probs + slot, mask=slot < slots, other=0.0) != 0.0


@triton.jit
def _student_sums(
    student: tl.tensor,
    ids: tl.tensor,
    probs: tl.tensor,
    kept: tl.tensor,
    vocab: tl.tensor,
    slots: tl.tensor,
    temperature: tl.tensor,
    HEATED: tl.constexpr,
    BUCKET: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Maximum and sums of a row, and maximum and sum of its rest: the entries not kept, or all if no bucket.

    With a bucket the kept entries of the row are overwritten by -inf.
    """
    slot = tl.arange(0, BLOCK_K)
    if BUCKET:
        for start in range(0, slots, BLOCK_K):
            used = _used(probs, start + slot, slots)
            tl.store(student + tl.load(ids + start + slot, mask=used, other=0), float("-inf"), mask=used)
        tl.debug_barrier()
    max_r, z_r1, z_r = _row_sums(student, vocab, temperature, HEATED, BLOCK)
    max_s, z_1, z_s = max_r, z_r1, z_r
    if BUCKET:
        for start in range(0, slots, BLOCK_K):
            used = _used(probs, start + slot, slots)
            s = tl.load(kept + start + slot, mask=used, other=float("-inf")).to(tl.float32)
            max_s, z_1, z_s = _grow(s, max_s, z_1, z_s, temperature, HEATED)
    return max_s, z_1, z_s, max_r, z_r


@triton.jit
def _kept_kl(
    probs: tl.tensor,
    kept: tl.tensor,
    slots: tl.tensor,
    max_s: tl.tensor,
    z_s: tl.tensor,
    temperature: tl.tensor,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The teacher's mass on the kept entries, and their part of the KL."""
    slot = tl.arange(0, BLOCK_K)
    mass, kd = 0.0, 0.0
    for start in range(0, slots, BLOCK_K):
        used = start + slot < slots
        p = tl.load(probs + start + slot, mask=used, other=0.0).to(tl.float32)
        s = tl.load(kept + start + slot, mask=used, other=0.0).to(tl.float32)
        mass += tl.sum(p, 0)
        kd += tl.sum(_slot_kl(p, (s - max_s) / temperature - tl.log(z_s)), 0)
    return mass, kd


@triton.jit
def _write_rest(
    student: tl.tensor,
    vocab: tl.tensor,
    gold: tl.tensor,
    valid: tl.tensor,
    ce_w: tl.tensor,
    rest_w: tl.tensor,
    max_s: tl.tensor,
    z_1: tl.tensor,
    max_r: tl.tensor,
    temperature: tl.tensor,
    high: tl.tensor,
    below: tl.tensor,
    HALVED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The second pass: the gradient at the entries that `_write_kept` does not correct afterwards."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        s = tl.load(student + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        onehot = tl.where(start + columns == gold, 1.0, 0.0)
        gradient = ce_w * (tl.exp(s - max_s) / z_1 - onehot) + rest_w * tl.exp((s - max_r) / temperature)
        gradient = tl.where(valid, gradient, 0.0)
        _store(gradient, student, high, below, start + columns, inside, HALVED)


@triton.jit
def _write_kept(
    student: tl.tensor,
    ids: tl.tensor,
    probs: tl.tensor,
    kept: tl.tensor,
    slots: tl.tensor,
    gold: tl.tensor,
    valid: tl.tensor,
    ce_w: tl.tensor,
    kd_w: tl.tensor,
    mass: tl.tensor,
    max_s: tl.tensor,
    z_1: tl.tensor,
    z_s: tl.tensor,
    temperature: tl.tensor,
    high: tl.tensor,
    below: tl.tensor,
    HALVED: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The gradient at the kept entries."""
    slot = tl.arange(0, BLOCK_K)
    for start in range(0, slots, BLOCK_K):
        used = _used(probs, start + slot, slots)
        entry = tl.load(ids + start + slot, mask=used, other=0)
        p = tl.load(probs + start + slot, mask=used, other=0.0).to(tl.float32)
        s = tl.load(kept + start + slot, mask=used, other=float("-inf")).to(tl.float32) - max_s
        gradient = ce_w * (tl.exp(s) / z_1 - tl.where(entry == gold, 1.0, 0.0))
        gradient += kd_w * (mass * tl.exp(s / temperature) / z_s - p)
        _store(tl.where(valid, gradient, 0.0), student, high, below, entry, used, HALVED)


@_tuned
@triton.jit
def sparse_kernel(
    student: tl.tensor,
    ids: tl.tensor,
    probs: tl.tensor,
    kept: tl.tensor,
    tails: tl.tensor,
    labels: tl.tensor,
    ce_weights: tl.tensor,
    kd_weights: tl.tensor,
    out: tl.tensor,
    addends: tl.tensor,
    tokens: tl.tensor,
    vocab: tl.tensor,
    slots: tl.tensor,
    stride: tl.tensor,
    temperature: tl.tensor,
    HEATED: tl.constexpr,
    HALVED: tl.constexpr,
    BUCKET: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Cross-entropy against labels and KL against kept entries; `out` is [ce, kd] x tokens.

    `kept` are the student's logits at `ids`, gathered before the launch; `probs` and `tails` have the tail
    policy applied, with each kept entry in one slot and probability 0 in all other slots.
    """
    row = tl.program_id(0).to(tl.int64)  # row * vocab passes 2^31
    high, below = addends + row * vocab, (0 * row + tokens) * vocab  # in 64 bits, as the row is
    student += row * stride
    ids += row * slots
    probs += row * slots
    kept += row * slots
    valid, gold, ce_w, kd_w, wrong = _token(
        labels + row, ce_weights + row, kd_weights + row, vocab, temperature
    )
    gold_s = tl.load(student + gold).to(tl.float32)
    tl.debug_barrier()  # every thread has read the gold logit before any overwrites it
    max_s, z_1, z_s, max_r, z_r = _student_sums(
        student, ids, probs, kept, vocab, slots, temperature, HEATED, BUCKET, BLOCK_K, BLOCK
    )
    empty = max_r == float("-inf")
    max_r, z_r = tl.where(empty, max_s, max_r), tl.where(empty, 1.0, z_r)
    tail = tl.where(empty, 0.0, tl.load(tails + row).to(tl.float32))
    log_rest = (max_r - max_s) / temperature + tl.log(z_r) - tl.log(z_s)
    log_rest = tl.where(empty, float("-inf"), log_rest)
    mass, kd = _kept_kl(probs, kept, slots, max_s, z_s, temperature, BLOCK_K)
    mass, kd = mass + tail, kd + _slot_kl(tail, log_rest)
    # Given the rest, the student's distribution is exp(s - max_r) / z_r: exact however small its mass.
    rest_w = kd_w * (mass * tl.exp(log_rest) - tail) / z_r
    _write_rest(
        student, vocab, gold, valid, ce_w, rest_w, max_s, z_1, max_r, temperature, high, below, HALVED, BLOCK
    )
    tl.debug_barrier()
    _write_kept(student, ids, probs, kept, slots, gold, valid, ce_w, kd_w, mass, max_s, z_1, z_s, temperature,
                high, below, HALVED, BLOCK_K)  # fmt: skip
    tl.store(out + row, tl.where(valid, max_s - gold_s + tl.log(z_1) + wrong, 0.0))
    tl.store(out + tokens + row, tl.where(valid, kd + wrong, 0.0))

# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The lightning-attn-jax authors. Licensed under the Apache License, Version 2.0
# (http://www.apache.org/licenses/LICENSE-2.0). Distributed on an "AS IS" BASIS, WITHOUT WARRANTIES
# OR CONDITIONS OF ANY KIND, either express or implied.
"""Lightning attention for JAX: linear attention with a fixed decay per head.

For one sequence and one head, with log decay g <= 0, a state S [K, V] is carried along the tokens:

    S_t = e^g S_{t-1} + k_t v_t^T              o_t = scale q_t S_t

TransNormerLLM (arXiv:2307.14995) introduced it, Lightning Attention-2 (arXiv:2401.04658) computes
it in chunks, and MiniMax-01 (arXiv:2501.08313) trained it at scale. Time grows linearly with the
sequence length, and the state has a fixed size.

Copy this file. It needs jax and numpy. With `jax-triton` and `triton` it runs kernels on NVIDIA and
AMD GPUs. Everywhere else it runs plain JAX.

The file in order: the API; packed batches; the scan in plain JAX; its gradients; the kernels, their
plan and their launch; vmap, sharding and many devices; checks.

Glossary
    B, T, H       batch rows, tokens per row, heads. [B | 1]: B rows, or one that all rows share
    K, V          head dims: of queries and keys; of values. BK, BV: columns that a program handles
    n             sequences per batch row: 1 unless the batch is packed (varlen)
    q, k, v, o    queries, keys, values, outputs
    g, g2         log decay of a head per token: in nats (`g_gamma`); to base 2
    S, z          state [K, V]; what a split adds to it. Kernels hold them transposed, [V, K]
    s0, s         initial and final states of sequences
    q2, o2        queries that read S^T; what they read. fused: both scans in one
    P, D          scores q_i.k_j D_ij of a chunk; decay, scale and causal mask. In kernels [j, i]
    i, j          a query and a key of a chunk. Scan order: last token first, if reverse
    c, C, rank    a chunk, one step of a loop; its length; a token's index in it, in scan order
    segment       tokens that one program scans
    split         part of a segment. The states of splits are summed in parallel
    work item     the tokens of a chunk, a segment or a split (`_WorkItem`)
    dx            the gradient with respect to x
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir, partial_eval
from jax.sharding import NamedSharding, PartitionSpec

__version__ = "0.1.0"

# Plain JAX needs the first range, the kernels need the others. When a new version breaks the file,
# look at what is private or young:
# - jax-triton: `_in_place` binds its primitive; the rule for dead code below ends with 0.4.2.
# - JAX: `_to_xla_hlo_sharding` in `_parts`, custom_partitioning and what `_lower_partitioned`
#   catches, `manual_axis_type` in `_varying`, auto_axes, auto_pcast, `abstract_device`.
# - Triton: Gluon in `_hopper_kernel`; ptxas in `_unpack_flags`.
# - XLA on CPUs: the selects and barriers of `_scan_xla` (jax 0.12.0.1).
_JAX = ">=0.10.2"
_KERNELS = {"jax": ">=0.11.1,<0.13", "jax-triton": ">=0.4.1,<0.5", "triton": ">=3.8,<3.10"}
_INSTALL = "pip install " + " ".join(f"'{name}{versions}'" for name, versions in _KERNELS.items())
_NEEDS = f"They need Linux, Python >= 3.12 and: {_INSTALL}"


def _fits(found, versions):
    """Whether the version `found` lies in `versions`, ">=a" or ">=a,<b". The first three parts of a
    version count, if they are numbers."""
    numbers = lambda text: tuple(int(n) for n in text.split(".")[:3] if n.isdigit())
    low, _, high = versions.removeprefix(">=").partition(",<")
    return numbers(low) <= numbers(found) and (not high or numbers(found) < numbers(high))


if not _fits(jax.__version__, _JAX):
    raise ImportError(
        f"lightning_attn needs jax{_JAX} and found jax {jax.__version__}: pip install 'jax{_JAX}'"
    )

_missing = None  # why the kernels cannot run
try:
    import jax_triton
    import triton

    _found = dict(zip(_KERNELS, (jax.__version__, jax_triton.__version__, triton.__version__)))
    if not all(_fits(_found[name], versions) for name, versions in _KERNELS.items()):
        raise ImportError("found " + ", ".join(f"{name} {found}" for name, found in _found.items()))
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except Exception as error:  # `_backend` tells who has a GPU
    triton, _missing = None, f"{type(error).__name__}: {error}"
if triton and _fits(_found["jax"], ">=0.12") and _found["jax-triton"] == "0.4.1":
    # jax 0.12 hands a rule for dead code three arguments, jax-triton 0.4.1's takes two.
    partial_eval.dce_rules[jax_triton.triton_lib.triton_kernel_call_p] = lambda used, live, eqn: (
        [True] * len(eqn.invars),
        eqn,
    )

__all__ = ["lightning_attn", "lightning_attn_reference", "lightning_g_gamma"]


# Types for callers. Checkers cannot follow what Triton compiles: they report nothing of this file.
# mypy: ignore-errors
# pyright: basic, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportOptionalIterable=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false
Array = jax.Array | np.ndarray
Integer = int | np.integer | Array
Real = float | np.floating | Integer


_F = TypeVar("_F", bound=Callable[..., Any])


def _promotes(f: _F) -> _F:
    """Runs f under JAX's default promotion rules, whatever the caller set. JAX calls the rules of a
    transformation when the caller's settings hold again, so rules that compute are marked too."""

    @functools.wraps(f)
    def promotes(*args, **kwargs):
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            jax.auto_pcast(True),
        ):
            return f(*args, **kwargs)

    return cast(_F, promotes)


# The API -----------------------------------------------------------------------------------------


@_promotes
def lightning_attn(
    query: Array,
    key: Array,
    value: Array,
    layer_idx: Integer | None = None,
    num_layers: Integer | None = None,
    softmax_scale: Real | None = None,
    initial_state: Array | None = None,
    reverse: bool = False,
    cu_seqlens: Array | Sequence[int] | None = None,
    *,
    g_gamma: Array | None = None,
    backend: Literal["triton", "xla"] | None = None,
    seq_axis: str | tuple[str, ...] | None = None,
    output_final_state: bool = True,
) -> tuple[jax.Array, jax.Array | Any]:  # Any: None if that is False
    """Lightning attention: o_t = scale q_t S_t, where S_t = e^g S_{t-1} + k_t v_t^T.

    See arXiv:2307.14995, arXiv:2401.04658 and arXiv:2501.08313. Works under jit, grad (reverse
    mode, to any order), vmap, scan, remat, export and sharding. A token reads itself and tokens
    before it or, with `reverse`, after it. Use `cu_seqlens` to separate sequences and padding:
    there is no `mask`, no `segment_ids` and no `is_causal`.

        output, final_state = lightning_attn(q, k, v, g_gamma=g, initial_state=state)

    Args:
      query: [batch, seq_len, num_heads, qk_head_dim], float32, bfloat16 or float16. In x64 mode
        also float64, which takes plain JAX. Head dims are 1 to 512, `seq_len` is 0 to 2**30.
      key: [batch, seq_len, num_kv_heads, qk_head_dim], in the dtype of `query`. `num_kv_heads`
        divides `num_heads`; query head h reads key and value head h // (num_heads / num_kv_heads).
      value: [batch, seq_len, num_kv_heads, v_head_dim], in the dtype of `query`.
      layer_idx, num_layers: integers, possibly traced: the layer, counted from 0, and the number of
        layers. Head h gets the log decay g = -(8 / num_heads) (1 - layer_idx / num_layers) h, or 0
        if a traced layer is past the last. Leave both out to give `g_gamma` instead. A
        `jax.shard_map` over heads needs `g_gamma`: the formula numbers each device's heads from 0.
      softmax_scale: scale of the outputs, 0 or a normal number of float32; None means
        qk_head_dim ** -0.5. Each number compiles a program of its own. A traced scale has a
        gradient. It multiplies `query` first, and the product rounds to the dtype of `query`.
      initial_state: [n, num_heads, qk_head_dim, v_head_dim], floating: the states that the
        sequences start from. n is the batch or the number of packed sequences. None means zeros.
      reverse: a static bool. True runs from the last token to the first: `initial_state` enters at
        the end, and `final_state` is left at the start.
      cu_seqlens: [num_seqs + 1] integers, concrete or traced: boundaries, from 0 up, of sequences
        that are packed in a batch of 1. Equal neighbours are an empty sequence. Tokens past the
        last boundary, and before a traced first boundary, belong to no sequence: their outputs and
        gradients are 0, whatever they hold. Traced boundaries are not checked: kernels stay inside
        their arrays, but boundaries that decrease or lie outside of the tokens give wrong results.
      g_gamma: [num_heads], log decay per token in nats, <= 0, possibly traced. Values above 0 raise
        if they are concrete. Otherwise they count as 0, and their gradient is 0.
      backend: None picks when the computation is lowered: Triton for cuda and rocm, plain JAX for
        everything else and for GPUs older than sm_80. "triton" and "xla" force one of the two, and
        "triton" raises on older GPUs. An export of symbolic shapes, for several platforms, or over
        a mesh without devices needs "xla".
      seq_axis: name of a `jax.shard_map` mesh axis, or a tuple of names, over which `seq_len` is
        split evenly, in order. Only states cross it. Both states are those of the whole sequence.
      output_final_state: a static bool. False returns None for the final state, and saves its time
        and memory.

    Returns:
      output: [batch, seq_len, num_heads, v_head_dim], in the dtype of `query`.
      final_state: [n, num_heads, qk_head_dim, v_head_dim], float32 (float64 for float64 inputs). On
        a GPU it takes the memory of an `initial_state` that the caller donates or carries through a
        loop, unless the sequence is so long that it is cut into segments.

    Accuracy: states, decays and sums are float32. float32 inputs follow
    `jax.default_matmul_precision`: TF32 by default on GPUs, float32 for "high" and "highest". With
    float16 inputs, states and scaled scores round to float16 before they are multiplied, and
    overflow past 65504.

    Raises:
      TypeError, ValueError: before anything runs. Messages name what is expected and what came.
        Only concrete values are checked. An eager call waits for the device to check them.
    """
    q, k, v = _qkv(query, key, value)
    g = _log_decays(q, layer_idx, num_layers, g_gamma)
    q, scale = _scaled(q, softmax_scale)
    axes = _seq_axes(seq_axis, cu_seqlens)
    cu_seqlens = _boundaries(cu_seqlens, q)
    s0 = _initial_state(initial_state, q, v, cu_seqlens)
    _static("reverse", reverse)
    _static("output_final_state", output_final_state)
    backend = _backend(backend, q, cu_seqlens)
    precision = jax.config.jax_default_matmul_precision
    op = _Op(scale, bool(reverse), backend, precision, final_state=bool(output_final_state))
    if s0 is not None:
        s0 = s0[:, None] if cu_seqlens is None else s0[None]
    x = _Operands(q, k, v, g[None], s0, None if cu_seqlens is None else cu_seqlens[None])
    if axes is None:
        o, s, _ = _attend(op, _pcast(x, _varying(x)))
    else:
        varying = _varying(x)
        qkv = _pcast((q, k, v), varying | set(axes))
        o, s = _attend_across(op, axes, _Operands(*qkv, x.g, _pcast(s0, varying - set(axes))))
    # not s[0]: the transpose of an index forgets an Explicit mesh axis of size 1
    return o, None if s is None else s.reshape(-1, *s.shape[2:])


@_promotes
def lightning_attn_reference(
    query: Array,
    key: Array,
    value: Array,
    layer_idx: Integer | None = None,
    num_layers: Integer | None = None,
    softmax_scale: Real | None = None,
    initial_state: Array | None = None,
    reverse: bool = False,
    cu_seqlens: Array | Sequence[int] | None = None,
    *,
    g_gamma: Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence, one token at a time, in plain JAX.

    Arguments and results are those of `lightning_attn`, except for backend, seq_axis and
    output_final_state."""
    q, k, v = _qkv(query, key, value)
    g = _log_decays(q, layer_idx, num_layers, g_gamma)
    q, scale = _scaled(q, softmax_scale)
    cu_seqlens = _boundaries(cu_seqlens, q)
    s = _initial_state(initial_state, q, v, cu_seqlens)
    _static("reverse", reverse)
    (B, T, H, K), V, dtype = q.shape, v.shape[3], g.dtype
    n = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    s = jnp.zeros((n, H, K, V), dtype) if s is None else s
    s = _pcast(s, _varying(q, k, v, g, cu_seqlens))
    token = jnp.arange(T)
    member = jnp.ones((T, B), bool)  # [T, n]
    if cu_seqlens is not None:
        bounds, _ = _intervals(T, cu_seqlens)
        member = (bounds[1:-2] <= token[:, None]) & (token[:, None] < bounds[2:-1])

    def step(s, x):
        q, k, v, member = x  # [B, H, K], [B, H, K], [B, H, V], [n]
        q, k, v = (jnp.repeat(y.astype(dtype), H // y.shape[1], axis=1) for y in (q, k, v))
        member = member[:, None, None]
        entered = jnp.exp(g)[:, None, None] * s + k[..., None] * v[..., None, :]
        s = jnp.where(member[..., None], entered, s)
        q = jnp.broadcast_to(q, (n, H, K))
        o = scale * jnp.einsum("bhk,bhkv->bhv", q, s, precision="highest")
        return s, o if cu_seqlens is None else jnp.where(member, o, 0).sum(0, keepdims=True)

    by_token = (jnp.moveaxis(x, 1, 0) for x in (q, k, v))
    s, o = lax.scan(step, s, (*by_token, member), reverse=reverse)
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), s


@_promotes
def lightning_g_gamma(
    num_heads: int,
    layer_idx: Integer,
    num_layers: Integer,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Log decay per token in nats, [num_heads]: -(8 / num_heads) (1 - layer_idx / num_layers) head.

    The formula is that of arXiv:2307.14995. `layer_idx` and `num_layers` are integers, possibly
    traced. They are checked as `lightning_attn` checks them."""
    num_heads = _scalar("num_heads", num_heads)
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads: expected a static integer of at least 1, got {num_heads!r}")
    layer_idx, num_layers = _layer(layer_idx, num_layers)
    slopes = -8 / num_heads * np.arange(num_heads)
    if isinstance(layer_idx, int) and isinstance(num_layers, int):
        return jnp.asarray((1 - layer_idx / num_layers) * slopes, dtype)
    wide = jnp.promote_types(dtype, jnp.float32)  # the difference cancels digits
    layer_idx, num_layers = (jnp.asarray(x).astype(wide) for x in (layer_idx, num_layers))
    left = 1 - layer_idx / num_layers
    # A layer past the last layer, which could not be checked, forgets nothing.
    return (jnp.where(left < 0, 0, left) * jnp.asarray(slopes, wide)).astype(dtype)


# Packed batches: where sequences begin and end ----------------------------------------------------


class _WorkItem(NamedTuple):
    """Consecutive tokens of one interval: a chunk, a segment or a split. Kernels read 7 int32."""

    first: Any  # token
    tokens: Any  # number of tokens; -1: no work
    valid: Any  # `tokens`, or 0 if they belong to no sequence
    sequence: Any  # -1: none
    items_before: Any  # how many items of its interval come before it, in scan order
    items_after: Any  # and after it. `_scan_xla` counts both in the order of the tokens
    slot: Any  # of a segment: how many segments with a successor come before it


def _intervals(T, cu_seqlens):
    """Splits T tokens at boundaries [n + 1], which may hold anything, into n + 2 intervals: before
    the first sequence, each sequence, after the last. Returns bounds [n + 3] that never decrease,
    and which intervals are sequences."""
    zero, last = jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32)
    bounds = lax.cummax(jnp.concatenate([zero, jnp.clip(cu_seqlens, 0, T), last]))
    i = jnp.arange(cu_seqlens.shape[0] + 1)
    return bounds, (i > 0) & (i < i.shape[0] - 1)


def _work_items(T, cu_seqlens, length, reverse=False, per_segment=0, of_sequences=False):
    """Work items [R, 7] of `length` tokens each, where R is enough for any boundaries.

    Items are segments or chunks, anchored where the scan starts. With `per_segment`, they are the
    splits of all segments with a successor, `per_segment` each. Each interval has one item or more,
    which write its outputs and its state, unless the items are `of_sequences`: then only tokens of
    sequences have items."""
    bounds, is_sequence = _intervals(T, cu_seqlens)
    tokens, intervals = bounds[1:] - bounds[:-1], is_sequence.shape[0]
    count = -(-tokens // (length * max(per_segment, 1)))  # items of each interval
    count = jnp.where(is_sequence, count, 0) if of_sequences else jnp.maximum(count, 1)
    count = (count - 1) * per_segment if per_segment else count
    ends = jnp.cumsum(count)
    R = _count_items(T, intervals - 2 * of_sequences, length, per_segment, of_sequences)
    item = jnp.arange(R)
    of = jnp.cumsum(jnp.zeros(R, jnp.int32).at[ends].add(1, mode="drop"))  # each item's interval
    # unused items count as the last interval's, which is no sequence
    used, of = of < intervals, jnp.minimum(of, intervals - 1)
    before = item - (ends - count)[of]
    done = before * length  # tokens of its interval before the item, in scan order
    tokens = jnp.clip(tokens[of] - done, 0, length)
    columns = _WorkItem(
        first=bounds[of + 1] - done - tokens if reverse else bounds[of] + done,
        tokens=jnp.where(used, tokens, -1),
        valid=jnp.where(is_sequence[of], tokens, 0),
        sequence=jnp.where(is_sequence[of], of - 1, -1),
        items_before=before,
        items_after=count[of] - 1 - before,
        slot=item - of,
    )
    return jnp.stack([x.astype(jnp.int32) for x in columns], -1)


def _count_items(T, intervals, length, per_segment=0, of_sequences=False):
    """How many work items T tokens have at most."""
    if per_segment:
        return (T - 1) // (length * per_segment) * per_segment
    if of_sequences or intervals == 1:  # the sum of ceil(t / length) over intervals of t >= 1
        return (T - intervals) // length + intervals
    return T // length + intervals


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4, 5))  # so that all uses share one trace
def _batched_work_items(T, cu_seqlens, *static):
    """`_work_items` of each batch row, [B | 1, R, 7]: one row for a plain batch."""
    cu_seqlens = T * jnp.arange(2)[None] if cu_seqlens is None else cu_seqlens
    return jax.vmap(lambda cu_seqlens: _work_items(T, cu_seqlens, *static))(cu_seqlens)


# What it computes: the scan in plain JAX ----------------------------------------------------------
#
# Internally each batch row holds n sequences, one after another; n is 1 for a plain batch. The op
# is a scan over them. That a head's decay is the same for all tokens is used by the powers of
# e^g, the splits that vanish, state passing, `_decay_gradient` and `seq_axis`.
#
#     _scan(op)(operands) -> o [B, T, H, V], s [B, n, H, K, V] | None, o2 [B, T, H, K] | None
#
# An operand may have one row instead of B: then all rows share that row. q, k, v and q2 may have
# fewer heads than the decay: then groups of the decay's heads share each of them. A forward scan
# decays the state before it adds a token. Its adjoint runs backwards, and decays the state after a
# token has read it.
#
# The scan works in chunks of C tokens. G groups of N chunks are the steps of a `lax.scan`. A group
# multiplies for all its chunks at once; only states pass from chunk to chunk. Chunks lie in the
# order of their tokens: a scan that goes back starts with the last chunk.

CHUNK, GROUP = 64, 512  # tokens per chunk if head dims are at most 64; tokens per group at most


@dataclasses.dataclass(frozen=True)
class _Op:
    scale: float  # of scores, and of what queries read of the state or, after_read, of added keys
    reverse: bool
    backend: str | None
    precision: Any  # jax.default_matmul_precision at the call
    after_read: bool = False  # the state decays after it is read, not before a token is added
    only_state: bool = False  # o is None
    final_state: bool = True  # False: s is None
    swapped: bool = False  # kernels sum the states of splits with k and v exchanged
    name: str = "forward"  # in profiles

    def adjoint(self):
        return dataclasses.replace(self, reverse=not self.reverse, after_read=not self.after_read)


class _Operands(NamedTuple):
    """The operands of a scan. All but k, v and g may be None. vmap puts more dims in front."""

    q: Any
    k: Any
    v: Any
    g: Any
    s0: Any = None
    cu_seqlens: Any = None
    q2: Any = None

    @property
    def untouched(self):
        """Stands for an array that a kernel neither reads nor writes: any array will do."""
        return self.g

    def transposed(self, q):
        """The operands of the scan in which queries q read S^T."""
        return self._replace(q=q, k=self.v, v=self.k, s0=_transposed(self.s0), q2=None)


# The dims: batch rows, tokens, heads, head dims K and V, sequences, boundaries. Shardings and the
# sharding rule are made from this table.
_DIMS = _Operands("b t h k", "b t h k", "b t h v", "b h", "b n h k v", "b m", "b t h v")
_RESULT_DIMS = "b t h v", "b n h k v", "b t h k"  # o, s, o2


def _sizes(x):
    """B, T, H, K, V and n of the operands x."""
    n = 1 if x.cu_seqlens is None else x.cu_seqlens.shape[1] - 1
    B = _common_size(a.shape[0] for a in jax.tree.leaves(x))
    return B, x.q.shape[1], x.g.shape[1], x.q.shape[3], x.v.shape[3], n


def _common_size(sizes):
    """The size other than 1 that the sizes agree on, or 1."""
    return next((size for size in sizes if size != 1), 1)


def _scan_xla(op, x, do=None, ds=None):
    """The scan, a group of chunks at a time. With do it returns <o, do> + <s, ds> of each row and
    head instead, [B, H], computed in float32; ds may be None."""
    B, T, H, K, V, n = _sizes(x)
    varlen, wide = x.cu_seqlens is not None, x.g.dtype
    dtype = x.v.dtype if do is None else wide
    # the jvp of a packed batch takes long to compile
    most = GROUP if ds is None or not varlen else GROUP // 4
    C, groups = _groups(T, n, x.cu_seqlens, max(K, V), most)
    N, i = groups.shape[2], jnp.arange(C)
    # Products of 16-bit numbers are exact in float32: more passes would change nothing.
    precision = op.precision if dtype == wide else "default"
    # keeps XLA from folding the decays of known g into large constants, which is slower
    g = lax.optimization_barrier(x.g)
    # Tokens to add, so that a plain batch has whole groups. C of them let JAX see that a chunk fits
    # in a symbolic T.
    rest = 0 if varlen else -T % (N * C) if isinstance(T, int) else C
    q, k, v, q2, do = (
        a if a is None else jnp.pad(a, ((0, 0), (0, rest), (0, 0), (0, 0)))
        for a in (x.q, x.k, x.v, x.q2, do)
    )

    def dot(indices, a, b):  # rounds what it multiplies, as the kernels do
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(indices, a, b, precision=precision, preferred_element_type=wide)

    distance = (i[:, None] - i) * (-1 if op.reverse else 1)  # from key j to query i in scan order
    D = jnp.where(distance >= 0, op.scale * _power(g, distance[None, None]), 0)
    scale_q, scale_k = (1.0, op.scale) if op.after_read else (op.scale, 1.0)

    def outputs(q, k, v, q_decay, S):
        """What queries read of the keys and values of their chunk, and of the state before it."""
        P = dot("bchik,bchjk->bchij", q, k) * D
        of_state = scale_q * q_decay * dot("bchik,bchkv->bchiv", q, S)
        return (dot("bchij,bchjv->bchiv", P, v) + of_state).astype(dtype)

    def group(carry, items):
        S, s, o, o2, total = carry
        item = _WorkItem(*jnp.moveaxis(items, -1, 0))  # [B | 1, N]
        inside = i < item.valid[..., None]
        tokens = jnp.where(inside, item.first[..., None] + i, T)  # [B | 1, N, C]

        def load(a):
            """Tokens of a [B | 1, T, Ha, :] in chunks [B, N, H, C, :]: 0 for those outside."""
            Ha, columns = a.shape[2:]
            if varlen:
                a = jnp.where(inside[..., None, None], _rows_at(a, tokens), 0)
            else:
                a = lax.dynamic_slice_in_dim(a, item.first[0, 0], N * C, 1)
            a = a.reshape(-1, N, C, Ha, columns).swapaxes(2, 3).astype(dtype)
            return jnp.broadcast_to(jnp.repeat(a, H // Ha, axis=2), (B, N, H, C, columns))

        def store(a, chunks):
            chunks = chunks.swapaxes(2, 3).reshape(B, N * C, H, -1)
            if varlen:
                return _put_rows(a, tokens.reshape(-1, N * C), chunks)
            return lax.dynamic_update_slice_in_dim(a, chunks, item.first[0, 0], 1)

        def states_of_sequences(a):
            """The states of a [B | 1, n, H, K, V] for the sequences of the chunks. None means 0."""
            if a is None:
                return jnp.zeros((1, N, 1, 1, 1), wide)
            a = _rows_at(a, jnp.maximum(item.sequence, 0))
            return jnp.where((item.valid > 0)[..., None, None, None], a, 0)

        qs, ks, vs, q2s, dos = (a if a is None else load(a) for a in (q, k, v, q2, do))
        valid = item.valid[..., None]
        rank = valid - 1 - i if op.reverse else jnp.broadcast_to(i, inside.shape)
        exponents = rank + (not op.after_read), valid - 1 - rank + op.after_read, valid
        # Without the barrier XLA takes a power for each number that the decays multiply.
        powers = lax.optimization_barrier(tuple(_power(g, a[..., None]) for a in exponents))
        q_decay, k_decay, s_decay = powers  # [B | 1, N, H, C, 1] twice, [B | 1, N, H, 1, 1]
        # 1. What each chunk adds to the state.
        Z = dot("bchjk,bchjv->bchkv", ks * (scale_k * k_decay), vs)
        # 2. States pass from chunk to chunk.
        before, after = item.items_before, item.items_after
        before, after = (after, before) if op.reverse else (before, after)
        entering = states_of_sequences(x.s0) if varlen else None
        S_in, S_out = _pass_states(op, before == 0, s_decay, Z, entering, S)
        S = S_out[:, 0 if op.reverse else N - 1]
        ends = (item.valid > 0) & (after == 0)
        if s is not None:
            s = _put_rows(s, jnp.where(ends, item.sequence, n), S_out)
        # 3. Queries read the keys of their chunk and the state before it.
        if do is not None:
            # The selects change no sum. They keep XLA on CPUs (jax 0.12.0.1) from fusing a sum with
            # a product of matrices, which would read memory that nothing has written.
            read = outputs(qs, ks, vs, q_decay, S_in)
            total += (jnp.where(inside[:, :, None, :, None], read, 0) * dos).sum((1, 3, 4))
            if varlen and ds is not None:
                last = jnp.where(ends[..., None, None, None], S_out, 0)
                total += (last * states_of_sequences(ds)).sum((1, 3, 4))
        o = o if o is None else store(o, outputs(qs, ks, vs, q_decay, S_in))
        o2 = o2 if o2 is None else store(o2, outputs(q2s, vs, ks, q_decay, _transposed(S_in)))
        return (S, s, o, o2, total), None

    def group_or_nothing(carry, items):  # half of a packed batch's groups may be without work
        return lax.cond((items[..., 2] > 0).any(), group, lambda *x: (x[0], None), carry, items)

    total, s, o, o2 = jnp.zeros((B, H), wide), None, None, None
    # an empty sequence ends with the state that it starts from
    s0 = jnp.broadcast_to(jnp.zeros((), wide) if x.s0 is None else x.s0, (B, n, H, K, V))
    S = jnp.zeros((B, H, K, V), wide) if varlen else s0[:, 0]
    if do is None:
        s = s0 if varlen and op.final_state else None
        o = None if op.only_state else jnp.zeros((B, T + rest, H, V), dtype)
        o2 = None if q2 is None else jnp.zeros((B, T + rest, H, K), dtype)
    carry = _pcast((S, s, o, o2, total), _varying(x, do, ds))
    step = group_or_nothing if varlen else group
    (S, s, o, o2, total), _ = lax.scan(step, carry, groups, reverse=op.reverse)
    if do is not None:
        return total if varlen or ds is None else total + (ds[:, 0] * S).sum((-1, -2))
    s = s if varlen or not op.final_state else S[:, None]
    o, o2 = (a if a is None else a[:, :T] for a in (o, o2))
    return o, s, o2


def _groups(T, n, cu_seqlens, widest, most):
    """C, and the work items of all groups, [G, B | 1, N, 7], filled up with items without work.
    `widest` is the larger head dim, and a group has at most `most` tokens."""
    C, per_group = CHUNK, 1  # in an export of symbolic shapes
    if isinstance(T, int) and isinstance(n, int):
        # with C near K and V, a chunk's scores cost as much as its state
        C = CHUNK if widest <= CHUNK else 2 * CHUNK
        # chunks of equal length need least padding
        per_group, C = max(1, most // C), -(-T // -(-T // C))
        # a sequence that is shorter than a chunk wastes the rest of the chunk
        C = min(C, max(16, _next_power_of_2(T // n)))
    items = _batched_work_items(T, cu_seqlens, C, False, 0, True)
    R = items.shape[1]
    G = -(-R // per_group)
    N = 1 if per_group == 1 else -(-R // G)
    items = jnp.pad(items, ((0, 0), (0, G * N - R), (0, 0)))
    return C, jnp.moveaxis(items.reshape(-1, G, N, 7), 1, 0)


def _pass_states(op, starts, s_decay, Z, entering, S):
    """The states [B, N, H, K, V] before and after the chunks of a group. Chunks decay the state by
    s_decay and add Z. The first state is S and, where a sequence `starts`, that of `entering`."""
    N = Z.shape[1]
    S_in, S_out = [None] * N, [None] * N
    # Unrolled: a loop would launch a kernel per chunk. No matrix product, in which a NaN times 0
    # would reach the next sequence.
    for c in reversed(range(N)) if op.reverse else range(N):
        if entering is not None:
            S = jnp.where(starts[:, c, None, None, None], entering[:, c], S)
        S_in[c], S_out[c] = S, s_decay[:, c] * S + Z[:, c]
        S = S_out[c]
    return jnp.stack(S_in, 1), jnp.stack(S_out, 1)


def _power(g, x):
    """e^{g x}, or 1 if x < 0: [B | 1, N, H, ., .] of g [B | 1, H] and x [B | 1, N, ., .]."""
    return jnp.exp(g[:, None, :, None, None] * jnp.maximum(x, 0)[:, :, None])


def _rows_at(x, index):
    """x[b, index[b]] of x [B | 1, ...] and index [B | 1, ...]. vmap tells the compiler that no row
    reads another's."""
    if x.shape[0] == 1:
        return x.reshape(x.shape[1:]).at[index].get(mode="clip")
    index = jnp.broadcast_to(index, (x.shape[0], *index.shape[1:]))
    return jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x, index)


def _put_rows(x, index, rows):
    """x [B, n, ...] with rows[b] at index[b], of index [B | 1, N]. Indices may be past the end."""
    index = jnp.broadcast_to(index, rows.shape[:2])
    return jax.vmap(lambda x, i, y: x.at[i].set(y, mode="drop"))(x, index, rows)


def _decayed_sum(states, g, ages):
    """The sum of states [N, B, n, H, K, V], each times e^{g age}. A state of negative age counts
    as 0."""
    age = ages[:, None, None]
    weight = jnp.where(age >= 0, jnp.exp(g * jnp.maximum(age, 0)), 0)  # [N, B | 1, H]
    return (weight[:, :, None, :, None, None] * states).sum(0)


def _transposed(s):
    return None if s is None else jnp.swapaxes(s, -1, -2)


# Its gradients ------------------------------------------------------------------------------------
#
# The scan is linear in q, k, v and s0, so its gradients are scans as well: scan(q, k, v, from s0).
# `back` is the adjoint direction, from the cotangent of the final state to that of s0:
#
#     dq = scan(do, v, k, from s0^T)           dk = scan back(v, do, q, from ds^T)
#     ds0 = the end of dv's scan               dv = scan back(k, q, do, from ds)
#
# The adjoint has the state A_j = e^{g (T-1-j)} ds + scale sum_{i>=j} e^{g (i-j)} q_i^T do_i:
# dv_j = k_j A_j and dk_j = v_j A_j^T read it. ds is not scaled, so the scale is of what enters the
# state. A backward pass is two scans, of which one is fused: with q2 = v it yields dv and dk. Both
# have gradients of their own: the rules hold for adjoint scans as well.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(op, x):
    specs = list(map(_spec, x[:3]))
    # rows are split as the first of q, k and v that splits its rows; heads likewise, by other axes
    rows = next((spec[0] for spec in specs if spec[0] is not None), None)
    taken = set(jax.tree.leaves(rows))
    heads = (spec[2] for spec in specs if not taken & set(jax.tree.leaves(spec[2])))
    out = PartitionSpec(rows, None, next((names for names in heads if names is not None), None))
    wanted = not op.only_state, op.final_state, x.q2 is not None
    out = tuple(out if is_wanted else None for is_wanted in wanted)
    return _in_auto_mode(_scan(op), (x,), out)


def _attend_fwd(op, x):
    """The last saved value is () if the gradient of g is wanted, which costs one more scan, or else
    None. Both are empty pytrees, so that the value stays static under jit."""
    wants_dg = () if x.g.perturbed else None
    x = custom_vjp_primal_tree_values(x)
    return _attend(op, x), (x, wants_dg)


@_promotes
def _attend_bwd(op, saved, cotangents):
    x, wants_dg = saved
    if x.q2 is None:  # a symbolic zero is the cotangent of a result that is not used
        do, ds = (None if isinstance(c, SymbolicZero) else c for c in cotangents[:2])
        return (_gradients(op, x, wants_dg, do, ds),)
    # only second derivatives differentiate a fused scan: two scans have gradients
    zeros = lambda c: jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c
    cotangents = _pcast(jax.tree.map(zeros, cotangents), _varying(x))
    return jax.vjp(functools.partial(_two_scans, _attend, op), x)[1](cotangents)


_forward.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
# The scan with its gradients. jit, because an eager shard_map takes no symbolic zeros.
_attend = jax.jit(_forward, static_argnums=0)


def _two_scans(scan, op, x):
    """A fused scan as two. If K = V, the states of their splits are equal launches, of which XLA
    makes one."""
    # Both scans have B rows. B is read off the operands, so g gets B rows if q or q2 has one row.
    B, _, H, *_ = _sizes(x)
    same_rows = x.q.shape[0] == x.q2.shape[0]
    x = x if same_rows else x._replace(g=jnp.broadcast_to(x.g, (B, H)))
    o, s, _ = scan(op, x._replace(q2=None))
    o2, *_ = scan(dataclasses.replace(op, final_state=False, swapped=True), x.transposed(x.q2))
    return o, s, o2


@functools.partial(jax.jit, static_argnums=0)
def _gradients(op, x, wants_dg, do, ds):
    """The gradients of the operands, for do and ds, of which each may be None."""
    wants_dg = wants_dg if x.q.size and x.v.size else None  # without tokens nothing decays
    specs = jax.tree.map(_spec, x._replace(cu_seqlens=None))
    specs = specs if wants_dg is not None else specs._replace(g=None)
    return _in_auto_mode(functools.partial(_gradients_by_scans, op), (x, wants_dg, do, ds), specs)


def _gradients_by_scans(op, x, wants_dg, do, ds):
    if do is None:
        do = jnp.zeros((*x.q.shape[:2], x.g.shape[1], x.v.shape[3]), x.v.dtype)
    op = dataclasses.replace(op, only_state=False, final_state=False, name="dq")
    back = dataclasses.replace(op.adjoint(), final_state=x.s0 is not None, name="dk_dv")
    dq, *_ = _attend(op, x.transposed(do))
    dv, ds0, dk = _attend(back, x._replace(q=x.k, k=x.q, v=do, s0=ds, q2=x.v))
    dq, dk, dv = (_sum_heads(a, b.shape[2]) for a, b in zip((dq, dk, dv), x))
    dg = None
    if wants_dg is not None:
        dg = _decay_gradient(op, x, do, ds).sum(0, keepdims=True)
    return _Operands(dq, dk, dv, dg, ds0)


def _sum_heads(x, heads):
    """Sums x [B, T, H, columns] over the H / heads heads that read each head."""
    B, T, H, columns = x.shape
    if H == heads:
        return x
    return x.reshape(B, T, heads, H // heads, columns).sum(3)  # jnp sums 16 bits in float32


def _decay_gradient(op, x, do, ds):
    """The gradient of g for cotangents do and ds (or None), [B, H], in forward mode. No head reads
    another's decay, so one derivative in the direction of all decays has that of each head. Reverse
    mode would sum t (q_t.dq_t - k_t.dk_t) over tokens t: noise, if a head forgets."""
    with jax.named_scope("lightning_attn_dg"):
        f = lambda g: _scan_xla(op, x._replace(g=g), do, ds)
        return jax.jvp(f, (x.g,), (jnp.ones_like(x.g),))[1]


# How it is fast: the kernels ----------------------------------------------------------------------
#
# Nothing above this line needs a GPU. The steps and their names are those of Mamba-2's SSD: chunk
# state, state passing, chunk scan. A scan is one launch if batch rows are short, or if batch rows
# and heads fill the GPU. Otherwise `_plan_segments` cuts batch rows into segments, so that a head
# keeps many SMs busy, and segments into splits. The scan then takes three launches:
#
#     _chunk_state_kernel     sums what each split adds to the state: [B, splits, H, V, K]
#     _state_passing_kernel   overwrites the last split of each segment with the state that the next
#                             segment starts from, without the initial state's share
#     _chunk_scan_kernel      scans all segments in parallel, each from that state plus the decayed
#                             initial state. For 16 bits on Hopper, _hopper_kernel does the same
#
# Scans of one token per plain batch row, decode steps, launch _step_kernel instead. A scan whose
# outputs are not needed (`only_state`) is one launch of _chunk_state_kernel; XLA sums splits.
# All kernels except _step_kernel hold the state transposed, S^T [V, K]. S^T is then the left
# operand of o^T = S^T q^T as it lies in registers, without a copy through shared memory. Programs
# divide the columns of values, at most 128 (BV) each. A program scans the columns of keys above 128
# in blocks of BK, one after another: the scan is linear in the keys, and each K block adds to the
# outputs. A program rereads only outputs that it wrote, so no launch depends on what XLA does with
# the memory between launches. An array that a launch may change in place is passed twice, as an
# input and as an output: a kernel works whether XLA gives it one array or two.

if triton:
    _kernel, _gluon = triton.jit, gluon.jit
    _constant, _layout = tl.constexpr, triton.constexpr_function
else:
    _kernel = _gluon = _constant = _layout = lambda x: x

LOG2_E = _constant(1.4426950408889634)  # kernels take powers of 2
VANISHED = _constant(-150.0)  # 2 to this power is 0 in float32


class _Params(NamedTuple):
    """The numbers that a launch gives its kernel, in one plain tuple: jax-triton compiles another
    binary for an argument that is 1, but not for a number in a tuple."""

    scale: Any
    flags: Any  # see `_unpack_flags`
    T: Any  # tokens per batch row
    H: Any  # heads of decays and outputs. The heads of each operand divide H
    q_heads: Any = 1
    k_heads: Any = 1
    v_heads: Any = 1
    q2_heads: Any = 1
    q_stride: Any = 0  # tokens from one batch row to the next; 0 if all share one row
    k_stride: Any = 0
    v_stride: Any = 0
    q2_stride: Any = 0
    s0_stride: Any = 0  # initial states from one batch row to the next, or 0
    g_stride: Any = 0  # decays from one batch row to the next, or 0
    sequences: Any = 1  # per batch row
    length: Any = 0  # tokens per work item
    items: Any = 1  # work items per batch row
    items_stride: Any = 0  # numbers from the work items of one batch row to the next, or 0
    splits: Any = 0  # per batch row, of segments with a successor; for `only_state` of all segments
    splits_per_segment: Any = 1


class _Work(NamedTuple):
    """What one program handles: two tiles, a head, a batch row, and the work item at an index."""

    v_tile: Any
    k_tile: Any
    h: Any
    b: Any
    index: Any
    item: Any


@_kernel
def _unpack_flags(flags):
    """reverse, after_read, swapped and final_state of `_Op`, each 0 or 1. Kernels read them at run
    time, so one binary serves every scan. They share a number, because four numbers would take
    registers that the Hopper kernel lacks."""
    # & once, and // % three times: with % alone head dims above 128 take longer, with & alone short
    # sequences in float32 do (measured with Triton 3.9, not explained).
    return flags & 1, flags // 2 % 2, flags // 4 % 2, flags // 8 % 2


@_kernel
def _find_work(
    work_items, p, k_tiles, v_tiles, reverse,
    IS_VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, ITEMS_FIRST: tl.constexpr,
):  # fmt: skip
    """The `_Work` of this program. In a packed batch the program loads its work item. In a plain
    batch it computes the item, which saves a launch and a load; without segments, a batch row is
    one item. Consecutive programs share tokens or, if ITEMS_FIRST, a head."""
    i = tl.program_id(0)
    v_tile, i = i % v_tiles, i // v_tiles
    k_tile, i = i % k_tiles, i // k_tiles
    items = p.items if IS_VARLEN or SEGMENTED else 1
    if ITEMS_FIRST:
        index, i = i % items, i // items
        h, b = i % p.H, (i // p.H).to(tl.int64)
    else:
        h, i = i % p.H, i // p.H
        index, b = i % items, (i // items).to(tl.int64)
    if IS_VARLEN:
        at = work_items + b * p.items_stride + index * 7
        first, tokens, valid = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        sequence, before, after = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
        item = _WorkItem(first, tokens, valid, sequence, before, after, tl.load(at + 6))
    else:
        tokens = tl.minimum(p.T - index * p.length, p.length)
        first = index * p.length + reverse * (p.T - tokens - 2 * index * p.length)
        item = _WorkItem(first, tokens, tokens, 0, index, items - 1 - index, index)
    return _Work(v_tile, k_tile, h, b, index, item)


@_kernel
def _log2_decay(g, work, p):
    """The log decay of the program's head to base 2."""
    return (tl.load(g + work.b * p.g_stride + work.h) * LOG2_E).to(tl.float32)


@_kernel
def _first_token(work, stride, heads, p):
    """The offset of the program's first token and head in an operand, counted in heads. The stride
    is from one batch row to the next."""
    return (work.b * stride + work.item.first) * heads + work.h // (p.H // heads)


@_kernel
def _state_offset(work, stride, p):
    """The offset of the program's sequence and head, counted in states."""
    return (work.b * stride + work.item.sequence) * p.H + work.h


@_kernel
def _scales(scale, after_read):
    """The scales of queries that read the state, and of keys that enter it."""
    return 1.0 if after_read > 0 else scale, scale if after_read > 0 else 1.0


@_kernel
def _query_decays(g2, scale_q, scale, distance, rank, after_read):
    """How a chunk decays scores, by the distance from key to query, and what queries read of the
    state, by their ranks."""
    D = tl.where(distance >= 0, tl.exp2(g2 * tl.maximum(distance, 0)) * scale, 0.0)
    return D, tl.exp2(g2 * (rank + 1 - after_read)) * scale_q


@_kernel
def _key_decays(g2, scale_k, tokens, rank, after_read):
    """How a chunk of `tokens` tokens decays what its keys add to the state, by their ranks."""
    return tl.exp2(g2 * tl.maximum(tokens - 1 - rank + after_read, 0)) * scale_k


@_kernel
def _load_state(
    S, s_in, s0, ck, cv, work, swapped, g2_length,
    K: tl.constexpr, V: tl.constexpr, SEGMENTED: tl.constexpr, HAS_S0: tl.constexpr,
):  # fmt: skip
    """S^T [BV, BK] plus the state at the start of a segment: what the segments before it leave, and
    the decayed initial state. `ck` and `cv` are the columns of keys and values."""
    inside = (ck < K) & (cv < V)
    state = ck * V + cv
    if SEGMENTED:
        if work.item.items_before > 0:
            if swapped > 0:
                S += tl.load(s_in + state, mask=inside, other=0.0)
            else:
                S += tl.load(s_in + (cv * K + ck), mask=inside, other=0.0)
    if HAS_S0:
        # the initial state of a sequence without valid tokens may hold anything
        if work.item.valid > 0:
            initial = tl.load(s0 + state, mask=inside, other=0.0)
            S += tl.exp2(g2_length * work.item.items_before) * initial
    return S


@_kernel
def _store_final_state(
    S, s, s0, ck, cv, work, final_state, K: tl.constexpr, V: tl.constexpr, HAS_S0: tl.constexpr
):
    """Stores S^T as the final state, if it is that of a sequence and is wanted."""
    inside = (ck < K) & (cv < V)
    state = ck * V + cv
    if (work.item.items_after == 0) & (final_state > 0):
        if work.item.sequence >= 0:
            if HAS_S0:
                if work.item.valid <= 0:  # the sequence ends with the state that it starts from
                    S = tl.load(s0 + state, mask=inside, other=0.0)
            tl.store(s + state, S, mask=inside)


@_kernel
def _load_tile(x, t, valid, stride, column, C: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr):
    """Rows t .. t+C and columns column .. column+BD of x, whose rows are `stride` apart, as
    [C, BD]: 0 outside of [valid, DIM]. The last chunk of a reverse scan may start at t < 0."""
    row, col = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    inside = (t + row >= 0) & (t + row < valid)
    if DIM % BD != 0:
        inside = inside & (column + col < DIM)
    at = x + (t.to(tl.int64) * stride + column) + row * stride + col
    return tl.load(at, mask=inside, other=0.0)


@_kernel
def _chunk_state_kernel(
    k, v, g, work_items, states, params,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    IS_VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S^T = sum_j e^{g(L-1-j)} v_j k_j^T over a split of L tokens. If the state decays after it is
    read: e^{g(L-j)}, and scaled. Chunks whose tokens all weigh 0 in float32 at the end of the split
    are skipped. A split whose sum vanishes before the end of its segment is not written: with
    typical decays that is true of most splits."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    reverse, after_read, _, _ = _unpack_flags(p.flags)
    direction = 1 - 2 * reverse
    # Heads of low index decay slowest and take longest: ITEMS_FIRST starts them first.
    work = _find_work(work_items, p, NK, NV, reverse, IS_VARLEN, SEGMENTED=True, ITEMS_FIRST=True)
    g2 = _log2_decay(g, work, p)
    splits_after = p.splits_per_segment - 1 - work.item.items_before % p.splits_per_segment
    if work.item.tokens < 0 or g2 * p.length * splits_after <= VANISHED:
        return
    k += _first_token(work, p.k_stride, p.k_heads, p) * K
    v += _first_token(work, p.v_stride, p.v_heads, p) * V
    k_column, v_column = work.k_tile * BK, work.v_tile * BV
    rank = (C - 1) * reverse + direction * tl.arange(0, C)
    _, scale_k = _scales(p.scale, after_read)
    chunks = (work.item.tokens + C - 1) // C
    # + 1, because the last chunk may hold one token
    live = tl.ceil(1.0 / tl.minimum(g2, -1e-6) * VANISHED / C) + 1
    live = tl.minimum(live, chunks * 1.0).to(tl.int32)
    S = tl.full([BV, BK], 0.0, tl.float32)
    for c in range(chunks - live, chunks):
        m = tl.minimum(work.item.tokens - c * C, C)
        t = (work.item.tokens - C) * reverse + direction * C * c
        ks = _load_tile(k, t, work.item.valid, p.k_heads * K, k_column, C, K, BK)
        vs = _load_tile(v, t, work.item.valid, p.v_heads * V, v_column, C, V, BV)
        k_decay = _key_decays(g2, scale_k, m, rank, after_read)
        vw = tl.trans((vs * k_decay[:, None]).to(vs.dtype))  # [BV, C]
        S = tl.dot(vw, ks, S * tl.exp2(g2 * m), input_precision=PRECISION)  # [BV, C] x [C, BK]
    ck = k_column + tl.arange(0, BK)[None, :]
    cv = v_column + tl.arange(0, BV)[:, None]
    states += ((work.b * p.items + work.index) * p.H + work.h) * K * V
    tl.store(states + cv * K + ck, S, mask=(ck < K) & (cv < V))


@_kernel
def _state_passing_kernel(
    states, g, work_items, s_in, params,
    SPLITS: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, IS_VARLEN: tl.constexpr,
):  # fmt: skip
    """Writes the state that the next segment starts from in place of each segment's last split.

    Along a sequence, S' = e^{g L M} S + sum_j e^{g L (M-1-j)} z_j over the M = SPLITS of a segment,
    which have L tokens each and the states z_j. A program handles BE of the E numbers of a state. A
    plain batch row is one walk. In a packed batch any segment may begin a walk."""
    NE: tl.constexpr = (E + BE - 1) // BE
    p = _Params(*params)
    i = tl.program_id(0)
    tile, i = i % NE, i // NE
    h, i = i % p.H, i // p.H
    segments = p.splits // SPLITS
    walks = segments if IS_VARLEN else 1
    item, b = i % walks * SPLITS, (i // walks).to(tl.int64)
    if IS_VARLEN:  # only the program of a sequence's first segment walks
        at = work_items + b * p.items_stride + item * 7
        tokens, before, after = tl.load(at + 1), tl.load(at + 4), tl.load(at + 5)
        segments = tl.where((tokens < 0) | (before > 0), 0, (after + 1) // SPLITS)
    g2_length = (tl.load(g + b * p.g_stride + h) * LOG2_E).to(tl.float32) * p.length
    in_place = states.to(tl.int64, bitcast=True) == s_in.to(tl.int64, bitcast=True)
    if (g2_length <= VANISHED) & in_place:
        return  # nothing survives a split: the last split of a segment holds the result already
    j, e = tl.arange(0, SPLITS)[:, None], tile * BE + tl.arange(0, BE)
    offset = ((b * p.splits + item) * p.H + h) * E
    stride = tl.full([], p.H * E, tl.int64)
    S = tl.full([BE], 0.0, tl.float32)
    # num_stages loads later segments ahead. That is safe: no state is loaded after it is stored.
    for _ in tl.range(0, segments, num_stages=3):
        written = g2_length * (SPLITS - 1 - j) > VANISHED  # as `_chunk_state_kernel` decides
        pointers = states + offset + j * stride + e[None, :]
        z = tl.load(pointers, mask=(e[None, :] < E) & written, other=0.0)  # [SPLITS, BE]
        offset += (SPLITS - 1) * stride
        S = S * tl.exp2(g2_length * SPLITS) + tl.sum(z * tl.exp2(g2_length * (SPLITS - 1 - j)), 0)
        tl.store(s_in + offset + e, S, mask=e < E)
        offset += stride


@_kernel
def _chunk_scan_kernel(
    s0, q, k, v, g, s_in, work_items, s, o, params,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    IS_VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, HAS_S0: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scan of one segment, for one head and BV of the V columns of values, chunk by chunk:

        o_i = scale (e^{g(i+1)} q_i S + sum_{j<=i} e^{g(i-j)} (q_i.k_j) v_j)
        S' = e^{g m} S + sum_j e^{g(m-1-j)} k_j v_j^T

    i and j are ranks, and m is the number of tokens in the chunk. If the state decays after it is
    read: e^{g i} q_i S and e^{g(m-j)} k_j v_j^T, and the scale is of what enters S.

    `_work_items` keeps items inside of the tokens, whatever cu_seqlens holds. Loads outside of an
    item return 0, and stores are masked."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    reverse, after_read, swapped, final_state = _unpack_flags(p.flags)
    direction = 1 - 2 * reverse
    work = _find_work(work_items, p, 1, NV, reverse, IS_VARLEN, SEGMENTED, ITEMS_FIRST=False)
    if work.item.tokens < 0:
        return
    g2 = _log2_decay(g, work, p)
    q += _first_token(work, p.q_stride, p.q_heads, p) * K
    k += _first_token(work, p.k_stride, p.k_heads, p) * K
    v += _first_token(work, p.v_stride, p.v_heads, p) * V
    o += ((work.b * p.T + work.item.first) * p.H + work.h) * V
    s0 += _state_offset(work, p.s0_stride, p) * K * V
    s += _state_offset(work, p.sequences, p) * K * V
    split_before = work.b * p.splits + work.item.slot * p.splits_per_segment - 1
    s_in += (split_before * p.H + work.h) * K * V

    rank = (C - 1) * reverse + direction * tl.arange(0, C)
    scale_q, scale_k = _scales(p.scale, after_read)
    distance = rank[None, :] - rank[:, None]  # [j, i]
    D, q_decay = _query_decays(g2, scale_q, p.scale, distance, rank, after_read)
    v_column = work.v_tile * BV
    row, col = tl.arange(0, C)[:, None], v_column + tl.arange(0, BV)[None, :]
    for k_block in range(NK):
        k_column = k_block * BK
        ck = k_column + tl.arange(0, BK)[None, :]
        cv = v_column + tl.arange(0, BV)[:, None]
        S = tl.full([BV, BK], 0.0, tl.float32)
        S = _load_state(S, s_in, s0, ck, cv, work, swapped, g2 * p.length, K, V, SEGMENTED, HAS_S0)
        for c in range((work.item.tokens + C - 1) // C):
            m = tl.minimum(work.item.tokens - c * C, C)
            t = (work.item.tokens - C) * reverse + direction * C * c
            qs = _load_tile(q, t, work.item.valid, p.q_heads * K, k_column, C, K, BK)
            ks = _load_tile(k, t, work.item.valid, p.k_heads * K, k_column, C, K, BK)
            vs = _load_tile(v, t, work.item.valid, p.v_heads * V, v_column, C, V, BV)
            qt = tl.trans(qs)
            P = tl.dot(ks, qt, input_precision=PRECISION) * D  # [C, BK] x [BK, C]
            # [BV, BK] x [BK, C] + [BV, C] x [C, C]
            O = tl.dot(S.to(qs.dtype), qt, input_precision=PRECISION) * q_decay[None, :]
            O = tl.dot(tl.trans(vs), P.to(vs.dtype), O, input_precision=PRECISION)
            O = tl.trans(O)
            at = o + t.to(tl.int64) * (p.H * V) + row * (p.H * V) + col
            mask = (t + row >= 0) & (t + row < work.item.tokens) & (col < V)
            if NK > 1:
                O += tl.load(at, mask=mask & (k_block > 0), other=0.0).to(tl.float32)
            tl.store(at, O.to(vs.dtype), mask=mask)
            k_decay = _key_decays(g2, scale_k, m, rank, after_read)
            vw = tl.trans((vs * k_decay[:, None]).to(vs.dtype))
            S = tl.dot(vw, ks, S * tl.exp2(g2 * m), input_precision=PRECISION)  # [BV, C] x [C, BK]
        _store_final_state(S, s, s0, ck, cv, work, final_state, K, V, HAS_S0)
        if NK > 1:
            tl.debug_barrier()  # threads reread outputs of other threads of the program


# The chunk scan for 16-bit operands on Hopper, in Gluon. Triton waits for each product and for each
# copy through shared memory before it starts the next. This kernel overlaps them. The schedule of
# one chunk:
#
#  1. loads     The tensor memory accelerator (TMA) fills a ring of STAGES >= 2 buffers, and runs up
#               to STAGES - 1 chunks ahead. An mbarrier per buffer says when the buffer is full. The
#               buffer of a chunk is filled again during the next chunk, after a `gl.barrier` that a
#               warp reaches only when it has waited for the products of the chunk. Triton puts a
#               barrier before each load: the loads start beside products or, if FUSED, before
#               them, because two buffers leave no time.
#  2. products  The scores P = k q^T and what queries read of the state, O = S^T q^T, start
#               together. P is decayed and stored while O is summed. Then O += v^T P and
#               S' = e^{g m} S + v^T k start together.
#  3. outputs   O is transposed in shared memory, so that stores are coalesced, and is stored while
#               S' is summed.
#
# Each warp owns 16 rows of S^T, o^T and o2^T. If FUSED, the kernel also scans with the transposed
# state, which is the same registers: q2 reads S^T, and k and v change places. One square tile must
# then hold all of K and V. Registers do not suffice to read S^T: a copy in shared memory is read.
#
# What limits the kernel, for C = 64, a tile of 128 x 128 and 256 threads: registers of a thread, 64
# of S, 32 of O, 16 each of P and D, and copies in 16 bits; and Hopper's 227 KiB of shared memory, 8
# bytes for each mbarrier and 2 bytes for each of STAGES C (2 BK + BV) + C C + C BV numbers or, if
# FUSED, STAGES C (2 BK + 2 BV) + BK BV + 2 C C + C (BK + BV). The emulator in the test file models
# neither these limits nor races between warps: compile every change, and run it under
# compute-sanitizer.


class _PerOperand(NamedTuple):
    """A value per operand. Without q2, its tiles are those of v, and nothing reads its value."""

    q: Any
    k: Any
    v: Any
    q2: Any


@_gluon
def _start_loads(
    arrays, buffers, full, c, first, last, t, rows, heads, k_column, v_column,
    STAGES: gl.constexpr, FUSED: gl.constexpr,
):  # fmt: skip
    """Starts the loads of chunk c, at t of the segment, if first <= c < last. The mbarrier counts
    their bytes."""
    if (c >= first) & (c < last):
        stage = c % STAGES
        bar = full.index(stage)
        bytes_qk: gl.constexpr = arrays.q.nbytes_per_cta + arrays.k.nbytes_per_cta
        bytes_v_q2: gl.constexpr = arrays.v.nbytes_per_cta * (2 if FUSED else 1)
        hopper.mbarrier.expect(bar, bytes_qk + bytes_v_q2)
        q_at, k_at = [rows.q + t, heads.q, k_column], [rows.k + t, heads.k, k_column]
        v_at, q2_at = [rows.v + t, heads.v, v_column], [rows.q2 + t, heads.q2, v_column]
        hopper.tma.async_load(arrays.q, q_at, bar, buffers.q.index(stage))
        hopper.tma.async_load(arrays.k, k_at, bar, buffers.k.index(stage))
        hopper.tma.async_load(arrays.v, v_at, bar, buffers.v.index(stage))
        if FUSED:
            hopper.tma.async_load(arrays.q2, q2_at, bar, buffers.q2.index(stage))


@_gluon
def _start_products(
    x, scores, S, D, q_decay, k_decay, s_decay,
    LO: gl.constexpr, LP: gl.constexpr, K_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Starts the products of a chunk. o^T and S'^T are still being summed when it returns, in this
    order. Also returns their operands in registers, to keep them alive until the wait."""
    C: gl.constexpr = x.k.shape[0]
    BV: gl.constexpr = x.v.shape[1]
    dtype: gl.constexpr = x.k.dtype
    AO: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    AS: gl.constexpr = gl.DotOperandLayout(0, S.type.layout, 2)
    qt = x.q.permute((1, 0))
    Sb = gl.convert_layout(S.to(dtype), AO)
    zero_p = gl.full([C, C], 0.0, gl.float32, LP)
    zero_o = gl.full([BV, C], 0.0, gl.float32, LO)
    P = hopper.warpgroup_mma(x.k, qt, zero_p, use_acc=False, is_async=True)  # [C, BK] x [BK, C]
    O = hopper.warpgroup_mma(Sb, qt, zero_o, use_acc=False, is_async=True)  # [BV, BK] x [BK, C]
    P = hopper.warpgroup_mma_wait(1, [P])  # O is still being summed
    scores.store((P * D).to(dtype))
    if K_BLOCKS:  # earlier outputs take registers: this wait frees those of Sb for v
        O, Sb = hopper.warpgroup_mma_wait(0, [O, Sb])
    vt = x.v.permute((1, 0)).load(AS)
    vw = (vt.to(gl.float32) * k_decay[None, :]).to(dtype)
    vt = gl.convert_layout(vt, AO)
    O, Sb = hopper.warpgroup_mma_wait(0, [O, Sb])  # before O is scaled
    gl.barrier()  # all warps have stored their scores (the compiler fences them)
    O = hopper.warpgroup_mma(vt, scores, O * q_decay[None, :], is_async=True)  # [BV, C] x [C, C]
    S = hopper.warpgroup_mma(vw, x.k, S * s_decay, is_async=True)  # [BV, C] x [C, BK]
    return O, vt, S, vw


@_gluon
def _start_fused_products(
    x, scores, q2_scores, Sb, S, D, q_decay, k_decay, s_decay, LO: gl.constexpr, LP: gl.constexpr
):
    """`_start_products` for both scans: o^T, o2^T and S'^T are still being summed when it returns.
    The state is read from shared memory, Sb."""
    C: gl.constexpr = x.k.shape[0]
    BV: gl.constexpr = x.v.shape[1]
    dtype: gl.constexpr = x.k.dtype
    AS: gl.constexpr = gl.DotOperandLayout(0, S.type.layout, 2)
    qt = x.q.permute((1, 0))
    q2t = x.q2.permute((1, 0))
    zero_p = gl.full([C, C], 0.0, gl.float32, LP)
    zero_o = gl.full([BV, C], 0.0, gl.float32, LO)
    P = hopper.warpgroup_mma(x.k, qt, zero_p, use_acc=False, is_async=True)  # [C, BK] x [BK, C]
    O = hopper.warpgroup_mma(Sb, qt, zero_o, use_acc=False, is_async=True)  # [BV, BK] x [BK, C]
    P = hopper.warpgroup_mma_wait(1, [P])  # O is still being summed
    scores.store((P * D).to(dtype))
    P = hopper.warpgroup_mma(x.v, q2t, zero_p, use_acc=False, is_async=True)  # [C, BV] x [BV, C]
    St = Sb.permute((1, 0))
    O2 = hopper.warpgroup_mma(St, q2t, zero_o, use_acc=False, is_async=True)  # [BK, BV] x [BV, C]
    O, P = hopper.warpgroup_mma_wait(1, [O, P])  # O2 is still being summed
    q2_scores.store((P * D).to(dtype))
    vt, kt = x.v.permute((1, 0)), x.k.permute((1, 0))
    vw = (vt.load(AS).to(gl.float32) * k_decay[None, :]).to(dtype)
    gl.barrier()  # all warps have stored their scores (the compiler fences them)
    O = hopper.warpgroup_mma(vt, scores, O * q_decay[None, :], is_async=True)  # [BV, C] x [C, C]
    O2 = hopper.warpgroup_mma_wait(1, [O2])  # before O2 is scaled; O is being summed again
    # [BK, C] x [C, C]
    O2 = hopper.warpgroup_mma(kt, q2_scores, O2 * q_decay[None, :], is_async=True)
    S = hopper.warpgroup_mma(vw, x.k, S * s_decay, is_async=True)  # [BV, C] x [C, BK]
    return O, O2, S, vw


@_layout
def _coalesced(BD, WARPS):
    """How WARPS warps hold [C, BD] such that whole rows are loaded and stored."""
    return gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [WARPS, 1], [1, 0])


@_gluon
def _tile_pointers(
    x, t, valid, stride, column,
    DIM: gl.constexpr, C: gl.constexpr, BD: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Pointers to rows t .. t+C and columns column .. column+BD of x, whose rows are `stride`
    apart, as [C, BD], and a mask of those inside [valid, DIM]."""
    layout: gl.constexpr = _coalesced(BD, WARPS)
    row = t + gl.arange(0, C, gl.SliceLayout(1, layout))[:, None]
    col = column + gl.arange(0, BD, gl.SliceLayout(0, layout))[None, :]
    return x + row.to(gl.int64) * stride + col, (row >= 0) & (row < valid) & (col < DIM)


@_gluon
def _zero_outside(x, t, valid, WARPS: gl.constexpr):
    """Sets rows of a chunk in shared memory, which starts at t, to 0 outside of 0 .. valid."""
    C: gl.constexpr = x.shape[0]
    layout: gl.constexpr = _coalesced(x.shape[1], WARPS)
    row = t + gl.arange(0, C, gl.SliceLayout(1, layout))[:, None]
    chunk = x.load(layout)
    x.store(gl.where((row >= 0) & (row < valid), chunk, 0.0))


@_gluon
def _store_output(
    o, buffer, O, earlier, t, tokens, stride, column, DIM: gl.constexpr, WARPS: gl.constexpr
):
    """Stores O^T, plus the outputs of `earlier` K blocks, through a buffer [C, BD] in shared
    memory."""
    C: gl.constexpr = buffer.shape[0]
    BD: gl.constexpr = buffer.shape[1]
    at, inside = _tile_pointers(o, t, tokens, stride, column, DIM, C, BD, WARPS)
    buffer.permute((1, 0)).store(O.to(buffer.dtype))
    out = buffer.load(_coalesced(BD, WARPS))
    if earlier is not None:
        out = (out.to(gl.float32) + earlier.to(gl.float32)).to(out.dtype)
    gl.store(at, out, mask=inside)


@_gluon
def _hopper_kernel(
    s0, qd, kd, vd, q2d, g, s_in, work_items, s, o, o2, params,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, IS_VARLEN: gl.constexpr, SEGMENTED: gl.constexpr, HAS_S0: gl.constexpr,
    FUSED: gl.constexpr,
):  # fmt: skip
    """The chunk scan by the schedule above. qd, kd, vd and q2d are descriptors of the operands as
    [B T, heads, head dim]."""
    # 4 warps of 16 rows hold the scores of 64 keys; chunks of 128 tokens overflow shared memory
    gl.static_assert(C == 64 and (BV == 64 or BV == 128) and (BK == 64 or BK == 128))
    gl.static_assert(BK == BV or not FUSED)
    WARPS: gl.constexpr = BV // 16  # `_config` launches as many
    # S^T [BV, BK]: 16 rows for each warp
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BK, 16])
    # o^T [BV, C] and o2^T [BK, C]
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    # scores [C, C]: a grid of 4 warps along the keys and WARPS / 4 along the queries
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 4 * C // WARPS, 16])
    NK: gl.constexpr = (K + BK - 1) // BK
    NV: gl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    reverse, after_read, swapped, final_state = _unpack_flags(p.flags)
    direction = 1 - 2 * reverse
    work = _find_work(work_items, p, 1, NV, reverse, IS_VARLEN, SEGMENTED, ITEMS_FIRST=False)
    if work.item.tokens < 0:
        return
    g2 = _log2_decay(g, work, p)
    arrays = _PerOperand(qd, kd, vd, q2d)
    h, b, first = work.h, work.b, work.item.first
    rows = _PerOperand(
        (b * p.q_stride).to(gl.int32) + first, (b * p.k_stride).to(gl.int32) + first,
        (b * p.v_stride).to(gl.int32) + first, (b * p.q2_stride).to(gl.int32) + first,
    )  # fmt: skip
    heads = _PerOperand(
        h // (p.H // p.q_heads), h // (p.H // p.k_heads),
        h // (p.H // p.v_heads), h // (p.H // p.q2_heads),
    )  # fmt: skip
    o += ((b * p.T + first) * p.H + h) * V
    if FUSED:
        o2 += ((b * p.T + first) * p.H + h) * K
    s0 += _state_offset(work, p.s0_stride, p) * K * V
    s += _state_offset(work, p.sequences, p) * K * V
    split_before = b * p.splits + work.item.slot * p.splits_per_segment - 1
    s_in += (split_before * p.H + h) * K * V

    dtype: gl.constexpr = qd.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    v_column = work.v_tile * BV
    for k_block in range(NK):
        k_column = k_block * BK
        ck = k_column + gl.arange(0, BK, gl.SliceLayout(0, LS))[None, :]
        cv = v_column + gl.arange(0, BV, gl.SliceLayout(1, LS))[:, None]
        S = gl.full([BV, BK], 0.0, gl.float32, LS)
        S = _load_state(S, s_in, s0, ck, cv, work, swapped, g2 * p.length, K, V, SEGMENTED, HAS_S0)

        # allocated in the loop, because loads and stores of S may use the same memory
        qb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], qd.layout)
        kb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], kd.layout)
        vb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], vd.layout)
        scores = gl.allocate_shared_memory(dtype, [C, C], flat)
        out = gl.allocate_shared_memory(dtype, [C, BV], flat)
        q2b = vb  # stands for it without FUSED
        if FUSED:
            q2b = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], q2d.layout)
            Sb = gl.allocate_shared_memory(dtype, [BV, BK], flat)
            q2_scores = gl.allocate_shared_memory(dtype, [C, C], flat)
            o2_out = gl.allocate_shared_memory(dtype, [C, BK], flat)
        buffers = _PerOperand(qb, kb, vb, q2b)
        full = hopper.mbarrier.allocate_mbarrier(batch=STAGES)
        for i in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(i), count=1)
        hopper.fence_async_shared()  # TMA sees the barriers
        gl.barrier()
        loaded = (work.item.valid + C - 1) // C  # chunks: tokens of no sequence are not loaded
        t = (work.item.tokens - C) * reverse  # where the first chunk starts in the segment
        step = direction * C
        for i in range(gl.minimum(loaded, STAGES)):
            _start_loads(
                arrays, buffers, full, i, 0, loaded, t + i * step,
                rows, heads, k_column, v_column, STAGES, FUSED,
            )  # fmt: skip

        scale_q, scale_k = _scales(p.scale, after_read)
        i = gl.arange(0, C, gl.SliceLayout(0, LP))[None, :]
        j = gl.arange(0, C, gl.SliceLayout(1, LP))[:, None]
        distance = direction * (i - j)
        first_rank = (C - 1) * reverse
        rank_q = first_rank + direction * gl.arange(0, C, gl.SliceLayout(0, LO))
        keys: gl.constexpr = gl.SliceLayout(0, gl.DotOperandLayout(0, LS, 2))
        rank_k = first_rank + direction * gl.arange(0, C, keys)
        D, q_decay = _query_decays(g2, scale_q, p.scale, distance, rank_q, after_read)
        k_decay = _key_decays(g2, scale_k, C, rank_k, after_read)
        s_decay = gl.exp2(g2 * C)
        c = 0
        while c < (work.item.tokens + C - 1) // C:  # Triton's pipeliner would make `for` wait
            stage, ahead = c % STAGES, t + (STAGES - 1) * step
            x = _PerOperand(
                qb.index(stage).reshape([C, BK]), kb.index(stage).reshape([C, BK]),
                vb.index(stage).reshape([C, BV]), q2b.index(stage).reshape([C, BV]),
            )  # fmt: skip
            # 1. loads
            if c < loaded:
                hopper.mbarrier.wait(full.index(stage), c // STAGES % 2)
            # The load of a short last chunk brings tokens that are not of the sequence. Without
            # tokens of a sequence nothing is loaded, and the buffers hold anything.
            if (c + 1) * C > work.item.valid:
                _zero_outside(x.q, t, work.item.valid, WARPS)
                _zero_outside(x.k, t, work.item.valid, WARPS)
                _zero_outside(x.v, t, work.item.valid, WARPS)
                if FUSED:
                    _zero_outside(x.q2, t, work.item.valid, WARPS)
                m = gl.minimum(work.item.tokens - c * C, C)
                k_decay = _key_decays(g2, scale_k, m, rank_k, after_read)
                s_decay = gl.exp2(g2 * m)
                if not FUSED:
                    hopper.fence_async_shared()  # the products see the zeros
                    gl.barrier()
            if FUSED:
                # No warp reads Sb now: each waited for O2, and then passed the barrier that the
                # compiler puts between the store and the load of `_store_output`.
                Sb.store(S.to(dtype))
                hopper.fence_async_shared()  # the products see Sb and the zeros
                gl.barrier()  # every warp is past the chunk before, so its buffer is free
                _start_loads(
                    arrays, buffers, full, c - 1 + STAGES, STAGES, loaded, ahead,
                    rows, heads, k_column, v_column, STAGES, FUSED,
                )  # fmt: skip
            # 2. products and 3. outputs
            if FUSED:
                O, O2, S, vw = _start_fused_products(
                    x, scores, q2_scores, Sb, S, D, q_decay, k_decay, s_decay, LO, LP
                )
                O = hopper.warpgroup_mma_wait(2, [O])
                _store_output(o, out, O, None, t, work.item.tokens, p.H * V, v_column, V, WARPS)
                O2 = hopper.warpgroup_mma_wait(1, [O2])
                _store_output(o2, o2_out, O2, None, t, work.item.tokens, p.H * K, 0, K, WARPS)
            else:
                O, vt, S, vw = _start_products(
                    x, scores, S, D, q_decay, k_decay, s_decay, LO, LP, NK > 1
                )
                earlier = None
                if NK > 1:  # loaded while O is summed
                    at, inside = _tile_pointers(
                        o, t, work.item.tokens, p.H * V, v_column, V, C, BV, WARPS
                    )
                    earlier = gl.load(at, mask=inside & (k_block > 0), other=0.0)
                _start_loads(
                    arrays, buffers, full, c - 1 + STAGES, STAGES, loaded, ahead,
                    rows, heads, k_column, v_column, STAGES, FUSED,
                )  # fmt: skip
                O, vt = hopper.warpgroup_mma_wait(1, [O, vt])
                _store_output(o, out, O, earlier, t, work.item.tokens, p.H * V, v_column, V, WARPS)
            S, vw = hopper.warpgroup_mma_wait(0, [S, vw])
            t += step
            c += 1
        _store_final_state(S, s, s0, ck, cv, work, final_state, K, V, HAS_S0)
        if NK > 1:
            gl.barrier()  # every warp is past the K block, whose outputs are read again
            for i in gl.static_range(STAGES):
                hopper.mbarrier.invalidate(full.index(i))


@_kernel
def _step_kernel(
    s0, q, k, v, g, s_in, work_items, s, o, params,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    IS_VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, HAS_S0: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The scan of one token per plain batch row (decoding): no matrix products, and the state is
    read and written once. The arguments are those of `_chunk_scan_kernel`."""
    NV: tl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    _, after_read, _, final_state = _unpack_flags(p.flags)
    work = _find_work(work_items, p, 1, NV, 0, IS_VARLEN, SEGMENTED, ITEMS_FIRST=False)
    decay = tl.exp(tl.load(g + work.b * p.g_stride + work.h))
    ck, cv = tl.arange(0, BK), work.v_tile * BV + tl.arange(0, BV)
    q += _first_token(work, p.q_stride, p.q_heads, p) * K
    k += _first_token(work, p.k_stride, p.k_heads, p) * K
    v += _first_token(work, p.v_stride, p.v_heads, p) * V
    qs = tl.load(q + ck, mask=ck < K, other=0.0).to(tl.float32)
    ks = tl.load(k + ck, mask=ck < K, other=0.0).to(tl.float32)
    vs = tl.load(v + cv, mask=cv < V, other=0.0).to(tl.float32)
    at = ck[:, None] * V + cv[None, :]
    inside = (ck < K)[:, None] & (cv < V)[None, :]
    scale_q, scale_k = _scales(p.scale, after_read)
    S = ks[:, None] * (vs * scale_k)[None, :]  # [BK, BV]
    if HAS_S0:
        s0 += _state_offset(work, p.s0_stride, p) * K * V
        S += tl.load(s0 + at, mask=inside, other=0.0) * (1.0 if after_read > 0 else decay)
    out = tl.sum(qs[:, None] * S, 0) * scale_q
    tl.store(o + (work.b * p.H + work.h) * V + cv, out.to(o.dtype.element_ty), mask=cv < V)
    if final_state > 0:
        s += _state_offset(work, p.sequences, p) * K * V
        tl.store(s + at, S * (decay if after_read > 0 else 1.0), mask=inside)


# Their plan, by shapes ----------------------------------------------------------------------------

STATES_CHUNK = 64  # tokens per chunk of `_chunk_state_kernel`
SEGMENT = 512  # tokens that a segment has at least: its state must cost less than they do
# KiB of shared memory per program
_SHARED_MEMORY = dict(
    sm_80=163, sm_87=163, sm_86=99, sm_89=99, sm_90=227, sm_100=227, sm_120=99, gfx942=64
)


@dataclasses.dataclass(frozen=True)
class _Config:
    """How the scan is launched, and the state kernel that goes before it."""

    kernel: Any  # `_hopper_kernel`, `_chunk_scan_kernel` or `_step_kernel`
    C: int  # tokens per chunk
    BK: int  # columns of queries and keys per program
    BV: int  # columns of values per program
    num_warps: int
    num_stages: int  # chunks in flight, the one in use included
    programs_per_sm: int
    states_BK: int  # key columns per program of `_chunk_state_kernel`, beside 64 value columns
    states_stages: int  # chunks in flight there

    def __post_init__(self):
        tile = self.C, self.BK, self.BV
        assert all(size & (size - 1) == 0 for size in tile) and self.BK * self.BV <= 128**2, tile


def _config(arch, num_sms, K, V, dtype, B, H, T, n, fused):
    """The launch configuration for B rows of T tokens in n sequences each, and H heads of head dims
    K and V. S^T is at most [128, 128], to fit in registers. `fused`: for both scans of one state.
    If the tile is not square or does not hold K and V, `_scan_triton` makes two scans instead."""
    shared = _SHARED_MEMORY.get(arch, 64 if arch.startswith("gfx") else 99)
    itemsize, length = dtype.itemsize, -(-T // n)
    BK, BV = min(_next_power_of_2(K), 128), min(_next_power_of_2(V), 128)
    states_BK = 256 // itemsize  # whole rows of 256 bytes
    # a chunk in flight has tiles of keys and 64 values; 32 columns more pass through shared memory
    states_stages = min(4, shared * 1024 // (STATES_CHUNK * (states_BK + 64 + 32) * itemsize))
    config = functools.partial(_Config, states_BK=states_BK, states_stages=states_stages)

    def narrow(BV, least, longest):
        """Fewer values per program, if T is at most `longest` and all resulting programs are
        resident at once. That costs less than cutting the sequence into segments."""
        while T <= longest and BV > least and 2 * B * n * H * -(-V // BV) <= num_sms:
            BV //= 2
        return BV

    # descriptors want rows of multiples of 16 bytes; short sequences waste most of a chunk
    fits = K % 8 == V % 8 == 0 and T >= 64 and length >= 32 and B * T < 2**31
    if arch == "sm_90" and itemsize == 2 and fits:
        BK = max(BK, 64)
        # Half the values: the bounds are those of MiniMax-01's decays, with which segments read the
        # keys and values of most heads twice. The more programs there are, the longer they win.
        longest = SEGMENT * (4 if K > 128 else max(8, 2 * B * n * H // 3))
        BV = narrow(max(BV, 64), 64, 2 * SEGMENT - 1 if fused else longest)
        stages = 2 if fused else 4
        programs = 2 if BK == BV == 64 else 1  # by shared memory
        warps = BV // 16  # 16 rows for each warp
        return config(_hopper_kernel, 64, BK, BV, warps, stages, programs)

    def fit(C, BV, stages):
        """Whether tiles in flight, and what passes through shared memory, fit there. Triton itself
        takes less than 4 KiB."""
        return (stages * C * (2 * BK + BV) + C * max(C, 2 * BV)) * itemsize <= (shared - 4) * 1024

    BV = narrow(BV, 32, 2 * SEGMENT - 1)
    C = 16 if length <= 16 else 32 if length <= 32 or itemsize == 4 else 64
    tiles = itertools.product((BV, 64, 32, 16), (64, 32, 16), (2, 1))
    BV, C, stages = next(
        (b, c, stages) for b, c, stages in tiles if b <= BV and c <= C and fit(c, b, stages)
    )
    # for short sequences, two programs of 4 warps at once beat one of 8
    warps = 8 if BK * BV > 64 * 64 and C > 16 else 4
    return config(_chunk_scan_kernel, C, BK, BV, warps, 1 if length <= C else stages, 1)


def _next_power_of_2(d):
    return max(16, 1 << (d - 1).bit_length())  # matrix products have no smaller tiles


@dataclasses.dataclass(frozen=True)
class _Segments:
    """How batch rows are cut into segments, and segments into splits. Without splits, no segment
    has a successor."""

    length: int  # tokens per segment
    split: int  # tokens per split
    splits_per_segment: int
    splits: int  # per batch row, of segments with a successor; of all segments if `only_state`
    BK: int  # the tile of `_chunk_state_kernel`
    BV: int


def _plan_segments(config, num_sms, itemsize, B, H, T, K, V, op, whole):
    """The `_Segments` of B rows of T tokens, for head dims K and V. `whole`: rows are not cut."""
    states_K, states_V = (V, K) if op.swapped else (K, V)  # as `_chunk_state_kernel` sees them
    programs = B * H * -(-V // config.BV)
    # splits whose states take a seventh of the memory of q, k, v and o; the last segment has none
    most = itemsize * T * (K + V) // (14 * K * V)
    # as many segments as fill the GPU
    segments = max(1, min(num_sms * config.programs_per_sm // programs, T // SEGMENT, 1 + most))
    segments = 1 if whole else segments
    BK, BV = min(_next_power_of_2(states_K), config.states_BK), min(_next_power_of_2(states_V), 64)
    tiles = -(-states_K // BK) * -(-states_V // BV)
    # Many splits, so that many programs sum the states of a head that never forgets in parallel: of
    # other heads most splits vanish. A power of two, because `tl.arange` counts a segment's splits.
    splits = min(8, 3 * num_sms // (B * segments * tiles), 2 * T // (segments * SEGMENT))
    splits = min(splits, most // max(1, segments - 1))
    splits = 1 << (max(1, splits).bit_length() - 1)
    split = -(-T // (segments * splits * config.C)) * config.C
    if op.only_state:  # the last segment's state is wanted as well
        return _Segments(split, split, 1, _count_items(T, 1, split), BK, BV)
    return _Segments(split * splits, split, splits, _count_items(T, 1, split, splits), BK, BV)


def _precision(asked, arch):
    """Triton's name for `jax.default_matmul_precision`, which names algorithms too. On NVIDIA GPUs
    names that are not listed here ask for more than one pass of TF32."""
    if arch.startswith("gfx"):
        return "ieee"
    fast = "default", "bfloat16", "tensorfloat32", "F16_F16_F16", "F16_F16_F32"
    fast += "BF16_BF16_BF16", "BF16_BF16_F32", "TF32_TF32_F32"
    return "tf32" if asked is None or asked in fast or asked.startswith("ANY_F8") else "tf32x3"


# Their launch -------------------------------------------------------------------------------------


@functools.cache
def _gpu():
    """Architecture and number of SMs of the first GPU; None without a GPU."""
    try:
        gpu = jax.devices("gpu")[0]
        arch = gpu.compute_capability
        arch = arch.split(":")[0] if arch.startswith("gfx") else "sm_" + arch.replace(".", "")
        return arch, gpu.core_count
    except RuntimeError:
        return None


def _launch(kernel, *arrays, out, programs, params, in_place=False, **arguments):
    """Launches a kernel and returns its outputs, which are like `out`. `in_place`: XLA may give the
    first output the memory of the first input."""
    arguments |= dict(kernel=kernel, out_type=out, grid=(programs,), params=tuple(params))
    # Triton 3.9 warns if this is left out, because 3.10 is to change its default
    arguments["backend_options"] = {"enable_fp_fusion": True}
    call = functools.partial(jax_triton.triton_call, **arguments)
    return _in_place(call, arrays) if in_place else call(*arrays)


def _in_place(call, arrays):
    """call(*arrays), whose first output XLA may give the memory of the first input."""
    # jax-triton would pass such an array once. That is wrong if XLA gives the output other memory
    # after all: the output of a call in a loop that stacks outputs is a row of the stack. So the
    # call is traced with separate outputs, and only its lowering learns of the sharing.
    jaxpr, out = jax.make_jaxpr(call, return_shape=True)(*arrays)
    (eqn,) = jaxpr.eqns
    operands = dict(zip(jaxpr.jaxpr.invars, jax.tree.leaves(arrays), strict=True))
    aliases = type(eqn.params["input_output_aliases"])({0: 0})
    results = eqn.primitive.bind(
        *map(operands.get, eqn.invars), **eqn.params | {"input_output_aliases": aliases}
    )
    return jax.tree.unflatten(jax.tree.structure(out), results)


def _params(op, x, B, segments, length, items, per_segment=0, **more):
    """The `_Params` of a launch, and its work items of `length` tokens each. A plain batch has
    `items` per row, which kernels compute."""
    flags = op.reverse + 2 * op.after_read + 4 * op.swapped + 8 * op.final_state
    T, work_items = x.v.shape[1], x.untouched  # plain batches read no items
    if x.cu_seqlens is not None:
        work_items = _batched_work_items(T, x.cu_seqlens, length, op.reverse, per_segment)
        rows, items, columns = work_items.shape
        more["items_stride"] = items * columns if rows > 1 else 0
    for name, a in x._asdict().items():
        if a is not None and f"{name}_stride" in _Params._fields:
            more[f"{name}_stride"] = a.shape[1] if a.shape[0] == B else 0
        if a is not None and f"{name}_heads" in _Params._fields:
            more[f"{name}_heads"] = a.shape[2]
    more |= dict(splits=segments.splits, splits_per_segment=segments.splits_per_segment)
    more |= dict(scale=float(op.scale), flags=flags, T=T, H=x.g.shape[1])
    return _Params(length=length, items=items, **more), work_items


def _scan_triton(op, x):
    """The scan by kernels; results as `_scan`'s."""
    B, T, H, K, V, n = _sizes(x)
    fused, itemsize = x.q2 is not None, x.q.dtype.itemsize
    arch, num_sms = _gpu() or ("sm_80", 108)  # without a GPU the launch is traced, never lowered
    config = _config(arch, num_sms, K, V, x.q.dtype, B, H, T, n, fused)
    one_tile = max(K, V) <= config.BK == config.BV
    if fused and not (config.kernel is _hopper_kernel and one_tile):
        return _two_scans(_scan_triton, op, x)
    if T == 1 and x.cu_seqlens is None and not op.only_state:
        BK = _next_power_of_2(K)
        tile = dict(C=1, BK=BK, BV=min(_next_power_of_2(V), max(16, 8192 // BK)))
        config = dataclasses.replace(config, kernel=_step_kernel, num_warps=4, num_stages=1, **tile)
    states_of = (x.v, x.k) if op.swapped else (x.k, x.v)
    # A pack of so many sequences is not cut, so that its states stay in place: to copy n H states
    # costs more than to scan T <= n H tokens uncut.
    in_place = x.s0 is not None and op.final_state and x.s0.shape[0] == B
    whole = in_place and T <= n * H
    segments = _plan_segments(config, num_sms, itemsize, B, H, T, K, V, op, whole)
    precision = _precision(op.precision, arch)
    s_in = x.untouched
    if segments.splits:
        states_x = _Operands(None, *states_of, x.g, cu_seqlens=x.cu_seqlens)
        s_in = _launch_states(op, config, segments, states_x, B, precision)
    if op.only_state:
        after = T - segments.split * (1 + jnp.arange(segments.splits))  # tokens after each split
        states = jnp.moveaxis(s_in, 1, 0)[:, :, None]
        return None, _transposed(_decayed_sum(states, x.g, jnp.maximum(after, 0))), None
    in_place &= not segments.splits  # then a program loads its tiles of s0 before it stores s
    return _launch_scan(op, config, segments, x, s_in, precision, in_place)


def _launch_states(op, config, segments, x, B, precision):
    """The states of splits [B, splits, H, V, K], where K and V are the columns of x.k and x.v. The
    last split of each segment has the state that the next segment starts from, without s0, unless
    only states are wanted."""
    H, K, V, varlen = x.g.shape[1], x.k.shape[3], x.v.shape[3], x.cu_seqlens is not None
    # a scan and its transpose give equal parameters, because nothing here depends on q and s
    op, splits = dataclasses.replace(op, final_state=False, swapped=False), segments.splits
    per_segment = segments.splits_per_segment
    params, work_items = _params(op, x, B, segments, segments.split, splits, per_segment)
    shape = jax.ShapeDtypeStruct((B, splits, H, V, K), jnp.float32)
    tiles = -(-K // segments.BK) * -(-V // segments.BV)
    states = _launch(
        _chunk_state_kernel, x.k, x.v, x.g, work_items,
        out=shape, programs=B * splits * H * tiles, params=params,
        K=K, V=V, BK=segments.BK, BV=segments.BV, C=STATES_CHUNK, IS_VARLEN=varlen,
        PRECISION=precision, num_warps=4, num_stages=config.states_stages,
    )  # fmt: skip
    if op.only_state:
        return states
    BE = min(512, _next_power_of_2(K * V))
    walks = splits // per_segment if varlen else 1
    return _launch(
        _state_passing_kernel, states, x.g, work_items,
        out=shape, in_place=True, programs=B * walks * H * -(-K * V // BE), params=params,
        SPLITS=per_segment, E=K * V, BE=BE, IS_VARLEN=varlen, num_warps=4, num_stages=1,
    )  # fmt: skip


def _launch_scan(op, config, segments, x, s_in, precision, in_place):
    """The scan of all segments, from their states s_in; results as `_scan`'s."""
    B, T, H, K, V, n = _sizes(x)
    varlen, has_s0, fused = x.cu_seqlens is not None, x.s0 is not None, x.q2 is not None
    count = _count_items(T, 1, segments.length)
    params, work_items = _params(op, x, B, segments, segments.length, count, sequences=n)
    arrays = x.q, x.k, x.v
    if config.kernel is _hopper_kernel:
        # kernels that make descriptors need scratch memory, which CUDA graphs do not provide
        layout = gl.NVMMASharedLayout(128, 16, 3)

        def described(a, BD):
            rows, _, heads, dim = a.shape
            shape, strides = (rows * T, heads, dim), (heads * dim, dim, 1)
            return jax_triton.TensorDescriptor(a, shape, strides, (config.C, 1, BD), layout)

        qd, kd, vd = map(described, arrays, (config.BK, config.BK, config.BV))
        arrays = qd, kd, vd, described(x.q2, config.BV) if fused else vd
        special = {"STAGES": config.num_stages, "num_stages": 1, "FUSED": fused}
        special |= {} if fused else {"o2": 0}  # the kernel does not touch o2 then
    else:
        special = {"num_stages": config.num_stages, "PRECISION": precision}
    states = jax.ShapeDtypeStruct((B, n, H, K, V), jnp.float32)
    o, o2 = (jax.ShapeDtypeStruct((B, T, H, D), x.q.dtype) for D in (V, K))
    unwritten = () if op.final_state else (x.untouched,)  # in place of s, which is no output then
    s, o, o2 = _launch(
        config.kernel, x.s0 if has_s0 else x.untouched, *arrays, x.g, s_in, work_items, *unwritten,
        out=(states if op.final_state else None, o, o2 if fused else None),
        in_place=in_place, programs=B * H * params.items * -(-V // config.BV), params=params,
        K=K, V=V, BK=config.BK, BV=config.BV, C=config.C, IS_VARLEN=varlen,
        SEGMENTED=segments.splits > 0, HAS_S0=has_s0, num_warps=config.num_warps, **special,
    )  # fmt: skip
    return o, s, o2


# How it composes: vmap, sharding, platforms -------------------------------------------------------
#
# A new operand of the scan goes into
# - the API (`lightning_attn`, `lightning_attn_reference`) and the checks;
# - `_Operands` and `_DIMS`, which serve vmap and sharding; `_Params`, for its heads and stride;
# - the math: `_scan_xla`, the kernels and their launches, `_gradients_by_scans`;
# - what makes operands anew: `_scan_triton` for the states, `_attend_across` and `_exchange`.


@functools.cache
def _scan(op):
    """The entry point of every scan, with its rules of vmap, sharding and platform. `_scan(op)(x)`
    returns o, s and o2, of which each may be None.

    A mapped axis becomes a dim in front of the batch, of size 1 in operands that are not mapped.
    `_dispatch` folds these dims, not this rule, because the compiler cannot split the batch of a
    folded array."""

    @jax.custom_batching.custom_vmap
    def scan(x):
        return _with_sharding_rule(op, x)

    @scan.def_vmap
    def _(size, mapped, x):
        leaves, tree = jax.tree.flatten(x)
        leaves = [a if m else a[None] for a, m in zip(leaves, jax.tree.leaves(mapped), strict=True)]
        results = _scan(op)(jax.tree.unflatten(tree, leaves))
        return results, jax.tree.map(lambda _: True, results)

    return scan


def _with_sharding_rule(op, x):
    """The scan with a sharding rule: each device scans its own batch rows and heads."""
    mesh = _mesh_of(x)
    auto_sizes = (n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes)
    nothing_to_split = mesh.abstract_device is None or math.prod(auto_sizes) == 1
    if not mesh.empty and nothing_to_split or not all(a.size for a in jax.tree.leaves(x)):
        return _dispatch(op, x)
    # jit, because custom_partitioning takes no constants: jit makes closed-over constants its own
    scan = jax.jit(lambda x, indices: _dispatch(op, x))
    operands = x, jnp.arange(x.g.shape[-1])  # indices of heads: a device gets those of its heads
    without_rule, results = jax.make_jaxpr(scan, return_shape=True)(*operands)
    dims = _dims(x, results)
    sides = (*dims.operands, ["h"]), dims.results
    rule = [[named for named in side if named] for side in sides]
    whole = tuple(dim for side in rule for named in side for dim in named if "whole" in dim)
    call = custom_partitioning(scan)
    call.def_partition(
        functools.partial(_partition, op, dims),
        sharding_rule=" -> ".join(", ".join(map(" ".join, side)) for side in rule),
        need_replication_factors=whole,
        decode_shardings=False,  # JAX decodes whole mesh axes: the compiler may split parts of them
    )
    by_rule, warns = jax.make_jaxpr(call)(*operands), op.backend != "xla"
    programs = dict(without_rule=without_rule, by_rule=by_rule)
    found = _partitioned.bind(*jax.tree.leaves(operands), **programs, warns=warns)
    return jax.tree.unflatten(jax.tree.structure(results), found)


_partitioned = jax.extend.core.Primitive("lightning_attn")
_partitioned.multiple_results = True
_partitioned.def_abstract_eval(lambda *_, without_rule, **__: without_rule.out_avals)
_partitioned.def_impl(lambda *x, without_rule, **_: jax.extend.core.jaxpr_as_fun(without_rule)(*x))


def _lower_partitioned(context, *leaves, without_rule, by_rule, warns):
    """Lowers `by_rule`, or `without_rule` if Shardy is off or JAX does not know the devices, as in
    nested shard_maps without `jax.set_mesh`. The compiler splits plain JAX well by itself, but
    gathers the operands of kernels."""
    lower = lambda jaxpr: mlir.lower_fun(jax.extend.core.jaxpr_as_fun(jaxpr))(context, *leaves)
    if jax.config.jax_use_shardy_partitioner:
        try:
            return lower(by_rule)
        except AttributeError as error:
            if "AbstractMesh" not in str(error):  # which custom_partitioning asks for its devices
                raise
        if warns:
            warnings.warn(
                "lightning_attn: on GPUs this call gathers its operands, because JAX does not know "
                "the devices of the mesh. Call with jax.set_mesh(mesh)"
            )
    return lower(without_rule)


mlir.register_lowering(_partitioned, _lower_partitioned)


class _Dims(NamedTuple):
    """Names of the dims of each operand and result. Dims of the same name are split alike: those of
    vmap, "b", "h" for the H heads, and "shared" for heads of operands that are fewer than H and
    more than 1. Each dim that stays whole has its own name."""

    rows: list  # the dims of vmap and "b"
    operands: _Operands
    results: tuple
    H: int
    shared_heads: int  # the size of "shared"; H without such a dim


def _dims(x, results):
    rows = [*(f"vmap{i}" for i in range(x.g.ndim - 2)), "b"]
    sizes = zip(*(a.shape[: len(rows)] for a in jax.tree.leaves(x)))
    sizes = dict(zip(rows, map(_common_size, sizes)), h=x.g.shape[-1])
    whole = map("whole{}".format, itertools.count())

    def name(dim, size):
        is_shared = dim == "h" and size > 1
        return dim if size == sizes.get(dim) else "shared" if is_shared else next(whole)

    def names(dims, a):
        return None if a is None else list(map(name, rows[:-1] + dims.split(), a.shape))

    shared_heads = min((a.shape[-2] for a in x[:3] if a.shape[-2] > 1), default=sizes["h"])
    operands, results = _Operands(*map(names, _DIMS, x)), tuple(map(names, _RESULT_DIMS, results))
    return _Dims(rows, operands, results, sizes["h"], shared_heads)


def _partition(op, dims, _mesh, _operands, results):
    """How one device scans its part: mesh, function, shardings of the results and the operands."""
    # Dims of the same name are split alike. So one array that has all of these dims tells how all
    # arrays are split. Each result has them.
    split_dims = [*dims.rows, "h"]
    named, array = next(pair for pair in zip(dims.results, results) if pair[0])
    parts = _parts(array)[:, [named.index(dim) for dim in split_dims]]
    axes, heads, shared_heads = _device_axes(parts, dims.H, dims.shared_heads)
    names = [f"axis{i}" for i in range(len(axes))]
    mesh = jax.sharding.AbstractMesh(tuple(size for size, _ in axes), tuple(names))

    def axes_of(column):
        # the major axis first, which has the larger step
        steps = [(step[column], name) for (_, step), name in zip(axes, names) if step[column]]
        return tuple(name for _, name in sorted(steps, reverse=True))

    spec = {dim: axes_of(column) for column, dim in enumerate([*split_dims, "shared"])}

    def put(named):
        if named is None:
            return None
        return NamedSharding(mesh, PartitionSpec(*(spec.get(dim) or None for dim in named)))

    # A device has `heads` of the H heads, and `shared_heads` of the shared heads.
    group = dims.H // dims.shared_heads
    size = math.gcd(heads, group)  # neighbors that read the same shared head

    def select(a, named, indices):
        """One head of an operand for each `size` heads of this device, which read that head."""
        # one shared head, or shared heads with all heads of their groups: a scan reads them as is
        if "shared" not in (named or ()) or shared_heads in (1, heads // group):
            return a
        return jnp.take(a, indices[::size] // group % shared_heads, axis=-2, mode="clip")

    def one_device(x, indices):
        # each device sees unsharded arrays
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            x = (select(a, named, indices) for a, named in zip(x, dims.operands))
            return _dispatch(op, _Operands(*x))

    of_operands = _Operands(*map(put, dims.operands)), put(["h"])
    return mesh, one_device, tuple(map(put, dims.results)), of_operands


def _device_axes(parts, H, shared_heads):
    """How devices split H heads and the heads that these share. `parts` [devices, dims] says which
    part of each dim a device is to have; the last dim is the heads. Takes the first try that the
    heads and a mesh allow, the finest first. Returns the axes of this mesh, and how many heads and
    shared heads a device gets. The last number of an axis' step is for the shared heads."""
    count = 1 + int(parts[:, -1].max())  # parts of the heads
    whole_heads = parts * (np.arange(parts.shape[1]) < parts.shape[1] - 1)
    tries = (parts, count, math.gcd(shared_heads, count)), (parts, count, 1), (whole_heads, 1, 1)
    for tried, count, shared_count in *tries, (0 * parts, 1, 1):
        if H % count == 0:
            if axes := _axes(np.c_[tried, tried[:, -1] // (count // shared_count)]):
                break
    return axes, H // count, shared_heads // shared_count


def _parts(x):
    """Which part of each dim of x each device has, [devices, dims]. In a shard_map, these are the
    devices that the shard_map leaves to the compiler."""
    tiling = x.sharding._to_xla_hlo_sharding(len(x.shape))
    if tiling.is_replicated():
        return np.zeros((len(x.sharding.device_set), len(x.shape)), int)
    place = np.argsort(tiling.tile_assignment_devices())
    parts = np.unravel_index(place, tiling.tile_assignment_dimensions())
    return np.stack(parts[: len(x.shape)], -1)


def _axes(parts):
    """The axes of a mesh, the major axis first, as (size, how many parts of each dim a step along
    the axis moves on). None if `parts` [devices, dims] are not made by such axes."""
    axes, stride = [], 1
    while stride < len(parts):
        step, k = parts[stride], np.arange(len(parts) // stride)
        regular = (parts[k * stride] == k[:, None] * step).all(1)
        # the size is the number of equal steps that follow one another; at least 2 ends the loop
        axes.insert(0, (max(2, int(np.argmin([*regular, False]))), step))
        stride *= axes[0][0]
    sizes, steps = zip(*axes)
    index = np.indices(sizes).reshape(len(sizes), -1).T
    return axes if np.array_equal(index @ np.array(steps), parts) else None


@_promotes
def _dispatch(op, x):
    """Triton or plain JAX, chosen when the computation is lowered unless `op.backend` names one."""
    leaves, front = jax.tree.leaves(x), x.q.ndim - 3  # dims of vmap and the batch
    rows = [_common_size(sizes) for sizes in zip(*(a.shape[:front] for a in leaves))]

    def fold(a):
        shape = a.shape[front:]
        one_row = _common_size(a.shape[:front]) == 1
        return (a if one_row else jnp.broadcast_to(a, (*rows, *shape))).reshape(-1, *shape)

    def run(scan, *leaves):
        folded = jax.tree.unflatten(jax.tree.structure(x), leaves)
        results = scan(op, jax.tree.map(fold, folded) if front > 1 else folded)
        results = jax.tree.map(lambda a: a.reshape(*rows, *a.shape[1:]), results)
        return _pcast(results, _varying(leaves))

    with jax.named_scope(f"lightning_attn_{op.name}"):
        if not all(a.size for a in leaves):  # no tokens, or no batch: nothing to launch
            return run(_scan_nothing, *leaves)
        plain, kernels = (functools.partial(run, scan) for scan in (_scan_xla, _scan_triton))
        if op.backend is None:
            return lax.platform_dependent(*leaves, cuda=kernels, rocm=kernels, default=plain)
        return (kernels if op.backend == "triton" else plain)(*leaves)


def _scan_nothing(op, x):
    """The scan of no tokens, or of no batch rows."""
    B, T, H, K, V, n = _sizes(x)
    o = None if op.only_state else jnp.zeros((B, T, H, V), x.v.dtype)
    s = jnp.broadcast_to(jnp.zeros((), x.g.dtype) if x.s0 is None else x.s0, (B, n, H, K, V))
    o2 = None if x.q2 is None else jnp.zeros((B, T, H, K), x.v.dtype)
    return o, s if op.final_state else None, o2


_spec = lambda x: jax.typeof(x).sharding.spec


def _varying(*trees):
    """The shard_map axes that any of the arrays varies over; none if shard_map does not check."""
    axes = (jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(trees))
    return frozenset().union(*axes)


def _pcast(tree, axes):
    """The arrays of `tree`, varying over these shard_map axes as well."""
    # sorted, because a set has another order in each process of a program
    missing = lambda a: tuple(sorted(set(axes) - _varying(a)))
    return jax.tree.map(lambda a: lax.pcast(a, missing(a), to="varying"), tree)


def _mesh_of(tree):
    """The mesh that is set or, because arrays know theirs, that of the arrays."""
    of_arrays = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    meshes = jax.sharding.get_abstract_mesh(), *of_arrays
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def _in_auto_mode(f, operands, out_specs):
    """f(*operands). On a mesh with Explicit axes, f runs in Auto mode, and `out_specs` shard its
    results."""
    mesh = _mesh_of(operands)
    kinds = zip(mesh.axis_names, mesh.axis_types)
    explicit = tuple(axis for axis, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    if not explicit:
        return f(*operands)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, axes=explicit, out_sharding=out_specs)(*operands)


# One sequence on many devices ---------------------------------------------------------------------
#
# Each device starts from the state that the devices before it leave. Of the sequence, only states
# are sent, once each way.


@_promotes
def _across_fwd(op, axes, x):
    s_in, s = _exchange(op, axes, x)
    local = x._replace(g=_pcast(x.g, _varying(x.q)), s0=s_in)
    o, *_ = _attend(dataclasses.replace(op, final_state=False), local)
    return (o, s if op.final_state else None), (x, local)


@_promotes
def _across_bwd(op, axes, saved, cotangents):
    (x, local), (do, ds) = saved, cotangents
    # with check_vma=False shard_map itself sums what devices return, and gives each device its part
    # of a shared cotangent
    checked = set(axes) <= _varying(x.q)
    ds = ds if checked else lax.psum(ds, axes)
    ds_in, ds0 = _exchange(op.adjoint(), axes, x._replace(k=x.q, v=do, s0=ds))
    dx = _gradients(op, local, (), do, ds_in)
    dg = dx.g
    if checked:
        dg = lax.psum(dg, tuple(sorted(_varying(dg) - _varying(x.g))))
    if x.s0 is None:
        ds0 = None
    elif not checked:
        ds0 /= lax.axis_size(axes)  # every device returns all of ds0
    return (dx._replace(g=dg, s0=ds0),)


_attend_across = jax.custom_vjp(lambda *args: _across_fwd(*args)[0], nondiff_argnums=(0, 1))
_attend_across.defvjp(_across_fwd, _across_bwd)


def _exchange(op, axes, x):
    """The state that this device's tokens start from, and the final state of the whole sequence,
    which all devices have."""
    only_state = dataclasses.replace(op, only_state=True, final_state=True, name="state")
    local = _Operands(x.k, x.k, x.v, _pcast(x.g, _varying(x.k)))  # k for q: no query is read
    _, state, _ = _attend(only_state, local)
    states_around = functools.partial(_states_around, op, axes, x.k.shape[1])
    return _in_auto_mode(states_around, (state, x.g, x.s0), (_spec(state), _spec(state)))


def _states_around(op, axes, T, state, g, s0):
    """The results of `_exchange`, from the state [B, 1, H, K, V] that each device's T tokens
    leave."""
    devices = lax.axis_size(axes)
    to = {"to": "invarying"} if set(axes) <= _varying(state) else {}
    every = lax.all_gather(state, axes, **to)  # [devices, B, 1, H, K, V]
    every = jnp.flip(every, 0) if op.reverse else every  # in scan order
    if s0 is not None:
        every = jnp.concatenate([s0[None], every])
    first = 0 if s0 is None else 1
    place = lax.axis_index(axes)
    place = devices - 1 - place if op.reverse else place

    def after(devices_before):  # the state after `devices_before` devices, s0 included
        age = devices_before - 1 + first - jnp.arange(every.shape[0])
        return _decayed_sum(every, g * T, age)

    return after(place), after(devices)


# Checks -------------------------------------------------------------------------------------------
#
# Messages are "argument: expected ..., got ...". A check of values must not wait for a device while
# something is traced, so it looks only at concrete values.

_QUERY_SHAPE = ", where query is [batch, seq_len, num_heads, qk_head_dim]"


def _qkv(query, key, value):
    """q, k and v, checked."""
    q = _array("query", query, ("batch", "seq_len", "num_heads", "qk_head_dim"), jnp.floating)
    B, T, H, K = q.shape
    k = _array("key", key, (B, T, "num_kv_heads", K), jnp.floating)
    v = _array("value", value, (B, T, k.shape[2], "v_head_dim"), jnp.floating)
    heads, V = k.shape[2], v.shape[3]
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(f"query: expected float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in ("key", k), ("value", v):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {q.dtype}, got {x.dtype}")
    if not all(isinstance(d, int) for d in (H, K, heads, V)):
        raise ValueError(
            "query: expected num_heads and head dims that are numbers, "
            f"got {q.shape}, {k.shape} and {v.shape}"
        )
    if H == 0 or heads == 0 or H % heads:
        raise ValueError(f"key: expected num_kv_heads to divide num_heads, got {heads} and {H}")
    for name, d in ("query", K), ("value", V):
        if not 1 <= d <= 512:
            raise ValueError(f"{name}: expected a head dim from 1 to 512, got {d}")
    if isinstance(T, int) and T > 2**30:
        raise ValueError(f"query: expected seq_len of at most 2**30, got {T}")
    return q, k, v


def _log_decays(q, layer_idx, num_layers, g_gamma):
    """The log decay of each head, [H]."""
    H, dtype = q.shape[2], jnp.promote_types(q.dtype, jnp.float32)
    if g_gamma is None:
        g = lightning_g_gamma(H, layer_idx, num_layers, dtype)
    elif layer_idx is not None or num_layers is not None:
        raise ValueError("g_gamma: expected either g_gamma or layer_idx and num_layers, got both")
    else:
        g = _array("g_gamma", g_gamma, (H,), jnp.floating, _QUERY_SHAPE)
        if (value := _known(g_gamma)) is not None and not (value <= 0).all():
            raise ValueError(f"g_gamma: expected log decays <= 0 (-slopes), got {value.max()}")
    # Decays that could not be checked must not grow. (jnp.minimum would halve the gradient at 0.)
    g = jnp.where(g > 0, 0, g).astype(dtype)
    # exp(g) underflows long before g = -1e5. The clamp avoids -inf times a distance of 0, a NaN.
    return jnp.where(g < -1e5, -1e5, g)


def _layer(layer_idx, num_layers):
    """`layer_idx` and `num_layers`, checked: as ints if they are concrete."""
    for name, x in ("layer_idx", layer_idx), ("num_layers", num_layers):
        if x is None:
            raise ValueError(
                f"{name}: expected layer_idx and num_layers, or g_gamma= in place of both, got None"
            )
    layer_idx, num_layers = _scalar("layer_idx", layer_idx), _scalar("num_layers", num_layers)
    known = type(num_layers) is int
    if known and not 1 <= num_layers < 2**31:
        raise ValueError(f"num_layers: expected 1 to 2**31 - 1, got {num_layers}")
    if type(layer_idx) is int and not 0 <= layer_idx < (num_layers if known else 2**31):
        raise ValueError(
            f"layer_idx: expected 0 to num_layers - 1, got {layer_idx} of "
            f"{num_layers if known else 'a traced number'}"
        )
    return layer_idx, num_layers


def _scaled(q, scale):
    """q and a scale that is a float. Kernels take a number, so a traced scale goes into q."""
    if scale is None:
        return q, q.shape[3] ** -0.5
    scale = _scalar("softmax_scale", scale, jnp.floating)
    if not isinstance(scale, (int, float)):
        # in float32, because the scale's gradient is a sum over all of q
        wide = jnp.promote_types(q.dtype, jnp.float32)
        return (q.astype(wide) * lax.convert_element_type(scale, wide)).astype(q.dtype), 1.0
    scale = float(scale) if isinstance(scale, float) or abs(scale) < 2**200 else math.inf
    # Kernels compute with it as a float32, and some flush what is not a normal number.
    normal = jnp.finfo(jnp.float32)
    if not (scale == 0 or float(normal.tiny) <= abs(scale) <= float(normal.max)):
        raise ValueError(f"softmax_scale: expected 0 or a normal number of float32, got {scale!r}")
    return q, scale


def _boundaries(cu_seqlens, q):
    """`cu_seqlens` as int32 or None, checked if it is concrete."""
    if cu_seqlens is None:
        return None
    B, T = q.shape[:2]
    if isinstance(cu_seqlens, (list, tuple)):
        listed = [_scalar("cu_seqlens", x) for x in cu_seqlens]
        traced = not all(isinstance(x, int) for x in listed)
        cu_seqlens = jnp.array(listed) if traced else np.array(listed, None if listed else int)
    # Its values are read before they become int32, which would wrap large ones.
    array = _array("cu_seqlens", cu_seqlens, ("num_seqs + 1",), jnp.integer)
    if B != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 to hold the packed sequences, got {B}")
    if array.shape[0] < 2:  # of a symbolic number, JAX says that it cannot know
        raise ValueError(f"cu_seqlens: expected at least 2 boundaries, got {array.shape[0]}")
    if (known := _known(cu_seqlens)) is not None:
        value = [int(x) for x in known]
        if value[0] != 0:
            raise ValueError(f"cu_seqlens: expected boundaries that start at 0, got {known}")
        if any(a > b for a, b in itertools.pairwise(value)):
            raise ValueError(f"cu_seqlens: expected boundaries that do not decrease, got {known}")
        if isinstance(T, int) and value[-1] > T:  # of a symbolic length that is not known
            raise ValueError(f"cu_seqlens: expected boundaries up to seq_len, {T}, got {value[-1]}")
    return array.astype(jnp.int32)


def _initial_state(s0, q, v, cu_seqlens):
    """The initial states in the dtype of states, or None."""
    if s0 is None:
        return None
    (n, _, H, K), V = q.shape, v.shape[3]
    hint = f": a state per batch row{_QUERY_SHAPE}"
    if cu_seqlens is not None:
        n, hint = cu_seqlens.shape[0] - 1, ": a state per packed sequence"
    s0 = _array("initial_state", s0, (n, H, K, V), jnp.floating, hint)
    return s0.astype(jnp.promote_types(q.dtype, jnp.float32))


def _backend(backend, q, cu_seqlens):
    """The backend, checked: "xla" if there are no kernels for this call."""
    if not (backend is None or isinstance(backend, str) and backend in ("triton", "xla")):
        raise ValueError(f'backend: expected None, "triton" or "xla", got {backend!r}')
    if backend == "triton" and triton is None:
        raise ValueError(
            'backend: expected None or "xla", because the kernels cannot run, got "triton": '
            f"{_missing}. {_NEEDS}"
        )
    arch = _gpu()[0] if _gpu() else None
    # GPUs before sm_80 lack Triton's matrix products: its code spills, and overflows shared memory
    old = arch is not None and arch.startswith("sm_") and int(arch[3:]) < 80
    if backend == "triton" and (arch is None or old):
        raise ValueError(
            'backend: expected None or "xla" without a GPU for the kernels (NVIDIA from '
            f'sm_80 on, AMD), got "triton" and {arch or jax.default_backend()}'
        )
    if triton is None and arch and not old and backend is None:
        warnings.warn(
            "lightning_attn: GPUs take the plain-JAX path, which is many times slower, because the "
            f"kernels cannot run: {_missing}. {_NEEDS}"
        )
    if triton is None or q.dtype == jnp.float64 or old:
        return "xla"
    sizes = *q.shape, *(() if cu_seqlens is None else cu_seqlens.shape)
    if backend != "xla" and not all(isinstance(d, int) for d in sizes):
        raise ValueError(
            'backend: expected "xla" for symbolic shapes (jax.export), because kernels are '
            f"launched for shapes that are numbers, got {backend!r}"
        )
    return backend


def _seq_axes(seq_axis, cu_seqlens):
    """`seq_axis` as a tuple of names, or None."""
    if seq_axis is None:
        return None
    if cu_seqlens is not None:
        raise ValueError(
            f"seq_axis: expected None with cu_seqlens, got {seq_axis!r}. Packed sequences are not "
            "cut: give each device of a shard_map its own packed batch"
        )
    axes = seq_axis if isinstance(seq_axis, tuple) else (seq_axis,)
    named = axes and all(isinstance(name, str) for name in axes)
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    if not named or sorted(axes) != sorted(manual & set(axes)):  # names that differ
        raise (ValueError if named else TypeError)(
            "seq_axis: expected the name of an axis of a shard_map around this call, or a tuple of "
            f"different names, got {seq_axis!r}"
        )
    return axes


def _static(name, x):
    """Raises if `x` is not a bool."""
    if not isinstance(x, (bool, np.bool_)):
        traced = isinstance(x, jax.core.Tracer)
        hint = ": it is static, so a jit must not trace it (static_argnames)" if traced else ""
        raise TypeError(f"{name}: expected True or False, got {x!r}{hint}")


def _unwrapped(x):
    """`x`, or the array in an object with `__jax_array__`, such as a flax.nnx.Param."""
    while not isinstance(x, (jax.Array, np.ndarray)) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    return x


def _scalar(name, x, kind=jnp.integer):
    """A scalar argument, an integer or of that kind: a Python number if it is concrete."""
    x = _unwrapped(x)
    if isinstance(x, (jax.Array, np.ndarray)) and x.shape != ():
        raise ValueError(f"{name}: expected a scalar, got shape {x.shape}")
    is_array = isinstance(x, (jax.Array, np.ndarray, np.generic))
    dtype = x.dtype if is_array else type(x) if type(x) in (int, float) else bool  # refused
    is_int = jnp.issubdtype(dtype, jnp.integer)
    if not (is_int or jnp.issubdtype(dtype, kind)):
        kind = "an integer" if kind is jnp.integer else "a real number"
        raise TypeError(f"{name}: expected {kind}, got {x!r}")
    value = _known(x) if is_array else x
    return x if value is None else int(value) if is_int else float(value)


def _array(name, x, shape, kind, hint=""):
    """`x` as a JAX array of that shape, in which names are free sizes, and kind of dtype."""
    x = _unwrapped(x)
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
    fixed = [(want, got) for want, got in zip(shape, x.shape) if not isinstance(want, str)]
    if len(x.shape) != len(shape) or any(want != got for want, got in fixed):
        shape = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{shape}], got {tuple(x.shape)}{hint}")
    if not jnp.issubdtype(x.dtype, kind):
        kind = "integers" if kind is jnp.integer else "floating point"
        raise TypeError(f"{name}: expected {kind}, got {x.dtype}")
    return jnp.asarray(x)


def _known(x):
    """`x` as numpy if it is concrete, else None. It is not concrete if it is traced, if some of it
    lies on other hosts, or if it lies on a device while something else is traced."""
    x = _unwrapped(x)
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return None
    # An operation on a concrete array gives a tracer while a jit is traced.
    return None if isinstance(lax.neg(x), jax.core.Tracer) else jax.device_get(x)

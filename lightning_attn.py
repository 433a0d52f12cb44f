# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The lightning-attn-jax authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except
# in compliance with the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License
# is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express
# or implied. See the License for the specific language governing permissions and limitations under
# the License.
"""Lightning attention for JAX: linear attention with a fixed decay per head.

For one sequence and one head, with log decay g <= 0, a state S [K, V] is carried along the tokens:

    S_t = e^g S_{t-1} + k_t v_t^T              o_t = scale q_t S_t

TransNormerLLM (arXiv:2307.14995) introduced it, Lightning Attention-2 (arXiv:2401.04658) computes
it in chunks, and MiniMax-01 (arXiv:2501.08313) trained it at scale. Time grows linearly with the
sequence length. The state is all that is remembered.

Copy this file. It imports jax and numpy and, on NVIDIA and AMD GPUs, `jax-triton` and `triton`.
Everywhere else it runs in plain JAX.

The file in order: the API; what it computes, in plain JAX; its gradients; packs; how it is fast
(kernels, their plan, their launch); how it composes with vmap, sharding and many devices; checks.

Glossary
  arrays
    q, k, v, o    queries, keys, values, outputs
    g, g2         log decay of a head per token: in nats (`g_gamma`); to base 2
    S             state [K, V]; in kernels S^T [V, K], save for `_step_kernel`
    s0, s         initial and final states of sequences
    w, y          queries that read S^T; what they read
    P             scores q_i.k_j of a chunk: [i, j], in kernels [j, i]
    D             decays of the scores, with the scale and the causal mask
    eq, ek, eS    decays in a chunk: of what queries read of S, of what keys add to S, of S. In
                  kernels eq and ek include the scale
    dx            the gradient of x, and nothing else
    cu            boundaries of packed sequences, `cu_seqlens`
  lengths
    B, T          batch rows; tokens of a batch row. [B | 1]: one row may stand for all
    H, h          heads of decays and outputs; one of them
    K, V          head dims: of queries and keys; of values
    BK, BV        columns of K and of V that one program handles
    C             tokens per chunk, which is one step of a loop
    segment       tokens that one program scans
    piece         a part of a segment; the state of each is summed by a program of its own
    L             tokens of a segment or of a piece
    part          BK of the keys' columns, where a program scans them one part after another
  places
    pack          a batch row that holds sequences one after another
    n             sequences of a batch row, which is 1 unless packed; in plain JAX's loops, a chunk
    c, m          in kernels, number of a chunk; its tokens
    i, j          a query and a key of a chunk
    rank          place of a token in its chunk, counted in scan direction
  scans
    post          the state decays after a token is read, not before it is added: in adjoints
    linked        of a state: summed over all segments before, without the initial state
    dual          two scans in one that read a state and its transpose
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec

__version__ = "0.1.0"

# The plain-JAX path needs the first range, the kernels need the others.
_JAX = ">=0.10.2"
_KERNELS = {"jax": ">=0.11.1,<0.13", "jax-triton": ">=0.4.1,<0.5", "triton": ">=3.7,<3.10"}
_HOPPER = ">=3.8,<3.10"  # the Triton of `_hopper_kernel`
_INSTALL = "pip install " + " ".join(f"'{name}{versions}'" for name, versions in _KERNELS.items())
_NEEDS = f"They need Linux, Python >= 3.12 and: {_INSTALL}"


def _fits(found, versions):
    """Whether the version `found` lies in `versions`, ">=a" or ">=a,<b". The first three parts of a
    version count, if they are numbers."""

    def numbers(text):
        return tuple(int(n) for n in text.split(".")[:3] if n.isdigit())

    low, _, high = versions.removeprefix(">=").partition(",<")
    return numbers(low) <= numbers(found) and (not high or numbers(found) < numbers(high))


if not _fits(jax.__version__, _JAX):
    raise ImportError(
        f"lightning_attn needs jax{_JAX} and found jax {jax.__version__}: pip install 'jax{_JAX}'"
    )

_unfit = None  # why installed kernels cannot run
try:
    import jax_triton
    import triton
    import triton.language as tl
except Exception as error:
    triton = None
    # macOS and TPU hosts have no Triton, so no warning is due here. `_backend` warns GPU hosts.
    absent = isinstance(error, ModuleNotFoundError) and error.name in ("jax_triton", "triton")
    if not absent:
        _unfit = f"importing jax_triton failed with {type(error).__name__}: {error}"
else:
    _found = dict(zip(_KERNELS, (jax.__version__, jax_triton.__version__, triton.__version__)))
    if all(_fits(_found[name], versions) for name, versions in _KERNELS.items()):
        from triton.experimental import gluon
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.language.nvidia import hopper

        if _fits(_found["jax"], ">=0.12") and _found["jax-triton"] == "0.4.1":
            # jax 0.12 hands a rule for dead code three arguments, jax-triton 0.4.1's takes two.
            partial_eval.dce_rules[jax_triton.triton_lib.triton_kernel_call_p] = (
                lambda used, live, eqn: ([True] * len(eqn.invars), eqn)
            )
    else:
        triton = None
        _unfit = "found " + ", ".join(f"{name} {version}" for name, version in _found.items())
_SLOW = "lightning_attn: GPUs take the plain-JAX path, which is many times slower, because "
if _unfit:
    warnings.warn(f"{_SLOW}the kernels cannot run: {_unfit}. {_NEEDS}")
_HAS_HOPPER = triton is not None and hasattr(hopper.tma, "async_load")  # Triton 3.7 lacks it

__all__ = ["lightning_attn", "lightning_attn_reference", "lightning_g_gamma"]


# Types for callers. Checkers cannot follow what Triton compiles: they report nothing of this file.
# mypy: ignore-errors
# pyright: basic, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportPossiblyUnboundVariable=false
Array = jax.Array | np.ndarray
Integer = int | np.integer | Array
Real = float | np.floating | Integer

_F = TypeVar("_F", bound=Callable[..., Any])


def _promotes(f: _F) -> _F:
    """`f`, in which ranks and dtypes are promoted whatever jax_numpy_rank_promotion and
    jax_numpy_dtype_promotion ask of the caller's code. JAX calls back the rules of a transformation
    when the caller's settings hold again, so each rule that promotes is marked as well."""

    @functools.wraps(f)
    def promotes(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
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
) -> tuple[jax.Array, jax.Array | Any]:  # Any: None where that is False
    """Lightning attention: o_t = scale q_t S_t, where S_t = e^g S_{t-1} + k_t v_t^T.

    See arXiv:2307.14995, arXiv:2401.04658 and arXiv:2501.08313. Works under jit, grad (to any
    order), vmap, scan, remat, export and sharding. Differentiable with respect to `query`, `key`,
    `value`, `initial_state` and `g_gamma`; both results may carry gradients. Derivatives are
    reverse mode only: `jax.jvp` and `jax.jacfwd` raise.

    `jax.export` of symbolic shapes takes backend="xla". The batch, `seq_len` and the number of
    boundaries may be symbolic. A symbolic `seq_len` must be known to be 64 or more, and symbolic
    boundaries 2 or more. A jit over sharded arrays cannot be exported, because JAX cannot serialize
    its partitioning: export a `jax.shard_map` instead.

    Args:
      query: [batch, seq_len, num_heads, qk_head_dim], float32, bfloat16 or float16 (in x64 mode
        also float64, which takes plain JAX everywhere). Head dims are 1 to 512, `seq_len` is 0 to
        2**30.
      key: [batch, seq_len, num_kv_heads, qk_head_dim], in the dtype of `query`. `num_kv_heads`
        divides `num_heads`; query head h reads key and value head
        h // (num_heads / num_kv_heads).
      value: [batch, seq_len, num_kv_heads, v_head_dim], in the dtype of `query`.
      layer_idx, num_layers: integers, possibly traced: the layer, counted from 0, and the number of
        layers. Head h gets the log decay g = -(8 / num_heads) (1 - layer_idx / num_layers) h. Leave
        both out to give `g_gamma` instead. Values that are traced, or on a device while something
        is traced, cannot be checked: no head forgets in a layer from `num_layers` on. Inside a
        `jax.shard_map` that splits the heads, the formula would number each device's heads from 0,
        which is wrong and cannot be seen from inside: there, give each device its part of
        `lightning_g_gamma(num_heads of all devices, ...)` as `g_gamma`.
      softmax_scale: scale of the outputs, 0 or a normal number of float32; None means
        qk_head_dim ** -0.5. A number is a constant of the compiled program: another number compiles
        another program. A traced scale multiplies `query`, in its dtype, and is not checked.
      initial_state: [n, num_heads, qk_head_dim, v_head_dim], floating: the states that the
        sequences start from. n is the batch or the number of packed sequences. None means zeros.
      reverse: a static bool. True runs from the last token to the first: `initial_state` enters at
        the end, and `final_state` is left at the start.
      cu_seqlens: [num_seqs + 1] integers, concrete or traced: boundaries, from 0 up, of sequences
        that are packed in a batch of 1. Equal neighbours are an empty sequence. Tokens past the
        last boundary belong to no sequence: their outputs and gradients are 0, whatever they hold.
        A traced `cu_seqlens` cannot be checked. A sequence that runs backwards or outside of the
        tokens then counts as empty. So does a sequence that starts before the largest end of the
        others before it.
      g_gamma: [num_heads], log decay per token in nats, <= 0, possibly traced. Values above 0 raise
        where they are at hand. Elsewhere they count as 0, and their gradient is 0.
      backend: None picks when the computation is lowered: Triton for cuda and rocm, plain JAX for
        everything else. "triton" and "xla" force one of the two. float64 and GPUs older than sm_80
        always take plain JAX.
      seq_axis: name of a `jax.shard_map` mesh axis, or a tuple of names, over which `seq_len` is
        split evenly, in order: one sequence on many devices. Only states cross it, never tokens.
        `initial_state` and `final_state` are those of the whole sequence.
      output_final_state: a static bool. False returns None for the final state, and no kernel
        writes a final state.

    Returns:
      output: [batch, seq_len, num_heads, v_head_dim], in the dtype of `query`.
      final_state: [n, num_heads, qk_head_dim, v_head_dim], float32 (float64 for float64 inputs). In
        a decode step on a GPU, seq_len 1 with an `initial_state` that the caller donates or carries
        through a loop, the final state takes the memory of the initial state.

    Accuracy: states, decays and sums are float32. float32 inputs follow
    `jax.default_matmul_precision`: TF32 by default on GPUs, float32 for "high" and "highest".
    Gradients have the dtype of their argument. The gradient of `g_gamma` is float32 throughout. The
    error of each head's gradient is at most 2e-3 for float32 at "highest", and 1e-2 for 16 bits and
    TF32, relative to the gradient or, where the gradient's terms cancel, to the root of the sum of
    their squares. The gradient of `g_gamma` takes one more scan, in plain JAX on any backend. Under
    jit that scan does not run where nobody differentiates `g_gamma`. With float16 inputs, states
    and scaled scores, q_i.k_j times `softmax_scale`, round to float16 where they are multiplied,
    and overflow there past 65504.

    Raises:
      TypeError, ValueError: before anything runs. The message names the argument, what was expected
        and what came.
    """
    q, k, v = _operands(query, key, value)
    g = _log_decays(q, layer_idx, num_layers, g_gamma)
    q, scale = _scaled(q, softmax_scale)
    cu = _boundaries(cu_seqlens, q)
    s0 = _initial_state(initial_state, q, v, cu)
    _static("reverse", reverse)
    _static("output_final_state", output_final_state)
    backend = _backend(backend, q, cu)
    axes = _axes(seq_axis, cu)
    precision = jax.config.jax_default_matmul_precision
    final_state = bool(output_final_state)
    op = _Op(scale, bool(reverse), False, backend, precision, final_state=final_state)
    s0 = None if s0 is None else s0[:, None] if cu is None else s0[None]
    g, cu = g[None], None if cu is None else cu[None]
    if axes is None:
        o, s = _attend(op, *_vary((q, k, v, g, s0, cu), q, k, v, g, s0, cu))
    else:
        q, k, v = _vary((q, k, v), q, k, v)
        o, s = _attend_across(op, axes, q, k, v, g, _vary(s0, q, but=axes))
    return o, None if s is None else s[:, 0] if cu is None else s[0]


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

    Arguments and results are those of `lightning_attn`, less the last three."""
    q, k, v = _operands(query, key, value)
    g = _log_decays(q, layer_idx, num_layers, g_gamma)
    q, scale = _scaled(q, softmax_scale)
    cu = _boundaries(cu_seqlens, q)
    s = _initial_state(initial_state, q, v, cu)
    _static("reverse", reverse)
    (B, T, H, K), V, dtype = q.shape, v.shape[3], g.dtype
    n = B if cu is None else cu.shape[0] - 1
    s = jnp.zeros((n, H, K, V), dtype) if s is None else s
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    token = jnp.arange(T)
    member = jnp.ones((T, B), bool)  # [T, n]
    if cu is not None:
        bounds, is_sequence = _intervals(T, cu)
        start, end = bounds[1:-2], bounds[2:-1]
        member = is_sequence[1:-1] & (start <= token[:, None]) & (token[:, None] < end)

    def step(s, x):
        q, k, v, member = x  # [B, H, K], [B, H, K], [B, H, V], [n]
        q, k, v = (y.astype(dtype) for y in (q, k, v))
        member = member[:, None, None]
        entered = jnp.exp(g)[:, None, None] * s + k[..., None] * v[..., None, :]
        s = jnp.where(member[..., None], entered, s)
        q = jnp.broadcast_to(q, (n, H, K))
        o = scale * jnp.einsum("bhk,bhkv->bhv", q, s, precision="highest")
        return s, o if cu is None else jnp.where(member, o, 0).sum(0, keepdims=True)

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
    traced. They are checked as `lightning_attn` checks them.
    """
    num_heads = _integer("num_heads", num_heads)
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads: expected a static integer of at least 1, got {num_heads!r}")
    layer_idx, num_layers = _layer(layer_idx, num_layers)
    slopes = -8 / num_heads * np.arange(num_heads)
    if isinstance(layer_idx, int) and isinstance(num_layers, int):
        return jnp.asarray((1 - layer_idx / num_layers) * slopes, dtype)
    layer_idx, num_layers = (jnp.asarray(x).astype(dtype) for x in (layer_idx, num_layers))
    return (1 - layer_idx / num_layers) * jnp.asarray(slopes, dtype)


# What it computes: the scan in plain JAX ----------------------------------------------------------
#
# Internally every batch row is a pack of n sequences; a row of a plain batch is a pack of one. The
# op is a scan over them:
#
#     _scan(op, q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], g [B, H],
#           s0 [B, n, H, K, V] | None, cu [B, n + 1] | None, w [B, T, Hw, V] | None)
#         -> o [B, T, H, V], s [B, n, H, K, V] | None, y [B, T, H, K] | None
#
# An operand may have one row in place of B: then all rows share that row. q, k, v and w may have
# fewer heads than the decay: then groups of the decay's heads share each of them.
#
# A forward scan decays the state before it adds a token. Its adjoint runs backwards, and decays the
# state after the token was read (`post`).
#
# The scan works in chunks of C tokens, which are rows of a table (`_Row`). G groups of N chunks are
# the steps of a `lax.scan`. A group multiplies for all its chunks at once; only states pass from
# chunk to chunk. Chunks lie in the order of their tokens: a scan that goes back starts with the
# last chunk.

CHUNK, GROUP = 64, 512  # tokens of a usual chunk, and of a group at most


@dataclasses.dataclass(frozen=True)
class _Op:
    scale: float  # of scores, and of what is read from the state or, if post, of what enters it
    reverse: bool
    post: bool  # decay the state after the token is read, not before it is added
    backend: str | None
    precision: Any  # jax.default_matmul_precision where the op was called
    only_state: bool = False  # o is [B, 0, H, V]
    final_state: bool = True  # False: s is None

    def adjoint(self):
        return dataclasses.replace(self, reverse=not self.reverse, post=not self.post)

    def scales(self):
        """The scales of queries that read the state, and of keys that enter it."""
        return (1.0, self.scale) if self.post else (self.scale, 1.0)


def _scan_xla(op, q, k, v, g, s0, cu, w=None, do=None, ds=None):
    """The scan, a group of chunks at a time. With w also y, which w reads of the transposed state
    as q reads o of the state. With do it returns <o, do> + <s, ds> of each row and head instead,
    [B, H], computed in float32; ds may be None."""
    B, T, H = _batch(q, k, v, g, s0, cu, w, do), q.shape[1], g.shape[1]
    K, V, wide, packed = q.shape[3], v.shape[3], g.dtype, cu is not None
    sequences = cu.shape[1] - 1 if packed else 1
    # a jvp of large groups takes long to compile
    C, groups = _groups(T, cu, max(K, V), GROUP if do is None else GROUP // 4)
    N, i = groups.shape[2], jnp.arange(C)
    rest = 0 if packed else -T % (N * C)  # tokens to add, so that a batch has whole groups
    dtype = v.dtype if do is None else wide
    # Products of 16-bit numbers are exact in float32: more passes would change nothing.
    precision = op.precision if dtype == wide else "default"
    # keeps XLA from folding the decays of known g into large constants, which is slower
    g = lax.optimization_barrier(g)
    q, k, v, w, do = (
        x if x is None else jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0)))
        for x in (q, k, v, w, do)
    )

    def dot(indices, x, y):  # rounds what it multiplies, as the kernels do
        x, y = x.astype(dtype), y.astype(dtype)
        return jnp.einsum(indices, x, y, precision=precision, preferred_element_type=wide)

    far = (i[:, None] - i) * (-1 if op.reverse else 1)  # from key j to query i in scan order
    D = jnp.where(far >= 0, op.scale * _power(g, far[None, None]), 0)  # [B | 1, H, 1, i, j]
    scale_q, scale_k = op.scales()

    def outputs(q, k, v, eq, S):
        """What queries read of the keys and values of their chunk, and of the state before it."""
        P = dot("bhcik,bhcjk->bhcij", q, k) * D
        O = dot("bhcij,bhcjv->bhciv", P, v) + scale_q * eq * dot("bhcik,bhckv->bhciv", q, S)
        return O.astype(dtype)

    def group(carry, work):
        S, s, o, y, total = carry
        row = _Row(*jnp.moveaxis(work, -1, 0))  # [B | 1, N]
        valid, has_work = jnp.maximum(row.valid, 0), (row.valid > 0)[:, None, :, None, None]
        inside = i < valid[..., None]
        tokens = jnp.where(inside, row.first[..., None] + i, T)  # [B | 1, N, C]

        def load(x):
            """Tokens of x [B | 1, T, Hx, X] in chunks [B, H, N, C, X]: 0 for those outside."""
            Hx, X = x.shape[2:]
            if packed:
                x = jnp.where(inside[..., None, None], _rows_at(x, tokens), 0)
            else:
                x = lax.dynamic_slice_in_dim(x, row.first[0, 0], N * C, 1).reshape(-1, N, C, Hx, X)
            x = jnp.repeat(jnp.moveaxis(x, 3, 1), H // Hx, axis=1)
            return jnp.broadcast_to(x, (B, H, N, C, X))

        def store(x, chunks):
            chunks = jnp.moveaxis(chunks, 1, 3).reshape(B, N * C, H, -1)
            if packed:
                return _put_rows(x, tokens.reshape(-1, N * C), chunks)
            return lax.dynamic_update_slice_in_dim(x, chunks, row.first[0, 0], 1)

        def states_of_sequences(x):
            """The states of x [B | 1, n, H, K, V] for the sequences of the chunks."""
            x = _rows_at(x, jnp.maximum(row.sequence, 0)) if packed else x
            return jnp.where(has_work, jnp.moveaxis(x, 2, 1), 0)

        qs, ks, vs, ws, dos = (x if x is None else load(x) for x in (q, k, v, w, do))
        eq, ek, eS = _decays(op, g, valid, C)
        Z = dot("bhcjk,bhcjv->bhckv", ks * (scale_k * ek), vs)
        entering = jnp.zeros((1, 1, N, 1, 1), wide) if s0 is None else states_of_sequences(s0)
        before, after = _pass_states(op, row, eS, Z, entering, S)
        S = after[:, :, 0 if op.reverse else N - 1]
        ends = (row.valid > 0) & ((row.before if op.reverse else row.after) == 0)
        if do is not None:
            # without the barrier XLA on CPUs (jax 0.12.0.1) adds memory that nothing has written
            os, after = lax.optimization_barrier((outputs(qs, ks, vs, eq, before), after))
            total += (os * dos).sum((2, 3, 4))
            if ds is not None:
                at_end = ends[:, None, :, None, None] * states_of_sequences(ds)
                total += (at_end * after).sum((2, 3, 4))
        if s is not None:
            s = _put_rows(s, jnp.where(ends, row.sequence, sequences), jnp.moveaxis(after, 1, 2))
        o = o if o is None else store(o, outputs(qs, ks, vs, eq, before))
        y = y if y is None else store(y, outputs(ws, vs, ks, eq, _transposed(before)))
        return (S, s, o, y, total), None

    def group_or_nothing(carry, work):  # half of a pack's groups may be without work
        unchanged = lambda carry, _: (carry, None)
        return lax.cond((work[..., 2] > 0).any(), group, unchanged, carry, work)

    S, total, s, o, y = jnp.zeros((B, H, K, V), wide), jnp.zeros((B, H), wide), None, None, None
    if do is None:
        if op.final_state:  # an empty sequence ends with the state that it starts from
            s = jnp.zeros((), wide) if s0 is None else s0
            s = jnp.broadcast_to(s, (B, sequences, H, K, V))
        o = None if op.only_state else jnp.zeros((B, T + rest, H, V), dtype)
        y = None if w is None else jnp.zeros((B, T + rest, H, K), dtype)
    carry = _vary((S, s, o, y, total), q, k, v, g, s0, groups, w, do, ds)
    step = group_or_nothing if packed else group
    (_, s, o, y, total), _ = lax.scan(step, carry, groups, reverse=op.reverse)
    if do is not None:
        return total
    o = jnp.zeros((B, 0, H, V), dtype) if op.only_state else o[:, :T]
    return o, s, None if y is None else y[:, :T]


def _groups(T, cu, widest, most):
    """C and the work of all groups, [G, B | 1, N, 7]: rows of a table, and of -1 to fill the last
    group. `widest` is the larger head dim, `most` the tokens of a group at most."""
    n = 1 if cu is None else cu.shape[1] - 1
    C, per_group = CHUNK, 1  # in an export of symbolic shapes
    if isinstance(T, int) and isinstance(n, int):
        # with C near K and V, a chunk's scores cost as much as its state
        C = CHUNK if widest <= CHUNK else 2 * CHUNK
        # chunks of equal length need least padding
        per_group, C = max(1, most // C), -(-T // -(-T // C))
        # a sequence that is shorter than a chunk wastes the rest of the chunk
        C = min(C, max(16, _block(T // n)))
    table = _tables(T, cu, C, False, 0, True)
    R = table.shape[1]
    G = -(-R // per_group)
    N = 1 if per_group == 1 else -(-R // G)
    table = jnp.pad(table, ((0, 0), (0, G * N - R), (0, 0)), constant_values=-1)
    return C, jnp.moveaxis(table.reshape(-1, G, N, 7), 1, 0)


def _pass_states(op, row, eS, Z, entering, S):
    """The states [B, H, N, K, V] before and after the chunks of a group, which decay the state by
    eS and add Z. Sequences that start in the group start from `entering`, the others from S."""
    N = Z.shape[2]
    starts = ((row.after if op.reverse else row.before) == 0)[:, None, :, None, None]
    before, after = [None] * N, [None] * N
    # unrolled: a loop would launch a kernel per chunk. Products with 0 would let NaN pass to the
    # next sequence.
    for c in reversed(range(N)) if op.reverse else range(N):
        before[c] = jnp.where(starts[:, :, c], entering[:, :, c], S)
        after[c] = S = eS[:, :, c] * before[c] + Z[:, :, c]
    return jnp.stack(before, 2), jnp.stack(after, 2)


def _decays(op, g, valid, C):
    """How chunks with so many tokens [B | 1, N] decay what queries read of the state and what keys
    add to it, [B | 1, H, N, C, 1], and the state itself, [B | 1, H, N, 1, 1]."""
    i, tokens = jnp.arange(C), valid[..., None]
    rank = tokens - 1 - i if op.reverse else jnp.broadcast_to(i, (*valid.shape, C))
    exponents = rank + (not op.post), tokens - 1 - rank + op.post, tokens
    # XLA would put them where they multiply, and take a power for each number there
    return lax.optimization_barrier(tuple(_power(g, x[..., None]) for x in exponents))


def _power(g, x):
    """e^{g x}, or 1 where x < 0: [B | 1, H, N, ., .] of g [B | 1, H] and x [B | 1, N, ., .]."""
    return jnp.exp(g[:, :, None, None, None] * jnp.maximum(x, 0)[:, None])


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


def _transposed(s):
    return None if s is None else jnp.swapaxes(s, -1, -2)


def _batch(*operands):
    """B of a scan's operands, each of which has B rows or one that all share."""
    return _shared(x.shape[0] for x in operands if x is not None)


def _shared(sizes):
    """The size other than 1 that the sizes agree on, or 1."""
    return next((size for size in sizes if size != 1), 1)


# Its gradients ------------------------------------------------------------------------------------
#
# The scan is linear in q, k, v and s0, so its gradients are scans as well. `back` is the adjoint
# direction, which starts from the cotangent of the final state and ends with that of s0:
#
#     dq = scan(do, v, k, from s0^T)           dk = scan back(v, do, q, from ds^T)
#     ds0 = the end of dv's scan               dv = scan back(k, q, do, from ds)
#
# The adjoint has the state
#
#     A_j = e^{g (T-1-j)} ds + scale sum_{i>=j} e^{g (i-j)} q_i^T do_i
#     dv_j = k_j A_j         dk_j = v_j A_j^T
#
# ds is not scaled, so the scale is of what enters the state (`post`). The scans for dk and dv have
# the same state, transposed, so one dual scan, with w = v, yields both.
#
# These gradients are scans with gradients of their own, so the rules hold for `post` scans as well.


def _attend(op, *operands):
    """The scan with its gradients. Outside of shard_map a symbolic zero tells the gradients that a
    result is not used. shard_map does not know symbolic zeros: zeros come instead."""
    inside = jax.sharding.get_abstract_mesh().manual_axes
    return (_attend_local if inside else _attend_anywhere)(op, *operands)


@functools.partial(jax.jit, static_argnums=0)
def _forward(op, *operands):
    q, k, v, *_ = operands
    specs = list(map(_spec, (q, k, v)))
    # o and s are split as the first operand that is split: over rows, and over heads by other axes
    rows = next((spec[0] for spec in specs if spec[0] is not None), None)
    taken = set(jax.tree.leaves(rows))
    heads = (spec[2] for spec in specs if not taken & set(jax.tree.leaves(spec[2])))
    out = PartitionSpec(rows, None, next((names for names in heads if names is not None), None))
    out = out, out if op.final_state else None
    return _in_auto_mode(lambda *operands: _scan(op, *operands)[:2], operands, out)


def _attend_fwd(op, *operands):
    """The last saved value says whether the gradient of g is wanted, which costs one more scan: ()
    for yes, None for no. A jit sees trees that differ, so the answer is static."""
    wanted = () if operands[3].perturbed else None
    operands = custom_vjp_primal_tree_values(operands)
    return _attend(op, *operands), (*operands, wanted)


def _attend_local_fwd(op, *operands):
    return _attend(op, *operands), (*operands, ())


def _attend_bwd(op, saved, cotangents):
    return _gradients(op, saved, *(None if isinstance(x, SymbolicZero) else x for x in cotangents))


@_promotes
@functools.partial(jax.jit, static_argnums=0)
def _gradients(op, saved, do, ds):
    q, k, v, g, s0, _, wants_dg = saved
    specs = *map(_spec, (q, k, v, g if wants_dg is not None else None, s0)), None
    return _in_auto_mode(functools.partial(_gradients_by_scans, op), (saved, do, ds), specs)


def _gradients_by_scans(op, saved, do, ds):
    q, k, v, g, s0, cu, wants_dg = saved
    if do is None or op.only_state:
        do = jnp.zeros((*q.shape[:2], g.shape[1], v.shape[3]), v.dtype)
    op = dataclasses.replace(op, only_state=False, final_state=False)
    back = dataclasses.replace(op.adjoint(), final_state=s0 is not None)
    dq, _ = _attend(op, do, v, k, g, _transposed(s0), cu)
    dv, ds0, dk = _attend_dual(back, k, q, do, g, ds, cu, v)
    dg = None
    if wants_dg is not None:
        dg = _decay_gradient(op, q, k, v, g, s0, cu, do, ds)
        dg = dg if g.shape[0] > 1 else dg.sum(0, keepdims=True)
    dq, dk, dv = (_to_heads(dx, x.shape[2], x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dg, ds0, None


def _to_heads(dx, heads, dtype):
    """The gradient [B, T, H, ...] of an operand, summed over the query heads that read each of its
    `heads`."""
    B, T, H, columns = dx.shape
    if heads == H:
        return dx
    dx = dx.reshape(B, T, heads, H // heads, columns)
    return dx.sum(3, dtype=jnp.promote_types(dtype, jnp.float32)).astype(dtype)


_attend_anywhere, _attend_local = (jax.custom_vjp(_forward, nondiff_argnums=(0,)) for _ in range(2))
_attend_anywhere.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)
_attend_local.defvjp(_attend_local_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_dual(op, q, k, v, g, s0, cu, w):
    """The scan, plus what w reads from the transposed states."""
    return _scan(op, q, k, v, g, s0, cu, w)


def _dual_as_two(op, q, k, v, g, s0, cu, w):
    """`_attend_dual` as two scans, which have gradients: only second derivatives take it."""
    stateless = dataclasses.replace(op, final_state=False)
    y, _ = _attend(stateless, w, v, k, g, _transposed(s0), cu)
    return *_attend(op, q, k, v, g, s0, cu), y


def _attend_dual_fwd(op, *operands):
    return _attend_dual(op, *operands), operands


def _attend_dual_bwd(op, operands, cotangents):
    return jax.vjp(functools.partial(_dual_as_two, op), *operands)[1](cotangents)


_attend_dual.defvjp(_attend_dual_fwd, _attend_dual_bwd)


def _decay_gradient(op, q, k, v, g, s0, cu, do, ds):
    """The gradient of g for cotangents do and ds (or None), [B, H], in forward mode. No head reads
    another's decay, so one derivative in the direction of all decays has that of each head. Reverse
    mode would sum t (q_t.dq_t - k_t.dk_t) over tokens t, which cancels to noise where a head
    forgets."""
    if not (q.size and v.size):  # states end as they start
        zeros = jnp.zeros((_batch(q, k, v, g, s0, cu, do), g.shape[1]), g.dtype)
        return _vary(zeros, q, k, v, g, s0, do, ds)
    f = lambda g: _scan_xla(op, q, k, v, g, s0, cu, do=do, ds=ds)
    return jax.jvp(f, (g,), (jnp.ones_like(g),))[1]


# Packs: where sequences begin and end -------------------------------------------------------------


class _Row(NamedTuple):
    """A row of work: the tokens of a chunk, a segment or a piece. Kernels read it as 7 int32."""

    first: Any  # token
    tokens: Any  # how many; -1 in rows without work
    valid: Any  # those that belong to a sequence: all or none
    sequence: Any  # -1: none
    before: Any  # rows of the same interval before this row in scan order
    after: Any  # rows of the same interval after this row in scan order
    slot: Any  # of a segment: how many of the rows above are followed in their interval


def _intervals(T, cu):
    """Splits T tokens at boundaries cu [n + 1], which may hold anything, into n + 2 intervals:
    before the first sequence, each sequence, after the last. Returns bounds [n + 3] that never
    decrease, and which intervals are sequences. A sequence that runs backwards, outside of the
    tokens or into an earlier one counts as empty, and the tokens of its interval belong to no
    sequence."""
    zero, last = jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32)
    start, end = jnp.concatenate([zero, cu]), jnp.concatenate([cu, last])
    fits = (start >= 0) & (start <= end) & (end <= T)
    ends = lax.cummax(jnp.where(fits, end, 0))
    latest = jnp.concatenate([zero, ends[:-1]])  # the largest end so far
    fits &= start >= latest
    bounds = jnp.concatenate([jnp.where(fits, start, latest), last])
    i = jnp.arange(start.shape[0])
    return bounds, fits & (i > 0) & (i < start.shape[0] - 1)


def _table(T, cu, L, reverse, pieces=0, of_sequences=False):
    """Rows of work, [R, 7], where R is enough for any cu. Rows are segments of L tokens, anchored
    where the scan starts. With `pieces`, rows are pieces of L tokens: `pieces` of them for each
    segment that another segment follows. `of_sequences`: only tokens of sequences have rows. Else
    every interval has one or more, which write its outputs and its state."""
    if cu is None:  # one sequence, and nothing around it
        bounds, is_sequence = T * jnp.arange(2), jnp.ones(1, bool)
    else:
        bounds, is_sequence = _intervals(T, cu)
    length, intervals = bounds[1:] - bounds[:-1], is_sequence.shape[0]
    rows = -(-length // (L * max(pieces, 1)))
    rows = jnp.where(is_sequence, rows, 0) if of_sequences else jnp.maximum(rows, 1)
    rows = (rows - 1) * pieces if pieces else rows
    R = _row_count(T, intervals, L, pieces, of_sequences)
    ends = jnp.cumsum(rows)
    row = jnp.arange(R)
    of = jnp.cumsum(jnp.zeros(R, jnp.int32).at[ends].add(1, mode="drop"))  # each row's interval
    used, of = of < intervals, jnp.minimum(of, intervals - 1)
    before = row - (ends - rows)[of]
    tokens = jnp.clip(length[of] - before * L, 0, L)
    sequence = of
    if cu is not None:  # interval 1 is sequence 0
        sequence = jnp.where((of > 0) & (of < intervals - 1), of - 1, -1)
    columns = _Row(
        first=bounds[1:][of] - before * L - tokens if reverse else bounds[of] + before * L,
        tokens=jnp.where(used, tokens, -1),
        valid=jnp.where(is_sequence[of], tokens, 0),
        sequence=sequence,
        before=before,
        after=rows[of] - 1 - before,
        slot=row - of,
    )
    return jnp.stack([x.astype(jnp.int32) for x in columns], -1)


def _row_count(T, intervals, L, pieces=0, of_sequences=False):
    """How many rows a `_table` of T tokens in so many intervals has."""
    if of_sequences:
        n = intervals if intervals == 1 else intervals - 2
        return (T - n) // L + n
    if pieces:
        return (T - 1) // (L * pieces) * pieces
    return -(-T // L) if intervals == 1 else T // L + intervals


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4, 5))  # so that all uses share one trace
def _tables(T, cu, L, reverse, pieces=0, of_sequences=False):
    """`_table` for each row of cu [B | 1, n + 1]: [B | 1, R, 7]; for a plain batch, of one row."""
    if cu is None:
        return _table(T, None, L, reverse, pieces, of_sequences)[None]
    return jax.vmap(lambda cu: _table(T, cu, L, reverse, pieces, of_sequences))(cu)


# How it is fast: the kernels ----------------------------------------------------------------------
#
# Nothing above this line needs a GPU.
#
# A scan is one launch where batch rows are short, or where batch rows and heads fill the GPU.
# Otherwise `_cut` cuts batch rows in segments, so that one head keeps many processors busy. Then
# the scan takes three launches:
#
#     _states_kernel   sums what each piece of a segment adds to the state: [B, pieces, H, V, K]
#     _link_kernel     overwrites the last piece of each segment with the state that the next
#                      segment starts from. What is left of s0 is not in this state
#     _scan_kernel     scans all segments at once, each from its linked state plus the decayed s0;
#                      _hopper_kernel does so for 16 bits on Hopper
#
# A decode step, the scan of one token, is a launch of _step_kernel. A scan that only wants the
# state is a launch of _states_kernel.
#
# Kernels, save for _step_kernel, hold the state transposed, S^T [V, K]. S^T is then the left
# operand of o^T = S^T q^T as it lies in registers, without a copy through shared memory.
#
# Values above 128 columns are split over programs. Keys above 128 columns are scanned in parts, one
# after another: the scan is linear in the keys, and each part adds to the outputs. A program
# rereads only outputs that its own threads wrote, so no launch depends on what XLA does with the
# memory between launches. An array that a launch may change in place (`_launch`) is passed twice,
# as an input and as an output: a kernel works whether XLA gives it one array or two.

if triton:
    _kernel, _gluon = triton.jit, gluon.jit
    _constant, _layout = tl.constexpr, triton.constexpr_function
else:
    _kernel = _gluon = _constant = _layout = lambda x: x

LOG2_E = _constant(1.4426950408889634)  # kernels take powers of 2
VANISHED = _constant(-150.0)  # 2 to this power is 0 in float32


class _Way(enum.IntFlag):
    """How a kernel scans. Kernels read the bits when they run, so one binary serves every scan.
    They share a number, because four would take registers that the Hopper kernel lacks."""

    REVERSE = 1
    POST = 2  # see `_Op`
    SWAPPED = 4  # linked states were summed with k and v exchanged: they lie as [K, V]
    FINAL_STATE = 8  # the final state is wanted


class _Params(NamedTuple):
    """The numbers that a launch gives its kernel, which reads those that it needs.

    They are one argument, because jax-triton compiles another binary for an argument that is 1,
    but not for a number in a tuple. It takes plain tuples only.
    """

    scale: Any
    way: Any  # bits of `_Way`
    T: Any  # tokens of a batch row
    H: Any  # heads of decays and outputs, which those of the operands divide
    q_heads: Any = 1
    k_heads: Any = 1
    v_heads: Any = 1
    w_heads: Any = 1
    q_stride: Any = 0  # tokens from one batch row to the next; 0 where all share one row
    k_stride: Any = 0
    v_stride: Any = 0
    w_stride: Any = 0
    s0_stride: Any = 0  # initial states from one batch row to the next, or 0
    g_stride: Any = 0  # decays from one batch row to the next, or 0
    sequences: Any = 1  # of a batch row
    length: Any = 0  # tokens of a segment or, in the kernels of states, of a piece
    rows: Any = 1  # rows of work of a batch row, or what `_link_kernel` says of itself
    table_stride: Any = 0  # numbers from one batch row of the table to the next, or 0
    pieces: Any = 0  # of a batch row: those whose states are summed
    pieces_per_segment: Any = 1


class _Work(NamedTuple):
    """What one program handles: two tiles, a head, a batch row, a row of work, and what `_Row` says
    of that row."""

    v_tile: Any
    k_tile: Any
    h: Any
    b: Any
    row: Any
    first: Any
    tokens: Any
    valid: Any
    sequence: Any
    before: Any
    after: Any
    slot: Any


@_kernel
def _switches(way):
    """The bits of `_Way`, each 0 or 1."""
    # One `&` and three `%`: by such details ptxas places spills and loads. With four `%` head dims
    # above 128 take longer, with four `&` short sequences in float32.
    return way & 1, way // 2 % 2, way // 4 % 2, way // 8 % 2


@_kernel
def _find_work(
    table,
    p,
    k_tiles,
    v_tiles,
    reverse,
    PACKED: tl.constexpr,
    LINKED: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """The `_Work` of this program. A pack loads its row from the table. A plain batch computes the
    row, which saves a launch and a load; if nothing is linked, a batch row is one row of work.
    Consecutive programs share tokens or, if ROWS_FIRST, a head."""
    i = tl.program_id(0)
    v_tile, i = i % v_tiles, i // v_tiles
    k_tile, i = i % k_tiles, i // k_tiles
    rows = p.rows if PACKED or LINKED else 1
    if ROWS_FIRST:
        row, i = i % rows, i // rows
        h, b = i % p.H, (i // p.H).to(tl.int64)
    else:
        h, i = i % p.H, i // p.H
        row, b = i % rows, (i // rows).to(tl.int64)
    if PACKED:
        at = table + b * p.table_stride + row * 7
        first, tokens, valid = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        sequence, before, after = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
        slot = tl.load(at + 6)
    else:
        tokens = tl.minimum(p.T - row * p.length, p.length)
        first = row * p.length + reverse * (p.T - tokens - 2 * row * p.length)
        valid, sequence, before, after, slot = tokens, 0, row, rows - 1 - row, row
    return _Work(v_tile, k_tile, h, b, row, first, tokens, valid, sequence, before, after, slot)


@_kernel
def _bits_per_token(g, work, p):
    """The log decay of the program's head to base 2."""
    return (tl.load(g + work.b * p.g_stride + work.h) * LOG2_E).to(tl.float32)


@_kernel
def _first_token(work, stride, heads, p):
    """The place of the program's first token and head in an operand with this stride from one batch
    row to the next, counted in heads."""
    return (work.b * stride + work.first) * heads + work.h // (p.H // heads)


@_kernel
def _state(work, stride, p):
    """The place of the program's sequence and head, counted in states."""
    return (work.b * stride + work.sequence) * p.H + work.h


@_kernel
def _scales(scale, post):
    """The scales of queries that read the state, and of keys that enter it."""
    return 1.0 if post > 0 else scale, scale if post > 0 else 1.0


@_kernel
def _query_decays(g2, scale_q, scale, far, rank, post):
    """How a chunk decays scores, at the distances `far` from key to query, and what queries read of
    the state, at their ranks."""
    D = tl.where(far >= 0, tl.exp2(g2 * tl.maximum(far, 0)) * scale, 0.0)
    return D, tl.exp2(g2 * (rank + 1 - post)) * scale_q


@_kernel
def _key_decays(g2, scale_k, tokens, rank, post):
    """How a chunk of so many tokens decays what its keys add to the state."""
    return tl.exp2(g2 * tl.maximum(tokens - 1 - rank + post, 0)) * scale_k


@_kernel
def _enter(
    S,
    linked,
    s0,
    ck,
    cv,
    work,
    swapped,
    g_length,
    K: tl.constexpr,
    V: tl.constexpr,
    LINKED: tl.constexpr,
    HAS_S0: tl.constexpr,
):
    """S^T [BV, BK] plus the state at the start of a segment: the linked state of the segments
    before it, and the decayed initial state. `ck` and `cv` are its columns of keys and values."""
    inside = (ck < K) & (cv < V)
    state = ck * V + cv
    if LINKED:
        if work.before > 0:
            if swapped > 0:
                S += tl.load(linked + state, mask=inside, other=0.0)
            else:
                S += tl.load(linked + (cv * K + ck), mask=inside, other=0.0)
    if HAS_S0:
        # the initial state of a sequence without valid tokens may hold anything
        if tl.where(work.valid > 0, work.sequence, -1) >= 0:
            initial = tl.load(s0 + state, mask=inside, other=0.0)
            S += tl.exp2(g_length * work.before) * initial
    return S


@_kernel
def _leave(
    S, s, s0, ck, cv, work, final_state, K: tl.constexpr, V: tl.constexpr, HAS_S0: tl.constexpr
):
    """Stores S^T as the final state, if it is that of a sequence and is wanted."""
    inside = (ck < K) & (cv < V)
    state = ck * V + cv
    if (work.after == 0) & (final_state > 0):
        if work.sequence >= 0:
            if HAS_S0:
                if work.valid <= 0:  # it ends with what it starts from, whatever that holds
                    S = tl.load(s0 + state, mask=inside, other=0.0)
            tl.store(s + state, S, mask=inside)


@_kernel
def _load(x, t, valid, stride, column, C: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr):
    """Rows t .. t+C and columns column .. column+BD of x, whose rows are `stride` apart, as
    [C, BD]: 0 outside of [valid, DIM]."""
    row, col = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    inside = (t + row >= 0) & (t + row < valid)
    if DIM % BD != 0:
        inside = inside & (column + col < DIM)
    at = x + (t.to(tl.int64) * stride + column) + row * stride + col
    return tl.load(at, mask=inside, other=0.0)


@_kernel
def _states_kernel(
    k,
    v,
    g,
    table,
    states,
    params,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S^T = sum_j e^{g(L-1-j)} v_j k_j^T over a piece of L tokens (post: e^{g(L-j)}, and scaled).

    Chunks whose tokens all weigh 0 in float32 at the end of the piece are skipped. A piece whose
    sum vanishes before the end of its segment is not written. For most heads most pieces are such.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    reverse, post, _, _ = _switches(p.way)
    turn = 1 - 2 * reverse
    # by the formula the first heads forget least and take longest: ROWS_FIRST starts them first
    work = _find_work(table, p, NK, NV, reverse, PACKED, LINKED=True, ROWS_FIRST=True)
    g2 = _bits_per_token(g, work, p)
    pieces_after = p.pieces_per_segment - 1 - work.before % p.pieces_per_segment
    if work.tokens < 0 or g2 * p.length * pieces_after <= VANISHED:
        return
    k += _first_token(work, p.k_stride, p.k_heads, p) * K
    v += _first_token(work, p.v_stride, p.v_heads, p) * V
    k_column, v_column = work.k_tile * BK, work.v_tile * BV
    rank = (C - 1) * reverse + turn * tl.arange(0, C)
    _, scale_k = _scales(p.scale, post)
    chunks = (work.tokens + C - 1) // C
    live = tl.ceil(1.0 / tl.minimum(g2, -1e-6) * VANISHED / C) + 1
    live = tl.minimum(live, chunks * 1.0).to(tl.int32)
    S = tl.full([BV, BK], 0.0, tl.float32)
    for c in range(chunks - live, chunks):
        m = tl.minimum(work.tokens - c * C, C)
        t = (work.tokens - C) * reverse + turn * C * c
        ks = _load(k, t, work.valid, p.k_heads * K, k_column, C, K, BK)
        vs = _load(v, t, work.valid, p.v_heads * V, v_column, C, V, BV)
        ek = _key_decays(g2, scale_k, m, rank, post)
        vw = tl.trans((vs * ek[:, None]).to(vs.dtype))  # [BV, C]
        S = tl.dot(vw, ks, S * tl.exp2(g2 * m), input_precision=PRECISION)  # [BV, C] x [C, BK]
    ck = k_column + tl.arange(0, BK)[None, :]
    cv = v_column + tl.arange(0, BV)[:, None]
    states += ((work.b * p.rows + work.row) * p.H + work.h) * K * V
    tl.store(states + cv * K + ck, S, mask=(ck < K) & (cv < V))


@_kernel
def _link_kernel(
    states,
    g,
    table,
    linked,
    params,
    PIECES: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Writes the state that the next segment starts from, at the last piece of each segment. Along
    a sequence, S' = e^{g L M} S + sum_j e^{g L (M-1-j)} z_j over the M = PIECES of a segment, which
    have L tokens each and the states z_j. A program handles BE of the E numbers of a state. A plain
    batch row is one walk. In a pack any segment may begin a walk: `rows` counts the segments."""
    NE: tl.constexpr = (E + BE - 1) // BE
    p = _Params(*params)
    i = tl.program_id(0)
    tile, i = i % NE, i // NE
    h, i = i % p.H, i // p.H
    row, b = i % p.rows * PIECES, (i // p.rows).to(tl.int64)
    segments = p.pieces // PIECES
    if PACKED:  # only the program of a sequence's first segment walks
        at = table + b * p.table_stride + row * 7
        tokens, before, after = tl.load(at + 1), tl.load(at + 4), tl.load(at + 5)
        segments = tl.where((tokens < 0) | (before > 0), 0, (after + 1) // PIECES)
    g_length = (tl.load(g + b * p.g_stride + h) * LOG2_E).to(tl.float32) * p.length
    same = states.to(tl.int64, bitcast=True) == linked.to(tl.int64, bitcast=True)
    if (g_length <= VANISHED) & same:
        return  # nothing survives a piece: the last pieces have the linked states as they are
    j, e = tl.arange(0, PIECES)[:, None], tile * BE + tl.arange(0, BE)
    offset = ((b * p.pieces + row) * p.H + h) * E
    stride = tl.full([], p.H * E, tl.int64)
    S = tl.full([BE], 0.0, tl.float32)
    # num_stages loads later segments ahead, which is safe: no place is loaded after it is stored
    for _ in tl.range(0, segments, num_stages=3):
        written = g_length * (PIECES - 1 - j) > VANISHED
        places = states + offset + j * stride + e[None, :]
        z = tl.load(places, mask=(e[None, :] < E) & written, other=0.0)  # [PIECES, BE]
        offset += (PIECES - 1) * stride
        S = S * tl.exp2(g_length * PIECES) + tl.sum(z * tl.exp2(g_length * (PIECES - 1 - j)), 0)
        tl.store(linked + offset + e, S, mask=e < E)
        offset += stride


@_kernel
def _scan_kernel(
    q,
    k,
    v,
    g,
    s0,
    linked,
    table,
    s,
    o,
    params,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    LINKED: tl.constexpr,
    HAS_S0: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scan of one segment, for one head and BV of the V columns of values, chunk by chunk:

        o_i = scale (e^{g(i+1)} q_i S + sum_{j<=i} e^{g(i-j)} (q_i.k_j) v_j)
        S' = e^{g m} S + sum_j e^{g(m-1-j)} k_j v_j^T

    i and j are ranks, and m the tokens of the chunk. Post: e^{g i} q_i S and e^{g(m-j)} k_j v_j^T,
    where the scale is of what enters S. If K > BK, the keys' columns are scanned in parts of BK.

    `_table` keeps rows inside of the tokens, whatever cu holds. Loads outside of a row return 0,
    and stores are masked."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    reverse, post, swapped, final_state = _switches(p.way)
    turn = 1 - 2 * reverse
    work = _find_work(table, p, 1, NV, reverse, PACKED, LINKED, ROWS_FIRST=False)
    if work.tokens < 0:
        return
    g2 = _bits_per_token(g, work, p)
    q += _first_token(work, p.q_stride, p.q_heads, p) * K
    k += _first_token(work, p.k_stride, p.k_heads, p) * K
    v += _first_token(work, p.v_stride, p.v_heads, p) * V
    o += ((work.b * p.T + work.first) * p.H + work.h) * V
    s0 += _state(work, p.s0_stride, p) * K * V
    s += _state(work, p.sequences, p) * K * V
    last_piece = work.b * p.pieces + work.slot * p.pieces_per_segment - 1
    linked += (last_piece * p.H + work.h) * K * V

    rank = (C - 1) * reverse + turn * tl.arange(0, C)
    scale_q, scale_k = _scales(p.scale, post)
    far = rank[None, :] - rank[:, None]  # [j, i]
    D, eq = _query_decays(g2, scale_q, p.scale, far, rank, post)
    v_column = work.v_tile * BV
    row, col = tl.arange(0, C)[:, None], v_column + tl.arange(0, BV)[None, :]
    for part in range(NK):
        k_column = part * BK
        ck = k_column + tl.arange(0, BK)[None, :]
        cv = v_column + tl.arange(0, BV)[:, None]
        S = tl.full([BV, BK], 0.0, tl.float32)
        S = _enter(S, linked, s0, ck, cv, work, swapped, g2 * p.length, K, V, LINKED, HAS_S0)
        for c in range((work.tokens + C - 1) // C):
            m = tl.minimum(work.tokens - c * C, C)
            t = (work.tokens - C) * reverse + turn * C * c
            qs = _load(q, t, work.valid, p.q_heads * K, k_column, C, K, BK)
            ks = _load(k, t, work.valid, p.k_heads * K, k_column, C, K, BK)
            vs = _load(v, t, work.valid, p.v_heads * V, v_column, C, V, BV)
            qt = tl.trans(qs)
            P = tl.dot(ks, qt, input_precision=PRECISION) * D  # [C, BK] x [BK, C]
            # [BV, BK] x [BK, C] + [BV, C] x [C, C]
            O = tl.dot(S.to(qs.dtype), qt, input_precision=PRECISION) * eq[None, :]
            O = tl.dot(tl.trans(vs), P.to(vs.dtype), O, input_precision=PRECISION)
            O = tl.trans(O)
            at = o + t.to(tl.int64) * (p.H * V) + row * (p.H * V) + col
            mine = (t + row >= 0) & (t + row < work.tokens) & (col < V)
            if NK > 1:
                O += tl.load(at, mask=mine & (part > 0), other=0.0).to(tl.float32)
            tl.store(at, O.to(vs.dtype), mask=mine)
            ek = _key_decays(g2, scale_k, m, rank, post)
            vw = tl.trans((vs * ek[:, None]).to(vs.dtype))
            S = tl.dot(vw, ks, S * tl.exp2(g2 * m), input_precision=PRECISION)  # [BV, C] x [C, BK]
        _leave(S, s, s0, ck, cv, work, final_state, K, V, HAS_S0)
        if NK > 1:
            tl.debug_barrier()  # threads reread outputs that others of the program wrote


# The same scan for 16-bit operands on Hopper, in Gluon. Triton waits for each product, and for each
# copy through shared memory, before it starts the next. This kernel overlaps them. Its schedule,
# for one chunk:
#
#     copies    The tensor memory accelerator fills a ring of STAGES >= 2 buffers, and runs up to
#               STAGES - 1 chunks ahead. An mbarrier per buffer says when the buffer is full. The
#               buffer of a chunk is filled again during the next chunk, after a `gl.barrier` that a
#               warp reaches only when it has waited for the products of the chunk.
#     products  scores P = k q^T and what queries read of the state, O = S^T q^T, start together. O
#               is summed while P is decayed and stored; then O += v^T P and S' = e^{g m} S + v^T k
#               start together.
#     outputs   O is transposed in shared memory, so that stores are coalesced, and stored while S'
#               is summed.
#
# Each warp owns 16 rows of S^T, o^T and y^T. DUAL: the kernel also scans with the transposed state,
# which it has anyway: w reads y, where k and v change places. One square tile must then hold all of
# K and V, and registers do not suffice to read S^T: a copy in shared memory is read.
#
# What limits it, for C = 64, a tile of 128 x 128 and 256 threads: registers, 64 of S, 32 of O, 16
# each of P and D, and copies of them in 16 bits; and shared memory, of which Hopper has 227 KiB:
# 8 bytes for each mbarrier, and 2 bytes for each of
# STAGES C (2 BK + BV) + C C + C BV numbers or, if DUAL,
# STAGES C (2 BK + 2 BV) + BK BV + 2 C C + C (BK + BV). The emulator in the test file sees no race
# between warps, no type and no limit: compile a change, and run it on a GPU under
# compute-sanitizer.


class _Four(NamedTuple):
    """A value per operand: w has that of v where no w is given."""

    q: Any
    k: Any
    v: Any
    w: Any


@_gluon
def _fetch(arrays, buffers, full, stage, t, rows, heads, k_column, v_column, DUAL: gl.constexpr):
    """Starts the copies of the chunk at t of the segment. The barrier counts their bytes."""
    bar = full.index(stage)
    bytes_qk: gl.constexpr = arrays.q.nbytes_per_cta + arrays.k.nbytes_per_cta
    bytes_vw: gl.constexpr = arrays.v.nbytes_per_cta + (arrays.w.nbytes_per_cta if DUAL else 0)
    hopper.mbarrier.expect(bar, bytes_qk + bytes_vw)
    q_at, k_at = [rows.q + t, heads.q, k_column], [rows.k + t, heads.k, k_column]
    v_at, w_at = [rows.v + t, heads.v, v_column], [rows.w + t, heads.w, v_column]
    hopper.tma.async_load(arrays.q, q_at, bar, buffers.q.index(stage))
    hopper.tma.async_load(arrays.k, k_at, bar, buffers.k.index(stage))
    hopper.tma.async_load(arrays.v, v_at, bar, buffers.v.index(stage))
    if DUAL:
        hopper.tma.async_load(arrays.w, w_at, bar, buffers.w.index(stage))


@_gluon
def _decayed_values(vs, ek, dtype: gl.constexpr, layout: gl.constexpr):
    """v^T [BV, C] in registers, as it is and with the decay of each key."""
    vt = vs.permute((1, 0)).load(layout)
    return vt, (vt.to(gl.float32) * ek[None, :]).to(dtype)


@_gluon
def _multiply(x, scores, S, D, eq, ek, eS, LO: gl.constexpr, LP: gl.constexpr, PARTS: gl.constexpr):
    """Starts the products of a chunk. o^T and S'^T are still being summed when it returns, in this
    order. It returns their operands in registers as well, which must live until the wait."""
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
    if PARTS:  # the outputs of earlier parts fill registers: waiting here frees those of Sb for v
        O, Sb = hopper.warpgroup_mma_wait(0, [O, Sb])
    vt, vw = _decayed_values(x.v, ek, dtype, AS)
    vt = gl.convert_layout(vt, AO)
    O, Sb = hopper.warpgroup_mma_wait(0, [O, Sb])  # before O is scaled
    gl.barrier()  # all warps have stored their scores (the compiler fences them)
    O = hopper.warpgroup_mma(vt, scores, O * eq[None, :], is_async=True)  # [BV, C] x [C, C]
    S = hopper.warpgroup_mma(vw, x.k, S * eS, is_async=True)  # [BV, C] x [C, BK]
    return O, vt, S, vw


@_gluon
def _multiply_dual(x, scores, w_scores, Sb, S, D, eq, ek, eS, LO: gl.constexpr, LP: gl.constexpr):
    """`_multiply` for both scans: o^T, y^T and S'^T are still being summed when it returns. The
    state is read from shared memory, Sb."""
    C: gl.constexpr = x.k.shape[0]
    BV: gl.constexpr = x.v.shape[1]
    dtype: gl.constexpr = x.k.dtype
    AS: gl.constexpr = gl.DotOperandLayout(0, S.type.layout, 2)
    qt = x.q.permute((1, 0))
    wt = x.w.permute((1, 0))
    zero_p = gl.full([C, C], 0.0, gl.float32, LP)
    zero_o = gl.full([BV, C], 0.0, gl.float32, LO)
    P = hopper.warpgroup_mma(x.k, qt, zero_p, use_acc=False, is_async=True)  # [C, BK] x [BK, C]
    O = hopper.warpgroup_mma(Sb, qt, zero_o, use_acc=False, is_async=True)  # [BV, BK] x [BK, C]
    P = hopper.warpgroup_mma_wait(1, [P])  # O is still being summed
    scores.store((P * D).to(dtype))
    P = hopper.warpgroup_mma(x.v, wt, zero_p, use_acc=False, is_async=True)  # [C, BV] x [BV, C]
    St = Sb.permute((1, 0))
    Y = hopper.warpgroup_mma(St, wt, zero_o, use_acc=False, is_async=True)  # [BK, BV] x [BV, C]
    O, P = hopper.warpgroup_mma_wait(1, [O, P])  # Y is still being summed
    w_scores.store((P * D).to(dtype))
    _, vw = _decayed_values(x.v, ek, dtype, AS)
    gl.barrier()  # all warps have stored their scores (the compiler fences them)
    vt, kt = x.v.permute((1, 0)), x.k.permute((1, 0))
    O = hopper.warpgroup_mma(vt, scores, O * eq[None, :], is_async=True)  # [BV, C] x [C, C]
    Y = hopper.warpgroup_mma_wait(1, [Y])  # before Y is scaled; O is being summed again
    Y = hopper.warpgroup_mma(kt, w_scores, Y * eq[None, :], is_async=True)  # [BK, C] x [C, C]
    S = hopper.warpgroup_mma(vw, x.k, S * eS, is_async=True)  # [BV, C] x [C, BK]
    return O, Y, S, vw


@_layout
def _coalesced(BD, WARPS):
    """How WARPS warps hold [C, BD] such that whole rows are loaded and stored."""
    return gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [WARPS, 1], [1, 0])


@_gluon
def _places(
    x,
    t,
    valid,
    stride,
    column,
    DIM: gl.constexpr,
    C: gl.constexpr,
    BD: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Pointers to rows t .. t+C and columns column .. column+BD of x, whose rows are `stride`
    apart, as [C, BD], and a mask of those inside [valid, DIM]."""
    layout: gl.constexpr = _coalesced(BD, WARPS)
    row = t + gl.arange(0, C, gl.SliceLayout(1, layout))[:, None]
    col = column + gl.arange(0, BD, gl.SliceLayout(0, layout))[None, :]
    return x + row.to(gl.int64) * stride + col, (row >= 0) & (row < valid) & (col < DIM)


@_gluon
def _read(
    x,
    t,
    valid,
    stride,
    column,
    DIM: gl.constexpr,
    C: gl.constexpr,
    BD: gl.constexpr,
    WARPS: gl.constexpr,
):
    """What lies at `_places`, or 0 outside."""
    at, inside = _places(x, t, valid, stride, column, DIM, C, BD, WARPS)
    return gl.load(at, mask=inside, other=0.0)


@_gluon
def _clear(x, t, valid, WARPS: gl.constexpr):
    """Sets rows of a chunk in shared memory, which starts at t, to 0 outside of 0 .. valid."""
    C: gl.constexpr = x.shape[0]
    layout: gl.constexpr = _coalesced(x.shape[1], WARPS)
    row = t + gl.arange(0, C, gl.SliceLayout(1, layout))[:, None]
    chunk = x.load(layout)
    x.store(gl.where((row >= 0) & (row < valid), chunk, 0.0))


@_gluon
def _put(
    o,
    buffer,
    O,
    old,
    t,
    tokens,
    stride,
    column,
    DIM: gl.constexpr,
    WARPS: gl.constexpr,
    ADD: gl.constexpr,
):
    """Stores O^T, plus `old` if ADD, through a buffer [C, BD]."""
    C: gl.constexpr = buffer.shape[0]
    BD: gl.constexpr = buffer.shape[1]
    at, inside = _places(o, t, tokens, stride, column, DIM, C, BD, WARPS)
    buffer.permute((1, 0)).store(O.to(buffer.dtype))
    out = buffer.load(_coalesced(BD, WARPS))
    if ADD:
        out = (out.to(gl.float32) + old.to(gl.float32)).to(out.dtype)
    gl.store(at, out, mask=inside)


@_gluon
def _hopper_kernel(
    qd,
    kd,
    vd,
    wd,
    g,
    s0,
    linked,
    table,
    s,
    o,
    y,
    params,
    K: gl.constexpr,
    V: gl.constexpr,
    BK: gl.constexpr,
    BV: gl.constexpr,
    C: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
    LINKED: gl.constexpr,
    HAS_S0: gl.constexpr,
    DUAL: gl.constexpr,
):
    """The steps of `_scan_kernel`, by the schedule above. qd, kd, vd and wd describe the arrays of
    the operands as [B T, heads, head dim]."""
    WARPS: gl.constexpr = BV // 16  # `_config` launches as many
    # S^T [BV, BK]: 16 rows for each warp
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BK, 16])
    # o^T [BV, C] and y^T [BK, C]
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    # scores [C, C]: a grid of 4 warps along the keys and WARPS / 4 along the queries
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 4 * C // WARPS, 16])
    NK: gl.constexpr = (K + BK - 1) // BK
    NV: gl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    reverse, post, swapped, final_state = _switches(p.way)
    turn = 1 - 2 * reverse
    work = _find_work(table, p, 1, NV, reverse, PACKED, LINKED, ROWS_FIRST=False)
    if work.tokens < 0:
        return
    g2 = _bits_per_token(g, work, p)
    arrays = _Four(qd, kd, vd, wd)
    rows = _Four(
        (work.b * p.q_stride).to(gl.int32) + work.first,
        (work.b * p.k_stride).to(gl.int32) + work.first,
        (work.b * p.v_stride).to(gl.int32) + work.first,
        (work.b * p.w_stride).to(gl.int32) + work.first,
    )
    h = work.h
    heads = _Four(
        h // (p.H // p.q_heads),
        h // (p.H // p.k_heads),
        h // (p.H // p.v_heads),
        h // (p.H // p.w_heads),
    )
    o += ((work.b * p.T + work.first) * p.H + h) * V
    if DUAL:
        y += ((work.b * p.T + work.first) * p.H + h) * K
    s0 += _state(work, p.s0_stride, p) * K * V
    s += _state(work, p.sequences, p) * K * V
    last_piece = work.b * p.pieces + work.slot * p.pieces_per_segment - 1
    linked += (last_piece * p.H + h) * K * V

    dtype: gl.constexpr = qd.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    v_column = work.v_tile * BV
    for part in range(NK):
        k_column = part * BK
        ck = k_column + gl.arange(0, BK, gl.SliceLayout(0, LS))[None, :]
        cv = v_column + gl.arange(0, BV, gl.SliceLayout(1, LS))[:, None]
        S = gl.full([BV, BK], 0.0, gl.float32, LS)
        S = _enter(S, linked, s0, ck, cv, work, swapped, g2 * p.length, K, V, LINKED, HAS_S0)

        # allocated in the loop: `_enter` and `_leave` may move S through the same memory
        qb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], qd.layout)
        kb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], kd.layout)
        vb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], vd.layout)
        scores = gl.allocate_shared_memory(dtype, [C, C], flat)
        out = gl.allocate_shared_memory(dtype, [C, BV], flat)
        wb, Sb, w_scores, y_out = vb, scores, scores, out  # not used without DUAL
        if DUAL:
            wb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], wd.layout)
            Sb = gl.allocate_shared_memory(dtype, [BV, BK], flat)
            w_scores = gl.allocate_shared_memory(dtype, [C, C], flat)
            y_out = gl.allocate_shared_memory(dtype, [C, BK], flat)
        buffers = _Four(qb, kb, vb, wb)
        full = hopper.mbarrier.allocate_mbarrier(batch=STAGES)
        for i in gl.static_range(STAGES):
            hopper.mbarrier.init(full.index(i), count=1)
        hopper.fence_async_shared()  # the copies' hardware sees the barriers
        gl.barrier()
        fetched = (work.valid + C - 1) // C  # chunks of a sequence; of other tokens nothing is read
        t = (work.tokens - C) * reverse  # where the first chunk starts in the segment
        step = turn * C
        for i in range(gl.minimum(fetched, STAGES)):
            _fetch(arrays, buffers, full, i, t + i * step, rows, heads, k_column, v_column, DUAL)

        scale_q, scale_k = _scales(p.scale, post)
        key: gl.constexpr = gl.SliceLayout(1, LP)
        query: gl.constexpr = gl.SliceLayout(0, LP)
        far = turn * (gl.arange(0, C, query)[None, :] - gl.arange(0, C, key)[:, None])  # [j, i]
        first_rank = (C - 1) * reverse
        rank_q = first_rank + turn * gl.arange(0, C, gl.SliceLayout(0, LO))
        keys: gl.constexpr = gl.SliceLayout(0, gl.DotOperandLayout(0, LS, 2))
        rank_k = first_rank + turn * gl.arange(0, C, keys)
        D, eq = _query_decays(g2, scale_q, p.scale, far, rank_q, post)
        ek = gl.exp2(g2 * (C - 1 - rank_k + post)) * scale_k
        eS = gl.exp2(g2 * C)
        c, stage, phase = 0, 0, 0
        while c < (work.tokens + C - 1) // C:  # Triton's pipeliner would make `for` wait
            x = _Four(
                qb.index(stage).reshape([C, BK]),
                kb.index(stage).reshape([C, BK]),
                vb.index(stage).reshape([C, BV]),
                wb.index(stage).reshape([C, BV]),
            )
            if c < fetched:
                hopper.mbarrier.wait(full.index(stage), phase)
            # The copy of a short last chunk brings tokens that are not of the sequence. Where no
            # token is of a sequence nothing was copied, and the buffers hold anything.
            if (c + 1) * C > work.valid:
                _clear(x.q, t, work.valid, WARPS)
                _clear(x.k, t, work.valid, WARPS)
                _clear(x.v, t, work.valid, WARPS)
                if DUAL:
                    _clear(x.w, t, work.valid, WARPS)
                m = gl.minimum(work.tokens - c * C, C)
                ek = _key_decays(g2, scale_k, m, rank_k, post)
                eS = gl.exp2(g2 * m)
            if DUAL:
                # No warp reads Sb now: each waited for Y, and then passed the barrier that the
                # compiler puts between the store and the load of `_put`.
                Sb.store(S.to(dtype))
            hopper.fence_async_shared()  # the products' hardware sees Sb and what was cleared
            gl.barrier()  # every warp is past the chunk before, so its buffer is free
            if (c > 0) & (c - 1 + STAGES < fetched):
                free = (stage + STAGES - 1) % STAGES
                ahead = t + (STAGES - 1) * step
                _fetch(arrays, buffers, full, free, ahead, rows, heads, k_column, v_column, DUAL)
            old = S  # not read where NK is 1
            if NK > 1:
                written = work.tokens * gl.minimum(part, 1)  # by the parts before
                old = _read(o, t, written, p.H * V, v_column, V, C, BV, WARPS)
            if DUAL:
                O, Y, S, vw = _multiply_dual(x, scores, w_scores, Sb, S, D, eq, ek, eS, LO, LP)
                O = hopper.warpgroup_mma_wait(2, [O])
                _put(o, out, O, old, t, work.tokens, p.H * V, v_column, V, WARPS, False)
                Y = hopper.warpgroup_mma_wait(1, [Y])
                _put(y, y_out, Y, old, t, work.tokens, p.H * K, 0, K, WARPS, False)
            else:
                O, vt, S, vw = _multiply(x, scores, S, D, eq, ek, eS, LO, LP, NK > 1)
                O, vt = hopper.warpgroup_mma_wait(1, [O, vt])
                _put(o, out, O, old, t, work.tokens, p.H * V, v_column, V, WARPS, NK > 1)
            S, vw = hopper.warpgroup_mma_wait(0, [S, vw])
            t += step
            c += 1
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        _leave(S, s, s0, ck, cv, work, final_state, K, V, HAS_S0)
        if NK > 1:
            gl.barrier()  # every warp is past the part: its outputs are read again
            for i in gl.static_range(STAGES):
                hopper.mbarrier.invalidate(full.index(i))


@_kernel
def _step_kernel(
    q,
    k,
    v,
    g,
    s0,
    s,
    o,
    params,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_S0: tl.constexpr,
):
    """`_scan_kernel` for sequences of one token (decoding): no matrix products, and the state is
    read and written once. s may be s0."""
    NV: tl.constexpr = (V + BV - 1) // BV
    p = _Params(*params)
    _, post, _, final_state = _switches(p.way)
    i = tl.program_id(0)
    tile, i = i % NV, i // NV
    h, b = i % p.H, (i // p.H).to(tl.int64)
    decay = tl.exp(tl.load(g + b * p.g_stride + h))
    ck, cv = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    q += (b * p.q_stride * p.q_heads + h // (p.H // p.q_heads)) * K
    k += (b * p.k_stride * p.k_heads + h // (p.H // p.k_heads)) * K
    v += (b * p.v_stride * p.v_heads + h // (p.H // p.v_heads)) * V
    qs = tl.load(q + ck, mask=ck < K, other=0.0).to(tl.float32)
    ks = tl.load(k + ck, mask=ck < K, other=0.0).to(tl.float32)
    vs = tl.load(v + cv, mask=cv < V, other=0.0).to(tl.float32)
    at = ck[:, None] * V + cv[None, :]
    inside = (ck < K)[:, None] & (cv < V)[None, :]
    scale_q, scale_k = _scales(p.scale, post)
    S = ks[:, None] * (vs * scale_k)[None, :]  # [BK, BV]
    if HAS_S0:
        s0 += (b * p.s0_stride * p.H + h) * K * V
        S += tl.load(s0 + at, mask=inside, other=0.0) * (1.0 if post > 0 else decay)
    out = tl.sum(qs[:, None] * S, 0) * scale_q
    tl.store(o + (b * p.H + h) * V + cv, out.to(o.dtype.element_ty), mask=cv < V)
    if final_state > 0:
        s += (b * p.H + h) * K * V
        tl.store(s + at, S * (decay if post > 0 else 1.0), mask=inside)


# Their plan: pure functions of shapes -------------------------------------------------------------

STATES_CHUNK = 64  # tokens per chunk of `_states_kernel`
HOPPER_CHUNK = 64  # tokens per chunk of `_hopper_kernel`: `_config`'s stages and residents fit it
SEGMENT = 512  # tokens that a segment has at least: its state must cost less than they do
# KiB of shared memory per program
_SHARED_MEMORY = {
    "sm_80": 163,
    "sm_87": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
}


@dataclasses.dataclass(frozen=True)
class _Config:
    """How the scan is launched. `_config` alone chooses it; `bench.py --tune` measures what it
    should choose."""

    kernel: Any  # `_hopper_kernel` or `_scan_kernel`
    C: int  # tokens per chunk: at least 16, for the matrix units
    BK: int  # columns of queries and keys per program
    BV: int  # columns of values per program
    num_warps: int
    num_stages: int  # chunks in flight, the one in use included
    residents: int  # resident programs per processor
    states_BK: int  # key columns per program of `_states_kernel`, beside 64 value columns
    states_stages: int  # chunks in flight there


def _config(arch, processors, K, V, dtype, B, H, T, n, dual):
    """The launch configuration for B rows of T tokens in n sequences each, and H heads of head dims
    K and V. S^T is at most [128, 128], to fit in registers. `dual`: for both scans of one state. If
    the tile is not square or does not hold K and V, `_scan_triton` makes two scans instead."""
    shared = _SHARED_MEMORY.get(arch, 64 if arch.startswith("gfx") else 99)
    itemsize, length = dtype.itemsize, -(-T // n)
    BK, BV = min(_block(K), 128), min(_block(V), 128)
    states_BK = 256 // itemsize  # whole rows of 256 bytes
    # a chunk in flight has tiles of keys and 64 values; 32 columns more pass through shared memory
    states_stages = min(4, shared * 1024 // (STATES_CHUNK * (states_BK + 64 + 32) * itemsize))

    def narrow(BV, least, longest):
        """Fewer values per program, where T is at most `longest` and the GPU holds all programs
        that this makes. That costs less than the states between segments."""
        while T <= longest and BV > least and 2 * B * n * H * -(-V // BV) <= processors:
            BV //= 2
        return BV

    # descriptors want rows of multiples of 16 bytes; short sequences waste most of a chunk
    half = HOPPER_CHUNK // 2
    fits = K % 8 == V % 8 == 0 and T >= HOPPER_CHUNK and length >= half and B * T < 2**31
    if arch == "sm_90" and itemsize == 2 and fits:
        if _HAS_HOPPER:
            BK = max(BK, 64)
            BV = narrow(max(BV, 64), 64, 2 * SEGMENT - 1 if dual else 4 * SEGMENT)
            stages = 2 if dual else 4
            residents = 2 if BK == BV == 64 else 1  # by shared memory
            return _Config(
                kernel=_hopper_kernel,
                C=HOPPER_CHUNK,
                BK=BK,
                BV=BV,
                num_warps=BV // 16,  # 16 rows for each warp
                num_stages=stages,
                residents=residents,
                states_BK=states_BK,
                states_stages=states_stages,
            )
        warnings.warn(
            "lightning_attn: this Hopper GPU runs the Triton kernel, which takes longer than the "
            "one in Gluon, because that cannot run: found triton "
            f"{triton.__version__}. It needs: pip install 'triton{_HOPPER}'"
        )

    def fit(C, BV, stages):
        """Whether tiles in flight, and what passes through shared memory, fit there."""
        return (stages * C * (2 * BK + BV) + C * max(C, 2 * BV)) * itemsize <= (shared - 4) * 1024

    BV = narrow(BV, 32, 2 * SEGMENT - 1)
    C = 16 if length <= 16 else 32 if length <= 32 or itemsize == 4 else 64
    tiles = itertools.product((BV, 64, 32, 16), (64, 32, 16), (2, 1))
    BV, C, stages = next(
        (b, c, stages) for b, c, stages in tiles if b <= BV and c <= C and fit(c, b, stages)
    )
    # for short sequences, two programs of 4 warps at once beat one of 8
    warps = 8 if BK * BV > 64 * 64 and C > 16 else 4
    return _Config(
        kernel=_scan_kernel,
        C=C,
        BK=BK,
        BV=BV,
        num_warps=warps,
        num_stages=1 if length <= C else stages,
        residents=1,
        states_BK=states_BK,
        states_stages=states_stages,
    )


def _block(d):
    return max(16, 1 << (d - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How sequences are cut in segments, and segments in pieces. Without pieces, no segment follows
    another."""

    segment: int  # tokens
    piece: int  # tokens
    pieces_per_segment: int
    pieces: int  # of a batch row: those of segments that another one follows; all if `only_state`
    BK: int  # the tile of `_states_kernel`
    BV: int


def _cut(config, processors, itemsize, B, H, T, K, V, states_K, states_V, only_state):
    """The `_Cut` of B rows of T tokens, for head dims K and V. `_states_kernel` sees them as
    `states_K` and `states_V`, which may be swapped."""
    programs = B * H * -(-V // config.BV)
    # pieces whose states take a seventh of the memory of q, k, v and o; the last segment has none
    room = itemsize * T * (K + V) // (14 * K * V)
    # as many segments as fill the GPU
    segments = max(1, min(processors * config.residents // programs, T // SEGMENT, 1 + room))
    BK, BV = min(_block(states_K), config.states_BK), min(_block(states_V), 64)
    tiles = -(-states_K // BK) * -(-states_V // BV)
    # Many pieces, so that many programs at once sum the states of a head that never forgets: of
    # other heads most pieces vanish. A power of two, because `tl.arange` counts a segment's pieces.
    pieces = min(
        8,
        3 * processors // (B * segments * tiles),
        2 * T // (segments * SEGMENT),
        room // max(1, segments - 1),
    )
    pieces = 1 << max(1, pieces).bit_length() - 1
    piece = -(-T // (segments * pieces * config.C)) * config.C
    if only_state:  # the last segment's state is wanted as well
        return _Cut(piece, piece, 1, _row_count(T, 1, piece), BK, BV)
    rows = _row_count(T, 1, piece, pieces)
    return _Cut(piece * pieces, piece, pieces, rows, BK, BV)


def _precision(op, arch):
    """Triton's name for `jax.default_matmul_precision`, which names algorithms too. Names that are
    not listed here ask for more than one pass of TF32."""
    if arch.startswith("gfx"):
        return "ieee"
    fast = "default", "bfloat16", "tensorfloat32", "F16_F16_F16", "F16_F16_F32"
    fast += "BF16_BF16_BF16", "BF16_BF16_F32", "TF32_TF32_F32"
    asked = op.precision
    return "tf32" if asked is None or asked in fast or asked.startswith("ANY_F8") else "tf32x3"


# Their launch -------------------------------------------------------------------------------------


@functools.cache
def _gpu():
    """Architecture and number of processors of the first GPU; None where there is none."""
    try:
        gpu = jax.devices("gpu")[0]
        arch = gpu.compute_capability
        arch = arch.split(":")[0] if arch.startswith("gfx") else "sm_" + arch.replace(".", "")
        return arch, gpu.core_count
    except RuntimeError:
        return None


def _launch(kernel, *arrays, out, programs, params, in_place=None, **arguments):
    """Launches a kernel and returns its outputs, which are like `out`. `in_place` {input: output}
    are arrays that XLA may give the same memory."""
    call = functools.partial(
        jax_triton.triton_call,
        kernel=kernel,
        out_type=out,
        grid=(programs,),
        params=tuple(params),
        # Triton 3.9 warns where this is left out, and 3.10 is to change what it stands for then
        backend_options={"enable_fp_fusion": True},
        **arguments,
    )
    return _in_place(call, arrays, in_place) if in_place else call(*arrays)


def _in_place(call, arrays, in_place):
    """call(*arrays), of which XLA may give `in_place` {input: output} the same memory."""
    # jax-triton would pass such an array once. That is wrong where XLA gives the output other
    # memory after all: the output of a call in a loop that stacks outputs is a row of the stack. So
    # the call is traced with separate outputs, and only its lowering learns of the sharing.
    jaxpr, out = jax.make_jaxpr(call, return_shape=True)(*arrays)
    (eqn,) = jaxpr.eqns
    operands = dict(zip(jaxpr.jaxpr.invars, arrays, strict=True))
    aliases = type(eqn.params["input_output_aliases"])(in_place)
    results = eqn.primitive.bind(
        *map(operands.get, eqn.invars), **eqn.params | {"input_output_aliases": aliases}
    )
    return jax.tree.unflatten(jax.tree.structure(out), results)


def _params(op, B, q, k, v, w, g, s0, sequences, swapped):
    """The `_Params` of a scan that do not depend on how it is cut."""
    T, H = q.shape[1], g.shape[1]
    way = _Way.REVERSE * op.reverse | _Way.POST * op.post
    way |= _Way.SWAPPED * swapped | _Way.FINAL_STATE * op.final_state
    w = v if w is None else w
    return _Params(
        scale=float(op.scale),
        way=int(way),
        T=T,
        H=H,
        q_heads=q.shape[2],
        k_heads=k.shape[2],
        v_heads=v.shape[2],
        w_heads=w.shape[2],
        q_stride=_tokens_apart(q, B),
        k_stride=_tokens_apart(k, B),
        v_stride=_tokens_apart(v, B),
        w_stride=_tokens_apart(w, B),
        s0_stride=sequences if s0 is not None and s0.shape[0] == B else 0,
        g_stride=H if g.shape[0] > 1 else 0,
        sequences=sequences,
    )


def _tokens_apart(x, B):
    """How many tokens lie between the rows of x [B | 1, T, H, D]: 0 where all rows share it."""
    return x.shape[1] if x.shape[0] == B else 0


def _rows_of_work(op, params, cu, length, rows, pieces=0):
    """The table of work in rows of `length` tokens and the parameters that describe the table. A
    plain batch has no table, and `rows` rows."""
    if cu is None:
        return None, params._replace(length=length, rows=rows)
    table = _tables(params.T, cu, length, op.reverse, pieces)
    batch_rows, rows, columns = table.shape
    stride = rows * columns if batch_rows > 1 else 0
    return table, params._replace(length=length, rows=rows, table_stride=stride)


def _scan_triton(op, q, k, v, g, s0, cu, w=None, swapped=False):
    """The scan by kernels; results as `_scan`'s. `swapped`: the states of segments are summed with
    k and v exchanged. Where K = V, the states of a scan and of its transpose then are equal
    launches, of which XLA makes one."""
    (T, _, K), V, H = q.shape[1:], v.shape[3], g.shape[1]
    B, n = _batch(q, k, v, g, s0, cu, w), 1 if cu is None else cu.shape[1] - 1
    arch, processors = _gpu() or ("sm_80", 108)  # traced, and never lowered, where there is no GPU
    config = _config(arch, processors, K, V, q.dtype, B, H, T, n, w is not None)
    one_tile = max(K, V) <= config.BK == config.BV
    if w is not None and not (config.kernel is _hopper_kernel and one_tile):
        stateless = dataclasses.replace(op, final_state=False)
        # each of the two scans is to have the rows of both, q's and w's
        g = g if q.shape[0] == w.shape[0] else jnp.broadcast_to(g, (B, H))
        o, s, _ = _scan_triton(op, q, k, v, g, s0, cu)
        y, *_ = _scan_triton(stateless, w, v, k, g, _transposed(s0), cu, swapped=True)
        return o, s, y

    params = _params(op, B, q, k, v, w, g, s0, n, swapped)
    if T == 1 and cu is None and not op.only_state:
        return _launch_step(op, params, B, q, k, v, g, s0)
    states_of = (v, k) if swapped else (k, v)
    states_K, states_V = (x.shape[3] for x in states_of)
    itemsize = q.dtype.itemsize
    cut = _cut(config, processors, itemsize, B, H, T, K, V, states_K, states_V, op.only_state)
    precision = _precision(op, arch)
    linked = g  # stands for an array that no kernel touches, here and below
    if cut.pieces:
        linked = _launch_states(op, config, cut, params, B, *states_of, g, cu, precision)
    if op.only_state:
        return jnp.zeros((B, 0, H, V), q.dtype), _state_after(cut, linked, g, T), None
    return _launch_scan(op, config, cut, params, B, q, k, v, g, s0, cu, w, linked, precision)


def _outputs(op, params, B, K, V, dtype, dual=False):
    """What a scan's kernel writes: s, o and y. A final state that nobody reads is no output: the
    kernel gets an array instead, which it does not touch."""
    states = jax.ShapeDtypeStruct((B, params.sequences, params.H, K, V), jnp.float32)
    o, y = (jax.ShapeDtypeStruct((B, params.T, params.H, D), dtype) for D in (V, K))
    return [states] * op.final_state + [o] + [y] * dual


def _results(op, out):
    """o, s and y of those outputs; s or y is None where it is not asked for."""
    out = iter(out)
    s = next(out) if op.final_state else None
    return next(out), s, next(out, None)


def _launch_step(op, params, B, q, k, v, g, s0):
    """The scan of plain batch rows of one token; results as `_scan`'s."""
    K, V = q.shape[3], v.shape[3]
    BK, BV = _block(K), min(_block(V), max(16, 8192 // _block(K)))
    unwritten = [] if op.final_state else [g]
    out = _launch(
        _step_kernel,
        *(q, k, v, g, g if s0 is None else s0, *unwritten),
        out=_outputs(op, params, B, K, V, q.dtype),
        # argument 4 is s0, output 0 the final state
        in_place={4: 0} if s0 is not None and op.final_state and s0.shape[0] == B else None,
        programs=B * params.H * -(-V // BV),
        params=params,
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        HAS_S0=s0 is not None,
        num_warps=4,
        num_stages=1,
    )
    return _results(op, out)


def _launch_states(op, config, cut, params, B, keys, values, g, cu, precision):
    """The states of pieces [B, pieces, H, V, K], where K and V are the columns of `keys` and
    `values`. The last piece of each segment has the state that the next segment starts from, s0
    left out, unless only states are wanted."""
    H, K, V = params.H, keys.shape[3], values.shape[3]
    # What these kernels do not read is left out, so that a scan and its transpose give equal ones.
    params = _Params(
        scale=params.scale,
        way=int(params.way & (_Way.REVERSE | _Way.POST)),
        T=params.T,
        H=H,
        k_heads=keys.shape[2],
        v_heads=values.shape[2],
        k_stride=_tokens_apart(keys, B),
        v_stride=_tokens_apart(values, B),
        g_stride=params.g_stride,
        pieces=cut.pieces,
        pieces_per_segment=cut.pieces_per_segment,
    )
    table, params = _rows_of_work(op, params, cu, cut.piece, cut.pieces, cut.pieces_per_segment)
    table, packed = (g, False) if table is None else (table, True)
    shape = jax.ShapeDtypeStruct((B, cut.pieces, H, V, K), jnp.float32)
    states = _launch(
        _states_kernel,
        *(keys, values, g, table),
        out=shape,
        programs=B * cut.pieces * H * -(-K // cut.BK) * -(-V // cut.BV),
        params=params,
        K=K,
        V=V,
        BK=cut.BK,
        BV=cut.BV,
        C=STATES_CHUNK,
        PACKED=packed,
        PRECISION=precision,
        num_warps=4,
        num_stages=config.states_stages,
    )
    if op.only_state:
        return states
    BE = min(512, _block(K * V))
    walks = cut.pieces // cut.pieces_per_segment if packed else 1
    return _launch(
        _link_kernel,
        *(states, g, table),
        out=shape,
        in_place={0: 0},
        programs=B * walks * H * -(-K * V // BE),
        params=params._replace(rows=walks),
        PIECES=cut.pieces_per_segment,
        E=K * V,
        BE=BE,
        PACKED=packed,
        num_warps=4,
        num_stages=1,
    )


def _state_after(cut, states, g, T):
    """The state [B, 1, H, K, V] after T tokens, from those of pieces [B, pieces, H, V, K]."""
    B, pieces, H, *_ = states.shape
    after = jnp.maximum(T - cut.piece * (1 + jnp.arange(pieces)), 0)  # tokens after each piece
    weight = jnp.broadcast_to(jnp.exp(g[..., None] * after), (B, H, pieces))
    return jnp.einsum("bzhvk,bhz->bhkv", states, weight, precision="highest")[:, None]


def _launch_scan(op, config, cut, params, B, q, k, v, g, s0, cu, w, linked, precision):
    """The scan of all segments, from their `linked` states; results as `_scan`'s."""
    T, K, V, C = params.T, q.shape[3], v.shape[3], config.C
    params = params._replace(pieces=cut.pieces, pieces_per_segment=cut.pieces_per_segment)
    table, params = _rows_of_work(op, params, cu, cut.segment, _row_count(T, 1, cut.segment))
    arrays = q, k, v
    if config.kernel is _hopper_kernel:
        # kernels that make descriptors need scratch memory, which CUDA graphs do not provide
        layout = gl.NVMMASharedLayout(128, 16, 3)

        def described(x, BD):
            rows, _, heads, dim = x.shape
            shape, strides = (rows * T, heads, dim), (heads * dim, dim, 1)
            return jax_triton.TensorDescriptor(x, shape, strides, (C, 1, BD), layout)

        qd, kd, vd = described(q, config.BK), described(k, config.BK), described(v, config.BV)
        arrays = qd, kd, vd, vd if w is None else described(w, config.BV)
        own = {"STAGES": config.num_stages, "num_stages": 1, "DUAL": w is not None}
        own |= {"y": 0} if w is None else {}  # the kernel does not touch y then
    else:
        own = {"num_stages": config.num_stages, "PRECISION": precision}
    arrays = *arrays, g, g if s0 is None else s0, linked, g if table is None else table
    unwritten = [] if op.final_state else [g]
    out = _launch(
        config.kernel,
        *(*arrays, *unwritten),
        out=_outputs(op, params, B, K, V, q.dtype, w is not None),
        programs=B * params.H * params.rows * -(-V // config.BV),
        params=params,
        K=K,
        V=V,
        BK=config.BK,
        BV=config.BV,
        C=C,
        PACKED=cu is not None,
        LINKED=cut.pieces > 0,
        HAS_S0=s0 is not None,
        num_warps=config.num_warps,
        **own,
    )
    return _results(op, out)


# How it composes: vmap, sharding, platforms -------------------------------------------------------
#
# A new operand of the scan goes into
# - the API: `lightning_attn`, `lightning_attn_reference` and a check;
# - `_scan` and its signature above `_Op`, `_scan_xla` with its `_vary`, and all calls of `_batch`;
# - the gradients, from `_attend_fwd`, which finds g by its place, to `_decay_gradient`, and
#   `_attend_across` to `_exchange`;
# - `_scan_triton`, `_params`, `_Params`, which `_launch_states` makes anew, the launches, whose
#   `in_place` counts arrays, and the kernels;
# - `_OPERANDS`, `_head_count` if it has no heads, `_partition` if it may have fewer heads,
#   `_sharding_rule` if it has a new dim, `_folded` if it stands before s0, and `_scan_nothing`.
# Operands and results are positional, in the order of `_OPERANDS` and `_RESULTS`, save for kernels,
# launches and `_decay_gradient`.


def _scan(op, q, k, v, g, s0, cu, w=None):
    """The entry point of every scan: adds the rules of vmap, sharding and platform. Returns o, s
    and y; s or y is None where it is not asked for."""
    return _folded(op)(q, k, v, g, s0, cu, w)


@functools.cache
def _folded(op):
    """The scan with a vmap rule: the mapped axis is folded into the batch."""

    @jax.custom_batching.custom_vmap
    def scan(*operands):
        return _sharded(op, *operands)

    @scan.def_vmap
    def _(size, mapped, *operands):
        mapped = *mapped[:4], *map(bool, mapped[4:])  # custom_vmap gives an empty tree for None
        rows = (x.shape[int(m)] for x, m in zip(operands, mapped) if x is not None)
        B = _shared(rows)

        def fold(x, is_mapped):
            if x is None or not is_mapped and x.shape[0] == 1:
                return x  # all rows share it
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.broadcast_to(x, (size, B, *x.shape[2:]))
            return x.reshape(size * B, *x.shape[2:])

        results = _scan(op, *map(fold, operands, mapped))
        results = jax.tree.map(lambda x: x.reshape(size, B, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return scan


# The dims of the operands and results of a scan: batch rows, tokens, heads, head dims K and V,
# sequences, boundaries. The sharding rule and the shardings are made from this table.
_OPERANDS = {
    "q": "b t h k",
    "k": "b t h k",
    "v": "b t h v",
    "g": "b h",
    "s0": "b n h k v",
    "cu": "b m",
    "w": "b t h v",
}
_RESULTS = {"o": "b t h v", "s": "b n h k v", "y": "b t h k"}


def _sharded(op, *operands):
    """The scan with a sharding rule: each device scans its own batch rows and heads, and nothing is
    sent."""
    shapes = {name: x.shape for name, x in zip(_OPERANDS, operands) if x is not None}
    mesh = jax.sharding.get_abstract_mesh()
    # devices that the compiler may use
    left = math.prod(n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes)
    if not all(x.size for x in operands if x is not None) or mesh.manual_axes and left == 1:
        return _on_platform(op, *operands)
    # jit, because custom_partitioning takes no constants: those that a call folds become its own
    call = custom_partitioning(jax.jit(functools.partial(_on_platform, op)))
    partition = functools.partial(_partition, op, shapes, mesh)
    call.def_partition(partition, **_sharding_rule(op, shapes))
    return call(*operands)


def _head_count(name, shape):
    return shape[_OPERANDS[name].split().index("h")] if name != "cu" else 1


def _sharding_rule(op, shapes):
    """What the compiler may split: batch rows, and heads, which operands share in groups. A factor
    of the heads is named by the count that it completes: with 2 key heads and 8 query heads, keys
    have h2 and queries (h2 h8), where h8 is 4."""
    B, H = _shared(shape[0] for shape in shapes.values()), shapes["g"][1]
    heads = {name: _head_count(name, shape) for name, shape in shapes.items()}
    counts = sorted({1, *heads.values()})
    sizes = {f"h{count}": count // fewer for fewer, count in itertools.pairwise(counts)}
    # a dim of size 1 where others have more is a factor of its own, which nothing splits
    own = map("one{}".format, itertools.count())

    def write(pattern, rows, heads):
        parts = [factor for factor in sizes if int(factor[1:]) <= heads]
        words = {"b": "b" if rows == B else next(own), "h": " ".join(parts) or next(own)}
        words["h"] = f"({words['h']})" if len(parts) > 1 else words["h"]
        return [words.get(dim, dim) for dim in pattern.split()]

    tensors = [write(_OPERANDS[name], shapes[name][0], heads[name]) for name in shapes]
    wanted = {"o": True, "s": op.final_state, "y": "w" in shapes}
    results = [write(_RESULTS[name], B, H) for name in _RESULTS if wanted[name]]
    if op.only_state:
        results[0][1] = "no_tokens"
    rule = " -> ".join(", ".join(map(" ".join, side)) for side in (tensors, results))
    dims = [dim for tensor in tensors + results for dim in tensor]
    # in order of appearance, as the compiler wants them
    whole = dict.fromkeys(dim for dim in dims if dim in ("t", "no_tokens", "k", "v", "n", "m"))
    unseen = {factor: size for factor, size in sizes.items() if factor not in dims}
    return {"sharding_rule": rule, "need_replication_factors": tuple(whole), **unseen}


def _partition(op, shapes, traced_mesh, mesh, _, results):
    """How one device scans its part: mesh, function, shardings of the results and the operands."""
    mesh, rows, heads = _split_of(results[0], mesh, traced_mesh)
    devices, H = math.prod(mesh.shape[axis] for axis in heads), shapes["g"][1]
    B = _shared(shape[0] for shape in shapes.values())
    counts = {name: _head_count(name, shape) for name, shape in shapes.items()}
    fewer = {name for name in {"q", "k", "v", "w"} & set(shapes) if counts[name] % devices}
    fewer = {name for name in fewer if counts[name] > 1}
    # a device selects the heads that it shares by its number, which is not known in a shard_map
    if H % devices or fewer and traced_mesh.manual_axes:
        heads, devices, fewer = (), 1, set()

    def put(pattern, split_rows=True, split_heads=True):
        split = {"b": rows if split_rows else (), "h": heads if split_heads else ()}
        spec = PartitionSpec(*(split.get(dim) or None for dim in pattern.split()))
        return NamedSharding(mesh, spec)

    def put_operand(name):
        if name not in shapes:
            return None
        split_heads = name not in fewer and counts[name] > 1
        return put(_OPERANDS[name], shapes[name][0] == B, split_heads)

    def own_heads(name, x):
        if name not in fewer:
            return x
        return _heads_of_device(x, H // devices, devices, lax.axis_index(heads))

    def one_device(*operands):
        operands = map(own_heads, _OPERANDS, operands)
        # the mesh at hand is not that of what a device has for itself
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return _on_platform(op, *operands)

    patterns = zip(results, _RESULTS.values())
    by_result = tuple(None if x is None else put(pattern) for x, pattern in patterns)
    return mesh, one_device, by_result, tuple(map(put_operand, _OPERANDS))


def _split_of(x, mesh, traced_mesh):
    """The mesh, and the axes of it over which the rows and heads of a result `x` are split."""
    if isinstance(x.sharding, NamedSharding):
        rows, _, heads, *_ = *x.sharding.spec, *(None,) * 4
        rows, heads = (axes if isinstance(axes, tuple) else (axes,) for axes in (rows, heads))
        return x.sharding.mesh, *(tuple(a for a in axes if a) for axes in (rows, heads))
    # The compiler named no mesh: its devices are those of the mesh of the call, less the axes that
    # a shard_map around the call took. The same sharding is looked for among all that split rows
    # and heads over them.
    free = [axis for axis in traced_mesh.axis_names if axis not in traced_mesh.manual_axes]
    sizes = [traced_mesh.shape[axis] for axis in free]
    devices = np.array([*x.sharding.device_set][: math.prod(sizes)])
    mesh = jax.sharding.Mesh(devices.reshape(sizes), free)
    wanted = x.sharding._to_xla_hlo_sharding(len(x.shape))
    for count in range(len(free) + 1):
        for axes in itertools.permutations(free, count):
            for cut in range(count + 1):
                rows, heads = axes[:cut], axes[cut:]
                found = NamedSharding(mesh, PartitionSpec(rows or None, None, heads or None))
                if found._to_xla_hlo_sharding(len(x.shape)) == wanted:
                    return mesh, rows, heads
    return mesh, (), ()


def _heads_of_device(x, heads, devices, device):
    """The heads of x [B, T, heads of x, ...] that the `heads` heads of a device read: a single one,
    or one for each."""
    group = heads * devices // x.shape[2]
    if group % heads == 0:
        return lax.dynamic_slice_in_dim(x, device * heads // group, 1, axis=2)
    return jnp.take(x, (device * heads + jnp.arange(heads)) // group, axis=2)


@_promotes
def _on_platform(op, *operands):
    """Triton or plain JAX, chosen when the computation is lowered unless `op.backend` names one."""
    q, k, v, *_ = operands
    if not (q.size and k.size and v.size):  # no tokens, or no batch: nothing to launch
        return _vary(_scan_nothing(op, *operands), operands)

    def on(scan):
        def run(*operands):
            return _vary(scan(op, *operands), operands)

        return run

    plain, kernels = on(_scan_xla), on(_scan_triton)
    if op.backend is None:
        return lax.platform_dependent(*operands, cuda=kernels, rocm=kernels, default=plain)
    return (kernels if op.backend == "triton" else plain)(*operands)


def _scan_nothing(op, q, k, v, g, s0, cu, w):
    """The scan of no tokens, or of no batch rows."""
    B, T, H = _batch(q, k, v, g, s0, cu, w), q.shape[1], g.shape[1]
    K, V, n = q.shape[3], v.shape[3], 1 if cu is None else cu.shape[1] - 1
    o = jnp.zeros((B, 0 if op.only_state else T, H, V), v.dtype)
    s = jnp.broadcast_to(jnp.zeros((), g.dtype) if s0 is None else s0, (B, n, H, K, V))
    y = None if w is None else jnp.zeros((B, T, H, K), v.dtype)
    return o, s if op.final_state else None, y


def _vary(x, *like, but=()):
    """`x`, varying over every shard_map axis that one of `like` varies over, save for some."""
    axes = frozenset().union(*map(_varying, jax.tree.leaves(like))) - set(but)
    # sorted, because a set has another order in each process of a program
    return jax.tree.map(lambda x: lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying"), x)


def _varying(x):
    """The shard_map axes that `x` varies over; none where shard_map does not check."""
    return jax.typeof(x).manual_axis_type.varying


def _spec(x):
    return None if x is None else jax.typeof(x).sharding.spec


def _in_auto_mode(f, operands, out_specs):
    """f(*operands). On a mesh with Explicit axes, f runs in Auto mode, and `out_specs` shard its
    results."""
    # arrays know their mesh where none is set
    of_arrays = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands))
    meshes = jax.sharding.get_abstract_mesh(), *of_arrays
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    kinds = zip(mesh.axis_names, mesh.axis_types)
    explicit = tuple(axis for axis, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    if not explicit:
        return f(*operands)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, axes=explicit, out_sharding=out_specs)(*operands)


# One sequence on many devices ---------------------------------------------------------------------
#
# Each device starts from the state that the devices before it leave. Only states are sent, once
# each way.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_across(op, axes, q, k, v, g, s0):
    return _across_fwd(op, axes, q, k, v, g, s0)[0]


@_promotes
def _across_fwd(op, axes, q, k, v, g, s0):
    s_in, s = _exchange(op, axes, k, v, g, s0)
    o, _ = _attend(dataclasses.replace(op, final_state=False), q, k, v, _vary(g, q), s_in, None)
    return (o, s if op.final_state else None), (q, k, v, g, s0, s_in)


@_promotes
def _across_bwd(op, axes, saved, cotangents):
    q, k, v, g, s0, s_in = saved
    do, ds = cotangents
    # with check_vma=False shard_map itself sums what devices return, and gives each device its part
    # of a shared cotangent
    checked = set(axes) <= _varying(q)
    ds = ds if checked else lax.psum(ds, axes)
    ds_in, ds0 = _exchange(op.adjoint(), axes, q, do, g, ds)
    dq, dk, dv, dg, *_ = _gradients(op, (q, k, v, _vary(g, q), s_in, None, ()), do, ds_in)
    if checked:
        dg = lax.psum(dg, tuple(sorted(_varying(dg) - _varying(g))))
    if s0 is None:
        ds0 = None
    elif not checked:
        ds0 /= lax.axis_size(axes)  # every device returns all of ds0
    return dq, dk, dv, dg, ds0


_attend_across.defvjp(_across_fwd, _across_bwd)


def _exchange(op, axes, k, v, g, s0):
    """The state that this device's tokens start from, and the final state of the whole sequence,
    which all devices have."""
    only_state = dataclasses.replace(op, only_state=True, final_state=True)
    _, own = _attend(only_state, k, k, v, _vary(g, k), None, None)  # k for q: no query is read
    states_around = functools.partial(_states_around, op, axes, k.shape[1])
    return _in_auto_mode(states_around, (own, g, s0), (_spec(own), _spec(own)))


def _states_around(op, axes, T, own, g, s0):
    """The results of `_exchange`, from the state [B, 1, H, K, V] that each device's own T tokens
    leave."""
    devices = lax.axis_size(axes)
    to = {"to": "invarying"} if set(axes) <= _varying(own) else {}
    every = lax.all_gather(own, axes, **to)  # [devices, B, 1, H, K, V]
    every = jnp.flip(every, 0) if op.reverse else every  # in scan order
    every = every if s0 is None else jnp.concatenate([s0[None], every])
    first = 0 if s0 is None else 1
    rank = lax.axis_index(axes)
    rank = devices - 1 - rank if op.reverse else rank

    def after(devices_before):  # the state after so many devices, s0 included
        age = devices_before - 1 + first - jnp.arange(every.shape[0])
        decay = jnp.exp(g[..., None] * T * jnp.maximum(age, 0))
        weight = jnp.where(age >= 0, decay, 0)  # [B | 1, H, devices (+ 1)]
        weight = jnp.broadcast_to(weight, (own.shape[0], *weight.shape[1:]))
        return jnp.einsum("bhd,dbnhkv->bnhkv", weight, every, precision="highest")

    return after(rank), after(devices)


# Checks -------------------------------------------------------------------------------------------
#
# Messages are "argument: expected ..., got ...". A check of values must not wait for a device while
# something is traced: it looks only at values that are at hand.


def _operands(query, key, value):
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
    if not isinstance(T, int):
        _symbolic("query: expected a symbolic seq_len", T, CHUNK)
    elif T > 2**30:
        raise ValueError(f"query: expected seq_len of at most 2**30, got {T}")
    return q, k, v


def _symbolic(what, size, least):
    """Raises where a symbolic size, of a `jax.export`, may be less."""
    try:
        enough = bool(size >= least)
    except jax.errors.InconclusiveDimensionOperation:
        enough = False
    if not enough:
        raise ValueError(
            f"{what} that is known to be {least} or more, got {size}: "
            f'jax.export.symbolic_shape(..., constraints=["{size} >= {least}"])'
        )


def _log_decays(q, layer_idx, num_layers, g_gamma):
    """The log decay of each head, [H]."""
    _, T, H, _ = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    if g_gamma is None:
        g = lightning_g_gamma(H, layer_idx, num_layers, dtype)
    elif layer_idx is not None or num_layers is not None:
        raise ValueError("g_gamma: expected either g_gamma or layer_idx and num_layers, got both")
    else:
        g = _array("g_gamma", g_gamma, (H,), jnp.floating, _layout_hint(g_gamma, 0, T, H))
        if (value := _known(g_gamma)) is not None and not (value <= 0).all():
            raise ValueError(f"g_gamma: expected log decays <= 0, got {value.max()}")
    # Decays that could not be checked must not grow. (jnp.minimum would halve the gradient at 0.)
    g = jnp.where(g > 0, 0, g)
    # e^g is 0 from far before -1e5 on; -inf times a distance of 0 would be NaN
    return jnp.maximum(g.astype(dtype), -1e5)


def _layer(layer_idx, num_layers):
    """`layer_idx` and `num_layers`, checked: as ints where their values are at hand."""
    x = layer_idx
    if isinstance(x, (jax.Array, np.ndarray)) and jnp.issubdtype(x.dtype, jnp.floating) and x.ndim:
        raise TypeError(
            f"layer_idx: expected an integer, got an array of {x.dtype} and shape {x.shape}: "
            "log decays are given by name, as g_gamma="
        )
    for name, x in ("layer_idx", layer_idx), ("num_layers", num_layers):
        if x is None:
            raise ValueError(
                f"{name}: expected layer_idx and num_layers, or g_gamma in place of both, got None"
            )
    layer_idx, num_layers = _integer("layer_idx", layer_idx), _integer("num_layers", num_layers)
    known = type(num_layers) is int
    if known and not 1 <= num_layers < 2**31:
        raise ValueError(f"num_layers: expected 1 to 2**31 - 1, got {num_layers}")
    if type(layer_idx) is int and not 0 <= layer_idx < (num_layers if known else 2**31):
        raise ValueError(
            f"layer_idx: expected 0 to num_layers - 1, got {layer_idx} of "
            f"{num_layers if known else 'a traced number'}"
        )
    return layer_idx, num_layers


def _scaled(q, softmax_scale):
    """q and a scale that is a float. Kernels take a number, so a traced scale goes into q."""
    scale = _scale(softmax_scale, q.shape[3])
    if isinstance(scale, float):
        return q, scale
    return q * lax.convert_element_type(scale, q.dtype), 1.0


def _scale(scale, K):
    """The scale as a float, or as the scalar array that came where its value is not at hand."""
    if scale is None:
        return K**-0.5
    if isinstance(scale, (jax.Array, np.ndarray)) and scale.shape != ():
        raise ValueError(f"softmax_scale: expected a scalar, got shape {scale.shape}")
    if not (_is_number(scale, jnp.floating) or _is_number(scale, jnp.integer)):
        raise TypeError(f"softmax_scale: expected a real number, got {scale!r}")
    if isinstance(scale, int):  # of any size: too large ones are infinite
        return _scale(float(scale) if abs(scale) < 2**200 else math.inf, K)
    if (value := _known(scale)) is None:
        return scale
    value, normal = float(value), jnp.finfo(jnp.float32)
    # Kernels compute with it as a float32, and some flush what is not a normal number.
    if not (value == 0 or float(normal.tiny) <= abs(value) <= float(normal.max)):
        raise ValueError(f"softmax_scale: expected 0 or a normal number of float32, got {value!r}")
    return value


def _boundaries(cu, q):
    """`cu_seqlens` as int32 or None, checked where its values are at hand."""
    if cu is None:
        return None
    B, T = q.shape[:2]
    if isinstance(cu, (list, tuple)):
        cu = _listed(cu)
    # Its values are read before they become int32, which would wrap large ones.
    array = _array("cu_seqlens", cu, ("num_seqs + 1",), jnp.integer)
    if B != 1:
        raise ValueError(f"cu_seqlens: expected a batch of 1 to hold the packed sequences, got {B}")
    if not isinstance(array.shape[0], int):
        _symbolic("cu_seqlens: expected a symbolic number of boundaries", array.shape[0], 2)
    elif array.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected at least 2 boundaries, got {array.shape[0]}")
    if (value := _known(cu)) is not None:
        _known_boundaries(value, T)
        return array.astype(jnp.int32)
    # Traced values past the end stay past the end as int32, and negative ones negative.
    if jnp.iinfo(array.dtype).max > 2**31 - 1:
        low, high = max(jnp.iinfo(array.dtype).min, -1), 2**31 - 1
        array = jnp.clip(array, jnp.asarray(low, array.dtype), jnp.asarray(high, array.dtype))
    return array.astype(jnp.int32)


def _listed(cu):
    """Boundaries in a list as numpy."""
    if any(isinstance(x, jax.core.Tracer) for x in cu):
        raise TypeError(
            "cu_seqlens: expected an array or a list of numbers, got a list with a traced value: "
            "write jnp.array([...]) or jnp.stack([...])"
        )
    for x in cu:
        scalar = _is_number(x, jnp.integer) and np.shape(x) == ()
        if not scalar or abs(int(x)) >= 2**63:
            raise TypeError(f"cu_seqlens: expected integers, got {cu!r}")
    return np.array([int(x) for x in cu], np.int64)


def _known_boundaries(value, T):
    """Raises for boundaries that T tokens cannot have."""
    value = [int(x) for x in value]
    shown = np.asarray(value)
    if value[0] != 0:
        lengths = min(value) >= 0 and sum(value) == T
        hint = ". These look like lengths: it takes boundaries, not lengths" if lengths else ""
        raise ValueError(f"cu_seqlens: expected to start at 0, got {value[0]} in {shown}{hint}")
    if any(a > b for a, b in itertools.pairwise(value)):
        raise ValueError(f"cu_seqlens: expected boundaries that do not decrease, got {shown}")
    if isinstance(T, int) and value[-1] > T:  # of a symbolic length that is not known
        raise ValueError(f"cu_seqlens: expected boundaries up to seq_len, {T}, got {value[-1]}")


def _initial_state(s0, q, v, cu):
    """The initial states in the dtype of states, or None."""
    if s0 is None:
        return None
    (B, T, H, K), V = q.shape, v.shape[3]
    n, count = B, "the batch"
    if cu is not None:
        n, count = cu.shape[0] - 1, "the number of packed sequences"
    if getattr(s0, "shape", ())[1:] == (H, K, V) and s0.shape[0] != n:
        raise ValueError(f"initial_state: expected {n} states, {count}, got {s0.shape[0]}")
    s0 = _array("initial_state", s0, (n, H, K, V), jnp.floating, _layout_hint(s0, 1, T, H))
    return s0.astype(jnp.promote_types(q.dtype, jnp.float32))


def _backend(backend, q, cu):
    """The backend, checked: "xla" where there are no kernels for this call."""
    if not (backend is None or isinstance(backend, str) and backend in ("triton", "xla")):
        raise ValueError(f'backend: expected None, "triton" or "xla", got {backend!r}')
    if backend == "triton" and triton is None:
        raise ValueError(
            'backend: expected None or "xla" where jax-triton and triton cannot be used, got '
            f'"triton": {_unfit or "not installed"}. {_NEEDS}'
        )
    arch = _gpu()[0] if _gpu() else None
    # Before sm_80 GPUs lack Triton's matrix products: its code spills, and wants twice their shared
    # memory.
    old = arch is not None and arch.startswith("sm_") and int(arch[3:]) < 80
    if backend == "triton" and (arch is None or old):
        raise ValueError(
            'backend: expected None or "xla" where there is no GPU for the kernels (NVIDIA from '
            f'sm_80 on, AMD), got "triton" and {arch or jax.default_backend()}'
        )
    if triton is None and not _unfit and arch and not old and backend is None:
        warnings.warn(f"{_SLOW}jax-triton or triton is not installed. {_NEEDS}")
    if triton is None or q.dtype == jnp.float64 or old:
        return "xla"
    sizes = *q.shape, *(() if cu is None else cu.shape)
    if backend != "xla" and not all(isinstance(d, int) for d in sizes):
        raise ValueError(
            'backend: expected "xla" for symbolic shapes (jax.export), because kernels are '
            f"launched for shapes that are numbers, got {backend!r}"
        )
    return backend


def _axes(seq_axis, cu):
    """`seq_axis` as a tuple of names, or None."""
    if seq_axis is None:
        return None
    if cu is not None:
        raise ValueError(
            "seq_axis: expected None with cu_seqlens, because a pack cannot be cut inside its "
            f"sequences; got {seq_axis!r}. Give each device whole sequences instead: a pack of its "
            "own in shard_map"
        )
    axes = seq_axis if isinstance(seq_axis, tuple) else (seq_axis,)
    if not (axes and all(isinstance(name, str) for name in axes)):
        raise TypeError(
            "seq_axis: expected the name of an axis of a shard_map around this call, "
            f"got {seq_axis!r}"
        )
    if not set(axes) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        raise ValueError(
            f"seq_axis: expected an axis of a shard_map around this call, got {seq_axis!r}"
        )
    return axes


def _static(name, x):
    """Raises where `x` is not a bool."""
    if not isinstance(x, (bool, np.bool_)):
        traced = isinstance(x, jax.core.Tracer)
        hint = ": it is static, so a jit must not trace it (static_argnames)" if traced else ""
        raise TypeError(f"{name}: expected True or False, got {x!r}{hint}")


def _is_number(x, kind):
    """Whether `x` is a Python, numpy or JAX number (or an array of them) of that kind."""
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return jnp.issubdtype(x.dtype, kind)
    return type(x) is int or type(x) is float and kind is not jnp.integer


def _integer(name, x):
    """A scalar integer argument: as an int where its value is at hand."""
    if isinstance(x, (jax.Array, np.ndarray)) and x.shape != ():
        raise ValueError(f"{name}: expected a scalar, got shape {x.shape}")
    if not _is_number(x, jnp.integer):
        raise TypeError(f"{name}: expected an integer, got {x!r}")
    if type(x) is int:  # of any size
        return x
    value = _known(x)
    return x if value is None else int(value)


def _array(name, x, shape, kind, hint=""):
    """`x` as a JAX array of that shape, where "batch" etc. name a free size, and kind of dtype."""
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
    """`x` as numpy where its values are at hand, else None.

    They are not where `x` is traced, where some of it lies on other hosts, and where `x` lies on a
    device while something else is traced.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
        return None
    # An operation on a concrete array gives a tracer where a jit is being traced.
    return None if isinstance(lax.neg(x), jax.core.Tracer) else jax.device_get(x)


def _layout_hint(x, axis, T, H):
    """What to add to a message where `x` has as many heads, along `axis`, as query has tokens:
    query is [B, H, T, D] then."""
    shape = getattr(x, "shape", ())
    if len(shape) != (4 if axis else 1) or shape[axis] != T or T in (1, H):
        return ""
    return (
        ". query is [batch, seq_len, num_heads, head_dim], so here "
        f"seq_len is {T} and num_heads {H}"
    )

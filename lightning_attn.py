# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The lightning-attn-jax authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in
# compliance with the License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is
# distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and limitations under the License.
"""Lightning attention for JAX: linear attention with a fixed decay per head, for GPUs (Triton, Gluon) and all else (plain JAX).

For one sequence and one head, with log decay g <= 0 and scale s, a state S of shape [K, V] is carried along the tokens:

    S_t = e^g S_{t-1} + k_t v_t^T              o_t = s q_t S_t

TransNormerLLM (arXiv:2307.14995) introduced it, Lightning Attention-2 (arXiv:2401.04658) computes it in chunks and MiniMax-01
(arXiv:2501.08313) trained it at scale. Time is linear in the sequence length, the state is all the memory there is.

This file is all there is to copy. It needs jax and numpy; on NVIDIA and AMD GPUs also `jax-triton` and `triton`.

Glossary (kernels and formulas share these letters)
    B, T          batch, tokens in a batch row            H, h      heads of the decay and of the output, one of them
    K, V          head dims of queries/keys, of values    n         sequences in a batch row (1 unless packed)
    q, k, v, o    queries, keys, values, outputs          g         log decay of a head in nats (`g_gamma`), gm in bits
    S             state; the kernels hold S^T [V, K]      s0, s     states that sequences start from, end with
    C             tokens in a chunk (one loop step)       L, R      tokens in a segment or piece (one program), rows of them
    P, D          scores q_i.k_j with their decays D      M         pieces in a segment
    dq, dk, dS    decays of what queries read, of what    z, Z      states of pieces of segments that others follow, how many
                  keys add, of the state over a chunk     w, y      queries of the transposed state, what they read
    rank i, j     place of a token in its chunk in scan order, whichever the direction
"""
from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any

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
_HOPPER = ">=3.8,<3.10"                                          # the Triton of `_hopper_kernel`
_INSTALL = "pip install " + " ".join(f"'{name}{versions}'" for name, versions in _KERNELS.items())


def _fits(found, versions):
    """Whether the version `found` lies in `versions`: ">=a" or ">=a,<b". Only leading numbers count."""
    def numbers(text):
        return tuple(int(n) for n in text.split(".")[:3] if n.isdigit())
    low, _, high = versions.removeprefix(">=").partition(",<")
    return numbers(low) <= numbers(found) and (not high or numbers(found) < numbers(high))


if not _fits(jax.__version__, _JAX):
    raise ImportError(f"lightning_attn needs jax{_JAX} and found jax {jax.__version__}: "
                      f"pip install 'jax{_JAX}'")

_unfit = None                                                    # why installed kernels cannot run
try:
    import jax_triton
    import triton
    import triton.language as tl
except Exception as error:
    triton = None
    # macOS and TPU hosts have no Triton. Plain JAX is all there is, and no warning is due.
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
                lambda used, live, eqn: ([True] * len(eqn.invars), eqn))
    else:
        triton = None
        _unfit = "found " + ", ".join(f"{name} {version}" for name, version in _found.items())
if _unfit:
    warnings.warn("lightning_attn: GPUs take the plain-JAX path, which is many times slower, because "
                  f"the kernels cannot run: {_unfit}. They need: {_INSTALL}")
_HAS_HOPPER = triton is not None and hasattr(hopper.tma, "async_load")      # Triton 3.7 lacks it

__all__ = ["lightning_attn", "lightning_attn_reference", "lightning_g_gamma"]


# The API ------------------------------------------------------------------------------------------------------------------------

def lightning_attn(query, key, value, layer_idx=None, num_layers=None, softmax_scale=None, initial_state=None, reverse=False,
                   cu_seqlens=None, *, g_gamma=None, backend=None, seq_axis=None):
    """Lightning attention (arXiv:2307.14995, 2401.04658, 2501.08313): o_t = scale q_t S_t, S_t = e^g S_{t-1} + k_t v_t^T.

    Works under jit, grad (to any order), vmap, scan, remat, export and sharding; is differentiable in `query`, `key`, `value`,
    `initial_state` and `g_gamma`, for cotangents of both results.

    Args:
      query: [batch, seq_len, num_heads, qk_head_dim], float32, bfloat16 or float16 (float64 in x64 mode: plain JAX everywhere).
        Head dims are 1 to 512, `seq_len` is anything from 0 on.
      key: [batch, seq_len, num_kv_heads, qk_head_dim], in the dtype of `query`. `num_kv_heads` divides `num_heads`; query head h
        reads key and value head h // (num_heads / num_kv_heads).
      value: [batch, seq_len, num_kv_heads, v_head_dim], in the dtype of `query`.
      layer_idx, num_layers: integers, possibly traced: the layer, from 0, and the number of layers. They give head h the log decay
        g = -(8 / num_heads) (1 - layer_idx / num_layers) h. Leave both out to give `g_gamma` instead.
      softmax_scale: scale of the outputs; None means qk_head_dim ** -0.5. A traced one multiplies `query`, in its dtype.
      initial_state: [n, num_heads, qk_head_dim, v_head_dim], floating: the states that the sequences start from. n is the batch or
        the number of packed sequences. None means zeros.
      reverse: True runs from the last token to the first: `initial_state` enters at the end, `final_state` is left at the start.
      cu_seqlens: [num_seqs + 1] integers, concrete or traced: boundaries of sequences packed in a batch of 1, from 0 up. Equal
        neighbours are an empty sequence. Tokens past the last boundary belong to none: their outputs and gradients are 0,
        whatever they hold. A traced `cu_seqlens` cannot be checked: a sequence that runs backwards, outside of the tokens or into
        an earlier one counts as empty.
      g_gamma: [num_heads], log decay in nats for each token, <= 0, possibly traced.
      backend: None picks when the computation is lowered: Triton for cuda and rocm, plain JAX for anything else. "triton" and
        "xla" force one.
      seq_axis: name of a `jax.shard_map` mesh axis over which `seq_len` is split evenly, in order: one sequence on many devices.
        Only states cross it, never tokens; `initial_state` and `final_state` are those of the whole sequence.

    Returns:
      output: [batch, seq_len, num_heads, v_head_dim] in the dtype of `query`.
      final_state: [n, num_heads, qk_head_dim, v_head_dim], float32 (float64 for float64 inputs).

    Accuracy: states, decays and sums are float32. float32 inputs follow `jax.default_matmul_precision`: TF32 by default on GPUs,
    "high" and "highest" for float32. Gradients have the dtype of what they are gradients of. That of `g_gamma` is a float32 sum of
    differences that cancel, taken from the rounded gradients of `query` and `key`: for bfloat16 inputs expect a relative error of up to
    5e-2, for float16 of up to 1e-2. float16 states round to float16 where they meet queries, and overflow there past 65504.

    Raises:
      TypeError, ValueError: naming the argument, what was expected and what came, before anything runs.
    """
    q, k, v, g, scale, s0, cu = _check(query, key, value, layer_idx, num_layers, softmax_scale, initial_state, reverse, cu_seqlens,
                                       g_gamma)
    if backend not in (None, "triton", "xla"):
        raise ValueError(f'backend: expected None, "triton" or "xla", got {backend!r}')
    if backend == "triton" and triton is None:
        raise ValueError('backend="triton" needs jax-triton and triton, which cannot be used here: '
                         f"{_unfit or 'not installed'}. They need Linux, Python >= 3.12 and: {_INSTALL}")
    if triton is None or q.dtype == jnp.float64:
        backend = "xla"
    if seq_axis is not None and cu is not None:
        raise ValueError("seq_axis: expected None with cu_seqlens, because a pack cannot be cut inside its sequences; got "
                         f"{seq_axis!r}. Give each device whole sequences instead: a pack of its own in shard_map")
    if seq_axis is not None:
        try:
            lax.axis_size(seq_axis)
        except NameError:
            raise ValueError(f"seq_axis: expected an axis of a shard_map around this call, got {seq_axis!r}") from None
    op = _Op(scale, bool(reverse), False, backend, jax.config.jax_default_matmul_precision)
    s0 = None if s0 is None else s0[:, None] if cu is None else s0[None]
    g, cu = g[None], None if cu is None else cu[None]
    if seq_axis is None:
        o, s = _in_auto_mode(functools.partial(_attend, op), *_vary((q, k, v, g, s0, cu), q, k, v, g, s0, cu))
    else:
        q, k, v = _vary((q, k, v), q, k, v)
        o, s = _attend_across(op, seq_axis, q, k, v, g, s0)
    return o, s[:, 0] if cu is None else s[0]


def lightning_attn_reference(query, key, value, layer_idx=None, num_layers=None, softmax_scale=None, initial_state=None,
                             reverse=False, cu_seqlens=None, *, g_gamma=None):
    """The recurrence, token by token, nothing clever: arguments and results of `lightning_attn`, in plain JAX."""
    q, k, v, g, scale, s, cu = _check(query, key, value, layer_idx, num_layers, softmax_scale, initial_state, reverse, cu_seqlens,
                                      g_gamma)
    (B, T, H, K), V, dtype = q.shape, v.shape[-1], jnp.promote_types(q.dtype, jnp.float32)
    n = B if cu is None else cu.shape[0] - 1
    s = jnp.zeros((n, H, K, V), dtype) if s is None else s
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    token = jnp.arange(T)
    member = jnp.ones((T, B), bool) if cu is None else (cu[:-1] <= token[:, None]) & (token[:, None] < cu[1:])   # [T, n]

    def step(s, x):
        q, k, v, member = x                                      # [B, H, K], [B, H, K], [B, H, V], [n]
        q, k, v = (y.astype(dtype) for y in (q, k, v))
        member = member[:, None, None]
        s = jnp.where(member[..., None], jnp.exp(g)[:, None, None] * s + k[..., None] * v[..., None, :], s)
        o = scale * jnp.einsum("bhk,bhkv->bhv", jnp.broadcast_to(q, (n, H, K)), s, precision="highest")
        return s, o if cu is None else jnp.where(member, o, 0).sum(0, keepdims=True)

    s, o = lax.scan(step, s, (*(jnp.moveaxis(x, 1, 0) for x in (q, k, v)), member), reverse=reverse)
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), s


def lightning_g_gamma(num_heads, layer_idx, num_layers):
    """Log decay per token in nats, [num_heads] float32: -(8 / num_heads) (1 - layer_idx / num_layers) head (arXiv:2307.14995)."""
    return jnp.asarray((1 - layer_idx / num_layers) * (-8 / num_heads * np.arange(num_heads)), jnp.float32)


# Its checks ---------------------------------------------------------------------------------------------------------------------

def _known(x):
    """`x` as numpy where its values are known now, None where they are traced."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def _array(name, x, shape, dtype_kind):
    """`x` as a JAX array of that shape ("batch" etc. name a free size) and kind of dtype, or an error that says what came."""
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}")
    if len(x.shape) != len(shape) or any(isinstance(want, int) and want != got for want, got in zip(shape, x.shape)):
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {tuple(x.shape)}")
    if not jnp.issubdtype(x.dtype, dtype_kind):
        raise TypeError(f"{name}: expected {'integers' if dtype_kind is jnp.integer else 'floating point'}, got {x.dtype}")
    return jnp.asarray(x)


def _integer(name, x):
    """A scalar integer argument, and its value where that is known."""
    if isinstance(x, bool) or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise TypeError(f"{name}: expected an integer, got {x!r}")
    if jnp.shape(x) != ():
        raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(x)}")
    value = _known(x)
    return x, None if value is None else int(value)


def _check(q, k, v, layer_idx, num_layers, scale, s0, reverse, cu, g):
    """Raises for wrong arguments; returns q, k, v, g [H], the scale as a float, initial states and int32 boundaries."""
    q = _array("query", q, ("batch", "seq_len", "num_heads", "qk_head_dim"), jnp.floating)
    B, T, H, K = q.shape
    k = _array("key", k, (B, T, "num_kv_heads", K), jnp.floating)
    v = _array("value", v, (B, T, k.shape[2], "v_head_dim"), jnp.floating)
    V = v.shape[3]
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        raise TypeError(f"query: expected float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in ("key", k), ("value", v):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of query, {q.dtype}, got {x.dtype}")
    if H == 0 or k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"key: expected num_kv_heads to divide num_heads, got {k.shape[2]} and {H}")
    for name, d in ("query", K), ("value", V):
        if not 1 <= d <= 512:
            raise ValueError(f"{name}: expected a head dim from 1 to 512, got {d}")
    if T > 2**30:
        raise ValueError(f"query: expected seq_len of at most 2**30, got {T}")

    if g is not None and (layer_idx is not None or num_layers is not None):
        raise ValueError("g_gamma: expected either g_gamma or layer_idx and num_layers, got both")
    if g is None:
        for name, x in ("layer_idx", layer_idx), ("num_layers", num_layers):
            if x is None:
                raise ValueError(f"{name}: expected both layer_idx and num_layers where g_gamma is not given, got None")
        (layer_idx, layer), (num_layers, layers) = _integer("layer_idx", layer_idx), _integer("num_layers", num_layers)
        if layers is not None and layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {layers}")
        if layer is not None and (layer < 0 or layers is not None and layer >= layers):
            raise ValueError(f"layer_idx: expected 0 to num_layers - 1, got {layer} of {'traced' if layers is None else layers}")
        g = lightning_g_gamma(H, layer_idx, num_layers)
    else:
        g = _array("g_gamma", g, (H,), jnp.floating)
        if (value := _known(g)) is not None and not (value <= 0).all():
            raise ValueError(f"g_gamma: expected log decays <= 0, got {value.max()}")
    state_dtype = jnp.promote_types(q.dtype, jnp.float32)
    g = jnp.maximum(g.astype(state_dtype), -1e5)                 # e^g is 0 from far before; -inf would give NaN where no token is between

    if scale is None:
        scale = K**-0.5
    elif jnp.shape(scale) != ():
        raise ValueError(f"softmax_scale: expected a scalar, got shape {jnp.shape(scale)}")
    elif not (jnp.issubdtype(jnp.result_type(scale), jnp.floating) or jnp.issubdtype(jnp.result_type(scale), jnp.integer)):
        raise TypeError(f"softmax_scale: expected a real number, got {scale!r}")
    elif _known(scale) is None:                                  # kernels take a number: a traced scale goes into the query
        q, scale = q * scale.astype(q.dtype), 1.0
    if not isinstance(reverse, (bool, np.bool_)):
        raise TypeError(f"reverse: expected True or False, got {reverse!r}")

    n, count = B, "the batch"
    if cu is not None:
        cu = _array("cu_seqlens", np.asarray(cu) if isinstance(cu, (list, tuple)) else cu, ("num_seqs + 1",), jnp.integer)
        if B != 1:
            raise ValueError(f"cu_seqlens: expected a batch of 1 to hold the packed sequences, got {B}")
        if cu.shape[0] < 2:
            raise ValueError(f"cu_seqlens: expected at least 2 boundaries, got {cu.shape[0]}")
        if (value := _known(cu)) is not None:
            if value[0] != 0:
                raise ValueError(f"cu_seqlens: expected to start at 0, got {value[0]}")
            if (np.diff(value.astype(np.int64)) < 0).any():
                raise ValueError(f"cu_seqlens: expected boundaries that do not decrease, got {value}")
            if value[-1] > T:
                raise ValueError(f"cu_seqlens: expected boundaries up to seq_len, {T}, got {value[-1]}")
        if jnp.iinfo(cu.dtype).max > 2**31 - 1:
            cu = jnp.clip(cu, max(jnp.iinfo(cu.dtype).min, -1), 2**31 - 1)
        cu, n, count = cu.astype(jnp.int32), cu.shape[0] - 1, "the number of packed sequences"
    if s0 is not None:
        s0 = _array("initial_state", s0, ("n", H, K, V), jnp.floating).astype(state_dtype)
        if s0.shape[0] != n:
            raise ValueError(f"initial_state: expected {n} states, {count}, got {s0.shape[0]}")
    return q, k, v, g, float(scale), s0, cu


# The scan that everything is made of --------------------------------------------------------------------------------------------
#
# Below the API every batch row is a pack of n sequences, a plain batch being packs of one, and the op is a scan over them:
#
#     _scan(op, q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], g [B | 1, H], s0 [B, n, H, K, V] | None, cu [B | 1, n+1] | None)
#         -> o [B, T, H, V], s [B, n, H, K, V]
#
# Any operand may have fewer heads than the decay. The op is linear in q, k, v and s0, so its gradients are scans as well:
#
#     dq = scan(do, v, k, from s0^T)     dk = scan back(v, do, q, from ds^T)     dv = scan back(k, q, do, from ds)     ds0 = its end
#
# where the adjoint of a scan that decays its state before a token is added decays it after the token is read (`post`): so the
# cotangent of the final state is the state that it starts from, and what it ends with is the cotangent of s0.
#
# The states of dk's scan are those of dv's, transposed: with a last operand w [B, T, Hw, V] a scan also returns y_i = scale S_i w_i [B, T,
# H, K], and dk is what v reads there.

@dataclasses.dataclass(frozen=True)
class _Op:
    scale: float                                                 # of what queries read, or (post) of what enters the state
    reverse: bool
    post: bool                                                   # S_t enters o_t, and decays after it instead of before k_t v_t^T
    backend: str | None
    precision: Any                                               # jax.default_matmul_precision where the op was called
    only_state: bool = False                                     # o is [B, 0, H, V]

    def adjoint(self):
        return dataclasses.replace(self, reverse=not self.reverse, post=not self.post)


def _transposed(s):
    return None if s is None else jnp.swapaxes(s, -1, -2)


def _to_heads(x, heads, dtype):
    """Sums the gradient [B, T, H, D] of an operand over the query heads that read each of its `heads`."""
    B, T, H, D = x.shape
    return x if heads == H else x.reshape(B, T, heads, H // heads, D).sum(3, dtype=jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def _attend(op, *operands):
    """The scan with its gradients. A final state that nothing depends on has no cotangent, unless shard_map is around: it wants zeros."""
    return (_attend_local if jax.sharding.get_abstract_mesh().manual_axes else _attend_anywhere)(op, *operands)


@functools.partial(jax.jit, static_argnums=0)
def _forward(op, q, k, v, g, s0, cu):
    return _scan(op, q, k, v, g, s0, cu)


def _attend_fwd(op, *operands):
    o, s = _attend(op, *operands)
    return (o, s), (*operands, s)


def _attend_bwd(op, saved, cotangents):
    return _gradients(op, saved, *(None if isinstance(x, SymbolicZero) else x for x in cotangents))


@functools.partial(jax.jit, static_argnums=0)
def _gradients(op, saved, do, ds):
    q, k, v, g, s0, cu, s = saved
    do = jnp.zeros((*q.shape[:2], g.shape[1], v.shape[3]), v.dtype) if do is None or op.only_state else do
    op = dataclasses.replace(op, only_state=False)
    back = op.adjoint()
    dq, _ = _attend(op, do, v, k, g, _transposed(s0), cu)
    dv, ds0, dk = _attend_both(back, k, q, do, g, ds, cu, v)

    # o and s depend on g through e^{g (p_i - p_j)}, e^{g p_i} and e^{g (n - p_j)}: what q_i gains with p_i, k_j loses with p_j.
    p, count = _positions(op, q.shape[1], cu)                    # [B | 1, T], [B | 1, n]
    H, wide = g.shape[1], g.dtype
    dot = lambda x, dx: (jnp.repeat(x, H // x.shape[2], axis=2).astype(wide) * dx.astype(wide)).sum(-1)
    dg = (p.astype(wide)[..., None] * (dot(q, dq) - dot(k, dk))).sum(1)
    if ds is not None:
        dg += (count.astype(wide)[..., None] * (s * ds).sum((-1, -2))).sum(1)
    dg = dg if g.shape[0] > 1 else dg.sum(0, keepdims=True)
    dq, dk, dv = (_to_heads(dx, x.shape[2], x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dg, None if s0 is None else ds0, None


_attend_anywhere, _attend_local = (jax.custom_vjp(_forward, nondiff_argnums=(0,)) for _ in range(2))
_attend_anywhere.defvjp(lambda op, *operands: _attend_fwd(op, *custom_vjp_primal_tree_values(operands)), _attend_bwd, symbolic_zeros=True)
_attend_local.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_both(op, q, k, v, g, s0, cu, w):
    """The scan, and what w reads of its states transposed."""
    return _scan(op, q, k, v, g, s0, cu, w)


def _one_by_one(attend, op, q, k, v, g, s0, cu, w):
    return *attend(op, q, k, v, g, s0, cu), attend(op, w, v, k, g, _transposed(s0), cu)[0]


_attend_both.defvjp(lambda op, *operands: (_attend_both(op, *operands), operands),
                    lambda op, operands, cotangents: jax.vjp(functools.partial(_one_by_one, _attend, op), *operands)[1](cotangents))


# One sequence on many devices: each starts from what the devices before it leave, so states are all that is sent, once each way.

@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_across(op, axis, q, k, v, g, s0):
    return _across_fwd(op, axis, q, k, v, g, s0)[0]


def _across_fwd(op, axis, q, k, v, g, s0):
    s_in, s = _exchange(op, axis, k, v, g, s0)
    o, left = _attend(op, q, k, v, _vary(g, q), s_in, None)
    return (o, s), (q, k, v, g, s0, s_in, left)


def _across_bwd(op, axis, saved, cotangents):
    q, k, v, g, s0, s_in, left = saved
    do, ds = cotangents
    checked = axis in _varying(q)                                  # else shard_map(check_vma=False) sums what devices give and hands
    devices = lax.axis_size(axis)                                # each its part of what they share
    r_in, ds0 = _exchange(op.adjoint(), axis, q, do, g, ds if checked else lax.psum(ds, axis))
    dq, dk, dv, dg, *_ = _gradients(op, (q, k, v, _vary(g, q), s_in, None, left), do, r_in)
    if checked:
        dg = lax.psum(dg, tuple(_varying(dg) - _varying(g)))
    return dq, dk, dv, dg, None if s0 is None else ds0 if checked else ds0 / devices


_attend_across.defvjp(_across_fwd, _across_bwd)


def _exchange(op, axis, k, v, g, s0):
    """The state that this device's tokens start from, and the one that the whole sequence ends with (the same everywhere)."""
    T, devices = k.shape[1], lax.axis_size(axis)
    own = _attend(dataclasses.replace(op, only_state=True), k, k, v, _vary(g, k), None, None)[1]
    varies = axis in _varying(own)
    every = lax.all_gather(own, axis, **({"to": "invarying"} if varies else {}))             # [devices, B, 1, H, K, V]
    every = jnp.flip(every, 0) if op.reverse else every          # in scan order
    every = every if s0 is None else jnp.concatenate([s0[None], every])
    first = 0 if s0 is None else 1
    rank = lax.axis_index(axis)
    rank = devices - 1 - rank if op.reverse else rank

    def after(devices_before):                                   # the state that so many devices, and s0, leave behind
        age = devices_before - 1 + first - jnp.arange(every.shape[0])
        weight = jnp.where(age >= 0, jnp.exp(g[..., None] * (T * jnp.maximum(age, 0))), 0)  # [B | 1, H, devices (+ 1)]
        return jnp.einsum("bhd,dbnhkv->bnhkv", jnp.broadcast_to(weight, (own.shape[0], *weight.shape[1:])), every, precision="highest")

    return after(rank), after(devices)


def _vary(x, *like):
    """`x`, varying over every shard_map axis that one of `like` varies over."""
    axes = frozenset().union(*map(_varying, jax.tree.leaves(like)))
    return jax.tree.map(lambda x: lax.pcast(x, tuple(axes - _varying(x)), to="varying"), x)


def _varying(x):
    """The shard_map axes that `x` varies over; none where shard_map does not check."""
    return jax.typeof(x).manual_axis_type.varying


def _in_auto_mode(attend, q, k, v, g, s0, cu):
    """Under a mesh with Explicit axes, hands them to the compiler for the call; results are sharded as the operands."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = tuple(a for a, kind in zip(mesh.axis_names, mesh.axis_types) if kind == jax.sharding.AxisType.Explicit)
    if not explicit:
        return attend(q, k, v, g, s0, cu)
    first = lambda axis: next((spec for x in (q, k, v) if (spec := jax.typeof(x).sharding.spec[axis]) is not None), None)
    o, s = PartitionSpec(first(0), None, first(2)), PartitionSpec(first(0), None, first(2))
    return jax.sharding.auto_axes(attend, axes=explicit, out_sharding=(o, s))(q, k, v, g, s0, cu)


def _scan(op, q, k, v, g, s0, cu, w=None):
    """One scan, wherever it is called from: under vmap, on sharded arrays, for whichever platform."""
    if not (q.size and k.size and v.size):                       # no tokens, or no batch: nothing to launch
        B, n = q.shape[0], 1 if cu is None else cu.shape[1] - 1
        shape = B, n, g.shape[1], q.shape[3], v.shape[3]
        s = jnp.zeros(shape, g.dtype) if s0 is None else s0
        T = 0 if op.only_state else q.shape[1]
        o = jnp.zeros((B, T, g.shape[1], v.shape[3]), v.dtype)
        return _vary((o, s) if w is None else (o, s, jnp.zeros((B, T, *q.shape[2:]), v.dtype)), q, k, v, g)
    return _folded(op)(q, k, v, g, s0, cu, w)


@functools.cache
def _folded(op):
    """The scan with a vmap rule: the mapped axis is folded into the batch."""
    @jax.custom_batching.custom_vmap
    def scan(*operands):
        return _sharded(op, *operands)

    @scan.def_vmap
    def _(N, mapped, q, k, v, g, s0, cu, w):
        B = q.shape[1 if mapped[0] else 0]

        def fold(x, is_mapped):
            if x is None or not is_mapped and x.shape[0] == 1 and (x is g or x is cu):
                return x                                         # one decay or one set of boundaries for every row, as before
            x = x if is_mapped else jnp.broadcast_to(x, (N, *x.shape))
            x = jnp.broadcast_to(x, (N, B, *x.shape[2:]))
            return x.reshape(N * B, *x.shape[2:])

        results = scan(*map(fold, (q, k, v, g, s0, cu, w), (*mapped[:4], *map(bool, mapped[4:]))))
        return tuple(x.reshape(N, B, *x.shape[1:]) for x in results), (True,) * len(results)

    return scan


def _sharded(op, *operands):
    """The scan with a sharding rule: each device scans its own batch rows and heads, and nothing is sent."""
    present = tuple(x is not None for x in operands)
    q, k, v, g, s0, cu, w = operands
    B, H, few = q.shape[0], g.shape[1], min(x.shape[2] for x in (q, k, v, q if w is None else w))      # heads are `few` groups: (f r)

    def local(*operands):
        operands = iter(operands)
        return _on_platform(op, *(next(operands) if here else None for here in present))

    def one_device(*operands):                                   # the mesh at hand is not that of what a device has for itself
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return local(*operands)

    def partition(mesh, arguments, results):
        b, _, h, _ = (*results[0].sharding.spec, *(None,) * 4)[:4]
        if h is not None and few > 1 and few % math.prod(mesh.shape[axis] for axis in np.atleast_1d(h)):
            h = None                                             # devices that would share a key head gather them all
        put = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
        by = [put(b, None, h if x.shape[2] > 1 else None) for x in (q, k, v)] + [put(b if g.shape[0] == B else None, h)]
        if s0 is not None:
            by += [put(b, None, h)]
        if cu is not None:
            by += [put(b if cu.shape[0] == B else None)]
        if w is not None:
            by += [put(b, None, h if w.shape[2] > 1 else None)]
        return mesh, one_device, (put(b, None, h),) * len(results), tuple(by)

    heads = lambda x: "f" if x == few else f"h{x}" if x != H else "r" if few == 1 else "(f r)"
    row = lambda x, own: "b" if x.shape[0] == B else own
    rule = [f"b t {heads(q.shape[2])} k", f"b t {heads(k.shape[2])} k", f"b t {heads(v.shape[2])} v", f"{row(g, 'g')} {heads(H)}"]
    if s0 is not None:
        rule += [f"b n {heads(H)} k v"]
    if cu is not None:
        rule += [f"{row(cu, 'c')} m"]
    if w is not None:
        rule += [f"b t {heads(w.shape[2])} v"]
    rule = ", ".join(rule) + f" -> b {'u' if op.only_state else 't'} {heads(H)} v, b n {heads(H)} k v"
    rule += "" if w is None else f", b t {heads(H)} k"
    call = custom_partitioning(local)
    together = tuple(x for x in "tkvnmu" if f" {x}" in rule)
    call.def_partition(partition, sharding_rule=rule, need_replication_factors=together, **({"r": H // few} if 1 < few < H else {}))
    return call(*(x for x in operands if x is not None))


def _on_platform(op, *operands):
    """Triton or plain JAX, chosen when the computation is lowered unless `op.backend` names one."""
    def on(scan):
        def run(*operands):
            return _vary(scan(op, *operands), operands)
        return run

    plain, kernels = on(_scan_xla), on(_scan_triton)
    if op.backend is None:
        return lax.platform_dependent(*operands, cuda=kernels, rocm=kernels, default=plain)
    return (kernels if op.backend == "triton" else plain)(*operands)


# Where sequences begin and end --------------------------------------------------------------------------------------------------

def _intervals(T, cu):
    """Cuts T tokens at boundaries cu [n+1] that may be anything: n+2 intervals (what is before the first sequence, the sequences,
    what is after the last) as bounds [n+3] that never decrease, and which of them are sequences. One that runs backwards, outside
    of the tokens or into an earlier one is an empty sequence, and its tokens, like those at both ends, belong to none."""
    zero, last = jnp.zeros(1, jnp.int32), jnp.full(1, T, jnp.int32)
    start, end = jnp.concatenate([zero, cu]), jnp.concatenate([cu, last])
    fits = (0 <= start) & (start <= end) & (end <= T)
    latest = jnp.concatenate([zero, lax.cummax(jnp.where(fits, end, 0))[:-1]])               # tokens are spoken for up to here
    fits &= start >= latest
    i = jnp.arange(start.shape[0])
    return jnp.concatenate([jnp.where(fits, start, latest), last]), fits & (0 < i) & (i < start.shape[0] - 1)


def _table(T, cu, L, reverse, M=0):
    """Rows of work, [R, 7] int32: first token, tokens, tokens that belong to a sequence (all or none), sequence or -1, how many rows
    of its interval come before it in scan order and how many after it, and how many segments of all intervals before it another one
    follows. Rows are segments of L tokens, anchored where the scan starts: T // L + intervals are always enough. With M, rows are
    pieces of L tokens, M to each of those segments that another one follows. Rows without work have -1 tokens."""
    if cu is None:                                               # one sequence, and nothing around it
        bounds, is_sequence = T * jnp.arange(2), jnp.ones(1, bool)
    else:
        bounds, is_sequence = _intervals(T, cu)
    length, intervals = bounds[1:] - bounds[:-1], is_sequence.shape[0]
    segments = jnp.maximum(1, -(-length // (L * max(M, 1))))
    rows, R = ((segments - 1) * M, (T - 1) // (L * M) * M) if M else (segments, -(-T // L) if cu is None else T // L + intervals)
    ends = jnp.cumsum(rows)
    row = jnp.arange(R)
    of = jnp.cumsum(jnp.zeros(R, jnp.int32).at[ends].add(1, mode="drop"))
    used, of = of < intervals, jnp.minimum(of, intervals - 1)
    place = row - (ends - rows)[of]
    tokens = jnp.clip(length[of] - place * L, 0, L)
    first = bounds[1:][of] - place * L - tokens if reverse else bounds[of] + place * L
    sequence = of if cu is None else jnp.where((0 < of) & (of < intervals - 1), of - 1, -1)  # interval 1 is sequence 0
    columns = first, jnp.where(used, tokens, -1), jnp.where(is_sequence[of], tokens, 0), sequence, place, rows[of] - 1 - place, row - of
    return jnp.stack([x.astype(jnp.int32) for x in columns], -1)


def _tables(T, cu, *rest):
    """`_table` for each row of cu [B | 1, n+1]: [B | 1, R, 7]; for a plain batch, of one row."""
    return _table(T, None, *rest)[None] if cu is None else jax.vmap(lambda cu: _table(T, cu, *rest))(cu)


def _positions(op, T, cu):
    """Exponents p of the decay that tokens [B | 1, T] read a state with, and those that final states [B | 1, n] end with."""
    t = jnp.arange(T)
    if cu is None:
        return (T - 1 - t if op.reverse else t)[None] + (not op.post), jnp.full((1, 1), T)

    def row(cu):
        bounds, _ = _intervals(T, cu)
        of = jnp.searchsorted(bounds[1:], t, side="right")
        p = bounds[1:][of] - 1 - t if op.reverse else t - bounds[of]
        return p + (not op.post), (bounds[1:] - bounds[:-1])[1:-1]
    return jax.vmap(row)(cu)


# The scan in plain JAX ----------------------------------------------------------------------------------------------------------

def _scan_xla(op, q, k, v, g, s0, cu, w=None):
    """Chunk by chunk with a `lax.scan`; results as `_scan`'s. On a CPU, chunks of 32 to 64 tokens were the fastest."""
    if w is not None:
        return _one_by_one(_scan_xla, op, q, k, v, g, s0, cu, w)
    B, T, H, K, V, n = *q.shape[:2], g.shape[1], q.shape[3], v.shape[3], 1 if cu is None else cu.shape[1] - 1
    g = lax.optimization_barrier(g)                              # XLA would fold decays that it knows into large constants, and be slower
    C, wide = min(T, 64), g.dtype
    dot = functools.partial(jnp.einsum, precision=op.precision, preferred_element_type=wide)

    scale_q, scale_k = (1.0, op.scale) if op.post else (op.scale, 1.0)
    i = jnp.arange(C)
    far = (i[:, None] - i) * (-1 if op.reverse else 1)           # the same in every chunk, whichever tokens of it are its own

    def row(q, k, v, g, s0, table):                              # [T, H, K], ..., [H], [n, H, K, V], [R, 7]
        decay = lambda distance: jnp.exp(g[:, None, None] * jnp.maximum(distance, 0))
        D = jnp.where(far >= 0, scale_k * decay(far), 0)

        def chunk(carry, work):
            o, s = carry
            first, tokens, read, sequence = work[:4]
            start = jnp.clip(first, 0, T - C)                    # C tokens, some of which may be another chunk's
            t = start + i.astype(jnp.int32)
            rank = first + tokens - 1 - t if op.reverse else t - first
            mine = ((0 <= rank) & (rank < tokens))[:, None, None]
            S = lax.dynamic_index_in_dim(s, sequence, keepdims=False)

            def load(x):                                         # [C, Hx, D] -> [H, C, D]: zeros where no sequence has tokens
                x = lax.dynamic_slice_in_dim(x, start, C).astype(wide)
                x = jnp.where(mine & (read > 0), x, 0).swapaxes(0, 1)
                return jnp.repeat(x, H // x.shape[0], axis=0)

            qs, ks, vs = map(load, (q, k, v))
            P = dot("hik,hjk->hij", qs, ks) * D
            O = dot("hij,hjv->hiv", P, vs) + decay(rank[:, None] + (not op.post)) * dot("hik,hkv->hiv", qs, S)
            S = decay(read) * S + dot("hjk,hjv->hkv", ks * (scale_k * decay((read - 1 - rank + op.post)[:, None])), vs)
            O = (scale_q * O).swapaxes(0, 1).astype(o.dtype)
            O = jnp.where(mine, O, lax.dynamic_slice_in_dim(o, start, C))
            return (lax.dynamic_update_slice_in_dim(o, O, start, 0), lax.dynamic_update_index_in_dim(s, S, sequence, 0)), None

        o, s = lax.scan(chunk, _vary((jnp.zeros((T, H, V), v.dtype), s0), q, k, v, g, s0, table), table)[0]
        return o[:0] if op.only_state else o, s

    s0 = jnp.zeros((B, n, H, K, V), wide) if s0 is None else s0
    table = _tables(T, cu, C, op.reverse)
    g, table = (x if x.shape[0] > 1 else x[0] for x in (g, table))
    return jax.vmap(row, (0, 0, 0, 0 if g.ndim > 1 else None, 0, 0 if table.ndim > 2 else None))(q, k, v, g, s0, table)


# The kernels --------------------------------------------------------------------------------------------------------------------
#
# They hold S^T, [V, K]: o^T = S^T q^T then takes it from the registers that it is summed in, and of all that is multiplied in a
# chunk only the [C, C] scores pass through shared memory. z, which no one else reads, is kept as [V, K] too.
#
# One binary serves scans in all directions: they are an argument, `way`, of 2 if reverse, 4 if post, 8 if z lies as [K, V], and 16 for each
# part of the keys before this one. It is never 1, because jax-triton compiles in what is 1 (as an integer: hence `scale * 1.0`).

_kernel, _gluon = (triton.jit, gluon.jit) if triton else (lambda f: f,) * 2


def _work(table, NK, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """What a program works on: tile of the values, of the keys, head, batch row, r and row r of its `_table`, read or, for a plain batch,
    worked out: that saves it a launch and a wait for memory. Neighbours share tokens, or else (ROWS_FIRST) their head."""
    i = tl.program_id(0)
    i_v, i = i % NV, i // NV
    i_k, i = i % NK, i // NK
    if ROWS_FIRST:
        r, i = i % R, i // R
        h, b = i % H, (i // H).to(tl.int64)
    else:
        h, i = i % H, i // H
        r, b = i % R, (i // R).to(tl.int64)
    if PACKED:
        row = table + b * TABLE_STRIDE + r * 7
        return (i_v, i_k, h, b, r, tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5),
                tl.load(row + 6))
    else:
        tokens = tl.minimum(T - r * L, L)
        first = r * L + reverse * (T - tokens - 2 * r * L)
        return i_v, i_k, h, b, r, first, tokens, tokens, 0, r, R - 1 - r, r


def _enter(S, z, s0, zT, state, inside, place, sequence, swap, gL, HAS_S0: tl.constexpr):
    """S plus the state that a segment starts from: what the segments before it leave, linked, and the sequence's own, decayed. Numbers
    lie at `zT` in z, as in [V, K], or (swap), as in any state, at `state`."""
    if place > 0:
        if swap > 0:
            S += tl.load(z + state, mask=inside, other=0.0)
        else:
            S += tl.load(z + zT, mask=inside, other=0.0)
    if HAS_S0:
        if sequence >= 0:
            S += tl.exp2(gL * place) * tl.load(s0 + state, mask=inside, other=0.0)
    return S


_work_gluon, _enter_gluon = _gluon(_work), _gluon(_enter)
_work, _enter = _kernel(_work), _kernel(_enter)


@_kernel
def _load(x, t, read, stride, column, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows t .. t+C and columns column .. column+BD of x, whose rows are `stride` apart: 0 outside of [read, D]."""
    row, col = tl.arange(0, C)[:, None], tl.arange(0, BD)[None, :]
    inside = (t + row >= 0) & (t + row < read)
    if D % BD != 0:
        inside = inside & (column + col < D)
    return tl.load(x + (t.to(tl.int64) * stride + column) + row * stride + col, mask=inside, other=0.0)


@_kernel
def _states_kernel(k, v, g, table, z, T, L, H, R, HK, HV, TABLE_STRIDE, G_STRIDE, M, scale, way,
                   K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """z^T = sum_j e^{g(L-1-j)} v_j k_j^T over a piece of L tokens (post: e^{g(L-j)}, times the scale).

    A weight that is 0 in float32 at the end of the segment belongs to a token that is not read, and to a z that is not written:
    for most heads that is most of the segment."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    reverse, post = way // 2 % 2, way // 4 % 2
    turn = 1 - 2 * reverse
    # the heads that forget least, the first ones, are at work longest: all of their rows start at once
    i_v, i_k, h, b, r, first, tokens, read, sequence, place, after, slot = _work(table, NK, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED, True)
    gm = (tl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(tl.float32)
    if tokens < 0 or gm * L * (M - 1 - place % M) <= -150.0:
        return
    start = b * T + first
    k += (start * HK + h // (H // HK)) * K
    v += (start * HV + h // (H // HV)) * V
    rank = (C - 1) * reverse + turn * tl.arange(0, C)
    scale_k = scale * 1.0 if post > 0 else 1.0
    c_end = (tokens + C - 1) // C
    live = tl.minimum(tl.ceil(150.0 / tl.maximum(-gm, 1e-6) / C) + 1, c_end * 1.0).to(tl.int32)
    S = tl.full([BV, BK], 0.0, tl.float32)
    for c in range(c_end - live, c_end):
        m = tl.minimum(tokens - c * C, C)
        t = (tokens - C) * reverse + turn * C * c
        ks, vs = _load(k, t, read, HK * K, i_k * BK, C, K, BK), _load(v, t, read, HV * V, i_v * BV, C, V, BV)
        dk = tl.exp2(gm * tl.maximum(m - 1 - rank + post, 0)) * scale_k
        S = tl.dot(tl.trans((vs * dk[:, None]).to(vs.dtype)), ks, S * tl.exp2(gm * m), input_precision=PRECISION)
    ck, cv = i_k * BK + tl.arange(0, BK)[None, :], i_v * BV + tl.arange(0, BV)[:, None]
    tl.store(z + ((b * R + r) * H + h) * K * V + cv * K + ck, S, mask=(ck < K) & (cv < V))


@_kernel
def _link_kernel(z, g, table, L, H, R, TABLE_STRIDE, G_STRIDE, Z, M: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, PACKED: tl.constexpr):
    """Makes z of the last piece of each segment the state that the next one starts from: along a sequence,
    S' = e^{gLM} S + sum_j e^{gL(M-1-j)} z_j over the M pieces of a segment; BE of the E numbers of a state."""
    NE: tl.constexpr = (E + BE - 1) // BE
    i = tl.program_id(0)
    i_e, i = i % NE, i // NE
    h, i = i % H, i // H
    r, b = i % R * M, (i // R).to(tl.int64)
    segments = Z // M
    if PACKED:                                                   # the first piece of a sequence stands for all of it
        row = table + b * TABLE_STRIDE + r * 7
        segments = tl.where((tl.load(row + 1) < 0) | (tl.load(row + 4) > 0), 0, (tl.load(row + 5) + 1) // M)
    gL = (tl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(tl.float32) * L
    if gL <= -150.0:                                             # every z is that already
        return
    j, e = tl.arange(0, M)[:, None], i_e * BE + tl.arange(0, BE)
    z += ((b * Z + r) * H + h) * E
    stride = tl.full([], H * E, tl.int64)
    S = tl.full([BE], 0.0, tl.float32)
    for c in tl.range(0, segments, num_stages=3):                # (reads ahead of what it writes)
        zs = tl.load(z + j * stride + e[None, :], mask=(e[None, :] < E) & (gL * (M - 1 - j) > -150.0), other=0.0)
        z += (M - 1) * stride
        S = S * tl.exp2(gL * M) + tl.sum(zs * tl.exp2(gL * (M - 1 - j)), 0)
        tl.store(z + e, S, mask=e < E)
        z += stride


@_kernel
def _scan_kernel(q, k, v, g, s0, z, table, o, s, B, T, L, H, R, n, HQ, HK, HV, TABLE_STRIDE, G_STRIDE, M, Z, scale, way,
                 K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                 PACKED: tl.constexpr, HAS_S0: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr):
    """o_i = scale (e^{g(i+1)} q_i S + sum_{j<=i} e^{g(i-j)} (q_i.k_j) v_j), S' = e^{gm} S + sum_j e^{g(m-1-j)} k_j v_j^T, chunk
    by chunk over one segment, for one head, BV of the V columns and BK of the K that are summed over (ADD: to what is in o).
    i, j in scan order, m tokens in the chunk (post: e^{gi} q_i S and e^{g(m-j)} k_j v_j^T, and the scale is of what enters S).

    What lies outside of the segment reads as 0 and is not written, whatever the table says of it."""
    NV: tl.constexpr = (V + BV - 1) // BV
    reverse, post = way // 2 % 2, way // 4 % 2
    turn = 1 - 2 * reverse
    i_v, _, h, b, r, first, tokens, read, sequence, place, after, slot = _work(table, 1, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED, False)
    if tokens < 0:
        return
    gm = (tl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(tl.float32)
    start = b * T + first
    q += (start * HQ + h // (H // HQ)) * K
    k += (start * HK + h // (H // HK)) * K
    v += (start * HV + h // (H // HV)) * V
    o += (start * H + h) * V

    column_k = way // 16 * BK
    ck, cv = column_k + tl.arange(0, BK)[None, :], i_v * BV + tl.arange(0, BV)[:, None]
    inside = (ck < K) & (cv < V)
    state = ck * V + cv
    s0 += ((b * n + sequence) * H + h) * K * V
    s += ((b * n + sequence) * H + h) * K * V
    z += ((b * Z + slot * M - 1) * H + h) * K * V
    S = _enter(tl.full([BV, BK], 0.0, tl.float32), z, s0, cv * K + ck, state, inside, place, sequence, way // 8 % 2, gm * L, HAS_S0)

    rank = (C - 1) * reverse + turn * tl.arange(0, C)
    far = rank[None, :] - rank[:, None]                          # [j, i]
    scale_q, scale_k = 1.0 if post > 0 else scale * 1.0, scale * 1.0 if post > 0 else 1.0
    D = tl.where(far >= 0, tl.exp2(gm * tl.maximum(far, 0)) * scale, 0.0)
    dq = tl.exp2(gm * (rank + 1 - post)) * scale_q
    for c in range((tokens + C - 1) // C):
        m = tl.minimum(tokens - c * C, C)
        t = (tokens - C) * reverse + turn * C * c
        qs, ks = _load(q, t, read, HQ * K, column_k, C, K, BK), _load(k, t, read, HK * K, column_k, C, K, BK)
        vs = _load(v, t, read, HV * V, i_v * BV, C, V, BV)
        P = tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * D
        O = tl.dot(S.to(qs.dtype), tl.trans(qs), input_precision=PRECISION) * dq[None, :]
        O = tl.dot(tl.trans(vs), P.to(vs.dtype), O, input_precision=PRECISION)
        row, col = tl.arange(0, C)[:, None], i_v * BV + tl.arange(0, BV)[None, :]
        O, to, mine = tl.trans(O), o + t.to(tl.int64) * (H * V) + row * (H * V) + col, (t + row >= 0) & (t + row < tokens) & (col < V)
        if ADD:
            O += tl.load(to, mask=mine, other=0.0).to(tl.float32)
        tl.store(to, O.to(vs.dtype), mask=mine)
        dk = tl.exp2(gm * tl.maximum(m - 1 - rank + post, 0)) * scale_k
        S = tl.dot(tl.trans((vs * dk[:, None]).to(vs.dtype)), ks, S * tl.exp2(gm * m), input_precision=PRECISION)
    if after == 0:
        if sequence >= 0:
            tl.store(s + state, S, mask=inside)


# The same scan for 16-bit operands on Hopper, in Gluon, because Triton waits for each product and for each copy through shared
# memory before it starts the next. Here the tensor memory accelerator fetches chunks ahead, and products run while what does
# not need them goes on. Warps own 16 rows of S^T each; [C, BV] outputs are turned in shared memory to leave in whole lines.

@_gluon
def _fetch(qd, kd, vd, wd, full, qs, ks, vs, ws, row, hq, hk, hv, hw, column_k, column_v, BOTH: gl.constexpr):
    hopper.mbarrier.expect(full, qd.nbytes_per_cta + kd.nbytes_per_cta + vd.nbytes_per_cta + (wd.nbytes_per_cta if BOTH else 0))
    hopper.tma.async_load(qd, [row, hq, column_k], full, qs)
    hopper.tma.async_load(kd, [row, hk, column_k], full, ks)
    hopper.tma.async_load(vd, [row, hv, column_v], full, vs)
    if BOTH:
        hopper.tma.async_load(wd, [row, hw, column_v], full, ws)


@_gluon
def _multiply(qs, ks, vs, ws, sb, ps, pw, S, D, dq, dk, dS, LO: gl.constexpr, LP: gl.constexpr, BOTH: gl.constexpr):
    """o^T, y^T and S'^T of a chunk, in this order still being summed when it returns, and the operands that they read from registers."""
    C: gl.constexpr = ks.shape[0]
    BV: gl.constexpr = vs.shape[1]
    dtype: gl.constexpr = ks.dtype
    AO: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    AS: gl.constexpr = gl.DotOperandLayout(0, S.type.layout, 2)
    qt = qs.permute((1, 0))
    wt = ws.permute((1, 0))
    if not BOTH:                                                 # for both there are not the registers: sb holds it
        Sb = gl.convert_layout(S.to(dtype), AO)
    P = hopper.warpgroup_mma(ks, qt, gl.full([C, C], 0.0, gl.float32, LP), use_acc=False, is_async=True)
    O = hopper.warpgroup_mma(sb if BOTH else Sb, qt, gl.full([BV, C], 0.0, gl.float32, LO), use_acc=False, is_async=True)
    P = hopper.warpgroup_mma_wait(1, [P])
    ps.store((P * D).to(dtype))
    if BOTH:
        P = hopper.warpgroup_mma(vs, wt, gl.full([C, C], 0.0, gl.float32, LP), use_acc=False, is_async=True)
        Y = hopper.warpgroup_mma(sb.permute((1, 0)), wt, gl.full([BV, C], 0.0, gl.float32, LO), use_acc=False, is_async=True)
        O, P = hopper.warpgroup_mma_wait(1, [O, P])
        pw.store((P * D).to(dtype))
    vt = vs.permute((1, 0)).load(AS)
    vw = (vt.to(gl.float32) * dk[None, :]).to(dtype)
    vt = gl.convert_layout(vt, AO)
    if not BOTH:
        O, Sb = hopper.warpgroup_mma_wait(0, [O, Sb])
        Y = O
    gl.barrier()                                                 # scores are all there (the compiler fences them for the product)
    O = hopper.warpgroup_mma(vs.permute((1, 0)) if BOTH else vt, ps, O * dq[None, :], is_async=True)
    if BOTH:
        Y = hopper.warpgroup_mma_wait(1, [Y])
        Y = hopper.warpgroup_mma(ks.permute((1, 0)), pw, Y * dq[None, :], is_async=True)
    S = hopper.warpgroup_mma(vw, ks, S * dS, is_async=True)
    return O, vw if BOTH else vt, Y, S, vw


@_gluon
def _rows(x, t, read, stride, column, D: gl.constexpr, C: gl.constexpr, BD: gl.constexpr, W: gl.constexpr):
    """Pointers to rows t .. t+C, columns column .. column+BD of x, whose rows are `stride` apart, and which are inside of [read, D]."""
    LB: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BD, BD // 8], [W, 1], [1, 0])
    row = t + gl.arange(0, C, gl.SliceLayout(1, LB))[:, None]
    col = column + gl.arange(0, BD, gl.SliceLayout(0, LB))[None, :]
    return x + row.to(gl.int64) * stride + col, (row >= 0) & (row < read) & (col < D)


@_gluon
def _read(x, t, read, stride, column, D: gl.constexpr, C: gl.constexpr, BD: gl.constexpr, W: gl.constexpr):
    at, inside = _rows(x, t, read, stride, column, D, C, BD, W)
    return gl.load(at, mask=inside, other=0.0)


@_gluon
def _put(o, os, O, old, t, tokens, stride, column, D: gl.constexpr, W: gl.constexpr, ADD: gl.constexpr):
    """Stores O^T, plus what was there if ADD."""
    at, inside = _rows(o, t, tokens, stride, column, D, os.shape[0], os.shape[1], W)
    os.permute((1, 0)).store(O.to(os.dtype))
    out = os.load(gl.BlockedLayout([1, 8], [256 // os.shape[1], os.shape[1] // 8], [W, 1], [1, 0]))
    if ADD:
        out = (out.to(gl.float32) + old.to(gl.float32)).to(out.dtype)
    gl.store(at, out, mask=inside)


@_gluon
def _hopper_kernel(qd, kd, vd, wd, q, k, v, w, g, s0, z, table, o, s, y, B, T, L, H, R, n, HQ, HK, HV, HW, TABLE_STRIDE, G_STRIDE, M, Z,
                   scale, way, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, C: gl.constexpr,
                   STAGES: gl.constexpr, PACKED: gl.constexpr, HAS_S0: gl.constexpr, ADD: gl.constexpr, BOTH: gl.constexpr):
    """`_scan_kernel`, line by line; qd, kd, vd, wd describe q, k, v, w as [B T, heads, head dim]. BOTH: also y_i = scale S_i w_i, the same
    for S transposed, where k and v change places; for a square tile that is all of K and V."""
    W: gl.constexpr = BV // 16                                   # warps
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BK, 16])              # S^T [BV, BK]
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, C, 16])               # o^T [BV, C], y^T
    LP: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, W // 4], [16, 4 * C // W, 16])  # scores [j, i]
    NV: gl.constexpr = (V + BV - 1) // BV
    reverse, post = way // 2 % 2, way // 4 % 2
    turn = 1 - 2 * reverse
    i_v, _, h, b, r, first, tokens, read, sequence, place, after, slot = _work_gluon(table, 1, NV, H, R, T, L, TABLE_STRIDE, reverse, PACKED,
                                                                                         False)
    if tokens < 0:
        return
    gm = (gl.load(g + b * G_STRIDE + h) * 1.4426950408889634).to(gl.float32)
    start = b * T + first
    hq, hk, hv, hw, column_k, column_v = h // (H // HQ), h // (H // HK), h // (H // HV), h // (H // HW), way // 16 * BK, i_v * BV
    q += (start * HQ + hq) * K
    k += (start * HK + hk) * K
    v += (start * HV + hv) * V
    o += (start * H + h) * V
    if BOTH:
        w += (start * HW + hw) * V
        y += (start * H + h) * K

    ck = column_k + gl.arange(0, BK, gl.SliceLayout(0, LS))[None, :]
    cv = column_v + gl.arange(0, BV, gl.SliceLayout(1, LS))[:, None]
    inside = (ck < K) & (cv < V)
    state = ck * V + cv
    s0 += ((b * n + sequence) * H + h) * K * V
    s += ((b * n + sequence) * H + h) * K * V
    z += ((b * Z + slot * M - 1) * H + h) * K * V
    S = _enter_gluon(gl.full([BV, BK], 0.0, gl.float32, LS), z, s0, cv * K + ck, state, inside, place, sequence, way // 8 % 2, gm * L, HAS_S0)

    dtype: gl.constexpr = qd.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    qb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], qd.layout)
    kb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BK], kd.layout)
    vb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], vd.layout)
    ps = gl.allocate_shared_memory(dtype, [C, C], flat)
    os = gl.allocate_shared_memory(dtype, [C, BV], flat)
    wb, sb, pw, ys = vb, ps, ps, os
    if BOTH:
        wb = gl.allocate_shared_memory(dtype, [STAGES, C, 1, BV], wd.layout)
        sb = gl.allocate_shared_memory(dtype, [BV, BK], flat)
        pw = gl.allocate_shared_memory(dtype, [C, C], flat)
        ys = gl.allocate_shared_memory(dtype, [C, BK], flat)
    full = hopper.mbarrier.allocate_mbarrier(batch=STAGES)
    for c in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(c), count=1)
    hopper.fence_async_shared()
    gl.barrier()
    whole = read // C
    t = (tokens - C) * reverse                                   # where the first chunk is, and how far it is to the next one
    forth = turn * C
    row = start.to(gl.int32) + t
    for c in range(gl.minimum(whole, STAGES)):
        _fetch(qd, kd, vd, wd, full.index(c), qb.index(c), kb.index(c), vb.index(c), wb.index(c), row + c * forth, hq, hk, hv, hw,
               column_k, column_v, BOTH)

    scale_q, scale_k = 1.0 if post > 0 else scale * 1.0, scale * 1.0 if post > 0 else 1.0
    far = turn * (gl.arange(0, C, gl.SliceLayout(0, LP))[None, :] - gl.arange(0, C, gl.SliceLayout(1, LP))[:, None])       # [j, i]
    rank_q = (C - 1) * reverse + turn * gl.arange(0, C, gl.SliceLayout(0, LO))
    rank_k = (C - 1) * reverse + turn * gl.arange(0, C, gl.SliceLayout(0, gl.DotOperandLayout(0, LS, 2)))
    D = gl.where(far >= 0, gl.exp2(gm * gl.maximum(far, 0)) * scale, 0.0)
    dq = gl.exp2(gm * (rank_q + 1 - post)) * scale_q
    dk = gl.exp2(gm * (C - 1 - rank_k + post)) * scale_k
    dS = gl.exp2(gm * C)
    c, stage, phase = 0, 0, 0
    while c < (tokens + C - 1) // C:                             # (of a `for`, Triton's pipeliner waits for each product)
        qs, ks = qb.index(stage).reshape([C, BK]), kb.index(stage).reshape([C, BK])
        vs, ws = vb.index(stage).reshape([C, BV]), wb.index(stage).reshape([C, BV])
        if c < whole:
            hopper.mbarrier.wait(full.index(stage), phase)
        else:                                                    # the ragged end of a sequence; padding, for which zeros are stored
            qs.store(_read(q, t, read, HQ * K, column_k, K, C, BK, W))
            ks.store(_read(k, t, read, HK * K, column_k, K, C, BK, W))
            vs.store(_read(v, t, read, HV * V, column_v, V, C, BV, W))
            if BOTH:
                ws.store(_read(w, t, read, HW * V, column_v, V, C, BV, W))
            m = gl.minimum(tokens - c * C, C)
            dk = gl.exp2(gm * gl.maximum(m - 1 - rank_k + post, 0)) * scale_k
            dS = gl.exp2(gm * m)
        if BOTH:
            sb.store(S.to(dtype))
        hopper.fence_async_shared()
        gl.barrier()                                             # every warp is past the chunk before
        if (c > 0) & (c - 1 + STAGES < whole):
            free = (stage + STAGES - 1) % STAGES
            _fetch(qd, kd, vd, wd, full.index(free), qb.index(free), kb.index(free), vb.index(free), wb.index(free),
                   row + (c - 1 + STAGES) * forth, hq, hk, hv, hw, column_k, column_v, BOTH)
        old = S
        if ADD:
            old = _read(o, t, tokens, H * V, column_v, V, C, BV, W)
        O, vt, Y, S, vw = _multiply(qs, ks, vs, ws, sb, ps, pw, S, D, dq, dk, dS, LO, LP, BOTH)
        O, vt = hopper.warpgroup_mma_wait(1 + BOTH, [O, vt])
        _put(o, os, O, old, t, tokens, H * V, column_v, V, W, ADD)
        if BOTH:
            Y = hopper.warpgroup_mma_wait(1, [Y])
            _put(y, ys, Y, old, t, tokens, H * K, 0, K, W, False)
        S, vw = hopper.warpgroup_mma_wait(0, [S, vw])
        t += forth
        c += 1
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if after == 0:
        if sequence >= 0:
            gl.store(s + state, S, mask=inside)


@_kernel
def _step_kernel(q, k, v, g, s0, o, s, H, HQ, HK, HV, G_STRIDE, scale, way, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, HAS_S0: tl.constexpr):
    """`_scan_kernel` for sequences of one token: nothing to multiply as matrices, so the state passes through once, as it lies."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0)
    i_v, i = i % NV, i // NV
    h, b = i % H, (i // H).to(tl.int64)
    decay = tl.exp(tl.load(g + b * G_STRIDE + h))
    ck, cv = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    qs = tl.load(q + (b * HQ + h // (H // HQ)) * K + ck, mask=ck < K, other=0.0).to(tl.float32)
    ks = tl.load(k + (b * HK + h // (H // HK)) * K + ck, mask=ck < K, other=0.0).to(tl.float32)
    vs = tl.load(v + (b * HV + h // (H // HV)) * V + cv, mask=cv < V, other=0.0).to(tl.float32)
    at = (b * H + h) * K * V + ck[:, None] * V + cv[None, :]
    inside = (ck < K)[:, None] & (cv < V)[None, :]
    post = way // 4 % 2
    scale_q, scale_k = 1.0 if post > 0 else scale * 1.0, scale * 1.0 if post > 0 else 1.0
    S = ks[:, None] * (vs * scale_k)[None, :]
    if HAS_S0:
        S += tl.load(s0 + at, mask=inside, other=0.0) * (1.0 if post > 0 else decay)
    tl.store(o + (b * H + h) * V + cv, (tl.sum(qs[:, None] * S, 0) * scale_q).to(o.dtype.element_ty), mask=cv < V)
    tl.store(s + at, S * (decay if post > 0 else 1.0), mask=inside)


# Their launch -------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Config:
    """How the scan is launched. Chosen by `_config` alone; `bench.py --tune` measures what it should choose."""
    kernel: Any                                                  # `_hopper_kernel` or `_scan_kernel`
    C: int                                                       # tokens a chunk: 16 at least, for the matrix units
    BK: int                                                      # columns of the queries and keys a program
    BV: int                                                      # columns of the values a program
    num_warps: int
    num_stages: int                                              # chunks in flight, the one at work included
    residents: int                                               # programs that a processor holds at once
    states_BK: int                                               # columns of the keys a program of `_states_kernel`, 64 of the values
    states_stages: int                                           # chunks of 64 tokens in flight there


_SHARED_MEMORY = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}    # KiB a program


def _config(arch, K, V, dtype, B, T):
    """The launch configuration on a GPU for head dims K, V and B rows of T tokens. S^T is at most [128, 128], for the registers."""
    shared, itemsize = _SHARED_MEMORY.get(arch, 64 if arch.startswith("gfx") else 99), dtype.itemsize
    BK, BV = min(_block(K), 128), min(_block(V), 128)
    wide = 256 // itemsize                                       # whole rows of 256 bytes
    states = wide, min(4, shared * 1024 // (64 * (wide + 96) * itemsize))                   # tiles in flight, and one that is multiplied
    # descriptors want rows that are multiples of 16 bytes
    if arch == "sm_90" and itemsize == 2 and 64 <= T and B * T < 2**31 and K % 8 == V % 8 == 0:
        if _HAS_HOPPER:
            BK, BV = max(BK, 64), max(BV, 64)
            return _Config(_hopper_kernel, 64, BK, BV, BV // 16, 4, 2 if BK == BV == 64 else 1, *states)
        warnings.warn("lightning_attn: this Hopper GPU runs the Triton kernel, which takes up to 1.5 times "
                      "as long as the one in Gluon, because that cannot run: found triton "
                      f"{triton.__version__}. It needs: pip install 'triton{_HOPPER}'")

    def need(C, BV, stages):                                     # tiles in flight, and what passes through shared memory
        return (stages * C * (2 * BK + BV) + C * max(C, 2 * BV)) * itemsize / 1024 + 4
    C = 16 if T <= 16 else 32 if T <= 32 or itemsize == 4 else 64
    for C, BV, stages in [(c, b, n) for b in (BV, 64, 32, 16) for c in (64, 32, 16) if b <= BV and c <= C for n in (2, 1)]:
        if need(C, BV, stages) <= shared:
            return _Config(_scan_kernel, C, BK, BV, 8 if BK * BV > 64 * 64 else 4, 1 if T <= C else stages, 1, *states)


def _block(d):
    return max(16, 1 << (d - 1).bit_length())


@functools.cache
def _gpu():
    """Architecture and number of processors of the first GPU; those of an H200 where there is none."""
    try:
        gpu = jax.devices("gpu")[0]
        arch = gpu.compute_capability
        return arch.split(":")[0] if arch.startswith("gfx") else "sm_" + arch.replace(".", ""), gpu.core_count
    except RuntimeError:
        return "sm_90", 132


def _launch(kernel, *arrays, out, programs, **arguments):
    return jax_triton.triton_call(*arrays, kernel=kernel, out_type=out, grid=(programs,),
                                  backend_options={"enable_fp_fusion": True}, **arguments)


def _arguments(op, k, v, g, cu, L, rows, M, pieces=0):
    """The table of work in so many rows of L tokens, which is g where it is not read, and arguments that kernels share."""
    T, H, packed = k.shape[1], g.shape[1], cu is not None
    return _tables(T, cu, L, op.reverse, pieces) if packed else g, dict(
        T=T, L=L, H=H, R=rows, HK=k.shape[2], HV=v.shape[2], K=k.shape[3], V=v.shape[3], M=M, scale=op.scale, way=2 * op.reverse + 4 * op.post,
        TABLE_STRIDE=rows * 7 if packed and cu.shape[0] > 1 else 0, G_STRIDE=H if g.shape[0] > 1 else 0, PACKED=packed)


def _scan_triton(op, q, k, v, g, s0, cu, w=None, swap=False):
    """`swap` sums the states of segments with k and v exchanged: those of the transposed scan are the same call then, which XLA makes once."""
    K, V, dtype = q.shape[3], v.shape[3], q.dtype
    (B, T), HQ, H, n = q.shape[:2], q.shape[2], g.shape[1], 1 if cu is None else cu.shape[1] - 1
    arch, processors = _gpu()
    config = _config(arch, K, V, dtype, B, T)
    if w is not None and not (config.kernel is _hopper_kernel and max(K, V) <= config.BK == config.BV):
        return *_scan_triton(op, q, k, v, g, s0, cu), _scan_triton(op, w, v, k, g, _transposed(s0), cu, swap=True)[0]
    states_out = jax.ShapeDtypeStruct((B, n, H, K, V), jnp.float32)
    if T == 1 and cu is None and not op.only_state:
        BK, BV = _block(K), min(_block(V), max(16, 8192 // _block(K)))
        _, arguments = _arguments(op, k, v, g, cu, 1, 1, 1)
        return _launch(_step_kernel, q, k, v, g, g if s0 is None else s0, out=(jax.ShapeDtypeStruct((B, T, H, V), dtype), states_out),
                       programs=B * H * -(-V // BV), HQ=HQ, BK=BK, BV=BV, HAS_S0=s0 is not None, num_warps=4, num_stages=1,
                       **{n: arguments[n] for n in ("H", "HK", "HV", "G_STRIDE", "scale", "way", "K", "V")})

    C, BK, BV = config.C, config.BK, config.BV
    programs = B * H * -(-V // BV)
    room = dtype.itemsize * T * (K + V) // (14 * K * V)          # states in a seventh of the memory of q, k, v and o
    # segments that fill the GPU, but none so short that its state costs more than its tokens
    segments = max(1, min(processors * config.residents // programs, T // 512, 1 + room))
    x, y = (v, k) if swap else (k, v)                            # what their states are summed from
    tile = dict(BK=min(_block(x.shape[3]), config.states_BK), BV=min(_block(y.shape[3]), 64))
    tiles = -(-x.shape[3] // tile["BK"]) * -(-y.shape[3] // tile["BV"])
    # M pieces a segment, a power of 2: the states of a head that forgets nothing are summed by programs that all run at once
    M = max(1, min(8, 3 * processors // (B * segments * tiles), T // (segments * 256), room // max(1, segments - 1)))
    M = 1 << M.bit_length() - 1
    piece = -(-T // (segments * M * C)) * C
    L = piece * M
    Z = -(-T // piece) if op.only_state else (T - 1) // L * M
    precise = str(op.precision).lower() in ("highest", "float32", "high", "tensorfloat32_3x", "bfloat16_3x")
    precision = dict(PRECISION="ieee" if arch.startswith("gfx") else "tf32x3" if precise else "tf32")

    z = g                                                        # never read where no segment follows another
    if Z:
        table, arguments = _arguments(op, x, y, g, cu, piece, Z, 1 if op.only_state else M, M)
        z = _launch(_states_kernel, x, y, g, table, out=jax.ShapeDtypeStruct((B, Z, H, y.shape[3], x.shape[3]), jnp.float32), C=64,
                    programs=B * Z * H * tiles, num_warps=4, num_stages=config.states_stages, **precision, **tile, **arguments)
    if op.only_state:
        after = jnp.maximum(T - piece * (1 + jnp.arange(Z)), 0)  # tokens after each piece
        s = jnp.einsum("bzhvk,bhz->bhkv", z, jnp.broadcast_to(jnp.exp(g[..., None] * after), (B, H, Z)), precision="highest")
        return jnp.zeros((B, 0, H, V), dtype), s[:, None]
    if Z:
        BE, walks = min(512, _block(K * V)), 1 if cu is None else Z // M
        ref = jax.new_ref(z)                                     # linked where it lies
        _launch(_link_kernel, ref, g, table, out=(), programs=B * walks * H * -(-K * V // BE), R=walks, Z=Z, E=K * V, BE=BE, num_warps=4,
                num_stages=1, **{n: arguments[n] for n in ("L", "H", "M", "TABLE_STRIDE", "G_STRIDE", "PACKED")})
        z = ref[...]

    R = -(-T // L) if cu is None else T // L + n + 2
    table, arguments = _arguments(op, k, v, g, cu, L, R, M)
    arrays, out = (q, k, v, g, g if s0 is None else s0, z, table), [jax.ShapeDtypeStruct((B, T, H, V), dtype), states_out]
    if config.kernel is _hopper_kernel:
        # made by the host, because those that a kernel makes need scratch memory, which a launch inside a CUDA graph does not get
        view = lambda x, D, BD: jax_triton.TensorDescriptor(x, (B * T, x.shape[2], D), (x.shape[2] * D, D, 1), (C, 1, BD),
                                                            gl.NVMMASharedLayout(128, 16, 3))
        both, w = w is not None, v if w is None else w
        arrays = view(q, K, BK), view(k, K, BK), view(v, V, BV), view(w, V, BV), q, k, v, w, *arrays[3:]
        out += [jax.ShapeDtypeStruct((B, T, H, K), dtype)] * both
        kind = dict(HW=w.shape[2], STAGES=2 if both else config.num_stages, num_stages=1, BOTH=both, **({} if both else {"y": 0}))
    else:
        kind = dict(num_stages=config.num_stages, **precision)
    for part in range(-(-K // BK)):                              # of the keys, in which the scan is linear: later ones add, in place
        refs = [jax.new_ref(x) for x in out] if part else []
        out = _launch(config.kernel, *arrays, *refs, out=[] if part else out, programs=programs * R, B=B, n=n, HQ=HQ, Z=Z, C=C, BK=BK, BV=BV,
                      HAS_S0=s0 is not None, ADD=part > 0, num_warps=config.num_warps, **kind,
                      **arguments | dict(way=arguments["way"] + 8 * swap + 16 * part))
        out = [x[...] for x in refs] or out
    return tuple(out)

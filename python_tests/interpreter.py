"""Triton's interpreter, repaired so that kernels can be judged by what it computes. Tests only.

`install` (by conftest.py, where TRITON_INTERPRET=1) also makes the `triton` backend serve CPU
tensors. What is repaired, and why (Triton 3.7):

- fp32 to bf16 is truncated; hardware and torch round to nearest even.
- Arithmetic on bf16 runs on the bit patterns. Kernels widen after the load and round at the store,
  so it raises here.
- Floats are bound as fp32 whatever the annotation says.
- ``tl.maximum`` and ``tl.max`` propagate NaN; hardware drops it unless told otherwise.
- ``tl.fma`` rounds twice.
- Reductions and scans by a function of one's own run in serial order, where a function that is not
  associative passes; here they run as trees, as on hardware, and 20 times faster.
- Lanes a load masks off without ``other`` are 0; on hardware they are anything. Here: NaN, or 77.
- 32-bit integers wrap around unnoticed.
- Nothing notices an address outside of every argument; here `OutOfBounds` is raised, also for the
  gaps between the elements of a strided tensor.
- Arguments are copied to and fro, by whole storages; here they are used where they lie.
- The language is patched and restored around every call; here once, for good.
- Types and shapes are worked out anew for every value; here once for each.

Races, barriers and memory order it cannot show; neither can it show what `exp2` or `log` give on
hardware, nor how a sum depends on the registers that hold it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import _normalize_ty

from ppo_kernels import _op


class OutOfBounds(Exception):
    """A kernel touched memory that belongs to none of its arguments."""


# ---- bf16 ----------------------------------------------------------------------------------------


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of fp32 rounded to bf16, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded.reshape(np.shape(x))).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def _convert_float(original):
    def convert(x, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(x)
        if (source, target) == (tl.bfloat16, tl.float32):
            return from_bf16(x)
        return original(x, source, target, rounding)

    return convert


def _refuse_bf16(*operands):
    for operand in operands:
        if operand.dtype.scalar == tl.bfloat16:
            raise TypeError("arithmetic in bf16: widen after the load")


def _unary(original):
    def operation(self, arg, op):
        _refuse_bf16(arg)
        return original(self, arg, op)

    return operation


def _binary(original):
    def operation(self, lhs, rhs, op):
        _refuse_bf16(lhs, rhs)
        result = original(self, lhs, rhs, op)
        if op in (np.add, np.subtract, np.multiply) and lhs.dtype.scalar == tl.int32:
            exact = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            if not np.array_equal(exact, result.data):
                raise OverflowError(f"{op.__name__} overflows 32 bits: widen an operand before it")
        return result

    return operation


# ---- numbers -------------------------------------------------------------------------------------


def _fma(self, x, y, z):
    if x.data.dtype != np.float32:
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    wide = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(wide.astype(np.float32), z.dtype.scalar)


def _extremum(operation):
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, operation)


def _min_max(self, value, val_reduce_op, idx_reduce_op=None):
    assert idx_reduce_op is None, "argmin and argmax: not repaired, because not used"
    operation = np.fmax if val_reduce_op in (np.max, np.nanmax) else np.fmin
    value = value[0] if isinstance(value, tuple) else value
    reduced = operation.reduce(value.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(reduced, value.dtype)


# ---- reductions and scans by trees ---------------------------------------------------------------


def _combine(function, left, right, like):
    def tensors(arrays):
        return [
            core.tensor(TensorHandle(a, t.dtype), tl.block_type(t.dtype, list(a.shape)))
            for a, t in zip(arrays, like, strict=True)
        ]

    result = function.fn(*tensors(left), *tensors(right))
    result = result if isinstance(result, (tuple, list)) else (result,)
    return [r.handle.data.astype(a.dtype) for r, a in zip(result, left, strict=True)]


def _tree_reduce(self, values):
    axis = 0 if self.axis is None else self.axis
    arrays = [v.handle.data if self.axis is not None else v.handle.data.ravel() for v in values]
    while (n := arrays[0].shape[axis]) > 1:
        halves = [np.split(a, [n // 2], axis) for a in arrays]
        left, right = zip(*halves, strict=True)
        arrays = _combine(self.combine_fn, left, right, values)
    if not self.keep_dims:
        arrays = [a.squeeze(axis) for a in arrays]
    return [
        self.to_tensor(a if a.shape else a[()], v.dtype)
        for a, v in zip(arrays, values, strict=True)
    ]


def _tree_scan(self, values):
    """Doubling: after k steps an element holds the combination of the 2^k up to itself."""
    arrays, step = [np.moveaxis(v.handle.data, self.axis, -1) for v in values], 1
    places = np.arange(arrays[0].shape[-1])
    while step < places.size:
        earlier = [np.roll(a, step, -1) for a in arrays]
        combined = _combine(self.combine_fn, earlier, arrays, values)
        arrays = [np.where(places < step, a, c) for a, c in zip(arrays, combined, strict=True)]
        step *= 2
    return [
        self.to_tensor(np.moveaxis(a, -1, self.axis), v.dtype)
        for a, v in zip(arrays, values, strict=True)
    ]


# ---- arguments and bounds ------------------------------------------------------------------------

_arguments: list[Any] = []


def _bind(self, args, kwargs):
    """Arguments where they lie; floats in the type that they are declared with."""
    annotations = {name: _normalize_ty(ty) for name, ty in self.fn.__annotations__.items()}

    def bound(name, value):
        if isinstance(value, float) and annotations.get(name) != "constexpr":
            double = annotations.get(name) == "fp64"
            dtype = tl.float64 if double else tl.float32
            array = np.array([value], np.float64 if double else np.float32)
            return core.tensor(TensorHandle(array, dtype), dtype)
        return value

    names = [*self.arg_names[: len(args)], *kwargs]
    values = [bound(n, v) for n, v in zip(names, [*args, *kwargs.values()], strict=True)]
    _arguments[:] = [v for v in values if hasattr(v, "data_ptr") and v.numel()]
    return values[: len(args)], dict(zip(list(kwargs), values[len(args) :], strict=True))


def _inside(addresses: np.ndarray, tensor: Any) -> np.ndarray:
    """Which addresses are those of an element of `tensor`, and not of a gap between them."""
    size = tensor.element_size()
    offset = addresses.astype(np.int64) - tensor.data_ptr()
    inside = (offset >= 0) & (offset % size == 0)
    if tensor.is_contiguous():
        return inside & (offset < size * tensor.numel())
    offset //= size
    steps = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if s)
    for stride, length in reversed(steps):
        index = np.clip(offset // stride, 0, length - 1)
        offset -= index * stride
    return inside & (offset == 0)


def _check_bounds(pointers, mask, what):
    live = np.asarray(pointers.data)
    if mask is not None:
        live = live[np.broadcast_to(mask.data, live.shape)]
    if live.size == 0:
        return
    inside = np.zeros(live.shape, bool)
    for tensor in _arguments:
        inside |= _inside(live, tensor)
        if inside.all():
            return
    raise OutOfBounds(
        f"{what}: {int((~inside).sum())} of {inside.size} lanes outside of every argument, "
        f"program {interpreter.interpreter_builder.grid_idx}"
    )


def _masked_load(original):
    def load(self, pointers, mask, other, *rest):
        _check_bounds(pointers, mask, "load")
        if other is None:
            dtype = pointers.get_element_ty()
            array_type = interpreter._get_np_dtype(dtype)
            anything = np.nan if array_type.kind == "f" else 77
            if dtype == tl.bfloat16:
                anything = 0x7FC0
            other = TensorHandle(np.full_like(pointers.data, anything, dtype=array_type), dtype)
        return original(self, pointers, mask, other, *rest)

    return load


def _checked(original, what, mask_position):
    def operation(self, *args):
        pointers = next(a for a in args if isinstance(a, TensorHandle))
        _check_bounds(pointers, args[mask_position], what)
        return original(self, *args)

    return operation


def _call_nested(self, *args, **kwargs):
    return self.rewrite()(*args, **kwargs)


def _call_kernel(original):
    def call(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return original(self, *args, **kwargs)

    return call


# ---- types and shapes ----------------------------------------------------------------------------

_NO_SHAPE = core.tuple([]), core.constexpr(1)


def _array_type(original):
    known: dict[str, np.dtype] = {}

    def array_type(dtype):
        if dtype.name not in known:
            known[dtype.name] = original(dtype)
        return known[dtype.name]

    return array_type


def _block_type(original):
    known: dict[tuple, dict[str, Any]] = {}
    shapes: dict[tuple, tuple] = {}

    def init(self, element_ty, shape):
        sizes = tuple(s.value if type(s) is core.constexpr else s for s in shape)
        key = element_ty.name, sizes
        if key not in known:
            original(self, element_ty, shape)
            if sizes not in shapes:
                constants = core.tuple([core.constexpr(size) for size in sizes])
                shapes[sizes] = constants, core.constexpr(self.numel)
            self.of_tensor = shapes[sizes]
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return init


def _tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _NO_SHAPE


def _broadcast(original):
    def broadcast(self, lhs, rhs):
        if lhs.shape is rhs.shape:  # of _block_type
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


def install() -> None:
    """Repair the interpreter, and let the `triton` backend serve CPU tensors."""
    interpreter._patch_lang(install)  # the modules it sees as globals: tl and core
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    builder = InterpreterBuilder
    interpreter._get_np_dtype = _array_type(interpreter._get_np_dtype)
    core.block_type.__init__ = _block_type(core.block_type.__init__)
    core.tensor.__init__ = _tensor
    TritonSemantic.broadcast_impl_value = _broadcast(TritonSemantic.broadcast_impl_value)
    interpreter._convert_float = _convert_float(interpreter._convert_float)
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    builder.binary_op = _binary(builder.binary_op)
    builder.unary_op = _unary(builder.unary_op)
    builder.create_fma = _fma
    for name, operation in (("max", np.fmax), ("min", np.fmin)):
        setattr(builder, f"create_{name}numf", _extremum(operation))
    builder.create_masked_load = _masked_load(builder.create_masked_load)
    builder.create_masked_store = _checked(builder.create_masked_store, "store", 2)
    builder.create_atomic_rmw = _checked(builder.create_atomic_rmw, "atomic", 3)
    builder.create_atomic_cas = _checked(builder.create_atomic_cas, "atomic", -1)
    interpreter.ReduceOps.min_max = _min_max
    interpreter.ReduceOps.generic_reduce = _tree_reduce
    interpreter.ScanOps.generic_scan = _tree_scan
    interpreter.GridExecutor._init_args_hst = _bind
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    interpreter.GridExecutor.__call__ = _call_kernel(interpreter.GridExecutor.__call__)
    interpreter.InterpretedFunction.__call__ = _call_nested
    _op.BACKENDS["triton"] = _op.Backend(("cuda", "cpu"), None)

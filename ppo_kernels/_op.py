"""The machinery every op rests on: schema, fake, backends, choice of backend, counters.

An op is declared once, next to its reference (see ``ops/logprob.py``)::

    _FORWARD = Op("logprob_forward", "(Tensor logits, ...) -> (Tensor, Tensor)",
                  function="logprobs_from_logits", fake=_fake_forward, autograd=_autograd,
                  cpu=cpu(native.logprob_forward))

and called with the name of the backend that serves it: ``_FORWARD(logits, ..., backend)``. A new
backend is one module of functions with the same arguments plus one keyword per op, and an entry in
``BACKENDS``.

The op is a ``torch.library`` op with one kernel per device and, at the Autograd key, a plain
function that calls a ``torch.autograd.Function``: this costs a fraction of ``register_autograd``
per call, is opaque to ``torch.compile`` and passes ``torch.library.opcheck``. The ``torch`` backend
is not a kernel: it is the reference itself, which public functions call directly, so torch
differentiates and compiles it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _faults, cpu, cuda, triton


class Backend(NamedTuple):
    """Where a backend runs, and why it cannot (None: it can)."""

    devices: tuple[str, ...]
    unavailable: str | None


# In the order `auto` prefers them. The reference runs wherever torch does.
BACKENDS: dict[str, Backend] = {
    "cpu": Backend(("cpu",), cpu.UNAVAILABLE),
    "triton": Backend(("cuda",), triton.UNAVAILABLE),
    "cuda": Backend(("cuda",), cuda.UNAVAILABLE),
    "torch": Backend((), None),
}
OPS: dict[str, Op] = {}

_LIBRARY = torch.library.Library("ppo_kernels", "DEF")
_counts: Counter[tuple[str, str]] = Counter()
# Asked in every call, in tens of nanoseconds each: what could want to see an op, unless empty.
_OBSERVERS: tuple[Callable[[], Any], ...] = (
    torch.compiler.is_compiling,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
    torch.autograd._profiler_enabled,  # type: ignore[attr-defined]
)
_keys_of = torch._C._dispatch_keys
_PLAIN_KEYS = _keys_of(torch.empty(0)).raw_repr()
_chosen: list[str] = [os.environ.get("PPO_KERNELS_BACKEND") or "auto"]


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source}: unknown backend {name!r}, expected one of {', '.join(['auto', *BACKENDS])}"
        )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the ``with`` block, calls that name no backend use this one, process-wide.

    Raises ValueError for an unknown name; a backend that cannot run an op raises when it is called.
    """
    _check_name(name, "use_backend")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def op_counts() -> dict[tuple[str, str], int]:
    """How often each (op, backend) ran since the start or `reset_op_counts`, compiled or not.

    Calls that torch.compile traced into the `torch` backend's own operations are not counted.
    """
    return dict(_counts)


def reset_op_counts() -> None:
    """Set all counts of `op_counts` back to zero."""
    _counts.clear()


def _dispatch_changes_nothing(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would only call our functions, which takes longer than most kernels.

    So it is for plain strided tensors (no subclass, wrapper, lazy conjugate or negative, functorch
    level) while no mode, transform, trace or profiler wants to see the op.
    """
    for observed in _OBSERVERS:
        if observed():
            return False
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            if _keys_of(a).raw_repr() != _PLAIN_KEYS:
                return False
        elif isinstance(a, Tensor):
            return False
    return True


def count(op: str, backend: str) -> None:
    if not torch.compiler.is_compiling():
        _counts[op, backend] += 1


def refusal(op: Op, backend: str, device: str) -> str | None:
    """Why `backend` cannot run `op` on `device`, or None if it can."""
    entry = BACKENDS[backend]
    if entry.unavailable:
        return entry.unavailable
    if backend == "torch":
        return None
    if backend not in op.kernels:
        return f"no {backend} kernel"
    if device not in entry.devices:
        return f"runs on {'/'.join(entry.devices)} tensors, these are on {device}"
    return None


def _refuse(op: Op, backend: str, device: str, reason: str) -> NoReturn:
    others = "; ".join(
        f"{name}: {refusal(op, name, device) or 'can run'}" for name in BACKENDS if name != backend
    )
    raise RuntimeError(f"backend {backend!r} cannot run {op.function}: {reason} ({others})")


class Op:
    """One torch custom op, ``torch.ops.ppo_kernels.<name>``, and the kernels behind it.

    Args:
        name: The op's name; one public function may own several ops (forward, backward).
        schema: Its signature; a last argument ``str backend`` is added.
        function: The public function it serves.
        fake: Shapes and dtypes of the outputs, from the same arguments without `backend`.
        autograd: What runs at the Autograd key, with all arguments; it calls `below` for the op
            itself. Without it, an input that requires grad raises while gradients are recorded.
        kernels: One function per backend, with the arguments of the schema without `backend`.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        function: str,
        fake: Callable[..., Any],
        autograd: Callable[..., Any] | None = None,
        **kernels: Callable[..., Any],
    ) -> None:
        self.name = name
        self.function = function
        self.kernels = kernels
        self._autograd = autograd or self._not_differentiable
        arguments, returns = schema.split(") -> ")
        _LIBRARY.define(f"{name}{arguments}, str backend) -> {returns}")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, self._run, key)
        self.fake = fake
        torch.library.register_fake(f"ppo_kernels::{name}", self._run_fake, lib=_LIBRARY)
        _LIBRARY.impl(name, self._autograd, "Autograd")
        self._overload = getattr(torch.ops.ppo_kernels, name).default
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        if not _dispatch_changes_nothing(args):
            return self._overload(*args)
        if torch.is_grad_enabled() and _requires_grad(args):
            return self._autograd(*args)
        return self._run(*args)

    def below(self, *args: Any) -> Any:
        """The op itself, without autograd: for use inside an autograd.Function."""
        if _dispatch_changes_nothing(args):
            return self._run(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*args)

    def resolve(self, device: torch.device, backend: str | None) -> str:
        """The backend named here, by `use_backend` or by PPO_KERNELS_BACKEND; else the best."""
        if backend is None:
            backend = _chosen[-1]
            _check_name(backend, "PPO_KERNELS_BACKEND")
        else:
            _check_name(backend, "backend")
        if backend == "auto":
            for name in BACKENDS:  # the last is `torch`, which runs anywhere
                if refusal(self, name, device.type) is None:
                    backend = name
                    break
            return backend
        reason = refusal(self, backend, device.type)
        if reason:
            _refuse(self, backend, device.type, reason)
        return backend

    def _run(self, *args: Any) -> Any:
        backend = args[-1]
        kernel = self.kernels[backend]
        _counts[self.name, backend] += 1
        if backend == "cpu":
            return kernel(*args[:-1])
        device = _device(args)
        if device.type == "cuda":
            with torch.cuda.device(device):
                result = kernel(*args[:-1])
        else:
            result = kernel(*args[:-1])
        _faults.check_in_debug_mode(device)
        return result

    def _run_fake(self, *args: Any) -> Any:
        if args[-1] != "cpu":
            _faults.prepare(_device(args))
        return self.fake(*args[:-1])

    def _not_differentiable(self, *args: Any) -> Any:
        if torch.is_grad_enabled():
            raise_if_recorded(self.name, args)
        return self.below(*args)


def _device(args: Sequence[Any]) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


def _requires_grad(args: Sequence[Any]) -> bool:
    for a in args:  # noqa: SIM110 (a generator takes twice as long, in every call)
        if isinstance(a, Tensor) and a.requires_grad:
            return True
    return False


def raise_if_recorded(name: str, args: Sequence[Any]) -> None:
    if _requires_grad(args):
        raise RuntimeError(f"ppo_kernels::{name} is not differentiable: an input requires grad")


def forbid_double_backward(public_name: str) -> None:
    """Called first in every backward: recording it would silently drop the second derivative."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{public_name}: the compiled kernels do not support double backward "
            '(create_graph=True); use backend="torch", which torch differentiates repeatedly'
        )

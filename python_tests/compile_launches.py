"""What compile_ladder.py compiles: calls of the public functions, by family of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

import ppo_kernels as pk
from ppo_kernels._kept import Sets
from ppo_kernels.ops.importance import CORRECTIONS
from ppo_kernels.triton import logprob_kept


class Launch(NamedTuple):
    """One call of a public function, forward and backward.

    `wide`: every kernel that works on blocks must have 128-bit loads.
    """

    family: str
    label: str
    call: Callable[[], None]
    quick: bool = False
    wide: bool = False


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(*outputs: torch.Tensor) -> None:
    """With a gradient of its own for each output, as a loss gives."""
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])


def _logprob() -> Iterator[Launch]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

    def launch(
        dtype: torch.dtype, vocab: int, rows: int, layout: str = "", everything: bool = False
    ) -> Launch:
        def call() -> None:
            logits = meta(8, rows // 8 + (layout == "shifted"), vocab, dtype=dtype, grad=True)
            if layout == "shifted":
                logits = logits[:, :-1]
            elif layout == "strided":
                logits = meta(8, rows // 8, 2 * vocab, dtype=dtype, grad=True)[..., ::2]
            elif layout == "transposed":
                logits = meta(8, vocab, rows // 8, dtype=dtype, grad=True).mT
            tokens = meta(8, rows // 8, dtype=torch.int32 if everything else torch.int64)
            if not everything:
                return backward(pk.logprobs_from_logits(logits, tokens, backend="triton"))
            return backward(
                *pk.logprobs_from_logits(
                    logits,
                    tokens,
                    temperature=meta(8, 1),
                    softcap=30.0,
                    mask=meta(8, rows // 8, dtype=torch.bool),
                    entropy=True,
                    backend="triton",
                )
            )

        words = [str(dtype).removeprefix("torch."), f"V={vocab}", f"rows={rows}", layout]
        label = " ".join(filter(None, [*words, "everything" * everything]))
        quick = (dtype, vocab) in ((dtypes[0], 151936), (dtypes[2], 1000)) and not layout
        # 8 numbers of 2 bytes for each of 64 lanes: blocks of small vocabularies are too few.
        wide = vocab == 151936 and not layout
        return Launch("logprob", label, call, quick, wide)

    for dtype in dtypes:
        for vocab in (200, 1000, 50257, 151936):
            for everything in (False, True):
                yield launch(dtype, vocab, 8192, everything=everything)
        yield launch(dtype, 151936, 8)
        yield launch(dtype, 151936, 8, everything=True)
    for layout in ("shifted", "strided", "transposed"):
        yield launch(torch.bfloat16, 32000, 8192, layout)


def _kept() -> Iterator[Launch]:
    positions, count = 8192, 400_000
    ids = meta(count, dtype=torch.int32)

    def from_logits(dtype: torch.dtype, everything: bool) -> None:
        logits = meta(8, positions // 8, 50257, dtype=dtype, grad=True)
        tokens = meta(8, positions // 8, dtype=torch.int64)
        kept = pk.KeptSet(meta(positions + 1, dtype=torch.int64), ids)
        if not everything:
            return backward(pk.logprobs_from_logits(logits, tokens, kept=kept, backend="triton"))
        return backward(
            *pk.logprobs_from_logits(
                logits,
                tokens,
                kept=kept,
                temperature=meta(8, 1),
                softcap=30.0,
                mask=meta(8, positions // 8, dtype=torch.bool),
                entropy=True,
                backend="triton",
            )
        )

    def from_values(dtype: torch.dtype) -> None:
        """What a part of the hidden states asks for."""
        logits, values = meta(256, 50257, dtype=dtype), meta(count, dtype=dtype)
        tokens = meta(256, dtype=torch.int64)
        sets = Sets(*(meta(256, dtype=torch.int64) for _ in range(2)), ids)
        settings = (1.0, 0.0, 1.0, -100)
        logprobs, entropy, state = logprob_kept.forward_sets(
            logits, tokens, None, None, sets, *settings, True, values
        )
        logprob_kept.backward_sets(
            logits, logprobs, entropy, None, values, tokens, None, None, sets, logprobs, state,
            *settings,
        )  # fmt: skip

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for everything in (False, True):
            label = f"kept {name}{' everything' * everything}"
            quick = (dtype, everything) == (torch.bfloat16, True)
            yield Launch("logprob", label, partial(from_logits, dtype, everything), quick)
    for dtype in (torch.float32, torch.float64):
        label = f"kept {str(dtype).removeprefix('torch.')} from hidden states"
        yield Launch("logprob", label, partial(from_values, dtype))


def _moments() -> Iterator[Launch]:
    def launch(
        function: str, dtype: torch.dtype, rows: int, layout: str = "", **more: Any
    ) -> Launch:
        def call() -> None:
            x = meta(rows, 1024 + (layout == "shifted"), dtype=dtype, grad=True)
            mask = meta(rows, 1024, dtype=more.get("mask", torch.bool))
            if layout == "shifted":
                x = x[:, :-1]
            options = {key: value for key, value in more.items() if key != "mask"}
            backward(getattr(pk, function)(x, mask, **options, backend="triton"))

        words = [function, str(dtype).removeprefix("torch."), f"rows={rows}", layout]
        words += [f"{key}={value}".replace("torch.", "") for key, value in more.items()]
        quick = (dtype, function, layout) == (torch.float32, "whiten", "") and not more
        return Launch("moments", " ".join(filter(None, words)), call, quick and rows > 1)

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield launch("whiten", dtype, 64)
        for dim in (0, 1, None):
            yield launch("masked_mean", dtype, 64, dim=dim)
    for function in ("whiten", "masked_sum"):
        yield launch(function, torch.float32, 64, "shifted")
        yield launch(function, torch.float32, 64, mask=torch.bfloat16)
    yield launch("whiten", torch.float32, 1)
    yield launch("whiten", torch.float32, 64, shift_mean=False, unbiased=False)
    yield launch("masked_mean", torch.float32, 8192, dim=0)


def _categorical_kl() -> Iterator[Launch]:
    def launch(
        dtype: torch.dtype,
        vocab: int,
        reverse: bool = False,
        layout: str = "",
        mask: bool = False,
        rows: int = 1024,
    ) -> Launch:
        def call() -> None:
            logits = meta(8, rows // 8 + 1, vocab, dtype=dtype)[:, :-1]
            if layout != "shifted":
                logits = meta(8, rows // 8, vocab, dtype=dtype)
            live = meta(8, rows // 8, dtype=torch.bool) if mask else None
            leaf = logits.detach().requires_grad_()
            backward(
                pk.categorical_kl(
                    leaf, torch.empty_like(logits), reverse=reverse, mask=live, backend="triton"
                )
            )

        words = [str(dtype).removeprefix("torch."), f"V={vocab}", f"rows={rows}", layout]
        words += ["reverse" * reverse, "masked" * mask]
        quick = (dtype, vocab, reverse) == (torch.bfloat16, 151936, True)
        # Two rows of 8 halves for each of 256 lanes would take too many registers elsewhere.
        wide = vocab == 151936 and not layout and dtype.itemsize > 2
        return Launch("categorical_kl", " ".join(filter(None, words)), call, quick, wide)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for vocab in (200, 50257, 151936):
            for reverse in (False, True):
                yield launch(dtype, vocab, reverse)
        yield launch(dtype, 151936, rows=8)
    yield launch(torch.bfloat16, 151936, True, rows=8)
    yield launch(torch.bfloat16, 151936, False, "", True, rows=8)
    yield launch(torch.bfloat16, 32000, False, "shifted", True)


def _tokens_of(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> Callable[[], torch.Tensor]:
    """Makes token tensors of one layout."""
    if layout == "shifted":
        return lambda: meta(shape[0], shape[1] + 1, dtype=dtype)[:, :-1]
    return lambda: meta(*shape, dtype=dtype)


def _losses() -> Iterator[Launch]:
    def launch(
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        label: str = "",
        *,
        quick: bool = False,
        per_sequence: bool = False,
        **more: Any,
    ) -> Launch:
        def call() -> None:
            make = _tokens_of(shape, dtype, label)
            inputs = [make().requires_grad_(), make(), make()]
            options = dict(more)
            if len(shape) == 1:
                options["cu_seqlens"] = meta(65, dtype=torch.int32)
            if per_sequence:
                inputs[2] = meta(64 if len(shape) == 1 else shape[0], dtype=dtype)
            if options.pop("masked", False):
                options["mask"] = meta(*shape, dtype=torch.bool)
            if options.pop("denominator_on_device", False):
                options["denominator"] = meta(dtype=torch.int64)
            if options.pop("no_gradient", False):
                inputs[0] = inputs[0].detach()
            loss = getattr(pk, name)(*inputs, backend="triton", **options).loss
            if loss.requires_grad:
                backward(loss)

        words = [name, str(dtype).removeprefix("torch."), f"{list(shape)}", label]
        return Launch("losses", " ".join(filter(None, words)), call, quick)

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for name in ("clipped_loss", "value_loss"):
        by_sequence = {"aggregation": "seq-mean-token-mean", "masked": True}
        for dtype in (half, torch.float16, single, double):
            quick = dtype == half and name == "clipped_loss"
            yield launch(name, dtype, (8, 1024), masked=True, quick=quick)
            yield launch(name, dtype, (65536,), **by_sequence)
        yield launch(name, single, (8, 1001), "odd", masked=True)
        yield launch(name, single, (1, 1), "one token")
        yield launch(name, single, (8, 1024), "shifted", **by_sequence)
        yield launch(
            name, single, (8, 1024), "no gradient", no_gradient=True, denominator_on_device=True
        )
    for shape in ((8, 1024), (65536,)):
        yield launch("clipped_loss", half, shape, "advantage per sequence", per_sequence=True)
    for variant in ("cispo", "sapo", "gpg", "gspo", "gmpo"):
        for dtype in (half, double):
            yield launch("clipped_loss", dtype, (8, 1024), variant, masked=True, variant=variant)
        yield launch("clipped_loss", single, (65536,), variant, masked=True, variant=variant)


def _importance() -> Iterator[Launch]:
    def launch(kind: str, dtype: torch.dtype, shape: tuple[int, ...], label: str = "") -> Launch:
        def call() -> None:
            make = _tokens_of(shape, dtype, label)
            packed = {"cu_seqlens": meta(65, dtype=torch.int32)} if len(shape) == 1 else {}
            mask = meta(*shape, dtype=torch.bool)
            pk.importance_weights(
                make(), make(), mask, kind=kind, high=2.0, **packed, backend="triton"
            )

        words = ["importance_weights", kind, str(dtype).removeprefix("torch."), f"{list(shape)}"]
        quick = (kind, dtype) == ("tis-geometric", torch.bfloat16)
        return Launch("losses", " ".join(filter(None, [*words, label])), call, quick)

    for kind in CORRECTIONS:
        yield launch(kind, torch.bfloat16, (8, 1024))
    for kind in ("tis", "tis-geometric"):
        yield launch(kind, torch.float32, (65536,))
        yield launch(kind, torch.float64, (8, 1024))
        yield launch(kind, torch.float32, (8, 1024), "shifted")


def _kl() -> Iterator[Launch]:
    def launch(
        estimator: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        label: str = "",
        quick: bool = False,
        masked: bool = True,
    ) -> Launch:
        def call() -> None:
            make = _tokens_of(shape, dtype, label)
            logprobs, ref = make().requires_grad_(), make()
            mask = meta(*shape, dtype=torch.bool) if masked else None
            backward(pk.kl_penalty(logprobs, ref, mask, estimator=estimator, backend="triton"))
            packed = len(shape) == 1
            pk.shape_rewards(
                meta(64 if packed else shape[0], dtype=dtype),
                logprobs,
                ref,
                mask,
                kl_coef=meta() if packed else 0.1,
                estimator=estimator,
                cu_seqlens=meta(65, dtype=torch.int32) if packed else None,
                backend="triton",
            )

        words = [estimator, str(dtype).removeprefix("torch."), f"{list(shape)}", label]
        return Launch("kl", " ".join(filter(None, words)), call, quick)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for estimator in ("k1", "k2", "k3", "abs"):
            quick = (estimator, dtype) == ("k3", torch.bfloat16)
            yield launch(estimator, dtype, (8, 1024), quick=quick)
        yield launch("k3", dtype, (65536,))
    yield launch("k3", torch.float32, (8, 1024), "shifted")
    yield launch("k3", torch.float32, (1, 1), "one token")
    yield launch("k3", torch.float32, (8, 1001), "odd", masked=False)


def _scan() -> Iterator[Launch]:
    def plain(dtype: torch.dtype, rows: int, length: int) -> None:
        rewards, values = (meta(rows, length, dtype=dtype, grad=True) for _ in range(2))
        backward(*pk.gae(rewards, values, gamma=0.99, lam=0.95, backend="triton"))

    def returns(dtype: torch.dtype, total: int) -> None:
        rewards = meta(total, dtype=dtype, grad=True)
        offsets = meta(65, dtype=torch.int32)
        backward(
            pk.discounted_returns(rewards, gamma=0.99, cu_seqlens=offsets, backend="triton"),
        )

    def everything(dtype: torch.dtype, convention: str, packed: bool) -> None:
        shape, sequences = ((2**18,), 64) if packed else ((64, 4096), 64)
        extra = {"cu_seqlens": meta(sequences + 1, dtype=torch.int64)} if packed else {}
        longer = shape if packed else (64, 4097)
        tensors = [meta(*s, dtype=dtype, grad=True) for s in (shape, longer, shape)]
        backward(
            *pk.gae(
                tensors[0],
                tensors[1],
                next_values=tensors[2],
                gamma=0.99,
                lam=meta(sequences),
                value_lam=meta(sequences),
                mask=meta(*shape, dtype=torch.bool),
                mask_convention=convention,
                terminated=meta(*shape, dtype=torch.bool),
                truncated=meta(*shape, dtype=torch.bool),
                backend="triton",
                **extra,
            )
        )

    def vtrace(dtype: torch.dtype, convention: str | None, packed: bool) -> None:
        shape, sequences = ((2**18,), 64) if packed else ((64, 4096), 64)
        numbers = [meta(*shape, dtype=dtype) for _ in range(5)]
        extra: dict[str, Any] = {}
        if packed:
            extra |= {"cu_seqlens": meta(sequences + 1, dtype=torch.int64)}
        else:
            numbers[3] = meta(64, 4097, dtype=dtype)
        if convention:
            extra |= {"mask": meta(*shape, dtype=torch.bool), "mask_convention": convention}
            extra |= {k: meta(*shape, dtype=torch.bool) for k in ("terminated", "truncated")}
            extra |= {"next_values": numbers[4], "lam": meta(sequences)}
        pk.vtrace(*numbers[:4], gamma=0.99, backend="triton", **extra)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        yield Launch("scan", f"{name} [64, 4096]", partial(plain, dtype, 64, 4096))
        for convention, packed in (("carry", True), ("truncate", False)):
            label = f"{name} {'packed' if packed else 'padded'} {convention} everything"
            call = partial(everything, dtype, convention, packed)
            yield Launch("scan", label, call, dtype == torch.float32)
        for convention, packed in ((None, False), ("carry", True), ("truncate", False)):
            label = f"vtrace {name} {'packed' if packed else 'padded'} {convention or 'plain'}"
            call = partial(vtrace, dtype, convention, packed)
            yield Launch("scan", label, call, (dtype, packed) == (torch.float32, True))
    yield Launch("scan", "float32 packed returns", partial(returns, torch.float32, 2**16))
    yield Launch("scan", "float32 [1, 2^24]", partial(plain, torch.float32, 1, 2**24))


def _ppo_loss() -> Iterator[Launch]:
    def launch(dtype: torch.dtype, vocab: int, quick: bool = False, **options: Any) -> Launch:
        def call() -> None:
            logits = meta(8, 1024, vocab, dtype=dtype, grad=True)
            tokens = meta(8, 1024, dtype=torch.int64)
            given = dict(options)
            if "kl_coef" in given:
                given["ref_logprobs"] = meta(8, 1024)
                given["loss_scale"] = meta()
            out = pk.ppo_loss_from_logits(
                logits, tokens, meta(8, 1024), meta(8), backend="triton", **given
            )
            backward(out.loss)

        words = [str(dtype).removeprefix("torch."), f"V={vocab}", *map(str, options.values())]
        return Launch("ppo_loss", " ".join(words), call, quick)

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    everything = {"entropy_coef": 0.01, "kl_coef": 0.1, "kl_gradient": "k2", "softcap": 30.0}
    yield launch(half, 151936, quick=True)
    for dtype in (half, single, double):
        for vocab in (200, 151936):
            yield launch(dtype, vocab, **everything)
    yield launch(single, 50257, variant="cispo")
    yield launch(single, 50257, variant="sapo", kl_coef=0.1)
    yield launch(half, 50257, variant="gpg", entropy_coef=0.01)


LAUNCHES: list[Launch] = [
    *_logprob(),
    *_kept(),
    *_moments(),
    *_categorical_kl(),
    *_losses(),
    *_importance(),
    *_kl(),
    *_scan(),
    *_ppo_loss(),
]

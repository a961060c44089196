"""What only a GPU can show of the Triton backend: real sizes, streams, graphs, devices."""

import pytest
import torch

import ppo_kernels as pk

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)


def example(*shape, seed=0, dtype=torch.bfloat16, device="cuda"):
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(shape, generator=g, device=device, dtype=dtype) * 3
    return logits, torch.randint(shape[-1], shape[:-1], generator=g, device=device)


def loss_and_gradient(logits, tokens, **more):
    leaf = logits.detach().requires_grad_()
    out = pk.logprobs_from_logits(leaf, tokens, entropy=True, **more)
    (grad,) = torch.autograd.grad(out.logprobs.sum() + 0.3 * out.entropy.sum(), leaf)
    return out.logprobs.detach(), out.entropy.detach(), grad


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_auto_chooses_triton():
    logits, tokens = example(4, 100)
    pk.reset_op_counts()
    pk.logprobs_from_logits(logits, tokens)
    assert pk.op_counts() == {("logprob_forward", "triton"): 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_bits_of_a_row_depend_on_nothing_but_the_row(dtype, vocab):
    """Alignment changes the registers that hold a row, few rows another kernel sums it."""
    logits, tokens = example(4096, vocab, dtype=dtype)
    whole = loss_and_gradient(logits, tokens)
    for offset in range(16):
        moved = torch.empty(7 * vocab + offset, dtype=dtype, device="cuda")[offset:]
        moved = moved.view(7, vocab).copy_(logits[:7])
        assert same(loss_and_gradient(moved, tokens[:7]), [w[:7] for w in whole]), offset
    strided = torch.empty(7, 2 * vocab, dtype=dtype, device="cuda")[:, ::2].copy_(logits[:7])
    assert same(loss_and_gradient(strided, tokens[:7]), [w[:7] for w in whole])
    for _ in range(3):
        assert same(loss_and_gradient(logits, tokens), whole)


def test_sizes_past_2_31_elements():
    logits, tokens = example(16384, 151936)
    assert logits.numel() > 2**31
    last = loss_and_gradient(logits[-7:].clone(), tokens[-7:])
    leaf = (logits[None].requires_grad_() * 1)[0]
    out = pk.logprobs_from_logits(leaf, tokens, entropy=True, inplace_backward=True)
    assert torch.equal(out.logprobs[-7:], last[0])
    assert torch.equal(out.entropy[-7:], last[1])
    (out.logprobs.sum() + 0.3 * out.entropy.sum()).backward()
    assert torch.equal(leaf.detach()[-7:], last[2])


def test_other_streams_and_graphs():
    logits, tokens = example(64, 50257)
    expected = loss_and_gradient(logits, tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = loss_and_gradient(logits, tokens)
    stream.synchronize()
    assert same(on_stream, expected)
    pk.check("cuda")
    graph = torch.cuda.CUDAGraph()
    static = logits.clone()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(static, tokens)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            pk.check()
    others, _ = example(64, 50257, seed=1)
    for values in (others, logits):
        static.copy_(values)
        graph.replay()
        assert same(captured, loss_and_gradient(values, tokens))


def test_a_call_waits_for_nothing():
    logits, tokens = example(8, 1000)
    loss_and_gradient(logits, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(logits, tokens, temperature=0.7)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_by_inductor_under_autocast():
    logits, tokens = example(16, 3, 1000)
    expected = loss_and_gradient(logits, tokens)
    compiled = torch.compile(loss_and_gradient, fullgraph=False)
    with torch.autocast("cuda", torch.bfloat16):
        assert same(compiled(logits, tokens), expected)
    whole = torch.compile(pk.logprobs_from_logits, fullgraph=True)
    assert torch.equal(whole(logits, tokens), expected[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_counts_not_the_current_one():
    logits, tokens = example(8, 1000)
    with torch.cuda.device(0):
        other = loss_and_gradient(logits.to("cuda:1"), tokens.to("cuda:1"))
        assert same([t.to("cuda:0") for t in other], loss_and_gradient(logits, tokens))
        tokens[3] = 1000
        pk.logprobs_from_logits(logits.to("cuda:1"), tokens.to("cuda:1"))
        with pytest.raises(ValueError, match="flat position 3 in a call on cuda:1"):
            pk.check()

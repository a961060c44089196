"""value_loss beyond the cube, against a loop in plain Python."""

import pytest
from loss_oracle import EXECUTORS, NORM, plain_value, plain_weights, some_mask, tokens, with_grad
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels.ops._aggregation import AGGREGATIONS
from ppo_kernels.testing import executor


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("delta", [None, 0.6])
@EXECUTORS
def test_value_loss_equals_plain_python(name, aggregation, clip, delta):
    v, old, target = tokens(4, 9)
    mask = some_mask(4, 9)
    mask[2] = False
    rows = mask.tolist()
    weights = plain_weights(rows, aggregation, None)
    loss, gradient, live = 0.0, [], []
    for i in range(4):
        for j in range(9):
            one = v[i, j].item(), old[i, j].item(), target[i, j].item()
            token = plain_value(*one, clip, delta)
            loss += weights[i][j] * token[0]
            gradient.append(weights[i][j] * token[1])
            if rows[i][j]:
                live.append((*token, *one))
    with executor(name):
        got, grad, m = with_grad(
            pk.value_loss, v, old if clip else None, target, mask, clip=clip, huber_delta=delta,
            aggregation=aggregation, norm_length=NORM.get(aggregation),
        )  # fmt: skip
    close = {"rtol": 1e-12, "atol": 1e-14}
    assert_close(got.item(), loss, **close)
    assert_close(grad.flatten().tolist(), gradient, **close)
    n = len(live)
    losses, _, cuts, vs, _, rs = zip(*live, strict=True)
    errors = [r - p for r, p in zip(rs, vs, strict=True)]

    def variance(x):
        return sum((e - sum(x) / n) ** 2 for e in x) / n

    expected = {
        "tokens": n,
        "sequences": 3,
        "loss": sum(losses) / n,
        "clip_fraction": sum(cuts) / n,
        "value_mean": sum(vs) / n,
        "return_mean": sum(rs) / n,
        "error_mean": -sum(errors) / n,
        "explained_variance": 1 - variance(errors) / variance(rs),
    }
    measured = {k: t.item() for k, t in m.as_dict().items()}
    assert list(measured) == list(expected)
    assert measured == pytest.approx(expected, rel=1e-11)
    assert clip is None or 0 < m.clip_fraction < 1

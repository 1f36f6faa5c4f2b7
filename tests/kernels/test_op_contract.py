"""What torch expects of an op, and what a person expects of an error."""

import numpy as np
import pytest
import torch
from kernel_helpers import (
    DTYPES,
    combinations,
    decode_inputs,
    int32,
    normal,
    span,
    uniform,
    zeros,
)
from op_calls import CALLS, TINY, assert_equals_reference, public_calls, raw_calls
from torch._dynamo.testing import CompileCounterWithBackend

import sgl_kernels
from sgl_kernels import (
    decode_attention,
    greedy_token,
    prefill_mass,
    prune_gather,
    registry,
    select_tokens,
    token_logprobs,
)

OPS = tuple(registry.SCHEMAS)


@pytest.mark.parametrize("number", range(9))
def test_opcheck(number):
    op, arguments = raw_calls()[number]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_compile_has_one_graph(name, backend):
    function, values = public_calls(TINY)[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with torch.inference_mode():
        for arguments in map(values, range(3)):
            torch.testing.assert_close(compiled(*arguments), function(*arguments), equal_nan=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "dtype"), combinations(CALLS, DTYPES), ids=str)
def test_calls_equal_the_reference(name, dtype):
    _, values = public_calls(TINY, dtype)[name]
    for seed in range(3):
        assert_equals_reference(name, TINY, dtype, values(seed))


def test_select_without_width_cannot_be_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, v, s: select_tokens(m, v, s, 2), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"out_len is None under torch\.compile"):
        compiled(uniform(1, 4), span(4), int32([6]))


def test_inputs_are_not_written():
    q, k, v = decode_inputs(2, 4, 2, 16, 40)
    before = [t.clone() for t in (q, k, v)]
    decode_attention(q, k, v, int32([40, 12]))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def overlapping():
    """Accumulators (mass, head_mass or None) of which two requests or two heads are the same memory."""
    flat = zeros(400)
    return [
        (zeros(1, 20).expand(2, 20), None),
        (flat.as_strided((2, 20), (19, 1)), None),
        (zeros(2, 20), zeros(1, 4, 20).expand(2, 4, 20)),
        (zeros(2, 20), zeros(2, 1, 20).expand(2, 4, 20)),
        (zeros(2, 20), flat.as_strided((2, 4, 20), (40, 20, 1))),
    ]


def accumulators(named, visual, mass, head_mass):
    options = {"head_mass": head_mass}
    return ((), {"visual_index": visual, "mass": mass, **options}) if named else ((mass,), options)


def bad_calls():
    q, k, v = decode_inputs(2, 4, 2, 16, 40)
    lens, visual, mass = int32([40, 33]), span(20, batch=2), zeros(2, 20)
    long_q, rows, hidden = normal(2, 4, 40, 16), int32([[1], [2]]), normal(2, 40, 8)
    logits = normal(3, 50)
    given = {"visual_index": visual, "mass": mass}
    decode = decode_attention
    return [
        (
            ValueError,
            r"q has shape \(2, 1, 4, 16\), expected \(batch, query",
            decode,
            (q[:, None], k, v, lens),
            {},
        ),
        (
            ValueError,
            r"k_cache has shape \(1, 2, 40, 16\), expected \(batch 2",
            decode,
            (q, k[:1], v, lens),
            {},
        ),
        (ValueError, r"v_cache has shape .*39.*, expected .*40", decode, (q, k, v[:, :, :39], lens), {}),
        (ValueError, r"3 query heads over 2 KV heads", decode, (q[:, :3], k, v, lens), {}),
        (ValueError, r"seq_lens has shape \(1,\), expected \(batch 2,\)", decode, (q, k, v, lens[:1]), {}),
        (TypeError, r"seq_lens is torch.int64, expected int32", decode, (q, k, v, lens.long()), {}),
        (TypeError, r"q is torch.float64, expected float32", decode, (q.double(), k, v, lens), {}),
        (
            TypeError,
            r"k_cache is torch.float16 .* expected torch.float32",
            decode,
            (q, k.half(), v, lens),
            {},
        ),
        (ValueError, r"k_cache has strides .*contiguous", decode, (q, normal(2, 2, 16, 40).mT, v, lens), {}),
        (ValueError, r"without visual_index", decode, (q, k, v, lens), {"mass": mass}),
        (
            ValueError,
            r"mass has shape \(2, 19\), expected .*20",
            decode,
            (q, k, v, lens),
            {**given, "mass": mass[:, :19]},
        ),
        (
            TypeError,
            r"mass is torch.float16, expected float32",
            decode,
            (q, k, v, lens),
            {**given, "mass": mass.half()},
        ),
        (
            ValueError,
            r"head_mass has shape \(2, 20\), expected .*query heads 4",
            decode,
            (q, k, v, lens),
            {**given, "head_mass": mass},
        ),
        (ValueError, rf"tensors on {q.device} and meta", decode, (q, k, v, lens.to("meta")), {}),
        (
            ValueError,
            r"head dim is 2048, expected 1 to 1024",
            decode,
            (normal(1, 1, 2048), *(normal(1, 1, 4, 2048),) * 2, lens[:1]),
            {},
        ),
        (
            ValueError,
            r"k has shape .*39.*positions 40",
            prefill_mass,
            (long_q, k[:, :, :39], rows, visual, mass),
            {},
        ),
        (TypeError, r"query_index is torch.int64", prefill_mass, (long_q, k, rows.long(), visual, mass), {}),
        (
            ValueError,
            r"softmax_lse has shape \(2, 40\)",
            prefill_mass,
            (long_q, k, rows, visual, mass),
            {"softmax_lse": zeros(2, 40)},
        ),
        (ValueError, r"visual_index has shape \(2, 19\)", select_tokens, (mass, visual[:, :19], lens, 3), {}),
        (TypeError, r"mass is torch.float64", select_tokens, (mass.double(), visual, lens, 3), {}),
        (
            TypeError,
            r"num_keep is 0.2, expected an int; use max",
            select_tokens,
            (mass, visual, lens, 0.2),
            {},
        ),
        (ValueError, r"num_keep is -1, expected 0 or more", select_tokens, (mass, visual, lens, -1), {}),
        *[
            (TypeError, rf"num_keep is {shown}, expected an int; use max", op, (*inputs, value), {})
            for op, inputs in (
                (select_tokens, (mass, visual, lens)),
                (prune_gather, (hidden, mass, visual, lens)),
            )
            for value, shown in (
                (np.float32(1.5), r"np\.float32\(1\.5\)"),
                ("3", "'3'"),
                (None, "None"),
                ([3, 3], r"\[3, 3\]"),
            )
        ],
        (ValueError, r"num_keep is 1180591620717411303424", select_tokens, (mass, visual, lens, 2**70), {}),
        (
            TypeError,
            r"out_len is 3\.0, expected an int",
            select_tokens,
            (mass, visual, lens, 3),
            {"out_len": 3.0},
        ),
        (TypeError, r"out_len is '3'", prune_gather, (hidden, mass, visual, lens, 3), {"out_len": "3"}),
        (ValueError, r"out_len is 11805", select_tokens, (mass, visual, lens, 3), {"out_len": 2**70}),
        (
            ValueError,
            r"mass has strides \(40, 2\).*contiguous",
            select_tokens,
            (uniform(2, 40)[:, ::2], visual, lens, 3),
            {},
        ),
        (
            ValueError,
            r"mass has strides \(40, 2\).*contiguous",
            prune_gather,
            (hidden, uniform(2, 40)[:, ::2], visual, lens, 3),
            {},
        ),
        *[
            (ValueError, r"has strides .* share memory", op, (*inputs, *written), options)
            for op, inputs, named in (
                (decode, (q, k, v, lens), True),
                (prefill_mass, (long_q, k, rows, visual), False),
            )
            for mass_like, head_like in overlapping()
            for written, options in [accumulators(named, visual, mass_like, head_like)]
        ],
        (TypeError, r"num_keep is torch.int64", select_tokens, (mass, visual, lens, lens.long()), {}),
        (ValueError, r"out_len is -2", select_tokens, (mass, visual, lens, 3), {"out_len": -2}),
        (ValueError, r"hidden has shape \(40, 8\)", prune_gather, (hidden[0], mass, visual, lens, 3), {}),
        (
            ValueError,
            r"mass has shape \(1, 20\).*hidden",
            prune_gather,
            (hidden, mass[:1], visual[:1], lens[:1], 3),
            {},
        ),
        (
            ValueError,
            r"extras\[0\] has shape \(3, 2, 40\)",
            prune_gather,
            (hidden, mass, visual, lens, 3),
            {"extras": [zeros(3, 2, 40)]},
        ),
        (ValueError, r"at least one token", greedy_token, (zeros(3, 0),), {}),
        (TypeError, r"logits is torch.int64", greedy_token, (zeros(3, 5).long(),), {}),
        (
            ValueError,
            r"targets has shape \(2,\), expected \(3,\)",
            token_logprobs,
            (logits, zeros(2).long()),
            {},
        ),
        (TypeError, r"targets is torch.float32", token_logprobs, (logits, zeros(3)), {}),
    ]


@pytest.mark.parametrize("number", range(len(bad_calls())))
def test_errors_quote_what_came_and_what_was_expected(number):
    error, message, function, arguments, options = bad_calls()[number]
    with pytest.raises(error, match=message) as caught:
        function(*arguments, **options)
    assert str(caught.value).startswith(function.__name__ + ": ")


def test_accumulators_may_lie_apart():
    """Any layout that gives every slot memory of its own is written in place."""
    q, k, v = decode_inputs(2, 4, 2, 16, 40)
    lens, visual = int32([40, 33]), span(20, batch=2)
    expected, expected_heads = zeros(2, 20), zeros(2, 4, 20)
    decode_attention(q, k, v, lens, visual_index=visual, mass=expected, head_mass=expected_heads)
    layers = zeros(1, 2, 20).expand(3, 2, 20)  # what the runtime keeps when it sums over layers
    heads_first = zeros(4, 2, 30).transpose(0, 1)[..., :20]
    decode_attention(q, k, v, lens, visual_index=visual, mass=layers[1], head_mass=heads_first)
    assert torch.equal(layers[2], expected)
    assert torch.equal(heads_first, expected_heads)
    alone = zeros(1, 20).as_strided((1, 20), (0, 1))  # of one request, any stride
    one_head = zeros(20).as_strided((1, 1, 20), (0, 0, 1))
    first = slice(0, 1)
    call = q[first, :1], k[first, :1], v[first, :1], lens[first]
    decode_attention(*call, visual_index=visual[first], mass=alone, head_mass=one_head)
    assert torch.equal(alone, one_head[:, 0])


def test_head_dim_of_one_has_any_stride():
    q, k, v = decode_inputs(2, 4, 2, 1, 40)
    lens, visual = int32([40, 33]), span(20, batch=2)
    rows = int32([[38, 39], [-1, 30]])
    long_q = normal(2, 4, 40, 1)
    spread = [torch.stack((t, t), -1).flatten(-2)[..., ::2] for t in (q, k, v, long_q)]  # stride 2
    assert all(t.stride(-1) == 2 for t in spread)
    results = []
    for one_q, keys, values, many_q in ([q, k, v, long_q], spread):
        mass = zeros(2, 20)
        out = decode_attention(one_q, keys, values, lens, visual_index=visual, mass=mass)
        prefill_mass(many_q, keys, rows, visual, mass)
        results.append((out, mass))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert greedy_token(zeros(5, 3)[:, ::3])[0].tolist() == [0] * 5


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_a_count_that_changes(dynamic):
    """`num_keep` and `out_len` may be symbols: they are not turned into constants."""

    def keep_some(hidden, mass, visual, lens, num_keep):
        pruned = prune_gather(hidden, mass, visual, lens, num_keep, out_len=20 + num_keep)
        return *pruned[:3], *select_tokens(mass, visual, lens, num_keep, out_len=20 + num_keep)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(keep_some, fullgraph=True, backend=counter, dynamic=dynamic or None)
    inputs = normal(2, 40, 8), uniform(2, 20), span(20, batch=2), int32([40, 33])
    for num_keep in (3, 5, 9, 12):
        torch.testing.assert_close(compiled(*inputs, num_keep), keep_some(*inputs, num_keep))
    assert counter.frame_count <= (1 if dynamic else 2)


def test_direct_calls_with_wrong_shapes_are_refused(compiled):
    """torch.ops.sgl_vlm is not the public API, but it must not read outside a tensor either."""
    for op, arguments in raw_calls():
        for position, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor) and argument.dim() and argument.shape[0] > 1:
                broken = list(arguments)
                broken[position] = argument[:1].clone()
                with pytest.raises(RuntimeError):
                    op.default(*broken)


def test_documented_example():
    import doctest

    assert doctest.testmod(sgl_kernels).failed == 0

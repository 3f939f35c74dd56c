"""The CPU kernels: they agree with torch, and no row's bits depend on the other rows of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fork_host import run_program
from support.kernel_formats import GROUPED, HEADS, PER_OUTPUT, UNQUANTIZED, rounded_inputs, stored_weight
from torch import nn

from aurora_lit.kernels import matmul, native
from aurora_lit.kernels.packed_linear import PackedEmbedding, PackedLinear, pack_linears
from aurora_lit.kernels.quantization import Codes
from aurora_lit.kernels.weight_format import WeightFormat
from aurora_lit.models.attention import KVCacheView, Variant, cached_attention
from aurora_lit.models.kv_cache import KVCache

needs_kernels = pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or AURORA_LIT_NATIVE=0")
pytestmark = pytest.mark.usefixtures("two_threads")
PROCESSOR = Path("/proc/cpuinfo")
FORMATS = [*UNQUANTIZED, *GROUPED, *HEADS, *PER_OUTPUT]


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(inputs * 1000 + outputs)
    return nn.Linear(inputs, outputs, bias=bias)


def expected_output(linear: nn.Linear, x: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    """Rounded inputs times the rounded weight with exact sums, plus the bias: what a packed layer computes, float64."""
    out = rounded_inputs(x, weight_format) @ stored_weight(linear.weight.detach(), weight_format).t()
    return out if linear.bias is None else out + linear.bias.detach().double()


@needs_kernels
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (3, 5), (16, 32), (17, 31), (33, 33), (64, 96), (97, 65), (130, 257), (576, 64)]
)
def test_a_packed_layer_agrees_with_torch(inputs: int, outputs: int, bias: bool, weight_format: WeightFormat) -> None:
    linear = random_linear(inputs, outputs, bias=bias)
    x = torch.randn(2, 7, inputs)
    y = PackedLinear(linear, weight_format)(x)
    assert y.shape == (2, 7, outputs)
    assert y.dtype == torch.float32
    # An input halfway between two integers may be rounded to either.
    tolerance = 2e-4 if weight_format.has_minima else 2e-5
    assert (y - expected_output(linear, x, weight_format)).abs().max() < tolerance


@needs_kernels
@pytest.mark.skipif(not PROCESSOR.exists() or "avx2" not in PROCESSOR.read_text().split(), reason="no AVX2")
def test_processors_with_avx2_have_products_of_bytes() -> None:
    assert native.has_byte_products(), "else the default precision is bf16"


@needs_kernels
@pytest.mark.parametrize("weight_format", GROUPED)
@pytest.mark.parametrize("rows", [1, 5, 28])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_of_whole_groups_do_not_overflow(
    sign: int, rows: int, weight_format: WeightFormat
) -> None:
    linear = random_linear(64, 32, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.weight[:, ::32] = -1.0  # the other weights of a group are its largest integer
    x = torch.full((rows, 64), float(sign))
    assert (PackedLinear(linear, weight_format)(x) - expected_output(linear, x, weight_format)).abs().max() < 1e-4


@needs_kernels
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (97, 65), (33, 31), (576, 64)])
def test_rows_do_not_depend_on_the_batch(inputs: int, outputs: int, bias: bool, weight_format: WeightFormat) -> None:
    layer = PackedLinear(random_linear(inputs, outputs, bias=bias), weight_format)
    most = 128
    x = torch.randn(most, inputs)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(most)])
    for rows in range(1, most + 1):
        assert torch.equal(layer(x[:rows]), alone[:rows]), f"{rows} rows"
        assert torch.equal(layer(x[most - rows :]), alone[most - rows :]), f"last {rows} rows"


@needs_kernels
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (97, 65), (33, 31), (16, 1)])
def test_argmax_finds_the_first_largest_output(inputs: int, outputs: int, weight_format: WeightFormat) -> None:
    linear = random_linear(inputs, outputs, bias=False)
    with torch.no_grad():
        linear.weight[outputs // 2 :] = linear.weight[: outputs - outputs // 2].clone()  # nearly every output twice
    layer, x = PackedLinear(linear, weight_format), torch.randn(5, 8, inputs)
    for rows in (1, 2, 5):
        y = layer(x[:rows])
        first = (y == y.amax(-1, keepdim=True)).float().argmax(-1)
        assert torch.equal(layer.argmax(x[:rows]), first)
    assert torch.equal(layer.argmax(-torch.zeros(3, inputs)), torch.zeros(3, dtype=torch.int64))


@needs_kernels
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_layer_made_of_anothers_tensors_computes_the_same(weight_format: WeightFormat) -> None:
    layer = PackedLinear(random_linear(64, 96, bias=True), weight_format)
    again = PackedLinear.from_tensors(layer.tensors(), weight_format, (96, 64))
    x = torch.randn(5, 64)
    assert torch.equal(again(x), layer(x))


def split_and_whole(q_OI: torch.Tensor, scale_OG: torch.Tensor) -> tuple[PackedLinear, PackedLinear]:
    """A head whose tokens are chosen after its codes' high halves, and one with the same numbers that is read whole."""
    codes = Codes(q_OI.to(torch.uint8), scale_OG, None)
    formats = WeightFormat.INT8_SPLIT, WeightFormat.INT8_GROUPED
    split, whole = (
        PackedLinear.from_tensors({"weight": matmul.pack_codes([codes], each, q_OI.shape)}, each, q_OI.shape)
        for each in formats
    )
    return split, whole


def assert_choices_are_equal(split: PackedLinear, whole: PackedLinear, x_NI: torch.Tensor) -> None:
    """Greedy ones, drawn ones, and of both in a batch; and the outputs themselves."""
    N = len(x_NI)
    another = PackedLinear(random_linear(1, 1, bias=False), WeightFormat.INT8_SPLIT)
    another.argmax(x_NI[:, :1])  # bounds that exclude little are not computed again soon, unless the head changes
    assert torch.equal(split(x_NI).view(torch.int32), whole(x_NI).view(torch.int32))
    assert torch.equal(split.argmax(x_NI), whole.argmax(x_NI))
    for temperature in (0.02, 0.7, 1.5):
        draws = {
            "temperature_N": torch.full((N,), temperature).where(torch.arange(N) % 3 > 0, 0.0),
            "key_N": torch.arange(N) + 5,
            "position_N": torch.arange(N) * 7,
        }
        assert torch.equal(split.choose(x_NI, **draws)[0], whole.choose(x_NI, **draws)[0])
        dense_N = torch.full((N,), -1)
        dense_N[-1] = 0
        ours, theirs = split.choose(x_NI, **draws, dense_N=dense_N), whole.choose(x_NI, **draws, dense_N=dense_N)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1].view(torch.int32), theirs[1].view(torch.int32))


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 2048), (97, 1000), (576, 3001), (33, 31), (16, 1)])
def test_choices_after_high_halves_equal_those_of_the_whole_product(
    inputs: int, outputs: int, gen: torch.Generator
) -> None:
    """With rows that are equal, or but for low halves, or zero, or of any size; inputs of any size, and not finite."""
    groups = -(-inputs // 32)
    q_OI = torch.randint(1, 256, (outputs, inputs), generator=gen)
    scale_OG = torch.rand(outputs, groups, generator=gen) * 4 ** torch.randint(-3, 4, (outputs, 1), generator=gen)
    twin = torch.randint(0, outputs, (2, outputs // 3), generator=gen)
    equal = torch.rand(outputs // 3, 1, generator=gen) < 0.5
    low = torch.randint(0, 16, (outputs // 3, inputs), generator=gen)
    q_OI[twin[0]] = torch.where(equal, q_OI[twin[1]], q_OI[twin[1]] // 16 * 16 + low)
    scale_OG[twin[0]] = scale_OG[twin[1]]
    scale_OG[::50], scale_OG[7::50] = 0.0, 60_000.0
    split, whole = split_and_whole(q_OI, scale_OG.half())
    x = torch.randn(40, inputs, generator=gen) * 10.0 ** torch.randint(-6, 7, (40, 1), generator=gen)
    x[3], x[4, 0], x[5, 0], x[6], x[24], x[25] = 0.0, float("nan"), float("inf"), 1e-39, x[24] * 1e30, x[25] * 1e-29
    x[7:20] = whole.rows(torch.randint(0, outputs, (13,), generator=gen))  # one output or its twin is the largest
    x[20:24, 1 % inputs] *= 1e4  # one input dominates
    for rows in (1, 2, 5, 6, 7, 40):
        for start in range(0, 41 - rows, max(1, rows // 2)):
            assert_choices_are_equal(split, whole, x[start : start + rows])


@needs_kernels
def test_choices_are_exact_where_all_rows_are_near_the_largest(gen: torch.Generator) -> None:
    """Rows that differ in low halves alone: the bounds exclude none of them."""
    high = torch.randint(0, 16, (1, 96), generator=gen) * 16
    q_OI = high + torch.randint(0, 16, (1500, 96), generator=gen)
    split, whole = split_and_whole(q_OI, torch.full((1500, 3), 0.01))
    x = torch.randn(6, 96, generator=gen)
    for rows in (1, 3, 6):
        assert_choices_are_equal(split, whole, x[:rows])


@needs_kernels
@pytest.mark.parametrize("inputs", [32, 576])
@pytest.mark.parametrize("seems", ["smaller", "larger"])
def test_the_bounds_hold_for_the_largest_possible_error(seems: str, inputs: int) -> None:
    """Inputs parallel to what low halves add, where Cauchy and Schwarz's inequality is an equation.

    Either the largest output seems smaller than another by nearly all of its bound, or another seems larger than it.
    With bounds that are a tenth less the choice would be wrong: so blocks that are excluded are not read whole.
    """
    sign = torch.where(torch.arange(inputs) % 3 > 0, 1, -1)
    x_1I = sign[None].float() * 127  # its rounding is exact

    def row(steps: int, low: int) -> torch.Tensor:
        """Codes with an approximate output of `steps` steps of 16 more than others, and low halves that add `low`."""
        raised = torch.where(torch.arange(inputs) < abs(steps), steps // max(1, abs(steps)), 0)
        return 128 + sign * (24 + 16 * raised + low)

    nearly = 7 * inputs // 16 - 1  # steps; the bound of low halves that add, or take away, 7
    best, other = (row(0, 7), row(nearly, 0)) if seems == "smaller" else (row(-nearly, 0), row(0, -7))
    first = row(1 if seems == "smaller" else 0, -7)  # has the largest upper bound
    q_OI, scale_OG = torch.full((4000, inputs), 128), torch.zeros(4000, inputs // 32)
    places = [3900, 70, 2000]  # in different blocks
    q_OI[places], scale_OG[places] = torch.stack([best, other, first]), 0.5
    split, whole = split_and_whole(q_OI, scale_OG)
    assert_choices_are_equal(split, whole, x_1I)
    assert split.argmax(x_1I).tolist() == [3900]
    errors = split.packed.view(4000 // 32, -1)[:, : 4 * 32].view(torch.float32)
    errors *= 0.9
    assert split.argmax(x_1I).tolist() == [70]


@needs_kernels
def test_bounds_that_exclude_little_are_computed_again_only_now_and_then(gen: torch.Generator) -> None:
    """Wrong bounds, which make a screened choice wrong, say which of the choices after these were screened."""
    q_OI = 128 + torch.randint(0, 16, (1500, 96), generator=gen)
    split, whole = split_and_whole(q_OI, torch.full((1500, 3), 0.01))
    x_1I = torch.randn(1, 96, generator=gen)
    expected = whole.argmax(x_1I).tolist()
    assert all(split.argmax(x_1I).tolist() == expected for _ in range(8))
    split.packed.view(-(-1500 // 32), -1)[:, : 4 * 32].view(torch.float32).zero_()
    are_wrong = [split.argmax(x_1I).tolist() != expected for _ in range(64)]
    assert 50 < are_wrong.index(True) < 64


@needs_kernels
@pytest.mark.parametrize("weight_format", FORMATS)
def test_strided_inputs_give_the_same_outputs(weight_format: WeightFormat) -> None:
    layer = PackedLinear(random_linear(24, 40, bias=False), weight_format)
    x = torch.randn(6, 48)
    for view in (x[:, :24], x[:, ::2], x[::2, 24:], x[:, :24].t().contiguous().t()):
        assert torch.equal(layer(view), layer(view.contiguous()))


@needs_kernels
@pytest.mark.parametrize("weight_format", FORMATS)
def test_rows_of_a_packed_weight_are_what_the_product_multiplies_by(weight_format: WeightFormat) -> None:
    linear = random_linear(133, 50, bias=True)
    layer, ids = PackedLinear(linear, weight_format), torch.tensor([[49, 0, 31], [32, 16, 49]])
    expected = stored_weight(linear.weight.detach(), weight_format).float()
    assert torch.equal(layer.rows(ids), expected[ids])
    assert torch.equal(PackedEmbedding(layer)(torch.arange(50)), expected)
    for wrong in (-1, 50):  # the packed weight is padded to 64 rows
        with pytest.raises(IndexError, match=f"{wrong}.*50 rows"):
            layer.rows(torch.tensor([0, wrong]))


@needs_kernels
@pytest.mark.parametrize("weight_format", [*GROUPED, *PER_OUTPUT])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_affect_only_their_row(weight_format: WeightFormat, value: float) -> None:
    layer = PackedLinear(random_linear(64, 40, bias=True), weight_format)
    x = torch.randn(3, 64)
    expected = layer(x)
    x[1, 37] = value
    assert layer(x)[1].isfinite().sum() == 0
    assert torch.equal(layer(x)[::2], expected[::2])


@needs_kernels
@pytest.mark.parametrize("weight_format", [*GROUPED, *PER_OUTPUT])
def test_constant_and_zero_weights_are_stored_exactly_enough(weight_format: WeightFormat) -> None:
    linear = nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([0.0, 0.5, -2.0])[:, None].expand(3, 64))
    torch.testing.assert_close(
        PackedLinear(linear, weight_format)(torch.ones(1, 64)), torch.tensor([[0.0, 32.0, -128.0]]), rtol=1e-3, atol=0
    )


@needs_kernels
@pytest.mark.parametrize("weight_format", GROUPED)
def test_quantising_a_weight_again_does_not_change_it(weight_format: WeightFormat) -> None:
    """So a model from a file in one of these formats is served unchanged."""
    weight = stored_weight(random_linear(256, 64, bias=False).weight.detach(), weight_format).float()
    linear = nn.Linear(256, 64, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    torch.testing.assert_close(PackedLinear(linear, weight_format).rows(torch.arange(64)), weight, rtol=0, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("weight_format", GROUPED)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (112, 33), (16, 1)])
def test_a_layer_of_given_codes_has_exactly_their_values(
    inputs: int, outputs: int, weight_format: WeightFormat, gen: torch.Generator
) -> None:
    """Every code occurs, and the scales and minima are such as no quantiser would choose."""
    assert weight_format.grouped_bits is not None
    codes, span = 2**weight_format.grouped_bits, weight_format.scale_inputs
    q_OI = torch.randint(codes, (outputs, inputs), generator=gen).to(torch.uint8)
    numbers_2OG = (torch.randn(2, outputs, -(-inputs // span), generator=gen) * 3).half()
    scale_OI, min_OI = numbers_2OG.double().repeat_interleave(span, dim=-1)[..., :inputs]
    scale_OG, min_OG = numbers_2OG[0], numbers_2OG[1] if weight_format.has_minima else None
    bias_O = torch.randn(outputs, generator=gen)
    packed = matmul.pack_codes([Codes(q_OI, scale_OG, min_OG)], weight_format, q_OI.shape)
    layer = PackedLinear.from_tensors({"weight": packed, "bias": bias_O}, weight_format, q_OI.shape)
    weight_OI = scale_OI * q_OI.double() + min_OI if min_OG is not None else scale_OI * (q_OI.double() - codes // 2)
    assert torch.equal(layer.rows(torch.arange(outputs)), weight_OI.float())
    x = torch.randint(-127, 128, (20, inputs), generator=gen).float()
    x[:, ::32] = 127  # so that inputs are not rounded
    torch.testing.assert_close(layer(x).double(), x.double() @ weight_OI.t() + bias_O.double(), rtol=2e-6, atol=0.05)
    parts = [Codes(q_OI[rows], scale_OG[rows], None if min_OG is None else min_OG[rows]) for rows in _parts(outputs)]
    assert torch.equal(matmul.pack_codes(parts, weight_format, (outputs, inputs)), layer.packed)


def _parts(outputs: int) -> list[slice]:
    """Of whole blocks, but for the last."""
    return [slice(first, first + 32) for first in range(0, outputs, 32)]


@needs_kernels
def test_all_linear_layers_of_a_model_are_packed_and_no_others() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)), nn.Linear(8, 3))
    ids = torch.tensor([[1, 4]])
    before = model(ids)
    assert pack_linears(model, weight_format=WeightFormat.FP32) == 2
    assert not [m for m in model.modules() if isinstance(m, nn.Linear)]
    torch.testing.assert_close(model(ids), before)


def attention_case(
    *, rows: int, T: int, N: int, G: int, D: int, dtype: torch.dtype, starts: list[int], gen: torch.Generator
) -> tuple[list[torch.Tensor], KVCache, torch.Tensor, torch.Tensor]:
    """New queries, keys and values for scattered slots, which contain noise at all positions."""
    kv_cache = KVCache(num_layers=1, num_slots=rows + 3, num_kv_heads=G, head_dim=D, capacity=90, dtype=dtype)
    kv_cache.keys_SGCQPE[0].normal_(generator=gen)
    kv_cache.values_SGMDE[0].normal_(generator=gen)
    slots_B = torch.randperm(rows + 3, generator=gen)[:rows]
    # As models pass them: heads and positions transposed, so not contiguous.
    new = [torch.randn(rows, T, heads, D, generator=gen).transpose(1, 2) for heads in (N, G, G)]
    return new, kv_cache, slots_B, torch.tensor(starts)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "G", "D"), [(2, 2, 32), (6, 2, 64), (4, 1, 96), (3, 3, 128)])
@pytest.mark.parametrize(
    ("T", "starts"), [(1, [0, 63, 64, 80]), (5, [3, 0, 28, 60]), (17, [0, 15, 50, 63]), (40, [0, 1, 32, 49])]
)
def test_attention_equals_torch_attention(
    T: int, starts: list[int], N: int, G: int, D: int, dtype: torch.dtype, gen: torch.Generator
) -> None:
    new, kv_cache, slots_B, starts_B = attention_case(rows=4, T=T, N=N, G=G, D=D, dtype=dtype, starts=starts, gen=gen)
    keys, values = kv_cache.keys_SGCQPE[0].clone(), kv_cache.values_SGMDE[0].clone()
    assert native.can_attend(new[0])
    out = KVCacheView(kv_cache, slots_B=slots_B, starts_B=starts_B).attend(0, *new, scale=0.3)
    expected = cached_attention(*new, keys, values, slots_B, starts_B, scale=0.3)
    torch.testing.assert_close(out, expected, atol=2e-5 if dtype == torch.float32 else 1e-4, rtol=0)
    assert torch.equal(kv_cache.keys_SGCQPE[0], keys), "the same keys are written and no others"
    assert torch.equal(kv_cache.values_SGMDE[0], values)


@needs_kernels
def test_a_window_that_no_slot_is_long_enough_for_leaves_attention_native(
    gen: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, kv_cache, slots_B, starts_B = attention_case(
        rows=2, T=5, N=2, G=1, D=32, dtype=torch.float32, starts=[0, 40], gen=gen
    )
    calls, attend, capacity = [], native.attend, kv_cache.capacity
    monkeypatch.setattr(native, "attend", lambda *given, **options: calls.append(1) or attend(*given, **options))
    view = KVCacheView(kv_cache, slots_B=slots_B, starts_B=starts_B)
    expected = view.attend(0, *new, scale=0.3)
    assert torch.equal(view.attend(0, *new, scale=0.3, variant=Variant(window=capacity)), expected)
    assert len(calls) == 2
    for variant in (Variant(window=capacity - 1), Variant(softcap=30.0), Variant(sinks_N=torch.zeros(2))):
        view.attend(0, *new, scale=0.3, variant=variant)
    assert len(calls) == 2, "this window could leave out a position, and the kernel has neither caps nor sinks"


@needs_kernels
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_batch_or_chunks(dtype: torch.dtype, D: int, gen: torch.Generator) -> None:
    """The whole is read as a prompt, by the most queries at a time, with some left over."""
    new, kv_cache, slots_B, starts_B = attention_case(
        rows=5, T=29, N=4, G=2, D=D, dtype=dtype, starts=[0, 9, 31, 40, 64], gen=gen
    )
    whole = KVCacheView(kv_cache, slots_B=slots_B, starts_B=starts_B).attend(0, *new, scale=0.2)
    for sizes in ([1] * 29, [17, 1, 10, 1], [25, 4]):
        for row in range(5):
            at = 0
            for size in sizes:
                part = [x[row : row + 1, :, at : at + size] for x in new]
                view = KVCacheView(kv_cache, slots_B=slots_B[row : row + 1], starts_B=starts_B[row : row + 1] + at)
                out = view.attend(0, *part, scale=0.2)
                assert torch.equal(out[0], whole[row, at : at + size]), f"row {row}, position {at}"
                at += size


def test_torch_attention_masks_the_future_other_slots_and_positions_outside_a_window() -> None:
    """Values are one-hot by position, so the output shows which positions were seen."""
    kv_cache = KVCache(num_layers=1, num_slots=2, num_kv_heads=1, head_dim=32, capacity=32)
    kv_cache.values_SGMDE[0].fill_(float("nan"))  # attending to another slot or to the future would give NaN
    kv_cache.values_SGMDE[0][1, 0, :8, :, 0] = torch.eye(32)[:8]
    kv_cache.keys_SGCQPE[0][1, ..., 8:] = 50.0
    query, key = torch.ones(1, 1, 3, 32), torch.zeros(1, 1, 3, 32)
    value = torch.eye(32)[8:11].view(1, 1, 3, 32)
    cached = (kv_cache.keys_SGCQPE[0], kv_cache.values_SGMDE[0], torch.tensor([1]), torch.tensor([8]))
    seen = cached_attention(query, key, value, *cached, scale=1.0)[0, :, 0] > 1e-6
    assert seen.sum(-1).tolist() == [9, 10, 11]
    seen = cached_attention(query, key, value, *cached, scale=1.0, variant=Variant(window=4))[0, :, 0] > 1e-6
    assert [row.nonzero().flatten().tolist() for row in seen] == [[5, 6, 7, 8], [6, 7, 8, 9], [7, 8, 9, 10]]


@needs_kernels
def test_queries_that_the_kernel_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 1, 1, 32)
    assert native.can_attend(query)
    for other in (torch.zeros(1, 1, 1, 48), query.bfloat16(), query.to("meta")):
        assert not native.can_attend(other)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not native.can_attend(query)


def test_the_environment_can_disable_the_kernels() -> None:
    code = "from aurora_lit.kernels import native; print(native.library())"
    result = run_program(code, environment={"AURORA_LIT_NATIVE": "0"})
    assert result.stdout.strip() == "None", result.stderr


@needs_kernels
def test_small_weights_share_huge_pages_without_overlapping() -> None:
    """Weights of any size keep their values; large ones have a mapping of their own."""
    gen = torch.Generator().manual_seed(0)
    weights = [torch.randn(33 + 7 * i, 20 + i, generator=gen) for i in range(40)]
    packed = [matmul.pack_weight(weight, WeightFormat.FP32) for weight in weights]
    x = torch.randn(3, 60, generator=gen)
    for weight, each in zip(weights, packed, strict=True):
        outputs, inputs = weight.shape
        torch.testing.assert_close(
            matmul.linear(x[:, :inputs], each, WeightFormat.FP32, outputs, None),
            x[:, :inputs] @ weight.T,
            rtol=1e-4,
            atol=1e-4,
        )
    storages = {each.untyped_storage().data_ptr() for each in packed}
    assert len(storages) <= 2, "forty weights of a few kilobytes share a mapping"
    assert all(each.data_ptr() % 64 == 0 for each in packed)
    large = matmul.pack_weight(torch.randn(3000, 800, generator=gen), WeightFormat.FP32)
    assert large.untyped_storage().data_ptr() not in storages
    assert large.data_ptr() % (1 << 21) == 0

"""Geometry, temperature and decompositions: laws, limits, and what is refused by name."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_kernel_ffn import InputError, KernelFFN, KernelFFNConfig, Readout, convert
from hf_kernel_ffn.checkpoint_code.kernels import KERNELS, Kernel, register_kernel
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.reading import trace
from hf_kernel_ffn.reading.attention import symmetrised_attention
from hf_kernel_ffn.reading.decompositions import alternatives, caratheodory, share_spread
from hf_kernel_ffn.reading.dial import dial, retrieval
from hf_kernel_ffn.reading.far_field import far_field
from hf_kernel_ffn.reading.geometry import (
    embedding_distances,
    embedding_norms,
    function_distance,
    function_norm,
    prototype_kernel,
    token_geometry,
)
from hf_kernel_ffn.reading.prices import principal_directions, write_price

SIZE, PROTOTYPES = 6, 20
MEMORY = [
    name for name, kernel in KERNELS.items() if kernel.positive_definite and not kernel.uses_knot
]
seeds = st.integers(0, 2**31)
few = settings(max_examples=15)


def make_ffn(kernel="yat", seed=0, prototypes=PROTOTYPES, size=SIZE, **changes):
    config = KernelFFNConfig(kernel=kernel, **changes)
    reference = {"scale": 1.5, "temperature": config.temperature or 1.0, "threshold": 0.5}
    for name, start in KERNELS[kernel].parameters.items():
        reference[name] = start if isinstance(start, float) else 0.7
    torch.manual_seed(seed)
    ffn = KernelFFN(LayerConfig(config, size, prototypes, reference)).eval().requires_grad_(False)
    nn.init.normal_(ffn.input_prototypes.weight)
    nn.init.normal_(ffn.output_prototypes.weight)
    ffn.units.copy_(torch.arange(1, prototypes + 1))
    return ffn


def inputs(seed=0, count=7, size=SIZE):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def signed_record():
    return Readout(torch.randn(3, 5), torch.randn(5, 4), None, None, None, tuple("abcde"))


def written(record):
    return record.coefficients.double() @ record.dictionary.double()


# Kernel matrices, norms and distances


@few
@given(seeds, st.sampled_from(MEMORY))
def test_a_positive_definite_kernel_has_a_positive_semi_definite_matrix(seed, kernel):
    gram = prototype_kernel(make_ffn(kernel, seed))
    assert gram.shape == (PROTOTYPES, PROTOTYPES)
    assert torch.equal(gram, gram.T)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues[0] >= -1e-9 * eigenvalues[-1]


def test_half_yat_has_a_witness_against_it():
    ffn = make_ffn("half-yat", prototypes=10, size=2)
    angles = torch.arange(10) * 2 * math.pi / 10
    ffn.input_prototypes.weight.copy_(torch.stack([angles.cos(), angles.sin()], 1))
    ffn.input_prototypes.bias.zero_()
    ffn.set_reference("epsilon", 10.0)
    assert torch.linalg.eigvalsh(prototype_kernel(ffn))[0].item() == pytest.approx(-0.009, abs=1e-3)


def test_the_matrix_is_the_kernel_between_rows():
    ffn = make_ffn("gaussian")
    rows = ffn.input_prototypes.weight
    kernel = ffn.kernel.value(
        *ffn.scores(rows), **ffn.kernel_parameters()
    )  # no bias: a row is an input like any other
    torch.testing.assert_close(prototype_kernel(ffn).float(), kernel, atol=1e-5, rtol=1e-4)


@few
@given(seeds, st.sampled_from(["imq", "yat", "exponential-yat", "exponential"]))
def test_the_function_norm_is_the_inner_product_with_itself(seed, kernel):
    """⟨f, f⟩ = Σ_i ⟨v_i, f(w_i)⟩ by the reproducing property; prototypes are inputs."""
    ffn = make_ffn(kernel, seed)
    if ffn.kernel.uses_bias:
        ffn.input_prototypes.bias.fill_(1.0)
    ffn.input_prototypes.weight.mul_(0.5)
    ffn.double()
    f = (
        ffn.coefficients(ffn.input_prototypes.weight) @ ffn.output_prototypes.weight.T
    )  # b_out left out
    expected = ffn.positive("scale").item() * (f * ffn.output_prototypes.weight.T).sum().item()
    assert function_norm(ffn) == pytest.approx(expected, rel=1e-6)
    assert expected > 0


@few
@given(seeds)
def test_function_distances_are_a_metric(seed):
    a, b, c = (make_ffn("yat", seed + i) for i in range(3))
    assert function_distance(a, a) <= 1e-5 * math.sqrt(function_norm(a))
    assert function_distance(a, b) == pytest.approx(function_distance(b, a), rel=1e-9)
    assert function_distance(a, c) <= function_distance(a, b) + function_distance(b, c) + 1e-9
    zero = make_ffn("yat", seed)
    zero.output_prototypes.weight.zero_()
    assert function_distance(a, zero) == pytest.approx(math.sqrt(function_norm(a)), rel=1e-9)


def test_functions_of_two_spaces_are_refused():
    other = make_ffn("yat")
    other.set_reference("epsilon", 1.3)
    for layer in (other, make_ffn("imq")):
        with pytest.raises(InputError, match="one space"):
            function_distance(make_ffn("yat"), layer)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernel": "half-yat"}, "not positive definite"),
        ({"intensity": "none"}, "intensity 'none'"),
        ({"intensity": "gate"}, "intensity 'gate'"),
        ({"simplex": "top-k", "top_k": 3}, "simplex 'top-k'"),
        ({"simplex": "threshold", "top_k": 3}, "simplex 'threshold'"),
        ({"simplex": "entmax-1.5"}, "simplex 'entmax-1.5'"),
        ({"simplex": "sparsemax"}, "simplex 'sparsemax'"),
        ({"temperature": 0.5}, "temperature 0.5"),
        ({"values": "gated"}, "values 'gated'"),
    ],
)
def test_where_there_is_no_function_norm_the_reason_is_named(changes, reason):
    with pytest.raises(InputError, match=reason):
        function_norm(make_ffn(**changes))


@few
@given(seeds, st.sampled_from(MEMORY), st.sampled_from(["none", "mass"]))
def test_embedding_distances_are_a_metric(seed, kernel, intensity):
    ffn = make_ffn(kernel, seed, intensity=intensity)
    x, gram = inputs(seed), prototype_kernel(ffn)
    record, other = ffn.readout(x), ffn.readout(x + 1)
    own, across = embedding_distances(ffn, record, record), embedding_distances(ffn, record, other)
    assert own.diagonal().abs().max() == 0
    assert torch.equal(own, own.T)
    assert (own[:, None] <= own[:, :, None] + own[None] + 1e-9 * own.max()).all()
    difference = (record.shares[0] - other.shares[1]).double()
    assert across[0, 1].item() == pytest.approx(
        (difference @ gram @ difference).clamp_min(0).sqrt().item(), rel=1e-4, abs=1e-6
    )
    pi = record.shares.double()
    torch.testing.assert_close(
        embedding_norms(ffn, record), torch.einsum("ti,ij,tj->t", pi, gram, pi)
    )


def test_embeddings_ask_for_shares_and_a_space_only():
    for changes in (
        {"simplex": "top-k", "top_k": 3},
        {"values": "gated"},
        {"intensity": "gate"},
        {"temperature": 0.5},
    ):
        ffn = make_ffn(**changes)
        assert embedding_norms(ffn, ffn.readout(inputs())).shape == (7,)
    half = make_ffn("half-yat")
    with pytest.raises(InputError, match="'half-yat', which is not positive definite"):
        embedding_norms(half, half.readout(inputs()))
    with pytest.raises(InputError, match="without shares"):
        embedding_norms(make_ffn(), signed_record())
    with pytest.raises(InputError, match="20 prototypes"):
        embedding_norms(make_ffn(), make_ffn(prototypes=8).readout(inputs()))


def test_token_geometry_is_there_for_every_record(llama, ids):
    traced = trace(llama, _Words(), ids[0])
    for record in (traced.ffn("layers.1.mlp"), traced.head(1, 0, -1), signed_record()):
        cosines = token_geometry(record)
        assert cosines.shape == (len(record.coefficients),) * 2
        torch.testing.assert_close(cosines.diagonal(), torch.ones_like(cosines.diagonal()))
        assert cosines.abs().max() <= 1 + 1e-9


class _Words:
    """A tokenizer for prompts given as ids."""

    def decode(self, ids):
        return f"<{ids[0]}>"


# Attention


@pytest.mark.parametrize("layer", [0, 2])
def test_learned_positions_leave_attention_all_content(gpt2, ids, layer):
    """GPT-2's positions are in the inputs: the form on (x, 1) gives the head's own weights."""
    found = symmetrised_attention(gpt2, trace(gpt2, _Words(), ids[0]), layer, 3)
    assert found.positional <= 1e-5
    assert found.form.shape == (33, 33)  # biases
    assert torch.linalg.eigvalsh(found.form)[0] >= -1e-9
    assert 0 < found.kept < 1
    assert found.kept + found.antisymmetric <= 1 + 1e-9
    assert found.least_symmetrised >= -1e-9
    apart = (found.plain - found.symmetrised).abs().sum() / 2
    assert found.variation == pytest.approx(apart.item() / len(found.plain)) and apart > 0


def test_heads_in_groups_share_their_keys(llama, ids):
    """Without rotary embeddings (one token: angle zero) the form's score is the head's."""
    traced = trace(llama, _Words(), ids[0])
    for head in range(4):
        found = symmetrised_attention(llama, traced, 1, head)
        attention = llama.model.layers[1].self_attn
        q, k = attention.q_proj.weight[head * 8 :][:8], attention.k_proj.weight[head // 2 * 8 :][:8]
        form = (q.T @ k).double() / math.sqrt(8)
        values, vectors = torch.linalg.eigh((form + form.T) / 2)
        torch.testing.assert_close(
            found.form, vectors * values.clamp_min(0) @ vectors.T, atol=1e-6, rtol=1e-5
        )
        assert found.positional > 1e-3  # rotary embeddings are left out
    with pytest.raises(InputError, match="0 to 3"):
        symmetrised_attention(llama, traced, 1, 4)


# The price of writing


@few
@given(seeds)
def test_prices(seed):
    v, u = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)), inputs(seed, 3, 4)
    rows = write_price(v, u)
    assert [r.nonnegative for r in rows] == sorted((r.nonnegative for r in rows), reverse=True)
    both = {r.direction: r for r in write_price(torch.cat([v, -v]), u)}
    for row in rows:
        assert 1 - 1e-6 <= row.signed <= row.nonnegative + 1e-6
        assert both[row.direction].nonnegative == pytest.approx(
            row.signed, rel=1e-6
        )  # with both signs there, c ≥ 0 costs nothing
        assert 1 <= row.prototypes <= 4
    scaled = {
        r.direction: r.nonnegative for r in write_price(v * torch.rand(30, 1).add(0.1), 5 * u)
    }
    assert scaled == pytest.approx({r.direction: r.nonnegative for r in rows}, rel=1e-6)


def test_known_prices():
    v = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    one, across, back, out = (
        torch.tensor(u) for u in ([1.0, 0, 0], [1.0, 1, 0], [-1.0, 0, 0], [0.0, 0, 1])
    )
    prices = {r.direction: r for r in write_price(v, torch.stack([one, across, back, out]))}
    assert prices[0].nonnegative == pytest.approx(1)
    assert prices[1].nonnegative == pytest.approx(math.sqrt(2))
    assert (prices[2].nonnegative, prices[2].signed) == (math.inf, pytest.approx(1))
    assert (prices[3].nonnegative, prices[3].signed) == (math.inf, math.inf)
    with pytest.raises(InputError, match="none of them zero"):
        write_price(v, torch.zeros(1, 3))


def test_opposite_directions_share_their_signed_price():
    v, u = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), inputs(0, 1, 4)
    pair = write_price(v, torch.cat([u, -u]))
    assert {r.direction: r.signed for r in pair}[1] == pytest.approx(write_price(v, -u)[0].signed)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    record = make_ffn().readout(inputs())
    for needs in (
        lambda: write_price(record, inputs()),
        lambda: share_spread(record, 0),
        lambda: alternatives(record, 0),
    ):
        with pytest.raises(InputError, match=r"pip install 'hf-kernel-ffn\[read\]'"):
            needs()
    assert (caratheodory(record, 0) > 0).sum() <= SIZE + 1


def test_principal_directions_come_in_pairs():
    outputs = torch.randn(50, 1) @ torch.tensor([[3.0, 4.0, 0.0]]) + torch.tensor([0.0, 0.0, 9.0])
    directions = principal_directions(outputs, 5)
    assert directions.shape == (2, 3)  # one direction is all there is
    torch.testing.assert_close(
        directions[0].abs(), torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(directions[1], -directions[0])


# Temperature and the far field


@few
@given(seeds, st.sampled_from(["none", "mass"]))
def test_the_dial_goes_from_one_prototype_to_the_centroid(seed, intensity):
    record = make_ffn("yat", seed, intensity=intensity).readout(inputs(seed))
    cold, own, hot = dial(record, 2, [1e-4, 1.0, 1e6])
    assert (cold.retrieval, hot.retrieval) == ("single", "global mean")
    assert cold.largest == pytest.approx(1, abs=1e-6)
    assert cold.from_top == pytest.approx(0, abs=1e-6)
    assert cold.from_centroid == pytest.approx(1, abs=1e-6)
    assert hot.effective == pytest.approx(PROTOTYPES, rel=1e-6)
    assert hot.entropy == pytest.approx(math.log(PROTOTYPES), rel=1e-6)
    assert hot.from_centroid == pytest.approx(0, abs=1e-4)
    assert own.largest == pytest.approx(record.shares[2].max().item(), rel=1e-5)
    entropies = [row.entropy for row in dial(record, 2)]
    assert entropies == sorted(entropies)


def test_a_truncated_mixture_is_never_the_mean_of_all():
    record = make_ffn("yat", simplex="top-k", top_k=4).readout(inputs())
    assert dial(record, 0, [1e6])[0].retrieval == "metastable"
    assert dial(record, 0, [1e6], support=True)[0].retrieval == "global mean"
    assert dial(record, 0, [1e6])[0].effective == pytest.approx(4)


def test_retrieval_by_known_mixtures():
    assert retrieval(torch.tensor([0.95, 0.05, 0.0])) == "single"
    assert retrieval(torch.full((10,), 0.1)) == "global mean"
    assert retrieval(torch.tensor([0.5, 0.5] + [0.0] * 18)) == "metastable"
    assert retrieval(torch.ones(1)) == "single"
    with pytest.raises(InputError, match="one mixture"):
        retrieval(torch.tensor([1.0, 1.0]))


def test_the_dial_refuses():
    with pytest.raises(InputError, match="converted layer"):
        dial(signed_record())
    record = make_ffn().readout(inputs())
    with pytest.raises(InputError, match="positive"):
        dial(record, 0, [0.0])
    with pytest.raises(InputError, match="nothing firing"):
        dial(record._replace(coefficients=torch.zeros_like(record.coefficients)), 0)


def test_light_tails_collapse_and_heavy_ones_stay_smoothers():
    rows = {
        (r.kernel, r.factor): r for r in far_field(make_ffn("half-yat"), inputs(count=30), (1, 1e5))
    }
    assert {kernel for kernel, _ in rows} == set(KERNELS) - {"brownian"}
    verdicts = {kernel: rows[kernel, 1e5].verdict for kernel, _ in rows}
    assert verdicts == {
        "exponential": "collapses, mass grows",
        "exponential-yat": "collapses, mass grows",
        "gaussian": "collapses, mass vanishes",
        "imq": "stays a smoother, mass vanishes",
        "yat": "stays a smoother, mass remains",
        "half-yat": "stays a smoother, mass remains",
        "root-half-yat": "stays a smoother, mass remains",
    }
    assert all(rows[kernel, 1].verdict.endswith("mass remains") for kernel, _ in rows)
    assert rows["gaussian", 1e5].nearest == 1
    assert rows["imq", 1e5].effective == pytest.approx(PROTOTYPES, rel=1e-4)


def test_the_layers_own_kernel_has_its_own_parameters():
    ffn, x = make_ffn("yat"), inputs(count=30)
    (here,) = far_field(ffn, x, (1.0,), ["yat"])
    pi = ffn.readout(x).shares.double()
    assert here.effective == pytest.approx((1 / pi.square().sum(-1)).mean().item(), rel=1e-5)
    ffn.set_reference("epsilon", 50.0)
    assert far_field(ffn, x, (1.0,), ["yat"])[0].effective != here.effective


def test_the_far_field_takes_kernels_it_can_start(registry):
    class Linear(Kernel):
        def value(self, score, distance2=None, slope=None):
            return score

    register_kernel(Linear("linear", nonnegative=False, positive_definite=True))
    register_kernel(
        Linear(
            "unknown",
            nonnegative=True,
            positive_definite=False,
            parameters={"slope": "from elsewhere"},
        )
    )
    assert {"linear", "unknown"}.isdisjoint(
        row.kernel for row in far_field(make_ffn(), inputs(), (2.0,))
    )
    with pytest.raises(InputError, match="can be negative"):
        far_field(make_ffn(), inputs(), (2.0,), ["linear"])
    with pytest.raises(InputError, match="finite"):
        far_field(make_ffn(), inputs(), (math.inf,))


# Other mixtures of the same output

SETTINGS = (
    {},
    {"intensity": "none"},
    {"kernel": "half-yat"},
    {"simplex": "top-k", "top_k": 9},
    {"simplex": "entmax-1.5"},
)


@few
@given(seeds, st.sampled_from(SETTINGS))
def test_decompositions_reproduce_the_output(seed, changes):
    record = make_ffn(seed=seed, **changes).readout(inputs(seed))
    c, v = record.coefficients[1].double(), record.dictionary.double()
    if not c.any():
        return
    reduced = caratheodory(record, 1)
    assert (reduced >= 0).all()
    assert (reduced > 0).sum() <= SIZE + 1
    assert ((reduced > 0) <= (c > 0)).all()
    torch.testing.assert_close(reduced.sum(), c.sum())
    torch.testing.assert_close(
        reduced @ v, c @ v, rtol=1e-8, atol=1e-8 * v.norm(dim=-1).max().item() * c.sum().item()
    )
    mixtures = alternatives(record, 1, count=4)
    torch.testing.assert_close(mixtures[0], c / c.sum())
    assert (mixtures >= 0).all()
    assert ((mixtures[1:] > 0).sum(-1) <= SIZE + 1).all()
    torch.testing.assert_close(mixtures.sum(-1), torch.ones(len(mixtures), dtype=torch.float64))
    torch.testing.assert_close(
        mixtures @ v, (mixtures[0] @ v).expand(len(mixtures), -1), rtol=1e-8, atol=1e-8
    )
    for row in share_spread(record, 1, 2):
        others = mixtures[:, row.prototype]
        assert (
            row.least - 1e-9 <= others.min() <= row.share <= others.max() + 1e-9 <= row.most + 2e-9
        )
        assert row.forced == (row.most - row.least <= 1e-6)


def test_many_prototypes_leave_the_shares_free_and_few_force_them():
    full = make_ffn("yat").readout(inputs())
    assert len(alternatives(full, 0, 5)) == 5
    assert not any(row.forced for row in share_spread(full, 0, 3))
    simplex = make_ffn("yat", prototypes=SIZE + 1).readout(inputs())  # affinely independent
    assert len(alternatives(simplex, 0, 5)) == 1
    assert all(row.forced for row in share_spread(simplex, 0, 3))
    few = make_ffn("yat", simplex="top-k", top_k=3).readout(inputs())
    assert len(alternatives(few, 0, 5, support=True)) == 1
    torch.testing.assert_close(
        caratheodory(few, 0), few.coefficients[0].double(), rtol=1e-6, atol=1e-9
    )


def test_spread_of_a_square():
    """The centre of a square: each corner's share may be anything from 0 to a half."""
    square = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    record = Readout(torch.full((1, 4), 0.5), square, None, None, None, tuple("abcd"))
    for row in share_spread(record, 0):
        assert (row.share, row.least, row.most) == (
            0.25,
            pytest.approx(0, abs=1e-9),
            pytest.approx(0.5),
        )
    corners = caratheodory(record, 0)
    assert sorted(corners.tolist()) == pytest.approx(
        [0, 0, 1, 1], abs=1e-9
    )  # one diagonal; Σc stays 2


def test_heads_are_decomposed_and_teachers_refused(llama, ids):
    traced = trace(llama, _Words(), ids[0])
    head = traced.head(1, 0, 20)
    mixtures = alternatives(head, 0, 4, support=True)
    assert len(mixtures) == 4  # 21 tokens in head_dim 8
    assert (mixtures[:, 21:] == 0).all()  # the future takes no part
    assert ((mixtures[1:] > 0).sum(-1) <= 9).all()
    v = head.dictionary.double()
    torch.testing.assert_close(mixtures @ v, (mixtures[0] @ v).expand(4, -1), rtol=1e-5, atol=1e-5)
    assert dial(head, 0, [1e6], support=True)[0].retrieval == "global mean"
    teacher = traced.ffn("layers.0.mlp")
    for refused in (caratheodory, alternatives, share_spread, dial):
        with pytest.raises(InputError, match="converted layer|no shares"):
            refused(teacher, 0)
        gated = make_ffn(values="gated")
        with pytest.raises(InputError):
            refused(gated.readout(inputs()), 0)
    nothing = make_ffn().readout(inputs())
    with pytest.raises(InputError, match="nothing firing"):
        caratheodory(nothing._replace(coefficients=0 * nothing.coefficients), 0)


def test_a_converted_model_from_end_to_end(llama, ids):
    student, _ = convert(llama, KernelFFNConfig(kernel="yat"), calibration_ids=ids)
    traced = trace(student, _Words(), ids[0])
    for path, ffn in student.kernel_ffns().items():
        record = traced.ffn(path)
        assert function_norm(ffn) > 0
        assert embedding_distances(ffn, record, record).shape == (32, 32)
        assert share_spread(record, -1, 1)[0].least <= record.shares[-1].max().item()
        assert len(far_field(ffn, traced.ffn_inputs[path]).to_pandas()) == 4 * (len(KERNELS) - 1)
        assert len(write_price(record, principal_directions(written(record), 1))) == 2

"""What distance carries, against plain loops and on constructions whose answer is known."""

import copy
import json
import math

import numpy as np
import pytest
import reference
import torch
from teachers import tiny_teacher

from hf_kernel_ffn import InputError, Kernel, KernelFFN, KernelFFNConfig, convert, register_kernel
from hf_kernel_ffn.checkpoint_code.layer_config import LayerConfig
from hf_kernel_ffn.conversion.sampling import read_ffn_inputs
from hf_kernel_ffn.evaluation import locality, purity
from hf_kernel_ffn.evaluation.locality import (
    auc,
    denominator_variation,
    locality_report,
    score_support_by_distance,
    support_auc,
)
from hf_kernel_ffn.evaluation.purity import context_purity, score_purity, top_tokens
from hf_kernel_ffn.families.registry import get_architecture_of_model
from hf_kernel_ffn.families.weights import read_ffn_weights, read_teacher_readout

SOFTENING = {"yat": "epsilon", "half-yat": "epsilon", "imq": "offset", "gaussian": None}
DATA_SCALE = {name: KernelFFNConfig(kernel=name, init="data-scale") for name in SOFTENING}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(entry):
    """All of a nested dict, None as −1."""
    parts = [numbers(value) if isinstance(value, dict) else [value] for value in entry.values()]
    return [
        -1 if value is None else value
        for part in parts
        for value in part
        if not isinstance(value, str)
    ]


def layer(kernel, rows, **reference):
    """A KernelFFN with prototypes ``rows`` (prototypes, d), no bias and unit scale."""
    settings = KernelFFNConfig(kernel=kernel, init="data-scale")
    ffn = KernelFFN(
        LayerConfig(settings, rows.shape[1], len(rows), {"scale": 1.0, **reference})
    ).requires_grad_(False)
    ffn.input_prototypes.weight.copy_(rows)
    if ffn.input_prototypes.bias is not None:
        ffn.input_prototypes.bias.zero_()
    return ffn


@pytest.fixture(scope="module", params=list(SOFTENING))
def converted(request, llama, ids):
    """Kernel name, a converted layer with learned parameters off their reference, and its inputs
    (tokens, 32)."""
    student, _ = convert(
        llama, DATA_SCALE[request.param], "1", calibration_ids=ids, calibration_tokens=256
    )
    [(path, ffn)] = student.kernel_ffns().items()
    with torch.no_grad():
        for ratio in ffn.log_ratio.values():
            ratio.add_(0.5)
    return request.param, ffn, next(read_ffn_inputs(llama, path, ids))[:40]


@pytest.fixture(scope="module")
def pair(llama, ids):
    """A student with different kernels, one of them without distance, in its layers, and its
    report."""
    settings = {
        0: DATA_SCALE["half-yat"],
        1: KernelFFNConfig(kernel="exponential"),
        2: DATA_SCALE["gaussian"],
    }
    student, _ = convert(llama, settings, calibration_ids=ids, calibration_tokens=256)
    return student, locality_report(student, llama, ids, top=5)


# the denominator


def plain_logs(name, ffn, x):
    """(tokens, prototypes) of the denominator and of log κ, in float64, one by one."""
    values = {
        n: ffn.config.reference[n] * math.exp(ffn.log_ratio[n].item())
        for n in ffn.kernel.parameters
    }
    rows = ffn.input_prototypes.weight.detach().double().numpy()
    bias = ffn.input_prototypes.bias
    bias = np.zeros(len(rows)) if bias is None else bias.detach().double().numpy()
    softening = values[SOFTENING[name]] if SOFTENING[name] else 0.0
    x = x.double().numpy()
    denominator = np.array([[sum((token - w) ** 2) + softening for w in rows] for token in x])
    kappa = np.array(
        [
            [reference.KERNELS[name](token, w, b, **values) for w, b in zip(rows, bias)]
            for token in x
        ]
    )
    return denominator, np.log(np.where(kappa > 0, kappa, np.nan))


def test_variation_against_plain_loops(converted, monkeypatch):
    name, ffn, x = converted
    denominator, log_kernel = plain_logs(name, ffn, x)
    monkeypatch.setattr(locality, "CHUNK", 7)
    found = denominator_variation(ffn, x)
    assert found["over_units"] == pytest.approx(
        np.mean([np.std(row) / np.mean(row) for row in denominator]), rel=1e-4
    )
    assert found["over_tokens"] == pytest.approx(
        np.mean([np.std(row) / np.mean(row) for row in denominator.T]), rel=1e-4
    )
    if name not in ("yat", "half-yat"):
        assert found["log_share"] == pytest.approx(1, rel=1e-4) and found[
            "log_share_weighted"
        ] == pytest.approx(1, rel=1e-4)
        return
    plain, weighted = np.zeros(2), np.zeros(2)
    for terms in zip(np.log(denominator), log_kernel):
        fires = ~np.isnan(terms[1])
        share = np.exp(terms[1][fires]) / np.exp(terms[1][fires]).sum()
        for i, term in enumerate(terms):
            plain[i] += np.var(term[fires])
            weighted[i] += share @ (term[fires] - share @ term[fires]) ** 2
    assert found["log_share"] == pytest.approx(plain[0] / plain[1], rel=1e-3)
    assert found["log_share_weighted"] == pytest.approx(weighted[0] / weighted[1], rel=1e-3)
    assert found["log_share"] > 1e-5
    assert name == "yat" or np.isnan(log_kernel).any()  # "where it fires" is tested


@pytest.mark.parametrize("name", list(SOFTENING))
def test_equal_distances_tell_no_unit_from_another(name):
    parameters = {"bandwidth": 1.0} if name == "gaussian" else {SOFTENING[name]: 1.0}
    ffn = layer(
        name, torch.eye(5)[:4], **parameters
    )  # the inputs stand on the fifth axis: distance² = 1 + length²
    inputs = torch.eye(5)[4] * torch.tensor([1.0, 3.0])[:, None]
    found = denominator_variation(ffn, inputs)
    low, high = (2.0, 10.0) if name == "gaussian" else (3.0, 11.0)
    assert found["over_units"] == pytest.approx(0, abs=1e-9)
    assert found["over_tokens"] == pytest.approx((high - low) / (high + low))
    assert found["log_share"] == found["log_share_weighted"] == 0


def test_far_inputs_know_no_distance_and_near_ones_do():
    """The warning that this module answers: rows of length one are all alike for inputs of length
    100."""
    rows = torch.nn.functional.normalize(noise(30, 8), dim=-1)
    ffn = layer("half-yat", rows, epsilon=0.01)
    near, far = (
        denominator_variation(ffn, noise(50, 8, seed=1) * length) for length in (0.3, 100.0)
    )
    assert far["over_units"] < 0.02 < 0.2 < near["over_units"]
    assert far["log_share"] < 1e-3 < 0.01 < near["log_share"]


def test_without_distance_nothing_varies(llama, ids):
    student, _ = convert(
        llama,
        KernelFFNConfig(kernel="exponential"),
        "0",
        calibration_ids=ids,
        calibration_tokens=256,
    )
    [ffn] = student.kernel_ffns().values()
    assert set(denominator_variation(ffn, noise(9, 32)).values()) == {0.0}


def test_nothing_that_fires():
    ffn = layer("half-yat", torch.eye(3), epsilon=1.0)
    found = denominator_variation(ffn, -torch.ones(4, 3))
    assert found["log_share"] == found["log_share_weighted"] == 0
    assert score_support_by_distance(ffn, -torch.ones(4, 3))["mass"].tolist() == [-math.inf] * 4


# contexts


@pytest.mark.parametrize("chunk", [3, 4, 1000])
def test_running_top_is_the_sorted_top(monkeypatch, chunk):
    monkeypatch.setattr(purity, "CHUNK", chunk)
    weight, x = noise(6, 5), noise(50, 5, seed=1)
    values, places = top_tokens(lambda some: some @ weight.T, x, 7)
    everything = (x @ weight.T).abs().T
    expected = everything.sort(-1, descending=True)
    torch.testing.assert_close(values, expected.values[:, :7])
    assert torch.equal(places, expected.indices[:, :7])


def test_a_prototype_for_each_token_id_is_pure():
    """Four ids, each with an input of its own and a prototype that knows nothing else."""
    tokens = torch.arange(4).repeat(10)
    inputs = torch.eye(4)[tokens]
    ffn = layer("half-yat", torch.eye(4), epsilon=1.0)
    found = context_purity(ffn.coefficients, inputs, tokens, top=10)
    assert found == {"token": 1.0, "cosine": pytest.approx(1), "dead": 0, "rare": 0}
    mixed = context_purity(lambda x: x @ torch.tensor([[1.0, 1, 0, 0]]).T, inputs, tokens, top=20)
    assert mixed["token"] == 0.5  # two ids alike
    # 190 pairs, 90 of one id and 100 of two; centred, the inputs of two ids are at cosine −1/3
    assert mixed["cosine"] == pytest.approx((90 - 100 / 3) / 190)


def test_dead_and_rare_units_are_left_out():
    tokens = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3])
    inputs = torch.eye(4)[tokens]
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [-1, -1, -1, -1]])
    found = context_purity(lambda x: (x @ rows.T).relu(), inputs, tokens, top=3)
    assert (found["dead"], found["rare"]) == (1, 1)
    one = context_purity(lambda x: (x @ rows[:1].T).relu(), inputs, tokens, top=3)
    two = context_purity(
        lambda x: (x @ rows[1:2].T * (1 + inputs[:, 2:3])).relu(), inputs, tokens, top=3
    )
    assert one["token"] == 1 and two["token"] == pytest.approx(2 / 3)  # id 2 fires it most
    assert context_purity(lambda x: (x @ rows[2:].T).relu(), inputs, tokens, top=3)["token"] is None


def test_the_sign_of_a_coefficient_is_no_part_of_its_context():
    x, tokens = noise(60, 5), torch.arange(60) % 7
    found, negated = (context_purity(lambda some, s=s: s * some, x, tokens, top=4) for s in (1, -1))
    assert found == negated and found["dead"] == 0
    assert torch.equal(top_tokens(lambda some: some, x, 1 + 1)[1][:, 0], x.abs().argmax(0))


def test_pairwise_cosine_is_its_definition(monkeypatch):
    monkeypatch.setattr(purity, "CHUNK", 9)  # two sets at once
    x, places = (
        noise(30, 6) + 3,
        torch.stack(
            [torch.randperm(30, generator=torch.Generator().manual_seed(i))[:4] for i in range(5)]
        ),
    )
    centred = x.double().numpy() - x.double().numpy().mean(0)
    cosines = [
        centred[a] @ centred[b] / np.sqrt(centred[a] @ centred[a] * (centred[b] @ centred[b]))
        for row in places.tolist()
        for a in row
        for b in row
        if a != b
    ]
    assert score_purity(places, x, torch.arange(30)) == {
        "token": 0.25,
        "cosine": pytest.approx(np.mean(cosines), abs=1e-6),
    }


@pytest.mark.parametrize("top", [1, 11])
def test_contexts_need_tokens(top):
    with pytest.raises(InputError, match=f"found 10 tokens for top={top}"):
        top_tokens(lambda x: x, noise(10, 3), top)


# support


def test_known_areas():
    low, high = torch.tensor([0.0, 1, 2]), torch.tensor([3.0, 4])
    assert auc(high, low) == 1 and auc(low, high) == 0
    assert auc(high, high) == auc(torch.zeros(3), torch.zeros(8)) == 0.5
    assert auc(torch.tensor([1.0, -math.inf]), torch.tensor([-math.inf])) == 0.75


def test_area_against_every_pair():
    one, other = (
        torch.randint(10, (n,), generator=torch.Generator().manual_seed(n)).float()
        for n in (40, 70)
    )
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in one.tolist() for b in other.tolist()]
    assert 0.5 in wins
    assert auc(one, other) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, math.nan]), torch.zeros(0)])
def test_no_area_without_numbers(bad):
    for one, other in ((bad, torch.ones(2)), (torch.ones(2), bad)):
        with pytest.raises(InputError, match="NaN or none"):
            auc(one, other)


def test_support_against_plain_loops(converted, monkeypatch):
    name, ffn, x = converted
    denominator, log_kernel = plain_logs(name, ffn, x)
    softening = ffn.positive(SOFTENING[name]).item() if SOFTENING[name] else 0.0
    monkeypatch.setattr(locality, "CHUNK", 7)
    found = score_support_by_distance(ffn, x)
    np.testing.assert_allclose(found["nearest"], softening - denominator.min(-1), rtol=1e-4)
    np.testing.assert_allclose(
        found["mass"], np.log(np.nansum(np.exp(log_kernel), -1)), rtol=1e-3, atol=1e-4
    )


def test_inputs_at_the_prototypes_are_supported():
    rows = 3 * torch.eye(6)
    ffn = layer("gaussian", rows, bandwidth=1.0)
    text = rows.repeat(4, 1) + 0.1 * noise(24, 6)
    found = support_auc(
        ffn, text, text.mean(0) + 0.1 * noise(24, 6, seed=1)
    )  # in the middle, far from all
    assert found == {
        "nearest": 1.0,
        "mass": 1.0,
        "control": 0.0,
        "length": 0.0,
    }  # the controls get it wrong
    assert set(support_auc(ffn, text, text).values()) == {0.5}


def test_short_prototypes_know_no_more_than_the_length():
    """The distance to rows near the origin is the input's own length; the controls say so."""
    ffn = layer("half-yat", 1e-4 * noise(20, 6), epsilon=0.1)
    text, other = noise(60, 6), 1.2 * noise(60, 6, seed=1)
    found = support_auc(ffn, text, other)
    assert (
        found["nearest"] == pytest.approx(found["length"], abs=1e-3) and 0.5 < found["length"] < 1
    )
    assert found["length"] == pytest.approx(auc(-text.square().sum(-1), -other.square().sum(-1)))


def test_support_without_distance(llama, ids):
    student, _ = convert(
        llama,
        KernelFFNConfig(kernel="exponential"),
        "0",
        calibration_ids=ids,
        calibration_tokens=256,
    )
    [ffn] = student.kernel_ffns().values()
    with torch.no_grad():
        row = ffn.input_prototypes.weight[0]
        found = support_auc(ffn, row.repeat(5, 1) * 50 + noise(5, 32), -row.repeat(5, 1) * 0.01)
    assert found["nearest"] is None and found["mass"] == 1


# the report


def test_the_report_is_its_parts(pair, llama, ids):
    student, report = pair
    paths = list(student.kernel_ffns())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["tokens"] == len(ids) * (32 - 8)
    assert [entry["path"] for entry in report["layers"]] == paths
    tokens = ids[:, 8:].flatten()
    for path, entry in zip(paths, report["layers"]):
        x = torch.cat(list(read_ffn_inputs(llama, path, ids))).view(8, 32, 32)[:, 8:].flatten(0, 1)
        ffn, stock = student.kernel_ffns()[path], llama.base_model.get_submodule(path)
        weights = read_ffn_weights(stock, get_architecture_of_model(llama), llama.config, path)
        assert entry["denominator"] == pytest.approx(denominator_variation(ffn, x))
        student_contexts = context_purity(
            lambda some, ffn=ffn: ffn.readout(some).coefficients, x, tokens, 5
        )
        teacher_contexts = context_purity(
            lambda some, w=weights: read_teacher_readout(w, some).coefficients, x, tokens, 5
        )
        assert entry["contexts"]["student"] == pytest.approx(student_contexts)
        assert entry["contexts"]["teacher"] == pytest.approx(teacher_contexts)
        assert teacher_contexts["token"] > entry["contexts"]["chance"]["token"] > 0.2


def test_means_are_over_layers_that_have_a_figure(pair):
    _, report = pair
    for figure in ("over_units", "log_share_weighted"):
        values = [entry["denominator"][figure] for entry in report["layers"]]
        assert values[1] == 0 and report["denominator"][figure] == pytest.approx(sum(values) / 3)
    nearest = [entry["support"]["random"]["nearest"] for entry in report["layers"]]
    assert nearest[1] is None and report["support"]["random"]["nearest"] == pytest.approx(
        (nearest[0] + nearest[2]) / 2
    )


def test_shuffled_rows_keep_their_tokens_and_random_ids_do_not(pair, llama, ids, monkeypatch):
    student, _ = pair
    read = []
    monkeypatch.setattr(
        locality,
        "read_ffn_inputs",
        lambda model, path, some: read.append(some) or read_ffn_inputs(model, path, some),
    )
    locality_report(student, llama, ids, top=5)
    text, shuffled, uniform = read[:3]  # of the first layer
    assert torch.equal(text, ids) and not torch.equal(shuffled, ids)
    assert torch.equal(shuffled.sort(1).values, ids.sort(1).values)
    assert (
        uniform.shape == ids.shape
        and uniform.max() < 300
        and len(uniform.unique()) > len(ids.unique()) * 0.8
    )
    assert (uniform == ids).double().mean() < 0.05


def test_text_of_one_token_is_told_from_random_ids(llama, ids):
    """Rows of a single id: shuffling changes nothing, its contexts are pure, and its inputs are
    nearest to their own mean."""
    student, _ = convert(
        llama, DATA_SCALE["half-yat"], "0", calibration_ids=ids, calibration_tokens=256
    )
    report = locality_report(student, llama, torch.full((4, 30), 7), top=5)
    assert set(report["support"]["shuffled"].values()) == {0.5}
    assert report["support"]["random"]["control"] == 1
    assert report["contexts"]["student"]["token"] == report["contexts"]["chance"]["token"] == 1


def test_how_it_is_computed_is_no_part_of_the_report(pair, llama, ids, monkeypatch):
    student, report = pair
    assert locality_report(student, llama, ids, top=5) == report
    assert locality_report(student, llama, ids, seed=1, top=5)["support"] != report["support"]
    for module in (locality, purity):
        monkeypatch.setattr(module, "CHUNK", 50)
    again = locality_report(student, llama, ids, top=5)
    for one, other in zip(again["layers"], report["layers"]):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_other_families_and_half_precision(family, make_teacher, ids):
    teacher = copy.deepcopy(make_teacher(family)).bfloat16()
    settings = KernelFFNConfig(kernel="yat", values="gated" if family == "mistral" else "fixed")
    student, _ = convert(teacher, settings, "1", calibration_ids=ids, calibration_tokens=256)
    report = locality_report(student, teacher, ids, top=5)
    assert 0 < report["denominator"]["over_units"] < 2
    assert report["contexts"]["student"]["dead"] == 0 < report["contexts"]["student"]["cosine"]


def test_kernels_of_ones_own(registry, llama, ids):
    class Boxcar(Kernel):
        """1 within a radius: distance decides what fires, and tells nothing of what does."""

        def value(self, score, distance2, radius2):
            return (distance2 < radius2).to(score.dtype)

    register_kernel(
        Boxcar(
            "boxcar",
            nonnegative=True,
            positive_definite=False,
            uses_distance=True,
            parameters={"radius2": 50.0},
        )
    )
    student, _ = convert(
        llama, KernelFFNConfig(kernel="boxcar"), "0", calibration_ids=ids, calibration_tokens=256
    )
    report = locality_report(student, llama, ids, top=5)
    assert report["denominator"]["over_units"] > 0 == report["denominator"]["log_share"]


def test_what_is_refused(pair, llama, ids):
    student, _ = pair
    for arguments, reason in (
        ((llama, llama, ids), "not converted"),
        ((student, tiny_teacher("llama", vocab_size=301), ids), "vocab_size"),
        ((student, llama, ids[:, :8]), "rows longer than 8"),
        ((student, llama, ids[0]), "expected \\(rows, length\\)"),
        ((student, llama, ids[:1, :20]), "found 12 tokens for top=20"),
    ):
        with pytest.raises(InputError, match=reason):
            locality_report(*arguments)


def test_nothing_is_left_behind(pair, llama):
    for model in (llama, pair[0]):
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        assert all(parameter.grad is None for parameter in model.parameters())

"""Calibration: whose inputs it sees, how many of them at once, and that processes share them."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from hf_kernel_ffn import KernelFFNConfig, convert
from hf_kernel_ffn.conversion import calibration_set, layer, sampling
from hf_kernel_ffn.conversion import ridge as calibration
from hf_kernel_ffn.conversion.block_source import BlockSource
from hf_kernel_ffn.conversion.calibration_set import CalibrationSet, split_fitted_and_held
from hf_kernel_ffn.conversion.ridge import Moments
from hf_kernel_ffn.conversion.sampling import read_ffn_inputs, read_fit_sample
from hf_kernel_ffn.families.lookup import find_ffn_paths
from hf_kernel_ffn.families.registry import get_architecture_of_model

LOUD_AND_WRONG = KernelFFNConfig(kernel="imq", simplex="top-k", top_k=1, intensity="none")


@pytest.fixture(scope="module")
def text(ids):
    """(32, 32) token ids."""
    return (ids.repeat(4, 1) + torch.arange(32)[:, None] // 8) % 300


def read(model, path, ids):
    return torch.cat(list(read_ffn_inputs(model, path, ids)))


def unexplained(ffn, teacher, inputs):
    with torch.no_grad():
        target = teacher(inputs)
        return (
            (ffn(inputs) - target).square().sum() / (target - target.mean(0)).square().sum()
        ).item()


def test_inputs_are_those_of_a_full_forward_pass_and_nothing_beyond_is_computed(teacher, text):
    path, other = find_ffn_paths(teacher, get_architecture_of_model(teacher))[1:]
    expected, beyond = [], []
    ffn = teacher.base_model.get_submodule(path)
    hook = ffn.register_forward_pre_hook(
        lambda module, args: expected.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        teacher(text)
    hook.remove()
    hooks = [ffn.register_forward_hook(lambda *_: beyond.append(path))]
    hooks += [
        teacher.base_model.get_submodule(other).register_forward_pre_hook(
            lambda *_: beyond.append(other)
        )
    ]
    torch.testing.assert_close(read(teacher, path, text), expected[0])
    for hook in hooks:
        hook.remove()
    assert not beyond


def test_a_layer_is_calibrated_on_what_the_student_feeds_it(teacher, text):
    per_layer = {0: LOUD_AND_WRONG, 1: KernelFFNConfig()}
    student, report = convert(teacher, per_layer, calibration_ids=text)
    _, path = report.layers
    mine, stock = (model.base_model.get_submodule(path) for model in (student, teacher))
    held = split_fitted_and_held(text)[1]
    seen, seen_by_teacher = read(student, path, held), read(teacher, path, held)
    assert (seen - seen_by_teacher).norm() > 0.1 * seen.norm()
    assert report.layers[path]["fvu"] == pytest.approx(unexplained(mine, stock, seen), rel=1e-3)
    assert report.layers[path]["fvu"] != pytest.approx(
        unexplained(mine, stock, seen_by_teacher), rel=1e-3
    )


def test_a_conversion_that_fails_leaves_the_teacher_as_it_was(teacher, text, monkeypatch):
    modules = list(teacher.modules())
    done = []

    def calibrate(*args, **options):
        if done:
            raise KeyboardInterrupt
        done.append(calibration.calibrate_ffn(*args, **options))
        return done[0]

    monkeypatch.setattr(layer, "calibrate_ffn", calibrate)
    with pytest.raises(KeyboardInterrupt):
        convert(teacher, KernelFFNConfig(), calibration_ids=text)
    assert len(done) == 1
    assert all(mine is other for mine, other in zip(teacher.modules(), modules, strict=True))
    assert all(not module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize(
    "settings",
    [KernelFFNConfig(), KernelFFNConfig(simplex="sparsemax")],
    ids=["fixed τ", "fitted τ"],
)
def test_inputs_are_held_one_batch_at_a_time(llama, text, monkeypatch, settings):
    batches, peak = [], []
    original = BlockSource.read

    def watched(source, ffn, purpose):
        for batch in original(source, ffn, purpose):
            batches.append(weakref.ref(batch))
            peak.append(len(batch) * sum(reference() is not None for reference in batches))
            yield batch

    monkeypatch.setattr(BlockSource, "read", watched)
    monkeypatch.setattr(calibration_set, "BATCH_TOKENS", 64)
    convert(llama, settings, calibration_ids=text)
    assert len(batches) == 3 * 2 * 1024 // 64  # every token twice per layer: to start, and to solve
    assert max(peak) <= 2 * 64  # the batch at hand, and the one before until it is let go


def test_batches_make_no_difference(llama, text, monkeypatch):
    whole, _ = convert(llama, KernelFFNConfig(), calibration_ids=text)
    monkeypatch.setattr(calibration_set, "BATCH_TOKENS", 96)
    monkeypatch.setattr(calibration, "CHUNK", 40)
    parts, _ = convert(llama, KernelFFNConfig(), calibration_ids=text)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "rows, length", [(32, 32), (5, 8), (4, 3), (2, 10), (1, 4096), (1, 4), (1, 2)]
)
def test_a_quarter_of_the_text_is_held_out(rows, length):
    ids = torch.arange(rows * length).view(rows, length)
    fitted, held = split_fitted_and_held(ids)
    if ids.numel() >= 4:
        assert not set(fitted.flatten().tolist()) & set(held.flatten().tolist())
        assert len(fitted) >= 0.6 * len(ids) and held.numel() >= 0.2 * ids.numel()


def test_the_rows_of_a_conversion_are_chosen_once():
    ids = torch.arange(64 * 8).view(64, 8)
    chosen = CalibrationSet.choose(ids, 40 * 8 + 7)
    assert chosen.tokens == 40 * 8
    assert torch.equal(chosen.ridge, ids[:30]) and torch.equal(chosen.held_out, ids[30:40])
    assert len(chosen.fit) == calibration_set.FIT_ROWS
    assert chosen.fit[0, 0] == 0 and torch.equal(chosen.fit[-1], ids[39])
    assert sum(map(len, chosen.batches("ridge"))) == 30


def test_pieces_are_fitted_on_all_rows_that_are_not_held_out(monkeypatch):
    ids = torch.arange(64 * 256).view(64, 256)
    chosen = CalibrationSet.choose_for_pieces(ids, ids.numel())
    assert torch.equal(chosen.fit, ids[:48]) and torch.equal(chosen.held_out, ids[48:])
    assert chosen.fit_every == 1 and len(chosen.ridge) == 0
    assert CalibrationSet.choose(ids, ids.numel()).fit_every == 4  # rows are long to fit on
    monkeypatch.setattr(calibration_set, "PIECES_FIT_TOKENS", 4096)
    chosen = CalibrationSet.choose_for_pieces(ids, ids.numel())
    assert len(chosen.fit) == 32 and chosen.fit_every == 2


def test_the_teacher_writes_as_many_tokens_as_are_asked_for(llama):
    for tokens, settings in ((None, None), (5120, None), (1024, KernelFFNConfig())):
        _, report = convert(llama, settings, calibration_tokens=tokens, layers="0")
        assert report.calibration == "own tokens"
        assert report.calibration_tokens == (tokens or calibration_set.PIECES_TOKENS)


def test_the_sample_is_spread_over_the_text(llama, text, monkeypatch):
    monkeypatch.setattr(sampling, "FIT_TOKENS", 64)
    monkeypatch.setattr(calibration_set, "FIT_ROWS", 8)
    path = "layers.1.mlp"
    rows = [
        0,
        4,
        8,
        13,
        17,
        22,
        26,
        31,
    ]  # odd and even ones, since a teacher's own text begins differently in them
    torch.testing.assert_close(
        read_fit_sample(llama, path, text), read(llama, path, text[rows])[::4]
    )


def _sum_of_shares(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    given = torch.load(folder / "given.pt", weights_only=False)
    moments = Moments(3, 2, torch.device("cpu"))
    for batch in split_fitted_and_held(given["ids"])[0]:  # by row, each a batch of tokens
        moments.add(given["coefficients"][batch], given["outputs"][batch])
    moments.all_reduce()
    converted = {
        name: convert(given["teacher"], settings, calibration_ids=given["text"])
        for name, settings in SETTINGS.items()
    }
    found = {
        name: (student.state_dict(), report.to_dict())
        for name, (student, report) in converted.items()
    }
    torch.save((vars(moments), found), folder / f"{rank}.pt")
    dist.destroy_process_group()


SETTINGS = {
    "dense": KernelFFNConfig(),
    "sparse": KernelFFNConfig(simplex="entmax-1.5", intensity="gate"),
}


def test_two_processes_find_what_one_finds(llama, text, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(52).view(13, 4)  # rows that two processes cannot share evenly
    coefficients, outputs = (
        torch.rand(52, 3, generator=generator),
        torch.randn(52, 2, generator=generator),
    )
    given = {
        "teacher": llama,
        "text": text[:13],
        "ids": rows,
        "coefficients": coefficients,
        "outputs": outputs,
    }
    torch.save(given, tmp_path / "given.pt")
    torch.multiprocessing.spawn(_sum_of_shares, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    (sums, found), (sums_again, found_again) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)
    )

    moments = Moments(3, 2, torch.device("cpu"))
    fitted = split_fitted_and_held(rows)[0].flatten()
    moments.add(coefficients[fitted], outputs[fitted])
    for name, value in vars(moments).items():
        torch.testing.assert_close(sums[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.as_tensor(sums[name]), torch.as_tensor(sums_again[name]))

    for name, settings in SETTINGS.items():
        student, report = convert(llama, settings, calibration_ids=text[:13])
        for key, tensor in student.state_dict().items():
            assert torch.equal(found[name][0][key], found_again[name][0][key])
            torch.testing.assert_close(found[name][0][key], tensor, rtol=1e-3, atol=1e-4)
        assert found[name][1] == found_again[name][1]
        for path, figures in report.layers.items():
            for key in ("fvu_start", "fvu", "pull", "dictionary_growth"):
                assert found[name][1]["layers"][path][key] == pytest.approx(figures[key], rel=1e-4)

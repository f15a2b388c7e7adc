"""What a run meets beside its recipe: trackers, the launcher's settings, the trial of kernels."""

import pytest
from safetensors.torch import load_file
from training_runs import LAYER_WISE, Interrupted, assert_same_files, interrupt, run

from hf_kernel_ffn import InputError
from hf_kernel_ffn.distillation import Recipe, accelerator, fused
from hf_kernel_ffn.distillation import run as run_module
from hf_kernel_ffn.distillation.accelerator import check_trackers, make_accelerator
from hf_kernel_ffn.distillation.state import find_state, load_facts
from hf_kernel_ffn.gpu.fused import Fused


@pytest.fixture(scope="module")
def recipe(teacher_folder, text_file):
    def make(out, **changes):
        content = {
            "teacher": str(teacher_folder("llama")),
            "kernel_ffn": {"rows": "free"},
            "data": {"train": str(text_file), "sequence_length": 32, "shuffle_buffer": 16},
            "stages": [LAYER_WISE],
            "output_dir": str(out),
            "calibration_tokens": 256,
            "save_every_tokens": 128,
        }
        return Recipe(**{**content, **changes})

    return make


# trackers


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("wandbb", "unknown tracker 'wandbb' in trackers: did you mean 'wandb'?"),
        ("x", "unknown tracker 'x' in trackers: expected one of all, "),
        ("swanlab", "tracker 'swanlab', whose package is not installed"),
    ],
)
def test_a_tracker_is_refused_before_anything_is_loaded(
    recipe, monkeypatch, tmp_path, name, sentence
):
    monkeypatch.setattr(accelerator, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(run_module, "load_tokenizer", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(InputError) as caught:
        run(recipe(tmp_path / "out", trackers=["tensorboard", name]))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_trackers_that_are_there_pass(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "get_available_trackers", lambda: ["tensorboard"])
    check_trackers(recipe(tmp_path, trackers=["tensorboard", "all"]))
    check_trackers(recipe(tmp_path))


def test_a_tracker_of_ones_own_is_told_the_losses(recipe, monkeypatch, text_file, tmp_path):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    told = []

    class Memo(GeneralTracker):
        name = "memo"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name, **more):
            super().__init__()

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None, **more):
            told.append(values)

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "memo", Memo)
    data = {**recipe(tmp_path).data.model_dump(), "validation": str(text_file)}
    data["validation_tokens"] = 64
    run(recipe(tmp_path / "out", trackers=["memo"], data=data))
    start, *steps = told
    assert '"trackers": ["memo"]' in start["recipe"]
    assert [values["layer-wise/step"] for values in steps] == list(range(6))
    assert all(values["layer-wise/loss"] > 0 for values in steps)
    assert steps[-1]["layer-wise/validation_loss"] > 0


# the launcher's settings

LAUNCHERS = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
}


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one state for a process: without it before and after."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_the_recipe_holds_against_the_launcher(recipe, fresh_accelerate, monkeypatch, tmp_path):
    from accelerate.state import AcceleratorState, GradientState

    plain = run(recipe(tmp_path / "plain"))
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name, value in LAUNCHERS.items():
        monkeypatch.setenv(name, value)
    made = make_accelerator(recipe(tmp_path))
    assert made.mixed_precision == "no" and made.gradient_accumulation_steps == 1
    assert made.state.dynamo_plugin.backend == "NO"
    assert_same_files(run(recipe(tmp_path / "launched")), plain)


def test_another_precision_of_this_process_is_refused(recipe, fresh_accelerate, tmp_path):
    from accelerate import Accelerator

    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(InputError, match="accelerator in this process already") as caught:
        make_accelerator(recipe(tmp_path))
    assert "\n" not in str(caught.value)


# the trial of kernels


def test_a_resumed_run_takes_over_what_the_trial_found(recipe, monkeypatch, tmp_path):
    """The trial is of time: it may end otherwise on another day."""
    trials = []

    def trial(model, how, autocast):
        trials.append(how)
        first, *rest = model.kernel_ffns().values()
        first.fused = Fused()
        for ffn in rest:
            ffn.fused = None
        return {"layers.1.mlp": "slower than the plain form"}

    seen = []
    original = fused.choose_fused_readouts

    def noted(student, *more):
        verdict = original(student, *more)
        seen.append([ffn.fused is not None for ffn in student.kernel_ffns().values()])
        return verdict

    monkeypatch.setattr(fused, "choose_kernels", trial)
    monkeypatch.setattr(run_module, "choose_fused_readouts", noted)
    same = recipe(tmp_path / "out")
    assert isinstance(interrupt(monkeypatch, same, 3), Interrupted)
    facts = load_facts(find_state(tmp_path / "out"))
    assert facts["fused"] == {
        "served": ["layers.0.mlp"],
        "refused": {"layers.1.mlp": "slower than the plain form"},
    }

    out = run(same, resume=True)
    assert trials == ["auto"] and seen == [[True, False, False]] * 2
    assert "slower than the plain form" in (out / "distillation.json").read_text()
    assert load_file(out / "model.safetensors")


def test_always_is_what_the_recipe_says_on_resume_too(recipe, monkeypatch, tmp_path, llama, ids):
    from hf_kernel_ffn import KernelFFNConfig, convert

    student, _ = convert(llama, KernelFFNConfig(), calibration_ids=ids, calibration_tokens=256)
    asked = recipe(tmp_path, fused="always")
    before = {"served": [], "refused": {}}
    verdict = fused.choose_fused_readouts(student, asked, before)
    assert verdict.served == list(student.kernel_ffns())
    assert all(ffn.fused.required for ffn in student.kernel_ffns().values())

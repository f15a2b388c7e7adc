"""Every family of the table: found, read exactly, converted, trained, saved, loaded, restored.

And every head of it.
"""

import inspect
import re
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_families import COMMON, FAMILIES, HEADS, tiny
from training_runs import make_step

from hf_kernel_ffn import InputError, convert, restore
from hf_kernel_ffn.checkpoint_code.carried_code import carried_file_names
from hf_kernel_ffn.distillation.objectives import layer_wise
from hf_kernel_ffn.families.detection import explain_ffns, find_undescribed_ffns
from hf_kernel_ffn.families.hooks import capture_ffn_inputs_and_outputs
from hf_kernel_ffn.families.lookup import find_ffn_paths, find_stock_ffns, get_attribute_at
from hf_kernel_ffn.families.registry import ARCHITECTURES, get_architecture_of_model
from hf_kernel_ffn.families.student import make_student_from_entry
from hf_kernel_ffn.families.task_classes import get_stock_heads
from hf_kernel_ffn.families.weights import read_stock_weights, read_teacher_readout
from hf_kernel_ffn.text.inputs import make_forward_arguments


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def inputs_of(model):
    """Something to read: token ids, images, sounds, whatever the head takes."""
    generator = torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    config = model.config
    made = {}
    if "input_ids" in takes and model.main_input_name == "input_ids":
        made["input_ids"] = torch.randint(3, 300, (8, 12), generator=generator)
        made["input_ids"][:, -1] = 2  # some heads read where the text ends
        if "MultipleChoice" in type(model).__name__:
            made["input_ids"] = made["input_ids"].view(4, 2, 12)
    if "pixel_values" in takes:
        made["pixel_values"] = torch.randn(8, 3, 16, 16, generator=generator)
    if "input_features" in takes:
        made["input_features"] = torch.randn(
            8, config.num_mel_bins, 2 * config.max_source_positions, generator=generator
        )
    if config.is_encoder_decoder and "decoder_input_ids" in takes and "labels" not in made:
        made["decoder_input_ids"] = torch.randint(3, 300, (8, 12), generator=generator)
        made["decoder_input_ids"][:, -1] = 2
    return made


def output(model, inputs):
    """The first tensor of a forward pass."""
    with torch.no_grad():
        return model(**inputs)[0]


class Made:
    """One family's teacher and student, made once."""

    def __init__(self, family, folder):
        self.heads = get_stock_heads(family)
        self.folder = folder / family / "student"
        self.auto = next(auto for auto in HEADS if auto in self.heads)
        self.teacher = tiny(family, self.auto)
        self.inputs = inputs_of(self.teacher)
        self.student, self.report = convert(
            self.teacher, calibration_ids=self.inputs, calibration_tokens=4096, copy=True
        )
        self.output = output(self.student, self.inputs)
        self.student.save_pretrained(self.folder)
        save_file(self.inputs, self.folder.with_name("inputs.safetensors"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a family's models."""
    folder = tmp_path_factory.mktemp("families")
    known = {}

    def make(family):
        if family not in known:
            known[family] = Made(family, folder)
        return known[family]

    return make


def test_the_list_covers_the_table():
    assert set(FAMILIES) == set(ARCHITECTURES) - {
        "gemma3"
    }  # gemma3: tested by its language part, below


def test_every_head_is_described_and_read_exactly(family):
    for name in dict.fromkeys(list(get_stock_heads(family).values())[1:]):
        model = tiny(
            family, next(auto for auto, head in get_stock_heads(family).items() if head == name)
        ).double()
        model.config._experts_implementation = "eager"  # the others have no float64
        ffns = find_stock_ffns(model, get_architecture_of_model(model))
        assert not find_undescribed_ffns(model.base_model, ffns), name
        for path, ffn in ffns.items():
            weights = read_stock_weights(model, ffn)
            x = torch.randn(5, weights.up.shape[1], dtype=torch.float64)
            with torch.no_grad():
                record = read_teacher_readout(weights, x)
                torch.testing.assert_close(
                    record.output(), ffn(x), rtol=1e-9, atol=1e-11, msg=f"{name} {path}"
                )


def test_the_record_is_what_the_running_model_writes(family, made):
    teacher = made(family).teacher
    base = teacher.base_model
    ffns = find_stock_ffns(teacher, get_architecture_of_model(teacher))
    with capture_ffn_inputs_and_outputs(base, ffns) as seen, torch.no_grad():
        base(**make_forward_arguments(base, made(family).inputs))
    assert seen.keys() == ffns.keys()
    for path, (x, y) in seen.items():
        torch.testing.assert_close(
            read_teacher_readout(read_stock_weights(teacher, ffns[path]), x).output(),
            y,
            rtol=1e-3,
            atol=1e-4,
        )


def test_converts_and_comes_back(family, made):
    it = made(family)
    assert (
        list(it.student.kernel_ffns())
        == list(it.report.layers)
        == find_ffn_paths(it.student, ARCHITECTURES[family])
    )
    assert torch.isfinite(it.output).all() and not torch.equal(
        it.output, output(it.teacher, it.inputs)
    )
    for path, ffn in it.student.kernel_ffns().items():
        for absorbed in ffn.config.absorbed:
            left = get_attribute_at(it.student.base_model, absorbed)
            assert left == 0.0 or type(left) is torch.nn.Identity, path
    stock = restore(it.student, it.teacher)
    assert type(stock) is type(it.teacher)
    assert torch.equal(output(stock, it.inputs), output(it.teacher, it.inputs))


def test_layer_wise_training_lowers_the_loss_of_every_layer(family, made):
    it = made(family)
    ffns = it.student.kernel_ffns()
    state = {
        path: {name: t.clone() for name, t in ffn.state_dict().items()}
        for path, ffn in ffns.items()
    }
    # A conversion is so near that there would be little to learn.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ffn in ffns.values():
            weight = ffn.output_prototypes.weight
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    parameters = [p for ffn in ffns.values() for p in ffn.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)

    def losses():
        return {
            p: layer_wise(make_step(None, it.teacher, it.student, {p: ffns[p]}, it.inputs)).item()
            for p in ffns
        }

    before = losses()
    for _ in range(8):
        layer_wise(
            make_step(None, it.teacher, it.student, ffns, it.inputs, backward=torch.Tensor.backward)
        )
        optimiser.step()
        optimiser.zero_grad()
    after = losses()
    for path, ffn in ffns.items():
        assert after[path] < before[path], path
        ffn.load_state_dict(state[path])


def test_every_head_runs_converted(family, made):
    it = made(family)
    heads = get_stock_heads(family)
    for name in dict.fromkeys(list(heads.values())[1:]):
        auto = next(auto for auto, head in heads.items() if head == name)
        teacher = tiny(family, auto)
        here = find_stock_ffns(teacher, get_architecture_of_model(teacher))
        entry = dict(it.student.config.kernel_ffn)
        entry["layers"] = {path: layer for path, layer in entry["layers"].items() if path in here}
        if not entry["layers"]:  # the head has one stack, under a name of its own
            student, _ = convert(
                teacher, calibration_ids=inputs_of(teacher), calibration_tokens=4096
            )
        else:
            student = make_student_from_entry(teacher, entry)
        assert type(student).__name__ == f"Kernel{name}"
        assert torch.isfinite(output(student, inputs_of(student))).all(), name


def test_generation_with_and_without_cache_agrees(family, made):
    it = made(family)
    if (
        not it.student.can_generate()
        or it.auto == "AutoModelForMaskedLM"
        or not getattr(it.student.config, "use_cache", False)
    ):
        pytest.skip("does not generate")
    if it.auto == "AutoModelForCausalLM" and family in ("bert", "roberta", "electra"):
        pytest.skip("an encoder")
    if it.auto == "AutoModelForCausalLM" and it.student.config.is_encoder_decoder:
        pytest.skip("half of an encoder with a decoder")
    prompt = {
        name: tensor[:2] for name, tensor in it.inputs.items() if not name.startswith("decoder")
    }
    runs = [
        it.student.generate(**prompt, max_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*runs)


@pytest.fixture(scope="module")
def elsewhere(made, run_elsewhere, tmp_path_factory):
    """Every family's checkpoint, read by one interpreter without the package."""
    jobs = []
    for family in FAMILIES:
        it = made(family)
        inputs = str(it.folder.with_name("inputs.safetensors"))
        jobs.append({"name": family, "auto": it.auto, "folder": str(it.folder), "inputs": inputs})
    return run_elsewhere(jobs, torch.zeros(1), tmp_path_factory.mktemp("elsewhere"))


def test_bit_equal_where_the_package_is_not_installed(family, elsewhere, made):
    results, errors = elsewhere
    assert family not in errors, errors[family]
    assert torch.equal(results[family], made(family).output)


def list_missing(model, plan):
    """Patterns of ``plan`` that no module or parameter of ``model`` has the name of."""
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters()]
    expressions = {pattern: re.escape(pattern).replace(r"\*", r"\d+") for pattern in plan}
    return [
        pattern
        for pattern, expression in expressions.items()
        if not any(re.fullmatch(expression, name) for name in names)
    ]


def test_parallel_plans_name_what_is_there(family, made):
    it = made(family)
    base = it.student.base_model
    stock = type(base.config).base_model_tp_plan
    assert not list_missing(it.student, it.student.tp_plan)
    of_experts = getattr(it.student, "ep_plan", {})  # transformers 5.17 has no such property
    assert not list_missing(it.student, of_experts)
    assert not list_missing(base, base.config.base_model_pp_plan or {})
    assert bool(base.config.base_model_tp_plan) == bool(stock)
    if not stock:
        return
    assert list_missing(base, stock), "the stock plan would have been right"
    assert not list_missing(base, base.config.base_model_tp_plan)
    for path, ffn in it.student.kernel_ffns().items():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
        split = {name for name in base.config.base_model_tp_plan if name.startswith(f"{pattern}.")}
        for name, _ in ffn.named_parameters():
            owner = f"{pattern}.{name.rpartition('.')[0]}"
            is_split = f"{pattern}.{name}" in split or owner in split
            assert is_split == (not name.startswith("log_ratio.")), name
    assert "base_model_tp_plan" not in it.student.config.to_dict()


def test_a_student_suits_the_same_serving_backends_as_its_teacher(family, made):
    it = made(family)
    for auto, name in get_stock_heads(family).items():
        if auto != "AutoConfig":
            student_class = getattr(sys.modules[type(it.student).__module__], f"Kernel{name}")
            stock_class = getattr(transformers, name)
            assert student_class.is_backend_compatible() == stock_class.is_backend_compatible()


def test_stock_classes_refuse(family, made):
    with pytest.raises(Exception, match="trust_remote_code=True"):
        type(made(family).teacher).from_pretrained(made(family).folder)


def test_a_checkpoint_names_one_stock_family(family, made):
    text = (made(family).folder / f"modeling_kernel_{family}.py").read_text()
    imports = [line for line in text.splitlines() if line.startswith(("from", "import"))]
    assert len(imports) == 4 and all(
        line.startswith(("from transformers import", "from .")) for line in imports
    )
    assert len(list(made(family).folder.glob("*.py"))) == len(carried_file_names()) + 1


def test_a_renamed_attribute_is_caught_by_name(llama):
    import copy

    renamed = copy.deepcopy(llama)
    block = renamed.model.layers[1]
    block.feed_forward = block.mlp
    del block.mlp
    with pytest.raises(InputError, match=r"no 'mlp' in layers\.1"):
        convert(renamed)


def test_an_ffn_that_no_entry_describes_is_refused(llama, ids):
    import copy

    wider = copy.deepcopy(llama)
    wider.model.layers[1].second = copy.deepcopy(wider.model.layers[1].mlp)
    with pytest.raises(InputError, match=r"'llama' does not describe, the first layers\.1\.second"):
        convert(wider, calibration_ids=ids)


def test_a_part_is_converted_by_a_pattern(made):
    it = made("clip")
    student, report = convert(it.teacher, layers="text_model.*", calibration_ids=it.inputs)
    assert list(report.layers) == [
        "text_model.encoder.layers.0.mlp",
        "text_model.encoder.layers.1.mlp",
    ]


def test_explain_says_what_matches_and_what_does_not(llama):
    import copy

    rows = explain_ffns(llama)
    assert [row["path"] for row in rows] == [f"layers.{i}.mlp" for i in range(3)]
    assert (
        rows[0]["sizes"] == "32 → 48"
        and rows[0]["entry"] == "llama: W_in up_proj, gate gate_proj, W_out down_proj"
    )
    wider = copy.deepcopy(llama)
    wider.model.layers[1].second = copy.deepcopy(wider.model.layers[1].mlp)
    assert "layers.1.second.down_proj" in explain_ffns(wider)[-1]["entry"]
    other = transformers.CodeGenForCausalLM(
        transformers.CodeGenConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    )
    [row] = explain_ffns(other)
    assert row["path"] == "h.0.mlp" and "'codegen'" in row["entry"]


def test_the_language_part_of_gemma3_is_converted(made):
    text = {**COMMON, **FAMILIES["gemma3_text"], "num_key_value_heads": 2}
    vision = {
        name: COMMON[name]
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=299,
    )
    teacher = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 290, (8, 12))
    assert len(find_stock_ffns(teacher, get_architecture_of_model(teacher))) == 4
    student, report = convert(teacher, layers="language_model.*", calibration_ids=ids)
    assert len(report.layers) == 2 and all(
        path.startswith("language_model.") for path in report.layers
    )
    assert torch.isfinite(output(student, {"input_ids": ids})).all()
    with pytest.raises(
        InputError, match="no input that comes to vision_tower.*give the model all that it reads"
    ):
        convert(teacher, calibration_ids=ids)

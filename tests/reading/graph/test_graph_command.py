"""``hf-kernel-ffn graph`` says what the functions say; bad input is one line before any work."""

import json
from functools import partial

import pytest

from hf_kernel_ffn import convert
from hf_kernel_ffn.reading.graph import attribution_graph, prune
from hf_kernel_ffn.storage import loading
from hf_kernel_ffn.storage.loading import load_student, load_teacher, load_tokenizer

PROMPT = "The old man looked at the sea and"


@pytest.fixture
def graph(cli):
    """Exit code, stdout and stderr of one command."""
    return partial(cli, "graph")


@pytest.fixture(scope="module")
def folder(teacher_folder, tmp_path_factory, ids):
    """A converted tiny Llama."""
    stock = teacher_folder("llama")
    converted = tmp_path_factory.mktemp("graph") / "student"
    student, _ = convert(load_teacher(str(stock)), calibration_ids=ids)
    student.save_pretrained(converted)
    load_tokenizer(str(stock)).save_pretrained(converted)
    return converted


def test_a_graph_of_a_student(graph, folder, tmp_path, text_file):
    code, printed, _ = graph(
        folder,
        "--prompt",
        PROMPT,
        "--target",
        " the",
        "--against",
        " said",
        *("--nodes", 12, "--keep", 0.9, "--group", 0.9, "--text", text_file),
        *("--json", tmp_path / "made" / "g.json", "--html", tmp_path / "g.html"),
    )
    assert code == 0
    assert "held: attention patterns, scales of norms" in printed and "' the'" in printed
    data = json.loads((tmp_path / "made" / "g.json").read_text())
    student, tokenizer = load_student(str(folder)), load_tokenizer(str(folder))
    expected = prune(
        attribution_graph(student, tokenizer, PROMPT, target=" the", against=" said", nodes=12), 0.9
    )
    units = [node for node in expected.nodes if node.kind == "unit"]
    found = [node for node in data["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert [node["activation"] for node in found] == pytest.approx(
        [node.value for node in units], rel=1e-5
    )
    assert "Fires most in" in (tmp_path / "g.html").read_text()


@pytest.mark.parametrize("start_units", (False, True))
def test_a_graph_begins_as_asked(graph, folder, tmp_path, start_units):
    options = ["--start-units"] if start_units else []
    file = tmp_path / "g.json"
    code, _, _ = graph(
        folder,
        *("--prompt", PROMPT, "--bos", "always", "--nodes", 400, "--keep", 1, "--json", file),
        *options,
    )
    assert code == 0
    data = json.loads(file.read_text())
    tokenizer = load_tokenizer(str(folder))
    assert data["metadata"]["prompt_tokens"][0] == tokenizer.bos_token
    assert data["metadata"]["prompt"].endswith(PROMPT)
    features = [node for node in data["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert any(node["ctx_idx"] == 0 for node in features) == start_units


def test_a_graph_of_a_teacher_with_heads(graph, teacher_folder):
    code, printed, _ = graph(
        teacher_folder("gpt2"), "--prompt", PROMPT, "--nodes", 12, "--heads", "--rule", "derivative"
    )
    assert code == 0 and "rule: derivative" in printed and "head " in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prompt", ""), "found a prompt without a token"),
        (("--prompt", "a", "--nodes", "0"), "found nodes 0, expected at least 1"),
        (("--prompt", "a", "--target", " old man"), "tokens (' old', ' man'), expected one token"),
        (("--prompt", "a", "--target", " the", "--target", " the"), "twice among the targets"),
        (("--prompt", "a", "--target", " the", "--against", " the"), "against itself"),
        (("--prompt", "a", "--rule", "best"), "found rule 'best', expected one of half"),
        (("--prompt", "a", "--keep", "1.5"), "found keep 1.5, expected a share from 0 to 1"),
        (("--prompt", "a", "--group", "2"), "found similarity 2.0, expected a number"),
        (("--prompt", "a", "--json", __file__ + "/g.json"), "no writable folder"),
        (("--prompt", "a", "--html", __file__ + "/g.html"), "no writable folder"),
        (("--prompt", "a", "--text", "missing.txt"), "missing.txt"),
    ],
)
def test_bad_input_is_one_line_before_the_model_is_loaded(
    graph, folder, monkeypatch, arguments, message
):
    def load_nothing(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_model", load_nothing)
    code, printed, error = graph(folder, *arguments)
    assert code == 2 and message in error and printed == ""
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_model_that_cannot_be_read(graph, tmp_path, tokenizer):
    from tiny_families import tiny

    tiny("bloom", "AutoModelForCausalLM", vocab_size=4096).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, error = graph(tmp_path, "--prompt", PROMPT)
    assert code == 2 and "found nothing on attention in the entry for 'bloom'" in error

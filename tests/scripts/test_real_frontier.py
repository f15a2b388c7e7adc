"""The frontier of a real model: rows are run once, and become a table."""

import json

import pytest
import real_frontier
from teachers import RECIPES
from typer.testing import CliRunner

from hf_kernel_ffn import load_teacher
from hf_kernel_ffn.storage.exporting import apply_surgery

ROWS = "readout, skip, allocated;teacher truncated, trained;teacher truncated"
WIDE = {"COLUMNS": "1000"}
NAMES = ["readout, skip, allocated, 6", "teacher truncated, trained, 6", "teacher truncated, 6"]


@pytest.fixture(scope="module")
def out(teacher_folder, text_file, tmp_path_factory):
    """The folder of three rows of a tiny Llama, two of them with training."""
    out = tmp_path_factory.mktemp("real_frontier") / "reports"
    options = ["--counts", 6, "--tokens", 1024, "--test-tokens", 2048, "--batch-size", 2]
    texts = ["--train", text_file, "--test", text_file]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECIPES.parent)
        arguments = ["run", teacher_folder("llama"), "--out", out, *options, *texts]
        done = CliRunner().invoke(
            real_frontier.app,
            [*map(str, arguments), "--only", ROWS, "--prompts", "2", "--save", str(out.parent)],
            catch_exceptions=False,
        )
    assert done.exit_code == 0, done.output
    return out


def test_every_row_has_its_figures(out):
    reports = {report["row"]: report for report in map(read, out.glob("*.json"))}
    assert sorted(reports) == sorted(NAMES)
    ours, trained, untrained = (reports[name] for name in NAMES)
    assert ours["active"] == pytest.approx(6, abs=2)
    assert 0 < ours["skip_share"] < 1 and trained["skip_share"] is None
    assert untrained["tokens"] == 0 and trained["tokens"] == 1024
    assert all(-1 <= report["jacobian_cosine"] <= 1 for report in reports.values())


def test_a_trained_student_can_be_put_together_again(out, teacher_folder):
    files = sorted(file.stem for file in out.parent.glob("*.safetensors"))
    assert files == sorted(name.replace(", ", "_").replace(" ", "-") for name in NAMES)
    file = out.parent / "readout_skip_allocated_6.safetensors"
    student = apply_surgery(file, load_teacher(teacher_folder("llama")))
    assert all(ffn.config.settings.skip for ffn in student.kernel_ffns().values())


def test_a_row_that_does_not_exist_is_refused(teacher_folder, text_file, tmp_path):
    arguments = ["run", teacher_folder("llama"), "--out", tmp_path, "--test", text_file]
    done = CliRunner().invoke(
        real_frontier.app, [*map(str, arguments), "--only", "readout, squared"], env=WIDE
    )
    assert done.exit_code == 2 and "'readout, squared'" in done.output


def read(file):
    return json.loads(file.read_text())


def test_the_table_has_a_line_for_each(out):
    done = CliRunner().invoke(real_frontier.app, ["show", str(out)], catch_exceptions=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(NAMES)
    assert (out / "table.md").read_text().count("\n") == len(NAMES) + 2


def test_the_teacher_with_all_units_has_the_teachers_jacobian(make_teacher, ids):
    from hf_kernel_ffn.evaluation.baselines import teacher_as_student

    teacher = make_teacher("llama")
    student = teacher_as_student(teacher, ids=ids)
    cosine, share = real_frontier.compare_ffns(student, teacher, ids)
    assert cosine == pytest.approx(1, abs=1e-5) and share is None

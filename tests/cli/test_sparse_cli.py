"""Sparse tied rows by the command line: converted, started from a student, read, and refused."""

import json

import pytest

FEW = ("--calibration-tokens", 512)
SPARSE = ("--rows", "tied", "--simplex", "threshold", "--top-k", 6)


@pytest.fixture
def convert(cli, teacher_folder, text_file, tmp_path):
    """Convert a tiny Llama into ``name``; the exit code, and what was said on stderr."""

    def run(name, *options):
        text = ("--calibration-text", text_file)
        code, _, error = cli(
            "convert", teacher_folder("llama"), tmp_path / name, *FEW, *text, *options
        )
        return code, error

    return run


def read_layers(folder):
    entry = json.loads((folder / "config.json").read_text())["kernel_ffn"]["layers"]
    return list(entry.values()) if isinstance(entry, dict) else entry


def test_counts_are_shared_out_and_pieces_taken(convert, tmp_path, cli):
    assert convert("dense")[0] == 0
    code, error = convert(
        "sparse", *SPARSE, "--skip", "--allocate", "--start", str(tmp_path / "dense")
    )
    assert code == 0, error
    settings = [layer["settings"] for layer in read_layers(tmp_path / "sparse")]
    assert all(each["skip"] for each in settings)
    assert sum(each["top_k"] for each in settings) == 6 * len(settings)
    code, output, error = cli("read", tmp_path / "sparse", "--prompt", "the")
    assert code == 0, error
    assert "linear" in output
    assert cli("verify", tmp_path / "sparse")[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (("--allocate",), "simplex 'softmax'"),
        (("--rows", "free", "--skip"), "skip with rows 'free'"),
        ((*SPARSE, "--stream", "--allocate"), "--stream with --allocate or --start"),
        ((*SPARSE, "--start", "nowhere"), "nowhere"),
    ],
)
def test_what_is_refused_is_said_in_one_line(convert, options, message):
    code, error = convert("out", *options)
    lines = [line for line in error.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1
    assert message in lines[0]

"""Text that a model writes, mixed with another one."""

import json
from pathlib import Path

import own_text
from typer.testing import CliRunner


def write(app, *arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_both_texts_are_whole_and_in_order(teacher_folder, text_file, tmp_path):
    app = own_text.typer.Typer()
    app.command()(own_text.main)
    teacher = teacher_folder("llama")
    alone = tmp_path / "alone.jsonl"
    mixed = tmp_path / "mixed.jsonl"
    write(app, teacher, alone, "--tokens", 512, "--batch-size", 3)
    write(app, teacher, mixed, "--tokens", 512, "--batch-size", 3, "--beside", text_file)

    own = [json.loads(line)["text"] for line in alone.read_text().splitlines()]
    every = [json.loads(line)["text"] for line in mixed.read_text().splitlines()]
    lines = [line for line in Path(text_file).read_text().splitlines() if line.strip()]
    assert len(own) == 2 and len(set(own)) == 2
    assert [text for text in every if text in own] == own  # the same seed, the same text
    others = [text.strip() for text in every if text not in own]
    assert others == [line.strip() for line in lines]


def test_half_of_the_texts_begin_as_the_model_was_trained(make_teacher):
    teacher = make_teacher("llama")
    ids = own_text.sample(teacher, 6, temperature=1.0)
    assert ids.shape == (6, own_text.LENGTH)
    assert ids[::2, 0].tolist() == [teacher.config.bos_token_id] * 3


def test_blocks_alternate():
    joined = own_text.alternate([f"a{i}" for i in range(128)], [f"b{i}" for i in range(64)])
    assert joined[:6] == ["a0", "a1", "b0", "a2", "a3", "b1"]
    assert len(joined) == 192

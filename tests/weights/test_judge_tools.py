"""What judge_tools.py finds with the tools that are installed is what the README's table says.

The default run makes a case of two tools in the extra `test`; the slow one every case of every tool.
"""

from __future__ import annotations

import judge_tools
import pytest
from judges import base

from mlx_gptoss.weights.formats import FORMATS

BY_DEFAULT = {
    "mlx_lm": "mlx-3bit-g64",
    "gguf": "gguf-tq1_0",
}  # of the extra, those that do not import torch to quantize
README = judge_tools.README.read_text("utf-8")


def check(name, cases, folder):
    if judge_tools.load_judge(name).version() is None:
        pytest.skip(f"{judge_tools.load_judge(name).NAME} is not installed")
    base.write_source(folder / "source")
    found = list(judge_tools.judge_tool(name, folder, cases))
    assert not [each for each in found if isinstance(each, str)]
    assert judge_tools.disagreements(README, found) == []
    return found


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_the_table_is_what_a_tool_gives(name, tmp_path):
    (found,) = check(name, [BY_DEFAULT[name]], tmp_path)
    assert found.cells[0].startswith("`")


@pytest.mark.slow
@pytest.mark.parametrize("name", judge_tools.JUDGES)
def test_the_table_is_what_every_tool_gives(name, tmp_path):
    check(name, judge_tools.chosen_cases([name], False)[name], tmp_path)


def test_the_table_has_every_row_and_every_format():
    table = judge_tools.read_table(README)
    expected = {(row.kind, judge_tools.load_judge(name).NAME) for name, row in judge_tools.rows()}
    assert set(table) == expected
    opened = {found.cells[0].strip("`") for found in table.values()}
    if judge_tools.NOT_TRIED not in opened:
        assert {name for fmt in FORMATS for name in fmt.recipes} - opened == set()
    assert not [cell for found in table.values() for cell in found.cells if cell.startswith(judge_tools.WRONG)]


def found(kind, cells, tool="ggml", version="1.2"):
    return judge_tools.Found(kind, tool, version, cells)


GOOD = ("`gguf`", "all bits", "as stored", "as stored", "no")


def test_a_row_is_replaced_and_the_others_are_kept():
    changed = ("`gguf`", "yes, to rounding", *GOOD[2:])
    text = judge_tools.updated(README, [found("MXFP4", changed)], False)
    table, old = judge_tools.read_table(text), judge_tools.read_table(README)
    assert table["MXFP4", "ggml"] == found("MXFP4", changed)
    assert {k: v for k, v in table.items() if k != ("MXFP4", "ggml")} == {
        k: v for k, v in old.items() if k != ("MXFP4", "ggml")
    }
    assert text.partition(judge_tools.BEGIN)[0] == README.partition(judge_tools.BEGIN)[0]
    assert text.partition(judge_tools.END)[2] == README.partition(judge_tools.END)[2]


def test_rows_of_tools_that_are_not_installed_are_marked():
    text = judge_tools.updated(README, [found("MXFP4", GOOD)], True)
    assert "| MXFP4 | ggml 1.2 |" in text
    assert text.count(judge_tools.LAST_TRIED) == len(judge_tools.read_table(README)) - 1
    assert judge_tools.read_table(text).keys() == judge_tools.read_table(README).keys()
    again = judge_tools.updated(text, [found("MXFP4", GOOD)], True)
    assert again == text


def test_versions_do_not_disagree_and_cells_do():
    table = judge_tools.read_table(README)
    known = table["MXFP4", "ggml"]
    assert judge_tools.disagreements(README, [found("MXFP4", known.cells, version="99")]) == []
    (line,) = judge_tools.disagreements(README, [found("MXFP4", (*known.cells[:4], "perhaps"))])
    assert "perhaps" in line
    (line,) = judge_tools.disagreements(README, [found("nothing", known.cells)])
    assert "no row" in line


def test_wrong_values_and_wrong_logits_are_seen(tmp_path):
    """The judge itself: a checkpoint whose decoding is said to be another."""
    source = base.write_source(tmp_path / "source")
    weights = base.by_parameter(base.load(source))
    assert judge_tools.judge_checkpoint(source, weights, source) == (
        "`bf16`",
        "all bits",
        "as stored",
        "as stored",
        "yes",
    )
    name = "layers.1.experts.up.weight"
    weights[name] = weights[name][::-1]
    cells = judge_tools.judge_checkpoint(source, weights, source)
    assert cells[1].startswith("no: ") and cells[2].startswith("wrong: ") and cells[3].startswith("wrong: ")
    config = source / "config.json"
    config.write_text(config.read_text().replace("gpt_oss", "other"))
    assert judge_tools.judge_checkpoint(source, weights, source)[0].startswith("refused: ")


def test_an_exception_is_a_row_that_fails_the_run(tmp_path, monkeypatch, capsys):
    """One that a backend raises, and one while a checkpoint is opened."""
    source = base.write_source(tmp_path / "source")
    weights = base.by_parameter(base.load(source))

    def broken(*words):
        raise IndexError("a | b")

    monkeypatch.setattr(judge_tools, "run", broken)
    cells = judge_tools.judge_checkpoint(source, weights, source)
    assert cells == ("`bf16`", "all bits", "failed: IndexError: a / b", "failed: IndexError: a / b", "yes")
    monkeypatch.setattr(judge_tools.checkpoint, "open", broken)
    assert judge_tools.judge_checkpoint(source, weights, source)[0] == "failed: IndexError: a / b"
    assert "Traceback" in capsys.readouterr().err

    rows = [found("MXFP4", cells), found("TQ1_0", GOOD)]
    readme = tmp_path / "README.md"
    readme.write_text(README, "utf-8")
    monkeypatch.setattr(judge_tools, "README", readme)
    monkeypatch.setattr(judge_tools, "judge_tool", lambda *words: iter(rows))
    monkeypatch.setattr("sys.argv", ["judge_tools.py", "--only", "ggml"])
    assert judge_tools.main() == 1
    table, old = judge_tools.read_table(readme.read_text("utf-8")), judge_tools.read_table(README)
    assert table["MXFP4", "ggml"].cells == cells and table["TQ1_0", "ggml"].cells == GOOD
    assert {k: v for k, v in table.items() if k[1] != "ggml"} == {k: v for k, v in old.items() if k[1] != "ggml"}

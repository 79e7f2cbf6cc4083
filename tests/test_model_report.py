"""The command that prints the traffic model: its labels, its selection and its errors."""

import json
from pathlib import Path

import pytest

import model_report
from support import by_default

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "modelled"
SMALL = ["--gpu", "h100", "--model", "square", "--tokens", "8192", "--dropout", "0.1"]
DECODER = ["--decoder", "--gpu", "h100", "--dropout", "0.1"]
# The commands of the committed files.
COMMITTED = {
    "layers.txt": [],
    "ranks.txt": [
        *("--gpu", "h100", "--model", "square", "llama3-8b", "--tokens", "8192"),
        *("--rank", "8", "16", "32", "64", "128", "256"),
    ],
    "overhead.txt": [
        *("--overhead", "--gpu", "a100", "h100", "h200", "rtx4090", "mi300x"),
        *("--model", "square", "--tokens", "8192", "--dropout", "0.1", "--rank", "16", "64", "128"),
    ],
    "decoder.txt": ["--decoder"],
    "experts.txt": ["--experts"],
}


@pytest.mark.parametrize("name", by_default(["decoder.txt", "experts.txt"], COMMITTED))
def test_the_committed_reports_are_what_is_printed(name, capsys):
    assert model_report.main(COMMITTED[name]) == 0
    assert capsys.readouterr().out == (RESULTS / name).read_text(), (
        f"python benchmarks/model_report.py {' '.join(COMMITTED[name])} > {RESULTS / name}"
    )


def test_experts_stay_within_their_limit(capsys):
    """Of PEFT's bytes beyond the frozen products; the project's limits for one layer of Qwen3.

    By the kernels that add to the vendor's product, and with that product in ``lora_gemm``.
    """
    assert model_report.main(["--experts", "--tokens", "4096"]) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if "qwen3" in line)
    assert float(row[-3]) <= 0.30
    assert float(row[-1]) <= 0.16


def test_a_step_on_an_h100_stays_within_its_passes_and_launches(capsys):
    """With Triton's GEMM: 3.5 passes over x and 8 launches at most."""
    model_report.main([*SMALL, "--overhead"])
    rows = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in rows if line.startswith("4096") and "split" in line)
    at = row.index("split")
    assert float(row[at + 1]) <= 3.5
    assert int(row[at + 2]) <= 8


def test_every_figure_is_called_modelled(capsys):
    model_report.main(SMALL)
    title, groups, _, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert title == "modelled: H100 SXM, square, rank 16, dropout 0.1"
    assert groups.split() == [
        "modelled",
        "thin",
        "bytes",
        "modelled",
        "GEMM",
        "GiB",
        "modelled",
        "time",
    ]
    assert len(rows) == 3


def test_rows_outside_of_validity_are_marked(capsys):
    """M=8192: x is 64, 80 and 128 MiB; the model needs 75 (1.5 times the H100's 50 MiB L2)."""
    model_report.main(SMALL)
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert ["*" in row for row in rows] == [True, False, False]


def test_no_time_where_triton_has_no_published_speed(capsys):
    model_report.main([*SMALL, "--gpu", "b200"])
    cells = capsys.readouterr().out.splitlines()[-1].split()
    assert cells.count("-") == len(model_report.TRITON)


def test_json_has_the_rows_unrounded(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert model_report.main([*SMALL, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["K"] for row in rows] == [4096, 5120, 8192]
    ours, eager = (rows[0]["modelled"][name]["thin_bytes"] for name in ("split", "eager"))
    assert f"{ours / eager:.3f}" in capsys.readouterr().out.splitlines()[-3].split()
    assert set(rows[0]["modelled"]) == {"frozen", *model_report.peer_traffic.PEERS} | {
        *model_report.OURS,
        "auto",
    }


# part of Llama-3-8B's layer, its most bytes, as a ratio to the separate layers'
SHARED = [("q, k, v", 0.53), ("activation", 0.65), ("layer", 0.72)]


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case[0])
def test_a_decoder_layer_together_stays_within_its_bytes(case, tmp_path, capsys):
    """On an H100 with the strategies that "auto" selects; the printed ratio is the same."""
    name, most = case
    file = tmp_path / "rows.json"
    model_report.main([*DECODER, "--json", str(file)])
    rows = [row for row in json.loads(file.read_text()) if row["part"] == name]
    assert [row["strategies"] for row in rows] == ["auto", "split"]
    together, apart = (rows[0]["modelled"][kind]["thin_bytes"] for kind in ("together", "apart"))
    assert together / apart <= most
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith(f"auto      {name} "))
    assert f"{together / apart:.3f}" in line.split()


def test_a_decoder_layer_is_the_sum_of_its_parts(tmp_path):
    file = tmp_path / "rows.json"
    model_report.main([*DECODER, "--json", str(file)])
    *parts, layer = json.loads(file.read_text())[:6]
    for kind, whole in layer["modelled"].items():
        of_parts = [part["modelled"][kind] for part in parts]
        assert sum(p["thin_bytes"] for p in of_parts) == whole["thin_bytes"]
        assert sum(len(p["launches"]) for p in of_parts) == len(whole["launches"])
        seconds = sum(p["seconds_beyond"] for p in of_parts)
        assert seconds == pytest.approx(whole["seconds_beyond"])


def test_no_time_of_a_decoder_layer_where_triton_has_no_published_speed(capsys):
    model_report.main([*DECODER, "--gpu", "mi300x"])
    rows = capsys.readouterr().out.splitlines()
    for strategies, missing in (("auto", 0), ("split", 3)):
        cells = [row.split().count("-") for row in rows if row.startswith(f"{strategies}  ")]
        assert cells == 6 * [missing]


def test_layers_that_are_no_decoders_are_refused(capsys):
    with pytest.raises(SystemExit):
        model_report.main(["--decoder", "--model", "square"])
    assert "square has no decoder layers" in capsys.readouterr().err


# option, value, what the error lists or expects
ERRORS = [
    ("--gpu", "h1", "'h100'"),
    ("--model", "llama", "'llama3-8b'"),
    ("--rank", "0", "expected a positive integer, got '0'"),
    ("--tokens", "many", "expected a positive integer, got 'many'"),
    ("--dropout", "1", "expected a probability in [0, 1), got '1'"),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case[0])
def test_a_bad_selection_is_an_error_that_says_what_there_is(case, capsys):
    option, value, message = case
    with pytest.raises(SystemExit) as stopped:
        model_report.main([option, value])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    assert model_report.main([*SMALL, "--json", str(tmp_path / "missing" / "rows.json")]) == 2
    assert "expected a file that can be written" in capsys.readouterr().err

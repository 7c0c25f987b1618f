"""The command: one safe page with the right numbers, whatever state the runs are in; mistakes in one line."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nvlm.commands.report import main
from nvlm.report.answers import read_answers
from nvlm.report.runs import folders_of
from nvlm.runs.place import split_paths
from tests.sweep_folders import Made, answered, with_seed, write_run

HOSTILE = "<script>alert(1)</script>&\"'$x_1^2$ | `a` {{ 7 * 7 }}"
RIGHT = {("decoder", "none"): 10, ("decoder", "1d"): 30, ("hybrid", "none"): 20, ("hybrid", "1d"): 40}  # of 40


class Page(HTMLParser):
    """What a browser would load or run, and the page's text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded, self.tags, self.text = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        names = ("src", "href", "data", "action", "srcset", "xlink:href")
        self.loaded += [values[name] for name in names if name in values]
        self.loaded += [name for name in values if name.startswith("on")]

    def handle_data(self, data):
        self.text += f"{data} "


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, configured):
    """Two architectures, two tags, two seeds, and runs that failed, diverged, stopped or were cut."""
    root = tmp_path_factory.mktemp("sweep")
    entries = []
    for (arch, tag), right in RIGHT.items():
        for seed in (1, 2):
            config = with_seed(configured(f"arch={arch}", f"tiling.tag={tag}", "data.heldout_records=4"), seed)
            folder = root / f"arch={arch},tiling.tag={tag},seed={seed}"
            flops = 1e12 if arch == "hybrid" else 2e12
            write_run(folder, config, Made(flops=flops, evaluated=(60,)), lines(right))
            entries.append(
                {
                    "folder": folder.name,
                    "overrides": folder.name.split(","),
                    "status": "done",
                    "reason": "",
                    "seconds": 1,
                }
            )
    config = configured("arch=hybrid", "tiling.tag=1d", "data.heldout_records=4")
    write_run(root / "stopped", with_seed(config, 3), Made(done=30, evaluated=(20,)))
    diverged = write_run(root / "diverged", with_seed(config, 4), Made(done=30, evaluated=()))
    edit(diverged / "metrics.jsonl", lambda row: row | ({"loss": None, "updated": False} if row["step"] > 15 else {}))
    cut = write_run(root / "cut", with_seed(config, 5), Made(done=40, evaluated=()))
    (cut / "metrics.jsonl").write_bytes((cut / "metrics.jsonl").read_bytes()[:-30])
    (root / "half").mkdir()
    (root / "half" / "config.yaml").write_text("a: 1\n")
    (root / "other").mkdir()
    entries.append({"folder": "gone", "overrides": ["seed=9"], "status": "failed", "reason": HOSTILE, "seconds": 1})
    (root / "sweep.json").write_text(json.dumps({"command": "train", "runs": entries}))
    return root


def lines(right: int) -> list[dict]:
    """Answers to 40 questions, of which the first `right` are right; the first has hostile texts."""
    rows = answered(Made(), 1, 1.0)
    rows = [row | {"answer": "7" if n < right else "1", "score": float(n < right)} for n, row in enumerate(rows)]
    return [row | ({"question": HOSTILE, "answer": HOSTILE} if n in (0, 25) else {}) for n, row in enumerate(rows)]


def edit(path, change):
    path.write_text("".join(json.dumps(change(json.loads(line))) + "\n" for line in path.read_text().splitlines()))


@pytest.fixture(scope="module")
def made(sweep, tmp_path_factory):
    """The report's files by name."""
    out = tmp_path_factory.mktemp("report")
    assert main([f"runs={sweep}", f"out={out}", f"title={HOSTILE}"]) == 0
    return {path.name: path.read_text() for path in out.iterdir()}


def test_it_writes_four_files(made):
    assert set(made) == {"report.html", "report.md", "report.csv", "cells.csv"}


def test_the_table_has_the_means(made):
    rows = list(csv.DictReader(made["cells.csv"].splitlines()))
    means = {(r["row"], r["column"]): float(r["mean"]) for r in rows if not r["category"] and not r["tiles"]}
    assert means == {
        ("NVLM-D", "no tag"): 0.25,
        ("NVLM-D", "1-D"): 0.75,
        ("NVLM-H", "no tag"): 0.5,
        ("NVLM-H", "1-D"): 1,
    }
    table = re.search(r'<table class="matrix">.*?</table>', made["report.html"], re.S)[0]
    assert re.findall(r"<b[^>]*>([\d.]+)</b>", table) == ["25.0", "75.0", "50.0", "100.0"]
    assert "| NVLM-D | 25.0 [" in made["report.md"]


def test_categories_and_tiles_split_the_scores(made):
    """Of ten questions of each of four kinds, whose kinds take turns, the first 30 of 40 are right."""
    rows = [r for r in csv.DictReader(made["cells.csv"].splitlines()) if (r["row"], r["column"]) == ("NVLM-D", "1-D")]
    kinds = {r["category"]: float(r["mean"]) for r in rows if r["category"]}
    assert kinds == {"tile": 0.8, "row": 0.8, "page": 0.7, "count": 0.7}
    tiles = {int(r["tiles"]): float(r["mean"]) for r in rows if r["tiles"]}
    assert set(tiles) == {1, 2, 3, 4, 5, 6} and tiles[1] == pytest.approx(5 / 7, abs=1e-6)


def test_differences_have_their_sign_and_their_base(made):
    table = made["report.md"].partition("By tile tag")[2]
    assert "| NVLM-D, 1-D | NVLM-D, no tag | +50.0 |" in table and "| 20 | 0 |" in table
    assert "| NVLM-H, no tag | NVLM-D, no tag | +25.0 |" in table


def test_the_page_loads_and_runs_nothing(made):
    page = Page(made["report.html"])
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert all(one.startswith(("#", "data:image/jpeg;base64,")) for one in page.loaded)
    assert not re.search(r"url\((?!#)|@import|https?://", made["report.html"])
    names = re.findall(r' id="([^"]*)"', made["report.html"])
    assert len(names) == len(set(names))
    assert set(re.findall(r"url\(#([^)]*)\)", made["report.html"])) <= set(names)


def test_texts_of_runs_stay_texts(made):
    text = Page(made["report.html"]).text
    assert text.count("<script>alert(1)</script>") >= 3  # the title, an answer, a reason
    assert "{{ 7 * 7 }}" in text and "49" not in re.findall(r"\b49\b", text)
    assert "<script" not in made["report.md"]


def test_what_does_not_count_is_told(made):
    text = " ".join(Page(made["report.html"]).text.split())
    assert "stopped unfinished : step 30 of 60" in text and "cut unfinished : step 39 of 60" in text
    assert "diverged diverged : no usable update" in text and "gone no run : failed: " in text
    assert "metrics.jsonl is damaged after step 39" in text and "2 of 5 runs" in text
    assert "half no run :" in text and "11 runs, 8 of them done" in text


def test_equal_flops_compare_less_samples_of_the_dearer(made):
    """NVLM-D takes twice the FLOPs of NVLM-H, and runs were scored at their end alone: so losses are compared."""
    text = " ".join(Page(made["report.html"]).text.split())
    samples, flops = text.partition("At equal samples")[2].partition("At equal FLOPs")[::2]
    assert samples.startswith(" score") and flops.startswith(" training loss")
    assert "60.0 TFLOP 60.0 TFLOP" in flops


def test_commands_and_commit(made):
    assert "python launch/train.py arch=decoder tiling.tag=none seed=1" in made["report.html"]
    assert "commit 0123456789ab" in made["report.html"]


def test_each_run_is_a_line_of_the_csv(made):
    rows = list(csv.DictReader(made["report.csv"].splitlines()))
    whole = [row for row in rows if not row["category"]]
    assert len(whole) == 11 and {row["status"] for row in rows} == {"done", "unfinished", "diverged"}
    done = next(row for row in whole if row["status"] == "done")
    assert (
        float(done["flops"]) == 60 * 2e12 and float(done["samples"]) == 60 * 32 and done["peak_memory_bytes"] == "3e+08"
    )


def test_a_sweep_without_scores_still_has_curves(tmp_path, configured, capsys):
    for seed in (1, 2):
        write_run(tmp_path / f"seed={seed}", with_seed(configured("arch=xattn"), seed), Made(evaluated=()))
    assert main([f"runs={tmp_path}", "show=0"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "No run has answered questions yet" in page and "<svg viewBox" in page and "NVLM-X" in page
    assert "2 runs: " in capsys.readouterr().out


def test_a_run_that_has_not_made_a_step_is_told(tmp_path, configured):
    folder = write_run(tmp_path / "run", with_seed(configured("arch=xattn"), 1), Made(done=0, evaluated=()))
    (folder / "metrics.jsonl").unlink()
    assert main([f"runs={folder}", f"out={tmp_path / 'out'}"]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "step 0 of 60" in page and "No run has logged a step" in page and not (folder / "report.html").exists()


def test_runs_that_were_asked_other_questions_are_paired_on_common_ones(tmp_path, configured):
    for arch, first in (("decoder", 0), ("xattn", 10)):
        config = with_seed(configured(f"arch={arch}"), 1)
        write_run(tmp_path / arch, config, Made(), lines(30)[first:])
    assert main([f"runs={tmp_path}", "show=0"]) == 0
    assert "were asked different questions" in (tmp_path / "report.html").read_text()


def test_scores_of_several_metrics_are_not_compared(tmp_path, configured):
    for arch, metric in (("decoder", "exact_match"), ("xattn", "exact_match"), ("hybrid", "anls")):
        folder = write_run(tmp_path / arch, with_seed(configured(f"arch={arch}"), 1), Made(), lines(30))
        score = folder / "evaluation/heldout/step_60/score.json"
        score.write_text(json.dumps(json.loads(score.read_text()) | {"metric": metric}))
    assert main([f"runs={tmp_path}", "show=0"]) == 0
    rows = list(csv.DictReader((tmp_path / "cells.csv").open()))
    found = {(row["task"], row["row"]) for row in rows}
    plain, similar = "heldout (exact_match)", "heldout (anls)"
    assert found == {(plain, "NVLM-D"), (plain, "NVLM-X"), (similar, "NVLM-H")}


def test_records_that_share_an_id_are_all_counted(tmp_path):
    (tmp_path / "a").write_text("".join(json.dumps(row | {"id": "q"}) + "\n" for row in lines(2)[:3]))
    found = read_answers(tmp_path / "a")
    assert [(name, one.score) for name, one in found.items()] == [("q", 1.0), ("q (2)", 1.0), ("q (3)", 0.0)]


def test_damaged_evaluations_are_told_and_do_not_count(tmp_path, configured):
    config = configured("arch=xattn")
    for seed, damage in ((1, "cut"), (2, "no score"), (3, "fine"), (4, "nan"), (5, "deep"), (6, "huge")):
        folder = write_run(tmp_path / f"{seed}", with_seed(config, seed), Made()) / "evaluation/heldout/step_60"
        if damage == "cut":
            (folder / "answers.jsonl").write_bytes((folder / "answers.jsonl").read_bytes()[:-20])
        if damage == "no score":
            (folder / "score.json").unlink()
        if damage == "nan":
            edit(folder / "answers.jsonl", lambda row: row | {"score": float("nan")})
        if damage == "deep":
            (folder / "score.json").write_text("[" * 100_000)
        if damage == "huge":
            edit(folder / "answers.jsonl", lambda row: row | {"score": 10**400})
    assert main([f"runs={tmp_path}", "show=0"]) == 0
    page = Page((tmp_path / "report.html").read_text()).text
    assert page.count("cannot be read") == 4 and page.count("has not ended") == 1 and "1 of 6 runs" in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "runs: got nothing"),
        (["runs=nowhere"], "runs: got 'nowhere'"),
        (["runs=.", "depth=3"], "command line: got 'depth=3'"),
        (["runs=.", "show=many"], "show: got 'many'"),
        (["runs=empty"], "no run)"),
    ],
)
def test_mistakes_are_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "Fix: " in error


def test_names_with_commas_are_no_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("arch=a,seed=1", "arch=a,seed=2", "b"):
        (tmp_path / name).mkdir()
    assert split_paths("arch=a,seed=1,b", folders_of) == ["arch=a,seed=1", "b"]
    assert split_paths("arch=a,seed=*,b", folders_of) == ["arch=a,seed=*", "b"]
    assert split_paths("c,b", folders_of) == ["c", "b"]


def test_pictures_of_heldout_pages(tmp_path, configured):
    """The page on which architectures disagree is drawn again from the run's configuration, with its tags. Its number
    of tiles is that of the largest tiling, which is drawn."""
    pytest.importorskip("sklearn")
    for arch, answer, tiles in (("decoder", "0", 0), ("xattn", "7", 2)):
        config = with_seed(configured(f"arch={arch}", "data.heldout_records=4"), 1)
        rows = [{"id": f"heldout-1-{n}", "question": "?", "answer": answer, "references": ["7"], "tiles": tiles,
                 "score": float(answer == "7"), "category": "tile"} for n in range(4)]  # fmt: skip
        write_run(tmp_path / arch, replace(config), Made(), rows)
    assert main([f"runs={tmp_path}", "show=3"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") == 3 and "&lt;tile_1&gt;" in page
    assert page.count("· 2 tiles ·") == 3


MEASURE = """<script>
const all = document.documentElement;
parent.postMessage([all.scrollWidth, all.clientWidth, document.querySelectorAll("svg").length].join(" "), "*");
</script></body>"""
FRAME = """<!doctype html><script>onmessage = event => { document.title = event.data; };</script>
<iframe srcdoc="PAGE" style="width: WIDTHpx; height: 900px; border: 0"></iframe>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1240])
def test_a_browser_shows_it_within_its_width(made, tmp_path, width):
    """Only tables scroll sideways, each by itself: the page is not wider than the window, also on a phone. A frame has
    the width, because Chromium's own windows are never as narrow."""
    page = html.escape(made["report.html"].replace("</body>", MEASURE))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", page))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1300,1000", "--dump-dom", (tmp_path / "frame.html").as_uri()]  # fmt: skip
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    needed, had, charts = map(int, re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown).groups())
    assert needed == had and width - 20 <= had <= width and charts > 10


def test_looks_in_a_run_s_folder_are_shown(tmp_path, configured):
    """Two by one tiles and the thumbnail; the second layer's gate is closed, so that only the first one counts."""
    folder = write_run(tmp_path / "run", with_seed(configured("arch=xattn"), 1), Made())
    shares, rest = [[[0.7, 0.2, 0.1]], [[0.0, 0.0, 1.0]]], [[[0.0] * 3]] * 2
    values = {
        "version": 1, "arch": "xattn", "tokens": [{"text": HOSTILE, "id": 1, "probability": 0.5}], "grids": [[2, 1]],
        "tiles": [{"image": 0, "tile": n, "tag": f"<tile_{n}>"} for n in range(3)], "layers": [2, 4],
        "gates": [0.5, 0.0],
        "attention": shares, "tags": rest, "strength": rest,
        "effect": [[1e9, 0.0, -0.5]], "question": "Why?", "answer": "x",
        "pictures": ["data:image/jpeg;base64,AAAA", "https://example.org/x.jpg", "javascript:alert(1)"],
    }  # fmt: skip
    (folder / "looks").mkdir()
    (folder / "looks" / "one.looks.json").write_text(json.dumps(values))
    (folder / "looks" / "two.looks.json").write_text('{"version": 1}')
    assert main([f"runs={tmp_path}", "show=0"]) == 0
    page = (tmp_path / "report.html").read_text()
    squares = re.findall(r'--share: (\d+)%; grid-(area: 1 / \d|column: 1)"', page)
    assert squares == [("70", "area: 1 / 1"), ("20", "area: 1 / 2"), ("10", "column: 1")]
    assert re.findall(r"--lost: (\d+)%", page) == ["100", "0", "0"]
    assert "data:image/jpeg;base64,AAAA" in page and "example.org" not in page and "javascript:" not in page
    assert "<script>" not in page and "two.looks.json cannot be read" in page

"""The command: one safe file, a report with the same numbers, exit statuses, mistakes in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from nvlm.commands.inspect import main
from tests.unit.inspect.records import HOSTILE, arguments

ARCHITECTURES = ("decoder", "xattn", "hybrid")


class Page(HTMLParser):
    """What a browser would load or run."""

    def __init__(self, page):
        super().__init__()
        self.loaded, self.tags, self.streams, self.depth = [], [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.loaded += [
            values[name] for name in ("src", "href", "data", "action", "poster", "srcset") if name in values
        ]
        self.loaded += [name for name in values if name.startswith("on")]
        if tag == "div":
            self.depth += 1
            if values.get("class") == "stream":
                self.streams.append("")
                self.within = self.depth

    def handle_endtag(self, tag):
        if tag == "div":
            self.within = None if getattr(self, "within", None) == self.depth else getattr(self, "within", None)
            self.depth -= 1

    def handle_data(self, data):
        if getattr(self, "within", None):
            self.streams[-1] += data


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_page_is_one_file_in_which_the_data_is_only_text(folder, tmp_path, arch):
    out = tmp_path / "page"
    assert main([*arguments(folder, arch, "max_bad=1"), f"out={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["data.html", "report.json"]
    page = (out / "data.html").read_text(encoding="utf-8")
    read = Page(page)
    assert all(place.startswith(("data:image/jpeg;base64,", "#")) for place in read.loaded)
    assert "script" not in read.tags and not re.search(r"@import|url\(|https?:", page)
    assert not re.search(r"javascript:", page)
    hostile = [text for text in read.streams if HOSTILE in text]
    assert len(hostile) == 1 and hostile[0].count(HOSTILE) == 2  # question and answer, exactly as they are
    assert len(page) < 200_000
    assert (">Who sees which tile<" in page) == (arch != "decoder")


def test_names_are_only_text_too(tmp_path, capsys):
    line = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    file = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    file.write_text(json.dumps(line) + "\n" + json.dumps(line | {"images": ["<script>.png"]}))
    assert main(["arch=xattn", "data=jsonl", f"data.path={file}", "data.workers=0", f"out={tmp_path}"]) == 1
    read = Page((tmp_path / "data.html").read_text())
    assert "script" not in read.tags and "img" not in read.tags and not read.loaded[0].startswith("x")
    assert "<script>.png: no such image" in capsys.readouterr().out


def test_the_report_has_the_same_numbers(folder, tmp_path):
    assert main([*arguments(folder, "hybrid"), f"out={tmp_path}", "records=4"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    (source,) = report["sources"].values()
    numbers = (
        "records bad too_long fewer_tiles cut without_images images tiles tiles_lost text learned stream keys".split()
    )
    assert set(source) == {*numbers, "spread", "grids", "reasons", "faults"}
    assert all(isinstance(source[name], int) for name in numbers)
    assert set(source["spread"]) == {"length", "text", "keys", "tiles", "width", "height"}
    assert all(set(values) in ({"min", "p50", "p90", "p99", "max"}, set()) for values in source["spread"].values())
    assert all(set(fault) == {"record", "reason"} for fault in source["faults"])
    assert source["records"] == 4 and report["sampled"] and not report["passed"] and report["refused"] == [""]
    assert set(report) == {
        *(
            "version",
            "name",
            "arch",
            "tokenizer",
            "seq_length",
            "cross_length",
            "max_tiles",
            "tag",
            "sampled",
            "decoded",
        ),
        *("max_bad", "passed", "refused", "sources", "step"),
    }
    assert set(report["step"]) == {"replicas", "rows", "skipped", "padding"}


def test_a_blend_is_judged_by_source(folder, tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    good.write_text((folder / "records.jsonl").read_text().splitlines()[2] + "\n")
    files = {"a": folder / "records.jsonl", "b": good}
    sources = ", ".join(f"{name}: {{source: jsonl, path: {file}, weight: 1}}" for name, file in files.items())
    words = ["arch=decoder", "data=blend", f"data.sources={{{sources}}}", "data.workers=0", f"out={tmp_path}"]
    assert main([*words, "max_bad=0.4"]) == 1
    said = capsys.readouterr().out
    assert "a: 3 of 6 records are bad, more than max_bad=0.4" in said and "a/records.jsonl:4" in said
    assert json.loads((tmp_path / "report.json").read_text())["refused"] == ["a"]
    assert main([*words, "max_bad=0.5"]) == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["data.path=nowhere.jsonl"], "data.path: got"),
        (["pixels=yes"], "pixels: got 'yes', expected true or false. Fix: pixels=true"),
        (["records=0"], "records: got '0', expected a whole number, at least 1. Fix: records=1000"),
        (["show=101"], "show: got '101', expected a whole number, 0 to 100. Fix: show=12"),
        (["max_bad=nan"], "max_bad: got 'nan', expected a share from 0 to 1. Fix: max_bad=0.01"),
        (["recods=4"], "recods: got a key that does not exist"),
        (
            ["out=records.jsonl"],
            "out: got records.jsonl: File exists, expected a folder that can be written. Fix: out=DIR",
        ),
        (["out=/proc/none"], "out: got /proc/none: No such file or directory, expected a folder that can be written"),
        (["out=records.jsonl/x/y"], "out: got records.jsonl/x/y: Not a directory, expected a folder"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(folder, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(folder)
    assert main([*arguments(folder), *words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {reason}") and "\n" not in said


def test_mistakes_are_found_without_torch():
    code = "import sys; from nvlm.commands.inspect import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

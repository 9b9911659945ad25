"""The page of results and README.md's table are what benchmark/page.py makes of the CSVs."""

import re

import pytest
from conftest import ROOT

pytest.importorskip("rliable")  # the extra
import page

TEXTS = ("README.md", "benchmark/results/README.md")


def test_the_committed_numbers_are_those_of_the_csvs(tmp_path):
    page.main(page.Options(output=tmp_path))
    for name in TEXTS:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run benchmark/page.py"
    figures = re.findall(r"\]\((\w+\.png)\)", (ROOT / TEXTS[1]).read_text())
    assert figures
    for figure in figures:
        assert (tmp_path / "benchmark/results" / figure).stat().st_size > 10_000, figure

"""The pages: links lead somewhere, messages that they explain are printed somewhere, and they build as a site."""

import json
import re
import subprocess
import sys

import pytest
from faults import report

OF_OTHERS = {"CUDA out of memory"}  # messages of PyTorch


def pages(root):
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def test_links_lead_somewhere(root):
    for page in pages(root):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#")):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_every_page_is_listed_in_the_site(root):
    listed = (root / "docs" / "index.md").read_text()
    for page in (root / "docs").glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", listed, re.M), page


def test_the_messages_that_are_explained_are_printed(root):
    """Each text in a first column stands in the code, but for the parts that differ from case to case."""
    code = "".join(path.read_text() for path in (root / "mutor_vision").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that go on in the next line
    page = (root / "docs" / "troubleshooting.md").read_text()
    messages = [text for row in re.findall(r"^\| (`.*?) \|", page, re.M) for text in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 12
    for message in set(messages) - OF_OTHERS:
        parts = re.split(r"\.\.\.|'x'|\b\d[\d.]*\b|\bnan\b|\(.*?\)|'|->", message)
        for part in (part.strip(" ;:,") for part in parts):
            assert len(part) < 5 or part in code, f"'{part}' of '{message}' is nowhere in the code"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(root, tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "docs", tmp_path], cwd=root,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Transformer" in (tmp_path / "api.html").read_text()


def test_the_page_of_promises_is_made_of_what_the_tests_found(root):
    scores = json.loads(report.SCORES.read_text())
    assert (root / "docs" / "reliability.md").read_text() == report.page(scores)
    for title, (_, test) in report.PROMISES.items():
        assert title not in scores or (root / "tests" / test).is_file(), test


def test_a_promise_that_is_not_listed_is_told():
    assert report.collected(['{"promise": "x", "what": "a", "held": 1, "tried": 2}'] * 2) == {"x": {"a": [2, 4]}}
    with pytest.raises(SystemExit, match="'x' is no promise"):
        report.page({"x": {"a": [2, 4]}})

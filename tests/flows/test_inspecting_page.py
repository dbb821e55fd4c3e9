"""The code of docs/inspecting.md runs as it stands, in a project that has finished a run, without Surgeon."""

import os
import re
import subprocess
import sys

from tests.flows.project import ROOT, Project, environment

PAGE = (ROOT / "docs" / "inspecting.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_code_of_the_page(finished: Project) -> None:
    assert len(BLOCKS) >= 6
    code = "\n".join(BLOCKS)
    assert "surgeon" not in "".join(line for line in code.splitlines() if "import" in line)
    before = finished.contents()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=finished.root, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "['costs', 'input-factors', 'output-factors', 'spectra', 'update']" in done.stdout
    assert "update [0.01, 0.1]" in done.stdout
    assert finished.contents() == before


def test_what_the_page_links_to_is_there() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / name).is_file(), name
    assert os.path.getsize(ROOT / "docs" / "inspecting.png") < 200_000  # noqa: PTH202

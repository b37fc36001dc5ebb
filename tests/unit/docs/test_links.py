"""Each relative link in the repository's pages leads to a file and to a heading of that file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
# These pages exist only on the site; `mkdocs build --strict` checks links to them
# (tests/unit/docs/test_site.py).
MADE_BY_THE_SITE = {ROOT / "docs" / "reference" / f"{name}.md" for name in ("fields", "commands", "api")}

NAMING = ("megatron_evomoe", "tools", "examples", "benchmarks", "tests")


def prose(page: Path) -> str:
    """The text of a page without its code."""
    text = re.sub(r"^(```|~~~).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda code: code.group().replace("(", "").replace("[", ""), text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site generate from a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(slug)
    return found


def broken(page: Path) -> list[str]:
    """The links of a page whose target is missing."""
    out = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file in MADE_BY_THE_SITE:
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            out.append(target)
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_pages_that_the_code_names_exist():
    named = {
        (name, file.relative_to(ROOT))
        for folder in NAMING
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".sh", ".yaml", ".sbatch")
        for name in re.findall(r"(?<![\w/])docs/[a-z/_-]+\.md", file.read_text(encoding="utf-8"))
    }
    assert named
    assert [f"{file}: {name}" for name, file in sorted(named) if not (ROOT / name).exists()] == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# One heading: `code`, and more\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#one-heading-code-and-more) [b](other.md#two) [c](gone.md) `[d](x.md)`\n")
    assert broken(page) == ["other.md#two", "gone.md"]


def test_readme_is_short_and_the_guide_has_its_configuration():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    guide = (ROOT / "docs" / "guides" / "your-data.md").read_text(encoding="utf-8")
    of_readme, of_guide = (re.search(r"```yaml\n(# run.*?)```", text, re.S)[1] for text in (readme, guide))
    assert of_guide == of_readme.replace(" (docs/models.md)", "")


def test_commands_of_the_guides_are_those_of_the_readme():
    """The guides use only commands that the README has too.

    tests/integration/test_readme.py runs the commands of the README.
    """
    readme = set(re.findall(r"^    (\S.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    known = {
        "python tools/convert_from_hf.py --language-model models/llm --vision-model models/tower "
        "--output imported",
        "python -m megatron_evomoe plan --config run.yaml --nnodes 2 --gpus-per-node 8 --gpu-memory 80",
    }
    for guide in sorted((ROOT / "docs" / "guides").glob("*.md")):
        for command in re.findall(r"^    (\S.*)$", guide.read_text(encoding="utf-8"), re.M):
            assert command in readme | known, f"{guide.name}: {command}"

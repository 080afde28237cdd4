"""The README and the pages of the site are short, linked and complete; mkdocs itself is not needed."""

import re

import pytest
from pages import ROOT, find_pages, read_commands, read_prose

import lightning_rprop

PAGES = find_pages()
MOST_WORDS = 700  # two screens of prose: a desktop screen shows about 350 words


def anchors(page):
    """Return the anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", read_prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES[1:])
def test_page_has_at_most_two_screens_of_prose(page):
    lines = [line for line in read_prose(page).splitlines() if not line.startswith(("|", "![", ":::"))]
    assert len(" ".join(lines).split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_resolve(page):
    prose = re.sub(r"`[^`\n]*`", "", read_prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    nav = re.search(r"^nav:\n((?: .*\n)+)", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)[1]
    listed = [f"docs/{name}" for name in re.findall(r": (\S+\.md)$", nav, flags=re.MULTILINE)]
    assert len(listed) == len(set(listed))
    assert set(PAGES) - set(listed) == {"README.md"}


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: lightning_rprop\.(\S+)$", text, flags=re.MULTILINE)
    names = {*lightning_rprop.__all__, "optim.rprop.rprop", "monitor.plot_run", "monitor.plot.plot_series"} - {
        "__version__"
    }
    assert sorted(listed) == sorted(names)


def test_every_benchmark_is_on_its_page():
    programs = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    commands = {*read_commands("docs/benchmarks.md"), *read_commands("docs/profile.md")}
    assert len(programs) > 5
    assert [path.stem for path in programs if f"python -m benchmarks.{path.stem}" not in commands] == []

"""docs/cli.md is what the code says; every command has its page; flags in the docs exist."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from ensemblekit.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/commands"
GENERAL = ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?<!-)\b")
CALL = re.compile(r"(?:^|[ `$])ensemblekit\s+(?:-[vq]\s+)*([a-z]+)\b(.*)")
CODE = re.compile(r"`([^`\n]+)`")
# Of other tools, in the same pages.
OTHERS = {
    "--nproc-per-node",  # torchrun
    "--model-repository",  # tritonserver
    "--force-reinstall",  # pip
    "--seed", "--out",  # the demo's training script
}  # fmt: skip


def flags_of(command: click.Command) -> set[str]:
    found = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return {name for name in found if name.startswith("--")} | {"--help"}


FLAGS = {name: flags_of(import_module(module).command) for name, (module, _) in COMMANDS.items()}
EVERYWHERE = flags_of(cli)


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, and what stands between backticks; a continued line is one line."""
    fenced = False
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line
        else:
            yield from CODE.findall(line)


def unknown(text: str, command: str | None) -> list[str]:
    """Flags that are none: of the command that a line calls, else of the page's, else of any."""
    wrong = []
    for line in code(text):
        call = CALL.search(line)
        name = call[1] if call and call[1] in COMMANDS else command
        named = FLAGS[name] if name else set[str]().union(*FLAGS.values())
        flags = set(FLAG.findall(line.partition("  #")[0]))
        wrong += [f"{flag}: {line}" for flag in flags - named - EVERYWHERE - OTHERS]
    return wrong


def test_the_reference_is_up_to_date() -> None:
    written = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    made = runpy.run_path(str(ROOT / "docs/make_cli.py"))["reference"]()
    assert written == made, "docs/cli.md is out of date; run: make docs (python docs/make_cli.py)"


def test_every_option_is_in_the_reference() -> None:
    """The generator could leave something out, and both sides of the test above with it."""
    sections = re.split(r"^## ", (ROOT / "docs/cli.md").read_text(), flags=re.MULTILINE)
    for name in COMMANDS:
        [section] = [text for text in sections if text.startswith(f"ensemblekit {name}\n")]
        for flag in FLAGS[name] - {"--help"}:
            assert re.search(rf"^\| `[^`]*{flag}\b", section, re.MULTILINE), (name, flag)


def test_every_command_has_its_page() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md")) == sorted(COMMANDS)
    readme = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"docs/commands/{name}.md" not in readme] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# ensemblekit {name}\n")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert {"Examples", "Next", "Exit codes"} <= set(titles)
    assert f"](../cli.md#ensemblekit-{name})" in text
    assert unknown(text, name) == []


@pytest.mark.parametrize("name", GENERAL)
def test_flags_elsewhere(name: str) -> None:
    assert unknown((ROOT / name).read_text(encoding="utf-8"), None) == []


def test_a_flag_that_is_none_is_found() -> None:
    text = "    ensemblekit average x --kk 3\n\n`ensemblekit bench --bn x` and `--halflife`"
    assert [line.partition(":")[0] for line in unknown(text, "average")] == [
        "--kk",
        "--bn",
        "--halflife",
    ]


def test_every_rule_is_on_the_page_of_average() -> None:
    from ensemblekit import averaging

    text = (PAGES / "average.md").read_text(encoding="utf-8")
    for rule in averaging.RULES:
        assert f"`{rule}`" in text
    for option in averaging.options().values():
        assert f"`{option.flag}`" in text


@pytest.mark.parametrize(
    "page", sorted([*PAGES.glob("*.md"), ROOT / "docs/cli.md"]), ids=lambda page: page.name
)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", t.lower().replace(" ", "-")) for t in titles}

"""For mkdocs: adds files from outside docs/ to the site, and makes links lead where they lead on disk."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: Pages at the site's root, and files to read beside them.
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "deltaweights/license/table.py")
EXAMPLES = tuple(sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/*.py")))

_LINK = re.compile(r"(?<=\]\()[^)\s#]+(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in OUTSIDE + EXAMPLES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In the site, what is in docs/ lies at the root, and so does everything from outside."""
    here = page.file.src_uri if page.file.src_uri in OUTSIDE else f"docs/{page.file.src_uri}"

    def link(found: re.Match[str]) -> str:
        if re.match(r"\w+:", found[0]):
            return found[0]
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[0])).removeprefix("docs/")
        return posixpath.relpath(linked, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(link, markdown)

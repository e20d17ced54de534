"""Pages of the site that are files of the project's root, and links that work in the site and in a clone.

MkDocs calls these functions (mkdocs.yml). README.md becomes the first page. A link to a file that is not a
page, such as source code, is shown as the file's name.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root => names of their pages."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at pages of the site."""
    folder = "" if page.file.src_uri in PAGES.values() else "docs"

    def linked(match: re.Match[str]) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = PAGES.get(path) or path.removeprefix("docs/")
        is_page = files.get_file_from_path(uri) is not None or not (ROOT / path).exists()
        return f"{mark}[{text}]({uri}{anchor})" if is_page else text

    return LINK.sub(linked, markdown)

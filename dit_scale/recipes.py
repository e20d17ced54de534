"""The recipes that ship with the package, by name.

`dit_scale/configs` is a link to the project's `configs/`; an installed package holds the files themselves.
"""

import difflib
from pathlib import Path

from dit_scale.errors import ConfigError

FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
    """Names of all recipes, in order: `dit_xl2_256` is configs/dit_xl2_256.yaml."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name_or_path: str | Path) -> Path:
    """The file of a recipe's name, or of a path; a file of that very path wins.

    Raises ConfigError when there is none, with the nearest name and all names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if str(name_or_path) in names():
        return FOLDER / f"{name_or_path}.yaml"
    if path.is_dir():
        inside = f"; {path}/config.yaml is one" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{path} is a folder, expected a YAML file or the name of a recipe{inside}")
    near = difflib.get_close_matches(path.stem, names(), n=1)
    raise ConfigError(
        f"no configuration file at {path}, and no recipe of that name"
        + (f"; did you mean {near[0]!r}?" if near else ";")
        + f" recipes: {', '.join(names())}"
    )

"""The recipes that ship with the package, by name.

In a clone, `dit_scale/configs` links to `configs/`; an installed package contains the files.
"""

import difflib
from pathlib import Path

from dit_scale.errors import ConfigError

FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
    """Return all recipe names, sorted; `dit_xl2_256` is configs/dit_xl2_256.yaml."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name_or_path: str | Path) -> Path:
    """Return the file of a path or a recipe name; an existing file takes precedence.

    Raises ConfigError, with the nearest name and all names, if there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if str(name_or_path) in names():
        return FOLDER / f"{name_or_path}.yaml"
    if path.is_dir():
        hint = f"; did you mean {path}/config.yaml?" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{path} is a folder; expected a YAML file or a recipe name{hint}")
    near = difflib.get_close_matches(path.stem, names(), n=1)
    raise ConfigError(
        f"no configuration file at {path}, and no recipe with that name"
        + (f"; did you mean {near[0]!r}?" if near else ";")
        + f" recipes: {', '.join(names())}"
    )

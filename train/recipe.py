"""Recipes: YAML files of options, with sections for some networks."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from command import did_you_mean
from train import TrainError

_FOLDER = Path(__file__).parent / "recipes"

# Options that cannot differ between the networks of one command.
_OF_THE_COMMAND = {"model", "refinery", "data", "recipe", "out", "runs"}


def is_built_in(recipe: str | None) -> bool:
    """Whether the recipe is one of those that come with the project, rather than the user's own file."""
    return (_FOLDER / f"{recipe}.yaml").is_file()


def read_recipe(recipe: str, model: str, known: Collection[str], *, as_refinery: bool = False) -> dict[str, Any]:
    """A recipe's values as dotted keys.

    Values of its section `networks` for this model (longest prefix) and, for a network that is to be a refinery, of its
    section `refineries` override the others. recipe: the name of a built-in one, or a file. known: the dotted names of
    all options. Raises TrainError for an invalid recipe and for unknown keys.
    """
    path = _FOLDER / f"{recipe}.yaml"
    if not path.is_file():
        path = Path(recipe)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        raise TrainError(f"recipe={recipe}: neither a recipe ({names}) nor a file")
    values = read_yaml(path)
    networks = _mapping(path, "networks", values.pop("networks", None))
    sections = {str(name): _section(path, f"networks: {name}", options, known) for name, options in networks.items()}
    refineries = _section(path, "refineries", values.pop("refineries", None), known)
    values = without_empty_groups(dotted(values), known)
    _check_keys(path, values, known)
    matching = max((name for name in sections if model.startswith(name)), key=len, default=None)
    return values | (sections[matching] if matching else {}) | (refineries if as_refinery else {})


def _section(path: Path, name: str, options: Any, known: Collection[str]) -> dict[str, Any]:
    """The options, by dotted keys, of a section of a recipe that applies only to some networks of a command."""
    values = without_empty_groups(dotted(_mapping(path, name, options)), known)
    _check_keys(path, values, known)
    shared = sorted(set(values) & _OF_THE_COMMAND)
    if shared:
        raise TrainError(f"{path}: {name}: {', '.join(shared)} must be the same for all networks; give it outside")
    return values


def _mapping(path: Path, name: str, value: Any) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TrainError(f"{path}: {name}: expected a mapping, not {value!r}")
    return value


def _check_keys(path: Path, values: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        hint = did_you_mean(unknown, list(known))
        raise TrainError(f"{path}: unknown keys {', '.join(unknown)}{hint} (python -m train --help lists them)")


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file, nested as in the file. Raises TrainError if it is not a mapping in YAML."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise TrainError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # of text, of dates as 2001-99-99, of lists in lists
        raise TrainError(f"{path}: not YAML") from None
    if not isinstance(values, dict):
        raise TrainError(f"{path}: expected a mapping of options to values")
    return values


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names, such as "optimizer.lr"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def without_empty_groups(options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Options without empty groups, as in a YAML file whose lines below `crop:` are comments."""
    groups = {option.partition(".")[0] for option in known if "." in option}
    return {option: value for option, value in options.items() if not (value is None and option in groups)}

"""Code that builds a network without this project.

code = standalone("mobilenet0.25", num_classes=5)
code.imports        # from network import MobileNet
code.expression     # MobileNet(num_classes=5, width=0.25)
code.source         # content of the file network.py; None for networks of timm and torchvision
"""

import inspect
import re
import sys
from dataclasses import dataclass
from functools import partial

from models import constructor
from models.initialise import initialise

# Replacements for what the networks' modules import from this project; weights come from a file, and networks are not
# trained.
_STAND_INS = {
    initialise.__name__: "def initialise(network):\n    pass  # the weights come from a file\n",
    "binarise": "def binarise(x):\n    return torch.where(x >= 0, 1, torch.where(x < 0, -1, x))\n",
}
_OURS = re.compile(r"^from (?:label_refinery\.)?(?:models|kernels)\S* import (\w+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Standalone:
    """Code for a network. imports: one line. expression: builds the network. source: content of network.py, or None."""

    imports: str
    expression: str
    source: str | None = None


def standalone(name: str, num_classes: int) -> Standalone:
    """Returns code that builds a network without this project. Raises ModelError for an unknown name."""
    hub, _, plain = name.partition(":")
    if hub == "torchvision":
        plain = plain.partition(".")[0]
        return Standalone(
            "from torchvision.models import get_model", f'get_model("{plain}", num_classes={num_classes})'
        )
    if hub == "timm":
        return Standalone("import timm", f'timm.create_model("{plain}", num_classes={num_classes})')
    build = constructor(name)
    function, options = (build.func, build.keywords) if isinstance(build, partial) else (build, {})
    # Options of the weights' initialisation are left out.
    options = {"num_classes": num_classes} | {key: options[key] for key in options if not key.startswith("zero_init")}
    expression = f"{function.__name__}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    if function.__module__.startswith("torchvision."):
        return Standalone(f"from torchvision.models import {function.__name__}", expression)
    source = inspect.getsource(sys.modules[function.__module__])
    needed = "\n\n".join(_STAND_INS[found] for found in _OURS.findall(source))
    # Inserted in place of the first import from this project, with blank lines around; these imports come last.
    replacements = iter([f"\n{needed}"])
    source = _OURS.sub(lambda _: next(replacements, ""), source)
    return Standalone(f"from network import {function.__name__}", expression, source)

"""Writes the inventories with which the API links to Python's and PyTorch's documentation.

``python docs/inventories`` does it. They hold the names that the signatures and docstrings mention and no
others, so that the site is built without network. A name that is missing here is reported by Sphinx
as a reference that is not found.
"""

import zlib
from pathlib import Path

FUNCTIONS = "library/functions.html#{}"
CONSTANTS = "library/constants.html#{}"
TYPES = "library/stdtypes.html#{}"
EXCEPTIONS = "library/exceptions.html#{}"
ABC = "library/collections.abc.html#{}"
PAGE = "generated/torch.{0}.html#torch.{0}"

PYTHON = {
    "int": ("class", FUNCTIONS.format("int")),
    "float": ("class", FUNCTIONS.format("float")),
    "bool": ("class", FUNCTIONS.format("bool")),
    "object": ("class", FUNCTIONS.format("object")),
    "type": ("class", FUNCTIONS.format("type")),
    "str": ("class", TYPES.format("str")),
    "list": ("class", TYPES.format("list")),
    "tuple": ("class", TYPES.format("tuple")),
    "dict": ("class", TYPES.format("dict")),
    "None": ("data", CONSTANTS.format("None")),
    "typing.Any": ("data", "library/typing.html#typing.Any"),
    "typing.NamedTuple": ("class", "library/typing.html#typing.NamedTuple"),
    **{
        f"collections.abc.{name}": ("class", ABC.format(f"collections.abc.{name}"))
        for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
    },
    **{
        name: ("exception", EXCEPTIONS.format(name))
        for name in ("RuntimeError", "TypeError", "UserWarning", "ValueError")
    },
}

TORCH = {
    "torch.Tensor": ("class", "tensors.html#torch.Tensor"),
    "torch.device": ("class", "tensor_attributes.html#torch.device"),
    "torch.dtype": ("class", "tensor_attributes.html#torch.dtype"),
    "torch.Generator": ("class", PAGE.format("Generator")),
    "torch.nn.Module": ("class", PAGE.format("nn.Module")),
    "torch.nn.Sequential": ("class", PAGE.format("nn.Sequential")),
    # Where these classes say that they are defined.
    "torch._C.Generator": ("class", PAGE.format("Generator")),
    "torch.nn.modules.module.Module": ("class", PAGE.format("nn.Module")),
    "torch.nn.modules.container.Sequential": ("class", PAGE.format("nn.Sequential")),
}


def write(project: str, names: dict[str, tuple[str, str]]) -> None:
    """One inventory, in version 2 of Sphinx's format: a header, then compressed lines."""
    header = (
        "# Sphinx inventory version 2\n"
        f"# Project: {project}\n"
        "# Version: \n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    lines = "".join(f"{name} py:{kind} 1 {uri} -\n" for name, (kind, uri) in sorted(names.items()))
    path = Path(__file__).parent / f"{project}.inv"
    path.write_bytes(header.encode() + zlib.compress(lines.encode(), 9))


write("python", PYTHON)
write("torch", TORCH)

"""How the site is built: ``python -m sphinx -W -n docs build``.

With ``TORCH2PC_EXAMPLES=short`` in the environment the examples run in their short versions, with
``none`` they are shown and not run. Neither building nor reading needs a network.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import gallery  # noqa: E402

import torch2pc  # noqa: E402

project = "torch2pc"
author = "the authors of torch2pc"
copyright = author
release = version = torch2pc.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_short_examples", "build"]
nitpicky = True
nitpick_ignore = [
    # What a Record keeps for its own use, and types of packages that have no inventory here.
    ("py:class", "torch2pc.follow.outlook.Spectrum"),
    ("py:class", "torch2pc.follow.outlook.ClosedForm"),
    ("py:class", "Figure"),
    ("py:class", "Tensor"),
    ("py:class", "torch.optim.Optimizer"),
    ("py:class", "torch.distributed.distributed_c10d.ProcessGroup"),
]

# Pages.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # PCRNN's docstrings write `name` as Markdown does

# Equations are set by MathJax. This file of it has all that it needs, fonts too: a browser may not
# load fonts for pages that it opens from the disk.
mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert mathjax is not None and mathjax.origin is not None, "install the extra [docs]"
mathjax_path = "tex-svg-full.js"
html_static_path = [
    "_static",
    str(Path(mathjax.origin).with_name("static") / "mathjax" / mathjax_path),
]

# The API.
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True

# The names that the API refers to; inventories/__main__.py writes the files.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.inv"),
}

# The examples.
how = os.environ.get("TORCH2PC_EXAMPLES", "full")
short = how == "short"
if short:
    gallery.write_short_versions(DOCS / "_short_examples")
warnings.filterwarnings("ignore", "The error hardly reaches", UserWarning)


def example_order(name: str) -> tuple[int, str]:
    return gallery.place(name), name


sphinx_gallery_conf = {
    "examples_dirs": ["_short_examples" if short else "../examples"],
    "gallery_dirs": ["examples"],
    "filename_pattern": r"\.py$",
    "within_subsection_order": "conf.example_order",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_signature": False,
    "min_reported_time": 10_000,
    "write_computation_times": False,
    "plot_gallery": how != "none",
    "abort_on_example_error": True,
    "doc_module": ("torch2pc",),
    "reference_url": {"torch2pc": None},
    "image_scrapers": ("matplotlib",),
}
# The order above is a function, which cannot be kept from one build to the next.
suppress_warnings = ["config.cache"]

# The theme.
html_theme = "furo"
html_title = "torch2pc"
html_css_files = ["torch2pc.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

"""The pages of this folder as a site: pip install -e '.[docs]', then sphinx-build -W -b html docs build/site."""

import mutor_vision

project = "mutor_vision"
author = copyright = "The mutor_vision authors"
version = release = mutor_vision.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"mutor_vision {release}"
exclude_patterns = []
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True

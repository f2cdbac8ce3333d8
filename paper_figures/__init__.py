"""Every figure of Rosenbaum (2022) drawn with torch2pc: ``python -m paper_figures``.

Each figure is one file of this folder, named ``figure_NAME.py``; nothing lists them, so adding the
file adds the figure, which ``--figure NAME`` draws. It reads like the figure's caption and has

- a docstring, whose first line is the title that ``--help`` shows;
- ``run(options) -> list[Number]``, which computes the figure, calls `report.save` to write its PNG,
  PDF and JSON, and returns the numbers to compare with the paper's; `report.Options` holds data,
  out, device, seed and quick. It raises `data.MissingData` if it cannot do without a file that is
  not there: the run then says so and goes on with the next figure;
- optionally ``DEFAULT = False``, to be drawn only when asked for by name;
- optionally ``DOWNLOADS = ("mnist",)``, the data sets that ``--download`` fetches for it (keys of
  `download.DATA_SETS`).

Shared by all: `data` (files into tensors), `nets` (the paper's networks), `training` (predictive
coding against backprop), `plotting` (how panels look) and `report` (numbers and files).

Source of the settings and of the numbers called the paper's: R. Rosenbaum, *On the relationship
between predictive coding and backpropagation*, PLOS ONE 17(3) e0266102 (2022).
"""

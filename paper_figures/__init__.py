"""Figures of predictive coding's papers drawn with torch2pc: ``python -m paper_figures``.

Each paper has its folder: `rosenbaum`, whose figures 1 to 7 the library reproduces, and with them
`rao_ballard`, `memory`, `jpc`, `unsupervised`, `pcx`, `prospective`, `depth` and `transformer`. Each
figure is one file there, named ``figure_NAME.py``; nothing lists them, so adding the file adds the
figure, which ``--figure NAME`` draws. It reads like the figure's caption and has

- a docstring, whose first line is the title that ``--help`` shows;
- ``run(options) -> list[Number]``, which computes the figure, calls `report.save` to write its PNG,
  PDF and JSON, and returns the numbers to compare with the paper's; `report.Options` holds data,
  out, device, seed, full and quick, and chooses between what three lengths of run need. It raises
  `data.MissingData` if it cannot do without a file that is not there: the run then says so and goes
  on with the next figure;
- optionally ``DEFAULT = False``, to be drawn only when asked for by name;
- optionally ``SECONDS = 10, 100``, which a run by default and one with ``--full`` take about, for the
  bar;
- optionally ``DOWNLOADS = ("mnist",)``, the data sets that ``--download`` fetches for it (keys of
  `download.DATA_SETS`).

Shared by all, beside the folders: `data` and `letters` (files into tensors), `download`, `nets` (the
networks), `training` (predictive coding against backprop), `plain` (Strict iterated as it is written
and as it was published), `decoders` and `maps` (what two figures have in common), `plotting` (how
panels look), `progress` (the bar over all figures), `runs` (finished trainings, kept in a file) and
`report` (numbers and files).

Source of the settings and of the numbers called the paper's, where a figure names no other:
R. Rosenbaum, *On the relationship between predictive coding and backpropagation*, PLOS ONE 17(3)
e0266102 (2022).
"""

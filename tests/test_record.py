"""What a record says and shows, of numbers that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor

from torch2pc import Record
from torch2pc.follow.outlook import ClosedForm, Spectrum, Ways
from torch2pc.follow.plot import _colour
from torch2pc.follow.record import _layers, _rounded

NAN = math.nan


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def record(**changes: Any) -> Record:
    """Two iterations of three layers, which converge; columns are the input and the layers."""
    made = Record(
        ErrType="Strict",
        eta=0.1,
        rule=None,
        names=["input", "first", "second", "third"],
        parents=[(0,), (1,), (2,)],
        energies=table([0, 0, 0, 4], [0, 0.5, 0.25, 3], [0, 0.25, 0.5, 2]),
        moves=table([0] * 4, [0, 0, 0.3, 0], [0, 0.2, 0.1, 0]),
        gradient=table([0, 0, 0.3, 0], [0, 0.2, 0.1, 0], [0, 0.01, 0.02, 0]),
        distance=table([1, 0.5, 0.005])[0],
        distances=table([0, 0, 1, 0], [0, 1, 0.5, 0], [0, 0.004, 0.012, 0]),
        cosine=table([NAN] * 4, [NAN, 0.9, 0.99, 1], [NAN, 0.99, 0.95, 0.97]),
        size=table([NAN] * 4, [NAN, 0.1, 0.4, 2], [NAN, 0.6, 0.7, 1.25]),
        stable_eta=1.2,
        falls=True,
        resolved=[1.0, 0.999, 0.75, 1.0],
        differences=[],
        slack=1e-12,
        outlook=None,
    )
    return replace(made, **changes)


RISES = dict(energies=table([0, 0, 0, 4], [0, 0.5, 0.25, 3], [0, 0.25, 0.5, 4]))
ENDLESS = dict(energies=table([0, 0, 0, 4], [0, 0.5, math.inf, 3], [0, NAN, NAN, 4]))
FAR = dict(distance=table([1, 0.7, 0.5])[0])
# From a distance of .5 on it falls by 1 - eta in each iteration.
FALLS_ON = Spectrum(2, (0.5,), 0, (1.0,), (1.0,))
OF_ONE_LAYER = ClosedForm([Ways([1], torch.ones(1, 1).double())])
CONVERGED = "Converged: 0.5 % from equilibrium; 1 % was reached at n = 2."
NOT_YET = "Not converged: 50 % from equilibrium"
TOO_LONG = "is above the largest stable"
RISES_BELOW = "F rises from iteration 2, though eta = 0.1 is below 1.2, the largest stable"
EDGES = "F has edges, or curves more elsewhere. A smaller eta overshoots less."
OF_UPDATES = "Updates are backprop's to within cosines of 0.95."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, CONVERGED),
        (dict(eta=1.3), f"eta = 1.3 {TOO_LONG} 1.2: it had not yet shown; try eta = 0.6."),
        (dict(eta=1.2), f"eta = 1.2 {TOO_LONG} 1.2: it had not yet shown; try eta = 0.6."),
        (
            dict(eta=1.3, **RISES),
            f"eta = 1.3 {TOO_LONG} 1.2: F rises from iteration 2; try eta = 0.6.",
        ),
        (
            dict(eta=1.3, **ENDLESS),
            f"eta = 1.3 {TOO_LONG} 1.2: F is not finite after iteration 1; try eta = 0.6.",
        ),
        (
            dict(ErrType="FixedPred", eta=2.5, stable_eta=2.0),
            f"eta = 2.5 {TOO_LONG} 2: the errors grow; try eta = 1.",
        ),
        (dict(eta=-0.1), "eta = -0.1 is below 0, which goes up the energy instead of down."),
        (
            dict(stable_eta=None, **RISES),
            "F rises from iteration 2, nor is its Hessian finite where F was lowest.",
        ),
        (RISES, f"{RISES_BELOW} along the way: {EDGES}"),
        (
            dict(falls=False, **RISES),
            f"{RISES_BELOW} between edges of F, at which it may rise below it: {EDGES}",
        ),
        (dict(eta=None, rule="Momentum()", **RISES), ["F rises from iteration 2.", CONVERGED]),
        (dict(eta=None, rule="Momentum()"), CONVERGED),
        (
            dict(eta=None, ErrType="Equilibrium", **RISES),
            "Converged: 0.5 % from equilibrium after 2 evaluations.",
        ),
        (dict(eta=None, ErrType="Equilibrium", **FAR), f"{NOT_YET} after 2 evaluations."),
        (dict(ErrType="Multipliers", **RISES), CONVERGED),
        (dict(eta=None, rule="Momentum()", **FAR), f"{NOT_YET} after 2 iterations."),
        (dict(eta=0.0, **FAR), f"{NOT_YET}, and steps of 0 lead no nearer."),
        (FAR, f"{NOT_YET}; what n it takes cannot be foretold from here."),
        (
            dict(outlook=FALLS_ON, **FAR),
            f"{NOT_YET}; 1 % takes about n = 40 with this eta or n = 6 with eta = 0.6.",
        ),
        (
            dict(outlook=FALLS_ON, stable_eta=0.24, **FAR),
            f"{NOT_YET}; 1 % takes about n = 40 with this eta.",
        ),
        (
            dict(outlook=FALLS_ON, stable_eta=math.inf, **FAR),
            f"{NOT_YET}; 1 % takes about n = 40 with this eta.",
        ),
        (
            dict(outlook=FALLS_ON, eta=1e-9, **FAR),
            f"{NOT_YET}; 1 % takes about n = 6 with eta = 0.6.",
        ),
        (
            dict(outlook=OF_ONE_LAYER, ErrType="FixedPred", **FAR),
            f"{NOT_YET}; 1 % takes n = 44 with this eta or n = 6 with eta = 0.6.",
        ),
        (
            dict(names=["input", "first"]),
            "One layer has no beliefs to infer: its errors are the gradients.",
        ),
    ],
)
def test_what_is_said_of_steps_and_of_equilibrium(
    changes: dict[str, Any], said: str | list[str]
) -> None:
    said, found = [said] if isinstance(said, str) else said, record(**changes).verdict
    assert found[: len(said)] == said
    assert not [more for more in found[len(said) :] if "onverge" in more or "eta" in more]


SHORT, TURNED = "is less than half as long as backprop's", "has another direction than backprop's"


@pytest.mark.parametrize(
    ("size", "cosine", "said"),
    [
        ([0.6, 0.7, 1.2], [0.99, 0.95, 0.97], [OF_UPDATES]),
        ([0.5, 0.7, 1.2], [0.9, NAN, 1], ["Updates are backprop's to within cosines of 0.9."]),
        ([NAN] * 3, [NAN] * 3, []),
        ([0, 0.7, 1], [NAN, 1, 1], ["No error has reached layer 1: it does not learn."]),
        ([0] * 3, [NAN] * 3, ["No error has reached layers 1 to 3: they do not learn."]),
        ([0.7, 0.25, 1], [1] * 3, [f"The update of layer 2 {SHORT}: 0.25 of it."]),
        (
            [0.4, 0.3, 1],
            [1] * 3,
            [f"The update of layers 1 and 2 {SHORT}, most of all at layer 2: 0.3 of it."],
        ),
        ([1] * 3, [1, 0.5, 1], [f"The update of layer 2 {TURNED}: cosine 0.5."]),
        (
            [1] * 3,
            [0.8, 1, -0.5],
            [f"The update of layers 1 and 3 {TURNED}, most of all at layer 3: cosine -0.5."],
        ),
        (
            [0, 0.3, 1],
            [NAN, 1, 0.5],
            [
                "No error has reached layer 1: it does not learn.",
                f"The update of layer 2 {SHORT}: 0.3 of it.",
                f"The update of layer 3 {TURNED}: cosine 0.5.",
            ],
        ),
    ],
)
def test_what_is_said_of_updates(size: list[float], cosine: list[float], said: list[str]) -> None:
    """From the layers' lengths and cosines in the last row."""
    rows = [[NAN, 1, 1, 1]] * 2
    found = record(size=table(*rows, [NAN, *size]), cosine=table(*rows, [NAN, *cosine]))
    assert found.verdict == [CONVERGED, *said]


@pytest.mark.parametrize(
    ("changes", "which", "left"),
    [
        (dict(differences=[2]), "layer 2", "75 % at layer 2"),
        (
            dict(differences=[1, 2], resolved=[1.0, 0.2, 0.75, 1.0]),
            "layers 1 and 2",
            "20 % at layer 1",
        ),
        (dict(differences=[1, 3]), None, None),
        (dict(differences=[2], ErrType="FixedPred"), None, None),
    ],
)
def test_what_is_said_of_float32(
    changes: dict[str, Any], which: str | None, left: str | None
) -> None:
    said = [CONVERGED, OF_UPDATES]
    if which is not None:
        said.append(
            f"The errors of {which} are computed as differences, of which float32 leaves {left}: "
            "float64, or a displacement_rule, would resolve them."
        )
    assert record(**changes).verdict == said


def test_a_summary() -> None:
    assert str(record()).splitlines() == [
        "Strict, eta = 0.1, n = 2, 3 layers",
        "layer          energy  distance  cosine  size  float32",
        "1      first     0.25      0.4%  0.9900   0.6     100%",
        "2      second     0.5      1.2%  0.9500   0.7      75%",
        "3      third        2            0.9700  1.25",
        "F 4 -> 2.75, loss 4 -> 2, distance from equilibrium 0.50%, "
        "largest stable eta 1.2 along the way",
        CONVERGED,
        OF_UPDATES,
    ]
    assert repr(record()) == "<Record of Strict, eta = 0.1, n = 2, 3 layers>"


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        (dict(ErrType="Exact", eta=None), "Exact, n = 2, 3 layers"),
        (dict(rule="Momentum(eta=0.1)", eta=None), "Strict, Momentum(eta=0.1), n = 2, 3 layers"),
        (dict(ErrType="Equilibrium", eta=None), "Equilibrium, evaluations: 2, 3 layers"),
        (dict(names=["input", "first"]), "Strict, eta = 0.1, n = 2, 1 layer"),
        (dict(eta=1 / 3), "Strict, eta = 0.3333, n = 2, 3 layers"),
    ],
)
def test_the_head_of_a_summary(changes: dict[str, Any], head: str) -> None:
    assert str(record(**changes)).splitlines()[0] == head


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, "1      first     0.25      0.4%  0.9900   0.6     100%"),
        (dict(ErrType="Latent"), "0      latent       0      0.0%"),
        (
            dict(energies=table([1, 0, 0, 4], [2, 0, 0, 1], [3, 0.25, 0.5, 2])),
            "0      input        3      0.0%",
        ),
    ],
)
def test_the_input_is_a_row_where_it_has_an_energy_or_moves(
    changes: dict[str, Any], row: str
) -> None:
    assert str(record(**changes)).splitlines()[2] == row


def test_what_does_not_descend_has_no_F() -> None:
    of = record(ErrType="FixedPred", stable_eta=None)
    line = "loss 4 -> 2, distance from equilibrium 0.50%"
    assert str(of).splitlines()[5] == line
    assert of.to_dict().keys() == record().to_dict().keys() - {"F", "prior", "stable_eta"}


def test_the_numbers_to_log() -> None:
    of_all = dict(loss=2, distance=0.005, eta=0.1, stable_eta=1.2, n=2, n_needed=2, F=2.75, prior=0)
    of_layers = {
        "energy": [0.25, 0.5],
        "distance": [0.004, 0.012],
        "resolved": [0.999, 0.75],
        "cosine": [0.99, 0.95, 0.97],
        "size": [0.6, 0.7, 1.25],
    }
    numbers = {f"{k}/{l}": x for k, of in of_layers.items() for l, x in enumerate(of, start=1)}
    assert record().to_dict() == of_all | numbers
    assert "cosine/1" not in record(cosine=torch.full((3, 4), NAN)).to_dict()


@pytest.mark.parametrize(
    ("distance", "reached"),
    [
        ([1, 0.5, 0.005], 2),
        ([0.01, 0.01, 0.01], 0),
        ([1, 0.01, 0.001], 1),
        ([0.001, 0.02, 0.001], 2),
        ([0.001, 0.001, 0.011], None),
        ([1, NAN, 0.001], 2),
        ([0, 0, NAN], None),
    ],
)
def test_equilibrium_is_reached_where_it_is_not_left_again(
    distance: list[float], reached: int | None
) -> None:
    found = record(distance=table(distance)[0])
    assert found.n_reached == reached and found.converged == (reached is not None)
    assert found.n_needed == reached  # nothing is foretold


def test_F_rises_by_more_than_round_off() -> None:
    """Which is relative to the terms of the step before."""
    for rise, rises_at in ((0.9e-3, None), (1.1e-3, 1)):
        energies = table([0, 1, -3, 6], [0, 1, -3, 6 + 10 * rise], [0, 1, -3, 0])
        assert record(energies=energies, slack=1e-3).rises_at == rises_at


def test_what_is_foretold_of_which_steps() -> None:
    far = record(outlook=FALLS_ON, **FAR)
    assert far.iterations_to(0.01) == far.iterations_to(0.01, 0.1) == 40
    assert far.iterations_to(0.01, 0.6) == 6
    for eta in (0.0, -0.1, 1.2, 1.3):
        assert far.iterations_to(0.01, eta) is None
    for missing in ("outlook", "eta", "stable_eta"):
        assert replace(far, **{missing: None}).iterations_to(0.01, 0.1) is None
    # What it had come to, and has left again, with this step size, may do with another one.
    left = replace(far, outlook=Spectrum(1, (0.009, 0.008), 1, (), ()))
    assert left.iterations_to(0.01) is None and left.iterations_to(0.01, 0.2) == 1
    assert replace(left, distance=table([1, 0.02, 0.01])[0]).iterations_to(0.01) == 1
    assert replace(left, distance=table([1, 0.02, NAN])[0]).iterations_to(0.01) is None


def test_numbers_in_words() -> None:
    rounded = {0.6: "0.6", 0.129: "0.12", 1.0: "1", 2.99: "2.9", 1e-5: "1e-05", 0.0999: "0.099"}
    assert {eta: _rounded(eta) for eta in rounded} == rounded
    which = {(3,): "layer 3", (1, 2): "layers 1 and 2", (1, 2, 3): "layers 1 to 3"}
    which |= {(1, 3): "layers 1 and 3", (1, 2, 4): "layers 1, 2 and 4"}
    assert {layers: _layers([*layers]) for layers in which} == which


# -------------------------------------------------------------------------------------- pictures


def drawn(**changes: Any) -> tuple[Figure, dict[str, Any]]:
    """The picture of a record, and its panels by their titles; the first one is the map."""
    figure = Figure()
    record(**changes).plot(figure)
    panels = {axes.get_title(): axes for axes in figure.axes[1:] if axes.get_title()}
    return figure, {"map": figure.axes[0], **panels}


def test_each_panel_shows_its_table() -> None:
    figure, panels = drawn()
    of = record()
    assert figure.get_suptitle() == str(of).splitlines()[0]
    shown = [
        ("energy of each layer", of.energies, [1, 2], "log"),
        ("distance from equilibrium", of.distances, [1, 2], "log"),
        ("cosine of the update to backprop's", of.cosine, [1, 2, 3], "linear"),
        ("size of the update / backprop's", of.size, [1, 2, 3], "log"),
    ]
    for title, values, layers, scale in shown:
        assert panels[title].get_yscale() == scale
        for l, line in zip(layers, panels[title].get_lines(), strict=False):
            expected = values[:, l].numpy()
            if scale == "log":
                expected = np.where(expected == 0, NAN, expected)  # a gap
            np.testing.assert_array_equal(line.get_ydata(), expected)
            assert line.get_color() == _colour(l, 3)
    energy = panels["F, and the loss"]
    np.testing.assert_array_equal(energy.get_lines()[0].get_ydata(), of.F)
    np.testing.assert_array_equal(energy.get_lines()[1].get_ydata(), of.loss)
    assert [text.get_text() for text in energy.get_legend().get_texts()] == ["F", "loss"]
    distance = panels["distance from equilibrium"]
    *_, of_all, near = distance.get_lines()
    np.testing.assert_array_equal(of_all.get_ydata(), of.distance)
    assert of_all.get_label() == "all layers" and list(near.get_ydata()) == [0.01, 0.01]
    assert distance.get_ylim() == (0.0025, 3)
    assert list(panels["size of the update / backprop's"].get_lines()[-1].get_ydata()) == [1, 1]
    for title, axes in panels.items():
        assert axes.get_xlabel() == "iteration"
        assert axes.get_xlim() == ((-0.5, 2.5) if title == "map" else (0, 2))
    assert panels["map"].get_title() == "energy of each layer"
    assert panels["map"].get_ylabel() == "layer"
    assert len(figure.axes) == 7  # with the scale of the colours


def test_the_lines_are_dark_to_light() -> None:
    brightness = [sum(_colour(l, 5)[:3]) for l in range(1, 6)]
    assert brightness == sorted(brightness)
    assert _colour(1, 1) == _colour(1, 3) != _colour(3, 3)


def test_the_map_shows_the_energies_that_matter() -> None:
    energies = torch.ones(3, 4).double()
    energies[:, 1] = table([0, 1e-12, 1e-3])[0]
    energies[:, 2] = table([1e-9, 10, 1e101])[0]
    _, panels = drawn(energies=energies)
    (image,) = panels["map"].get_images()
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((1e-7, 10))
    assert image.get_array().mask.tolist() == [[True, False, False], [False, False, True]]
    assert image.get_cmap().get_bad().tolist() == list(to_rgba("0.92"))
    np.testing.assert_array_equal(image.get_array()[1, :2], [1e-9, 10])
    assert image.origin == "lower"


def test_one_energy_alone_can_be_drawn() -> None:
    _, panels = drawn(energies=torch.ones(3, 4).double())
    (image,) = panels["map"].get_images()
    assert image.norm.vmin == 1 < image.norm.vmax < 1.001


def test_what_is_no_number_and_what_is_nothing_leave_gaps() -> None:
    nothing = dict(distance=torch.zeros(3).double(), distances=torch.zeros(3, 4).double())
    figure, panels = drawn(energies=torch.zeros(3, 4).double(), **nothing)
    assert len(figure.axes) == 6
    assert panels["distance from equilibrium"].get_yscale() == "linear"
    assert [text.get_text() for text in panels["map"].texts] == ["no energy"]
    _, panels = drawn(**ENDLESS)
    energies = panels["F, and the loss"].get_lines()[0].get_ydata()
    assert np.isnan(energies).tolist() == [False, True, True]


def test_a_distance_below_what_is_usual_is_in_sight() -> None:
    for lowest, limit in ((0.5, 0.005), (1e-4, 5e-5)):
        _, panels = drawn(distance=table([1, lowest, 0])[0])
        assert panels["distance from equilibrium"].get_ylim() == (limit, 3)


@pytest.mark.parametrize(
    ("energies", "scale"),
    [
        (table([0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 99]), "linear"),
        (table([0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 101]), "log"),
        (table([0, 0, 0, 100], [0, 0, 0, 1], [0, 0, 0, 0.5]), "linear"),  # it falls
        (table([0, 0, 0, 1], [0, 0, 0, -1], [0, 0, 0, 200]), "linear"),
        (table([0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 1e102]), "linear"),  # what is seen of it
    ],
)
def test_a_logarithm_of_F_where_it_has_risen_far(energies: Tensor, scale: str) -> None:
    _, panels = drawn(energies=energies)
    assert panels["F, and the loss"].get_yscale() == scale


@pytest.mark.parametrize("ErrType", ["Strict", "Equilibrium", "FixedPred", "Latent"])
def test_what_kind_of_record_it_is_shows(ErrType: str) -> None:
    energies = table([1, 0, 0, 4], [0.5, 0.5, 0.25, 3], [0.25, 0.25, 0.5, 2])
    if ErrType != "Latent":
        energies[:, 0] = 0
    _, panels = drawn(ErrType=ErrType, energies=energies)
    title = "the loss" if ErrType == "FixedPred" else "F, and the loss"
    assert {axes.get_xlabel() for axes in panels.values()} == {
        "evaluation" if ErrType == "Equilibrium" else "iteration"
    }
    lines = {line.get_label(): line.get_ydata() for line in panels[title].get_lines()}
    assert list(lines) == {"Latent": ["F", "loss", "prior"], "FixedPred": ["loss"]}.get(
        ErrType, ["F", "loss"]
    )
    if ErrType == "Latent":
        np.testing.assert_array_equal(lines["prior"], energies[:, 0])


def test_the_legend_names_the_layers() -> None:
    figure, _ = drawn()
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "layer"
    assert [text.get_text() for text in legend.get_texts()] == ["1", "2", "3"]
    figure, _ = drawn(size=torch.full((3, 4), NAN))
    assert not figure.legends


def test_letters_are_small_and_what_guides_the_eye_is_faint() -> None:
    figure, panels = drawn()
    (legend,) = figure.legends
    assert figure._suptitle.get_fontsize() == 10
    for axes in panels.values():
        assert (axes.title.get_fontsize(), axes.xaxis.label.get_fontsize()) == (9, 9)
        assert axes.xaxis.get_tick_params()["labelsize"] == 8
        assert axes.yaxis.get_tick_params()["labelsize"] == 8
    energy, distance = panels["F, and the loss"], panels["distance from equilibrium"]
    for of in (legend, energy.get_legend(), distance.get_legend()):
        assert {text.get_fontsize() for text in of.get_texts()} == {8} and not of.get_frame_on()
    assert legend.get_title().get_fontsize() == 8
    assert figure.axes[-1].yaxis.get_tick_params()["labelsize"] == 7  # of the colours
    *thin, of_all, guide = distance.get_lines()
    assert {line.get_linewidth() for line in thin} == {0.8} and of_all.get_linewidth() == 1.8
    assert of_all.get_color() == "k"
    for line in (guide, panels["size of the update / backprop's"].get_lines()[-1]):
        assert (line.get_color(), line.get_linewidth(), line.get_zorder()) == ("0.6", 0.8, 0)
    shown = [(line.get_color(), line.get_linestyle()) for line in energy.get_lines()]
    assert shown == [("#D55E00", "-"), ("#0072B2", "--")]


SKIP = dict(names=["x", "a", "b", "out"], parents=[(0,), (1,), (2, 1)])


def test_the_graph_of_a_record() -> None:
    """Its energies at the end are colours, on which names can be read; ways around layers are bent."""
    figure, panels = drawn(**SKIP)
    axes = panels["map"]
    assert axes.get_title() == "energies at the end"
    names = {text.get_text(): text for text in axes.texts if text.get_text()}
    places = {name: text.get_position() for name, text in names.items()}
    assert list(names) == ["x", "a", "b", "out"]
    arrows = [text for text in axes.texts if not text.get_text()]
    at = {tuple(place): name for name, place in places.items()}
    found = {
        (at[tuple(arrow.xyann)], at[tuple(arrow.xy)]): arrow.arrowprops["connectionstyle"]
        for arrow in arrows
    }
    straight, bent = "arc3", "arc3,rad=0.4"
    assert found == {
        ("x", "a"): straight,
        ("a", "b"): straight,
        ("b", "out"): straight,
        ("a", "out"): bent,
    }
    style = dict(arrowstyle="->", color="0.6", linewidth=0.8, shrinkA=7, shrinkB=7)
    assert all(style.items() <= arrow.arrowprops.items() for arrow in arrows)
    for text in names.values():
        placed = text.get_ha(), text.get_va(), text.get_fontsize()
        assert placed == ("center", "center", 7)
        patch = text.get_bbox_patch()
        assert patch.get_boxstyle().__class__.__name__ == "Round"
        assert patch.get_edgecolor() == to_rgba("0.4")
    faces = {name: text.get_bbox_patch().get_facecolor() for name, text in names.items()}
    assert faces["x"] == faces["out"] == to_rgba("0.92")
    of = Figure().add_subplot().scatter([0, 1], [0, 1], c=[0.0, 1.0]).get_cmap()
    assert (faces["a"], faces["b"]) == (of(0.0), of(1.0))
    inks = {name: text.get_color() for name, text in names.items()}
    assert inks == {"x": "black", "a": "white", "b": "black", "out": "black"}
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left < x < right and low < y < high for x, y in places.values())
    assert not axes.axison and axes.get_xlabel() == ""
    assert len(figure.axes) == 7  # with the scale of the colours
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "out"]


def test_a_graph_without_energies_has_no_colours() -> None:
    figure, panels = drawn(energies=torch.zeros(3, 4).double(), **SKIP)
    shown = [text for text in panels["map"].texts if text.get_text()]
    assert {text.get_bbox_patch().get_facecolor() for text in shown} == {to_rgba("0.92")}
    assert {text.get_color() for text in shown} == {"black"}
    assert len(figure.axes) == 6

"""The letters' trajectories: the embedded file, UCI's file, and their errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from paper_figures import letters
from paper_figures.data import DataError


def test_the_embedded_letters_are_twenty_different_trajectories():
    embedded = letters.load_letters(None)
    x = embedded.trajectories
    assert embedded.characters == letters.CHARACTERS and len(set(embedded.characters)) == 20
    assert x.shape == (60, 20, 2) and x.dtype == torch.float32
    assert not x[0].any()
    assert x.var().item() == pytest.approx(letters.VARIANCE, rel=1e-2)
    sizes = x.var(0, correction=0).mean(1)
    torch.testing.assert_close(sizes, sizes.mean().expand(20), rtol=1e-2, atol=0)
    distances = torch.cdist(x.transpose(0, 1).flatten(1), x.transpose(0, 1).flatten(1))
    assert distances.fill_diagonal_(torch.inf).min() > 1
    # A pen does not jump.
    assert x.diff(dim=0).norm(dim=2).max() < 0.5


def test_the_embedded_letters_are_made_from_the_font():
    fonts = pytest.importorskip("HersheyFonts")
    font = fonts.HersheyFonts()
    font.load_default_font("scripts")
    made = letters._normalised(
        [letters.trace(list(font.strokes_for_text(c))) for c in letters.CHARACTERS]
    )
    torch.testing.assert_close(letters.load_letters(None).trajectories, made, rtol=0, atol=1e-3)


def uci_variables() -> dict[str, object]:
    """Five trajectories of the letters b, a, b, c, a, zero at both ends, of different lengths."""
    generator = np.random.default_rng(0)
    trajectories = np.empty(5, object)
    for index in range(5):
        trajectories[index] = np.zeros((3, 100 + 10 * index))
        trajectories[index][:, 8:-6] = generator.normal(size=(3, 86 + 10 * index))
    key = np.array(["a", "b", "c"], object)
    labels = np.array([2, 1, 2, 3, 1], np.uint8)
    return {"mixout": trajectories, "consts": {"charlabels": labels, "key": key}}


def test_ucis_file_gives_the_first_of_each_letter(tmp_path: Path):
    variables = uci_variables()
    savemat(tmp_path / letters.UCI_FILE, variables)
    loaded = letters.load_letters(tmp_path)
    assert loaded.characters == "abc"
    assert loaded.trajectories.shape == (60, 3, 2)
    variance = loaded.trajectories.var(correction=0).item()
    assert variance == pytest.approx(letters.VARIANCE, rel=1e-5)
    for index, source in enumerate((1, 0, 3)):
        path = variables["mixout"][source][:2, 8:-6].cumsum(1)
        whole = path[:, -1] - path[:, 0]
        ours = loaded.trajectories[-1, index].numpy()
        # The same path but for its size.
        scale = np.linalg.norm(ours) / np.linalg.norm(whole)
        np.testing.assert_allclose(ours, scale * whole, rtol=1e-5)


def test_a_folder_without_ucis_file_gives_the_embedded_letters(tmp_path: Path):
    assert letters.load_letters(tmp_path).name == "embedded letters"


def spoil(name: str, variables: dict[str, object]) -> dict[str, object]:
    trajectories, consts = variables["mixout"], dict(variables["consts"])
    if name == "no mixout":
        return {"consts": consts}
    if name == "no key":
        return {"mixout": trajectories, "consts": {"charlabels": consts["charlabels"]}}
    if name == "consts is a number":
        return {"mixout": trajectories, "consts": 3.0}
    if name == "too few labels":
        consts["charlabels"] = consts["charlabels"][:3]
    if name == "label 0":
        consts["charlabels"] = consts["charlabels"] - 1
    if name == "two rows":
        trajectories[0] = trajectories[0][:2]
    if name == "still":
        trajectories[0] = 0 * trajectories[0]
    if name == "not finite":
        trajectories[0][0, 20] = np.nan
    return {"mixout": trajectories, "consts": consts}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no mixout", "must hold mixout, consts.charlabels and consts.key"),
        ("no key", "must hold mixout, consts.charlabels and consts.key"),
        ("consts is a number", "must hold mixout, consts.charlabels and consts.key"),
        ("too few labels", "5 trajectories, 3 labels from 1 to 2 and 3 letters"),
        ("label 0", "5 trajectories, 5 labels from 0 to 2 and 3 letters"),
        ("two rows", r"must be a \(3, time\) matrix of floats, got shape \(2, 100\)"),
        ("still", "a trajectory does not move, or is not finite"),
        ("not finite", "a trajectory does not move, or is not finite"),
    ],
)
def test_an_unusable_uci_file_is_explained(tmp_path: Path, name: str, message: str):
    path = tmp_path / letters.UCI_FILE
    savemat(path, spoil(name, uci_variables()))
    with pytest.raises(DataError, match=message) as caught:
        letters.load_uci(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 200, 1000])
def test_a_cut_off_uci_file_is_explained(tmp_path: Path, kept: int):
    path = tmp_path / letters.UCI_FILE
    savemat(path, uci_variables(), do_compression=True)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"archive.ics.uci.edu again"):
        letters.load_uci(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,1,2\na,1\n", "line 2: 'a,1' is not 'letter,x,y'"),
        ("# note\na,1,x\n", "line 2: 'a,1,x' is not 'letter,x,y'"),
        ("a,1,2\na,1,2\nb,1,2\n", "every letter must have as many points, got {'a': 2, 'b': 1}"),
        ("", "every letter must have as many points, got {}"),
    ],
)
def test_a_malformed_letter_file_is_explained(tmp_path: Path, text: str, message: str):
    path = tmp_path / "letters.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        letters.load_csv(path)

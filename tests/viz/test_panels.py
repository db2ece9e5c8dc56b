"""Pictures of masks: the panels are the mask, any length is affordable, every format is written or refused by name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from truemask import Mask, MaskError, blocks, causal, dilated, everything, prefix, random, window
from truemask.viz.panels import panels_of, svg_of, text_of
from truemask.viz.picture import shares
from truemask.viz.plot import PictureError, can_plot, plot, save_picture

MASKS = [causal & (window(11) | prefix(3)), blocks(7, back=1), random(0.3, block=2, seed=1), dilated(3), ~causal]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_panels_are_the_shares_of_the_dense_mask(mask: Mask) -> None:
    dense = mask.to_dense(67, 71)[0, 0].numpy()
    (cut,), labels, more = panels_of(mask, 67, 71, rows=13, columns=17)
    expected = shares(dense, 13, 17)
    np.testing.assert_allclose(cut.density, expected.density)
    assert cut[1:] == expected[1:]
    assert (labels, more) == ([""], 0)


def test_samples_and_heads_have_their_own_panels_up_to_a_number() -> None:
    panels = panels_of(random(0.5, per_head=True), 13, heads=11)
    assert len(panels.cuts) == len(panels.labels) == 8
    assert panels.labels[3] == "head 3"
    assert panels.more == 3
    assert "(and 3 more" in text_of(random(0.5, per_head=True), 13, heads=11)
    lines = text_of(window(3).padded([0, 2]), 5).splitlines()
    assert [line for line in lines if line.startswith("sample")] == ["sample 0", "sample 1"]


def test_a_million_tokens_are_drawn_without_a_dense_mask() -> None:
    picture = text_of(causal & window(1 << 17), 1 << 20, columns=16)
    assert "a sign is 131072 queries by 65536 keys" in picture
    assert len(svg_of(causal, 1 << 20)) < 100_000


def test_nothing_to_draw_is_a_mistake() -> None:
    with pytest.raises(MaskError, match="0 queries and 5 keys"):
        panels_of(causal, 0, 5)
    assert "nothing to draw" in text_of(everything, 0, 5)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.pdf", "a.svg", "a.txt"])
def test_every_format_is_written(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = save_picture(causal & window(5), tmp_path / name, 13, 17)
    content = path.read_bytes()
    assert content.startswith({"a.png": PNG, "a.jpg": b"\xff\xd8", "a.pdf": b"%PDF"}.get(name, content[:1]))
    if name == "a.svg":
        assert ElementTree.fromstring(content.decode()) is not None
    if name == "a.txt":
        assert content.decode().startswith("causal & window(5)\n")


def test_the_png_shows_ink_where_the_mask_is_true(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    both = [image.imread(save_picture(mask, tmp_path / "a.png", 29)) for mask in (causal, ~causal)]
    ink = [(pixels[..., 2] - pixels[..., 0] > 0.4) for pixels in both]
    rows, columns = np.nonzero(ink[0])
    square = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    size = rows.max() + 1 - rows.min()
    below = np.tri(size, columns.max() + 1 - columns.min(), dtype=bool)
    assert (ink[0][square] & ~below).mean() < 0.05
    assert (ink[1][square] & below).mean() < 0.05
    assert min(part.mean() for part in (ink[0][square], ink[1][square])) > 0.3


def test_plot_draws_into_given_axes() -> None:
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().subplots()
    assert plot(causal, 13, axes=axes) is axes
    assert axes.images[0].get_array().shape == (13, 13)
    assert axes.texts[0].get_text() == "causal\n91 of 169 pairs (53.8 %)"


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"ends in '.bmp'.*\.png"):
        save_picture(causal, tmp_path / "a.bmp", 5)


def test_without_matplotlib_the_extra_is_named_and_svg_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not can_plot()
    with pytest.raises(PictureError, match=r"pip install 'truemask\[plot\]'"):
        save_picture(causal, tmp_path / "a.png", 5)
    assert save_picture(causal, tmp_path / "a.svg", 5).is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(causal.to_dense(3)[0, 0], torch.ones(3, 3).tril().bool())

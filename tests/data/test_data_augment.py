"""Augmentations: seeded, in range, of the right shape, and exact where they can be."""

from __future__ import annotations

import colorsys

import pytest
import torch

from ffengine.data import augment, colour

OPS = {
    "crop": augment.RandomCrop(2),
    "flip": augment.RandomHorizontalFlip(),
    "rotation": augment.RandomRotation(30),
    "scale": augment.RandomScale(0.7, 1.4),
    "jitter": augment.ColourJitter(0.5, 0.5, 0.5, 0.2),
}
OPS["all"] = augment.Compose(tuple(OPS.values()))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 16, c: int = 3, h: int = 9, w: int = 12) -> torch.Tensor:
    return torch.rand(n, c, h, w, generator=seeded(99))


@pytest.mark.parametrize("name", OPS)
def test_seeded_shaped_and_in_range(name):
    x, op = images(), OPS[name]
    before = x.clone()
    out = op(x, seeded(1))
    assert out.shape == x.shape and out.dtype == x.dtype and torch.equal(x, before)
    assert torch.equal(out, op(x, seeded(1))) and not torch.equal(out, op(x, seeded(2)))
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    assert not torch.equal(out, x)
    assert op(x[:0], seeded()).shape == (0, 3, 9, 12)


IDENTITIES = [
    augment.RandomCrop(0),
    augment.RandomHorizontalFlip(0.0),
    augment.RandomRotation(0),
    augment.RandomScale(1, 1),
    augment.ColourJitter(),
    augment.ColourJitter(hue=0.0),
    augment.Compose(()),
]


@pytest.mark.parametrize("op", IDENTITIES, ids=repr)
def test_nothing_asked_is_nothing_changed(op):
    assert torch.equal(op(images(), seeded()), images())


def test_flip_is_exact():
    x = images()
    assert torch.equal(augment.RandomHorizontalFlip(1.0)(x, seeded()), x.flip(-1))
    some = augment.RandomHorizontalFlip()(x, seeded())
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(some, x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(some, x, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True)) and 0 < sum(flipped) < 16


def test_crop_cuts_windows_of_the_padded_image():
    x, padding = images(64), 2
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    seen = set()
    for image, source in zip(augment.RandomCrop(padding)(x, seeded()), padded, strict=True):
        places = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(image, source[:, top : top + 9, left : left + 12])
        ]
        assert len(places) == 1
        seen.update(places)
    assert {t for t, _ in seen} == {lf for _, lf in seen} == set(range(5))
    assert augment.RandomCrop(0, size=(4, 5))(x, seeded()).shape == (64, 3, 4, 5)


@pytest.mark.parametrize("h, w", [(8, 8), (7, 7)])
@pytest.mark.parametrize("quarters", [-1, 0, 1, 2])
def test_quarter_turns_equal_rot90(h, w, quarters):
    x = images(3, 2, h, w)
    out = augment.affine(x, torch.full((3,), 90.0 * quarters), torch.ones(3))
    torch.testing.assert_close(out, torch.rot90(x, quarters, (2, 3)), rtol=0, atol=1e-5)


def test_rotation_of_a_rectangle_keeps_lengths():
    """A bar of 5 pixels along x is one of 5 pixels along y after a quarter turn."""
    x = torch.zeros(1, 1, 9, 21)
    x[..., 4, 8:13] = 1
    out = augment.affine(x, torch.tensor([90.0]), torch.ones(1))
    expected = torch.zeros_like(x)
    expected[..., 2:7, 10] = 1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_scale_magnifies():
    x = torch.zeros(1, 1, 16, 16)
    x[..., 6:10, 6:10] = 1
    out = augment.affine(x, torch.zeros(1), torch.tensor([2.0]))
    assert out.sum() == pytest.approx(4 * 16, rel=0.1) and out[0, 0, 8, 8] == 1


def test_hue_against_the_standard_library():
    x = images(4, 3, 3, 3)
    turn = torch.tensor([0.1, -0.3, 0.5, 0.0])
    out = colour.hue(x, turn)
    for n in range(4):
        for i in range(9):
            h, s, v = colorsys.rgb_to_hsv(*x[n].flatten(1)[:, i].tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + float(turn[n])) % 1, s, v))
            torch.testing.assert_close(out[n].flatten(1)[:, i], expected, rtol=0, atol=1e-5)
    grey = torch.rand(2, 1, 3, 3, generator=seeded()).expand(2, 3, 3, 3)
    torch.testing.assert_close(colour.hue(grey, torch.tensor([0.2, 0.4])), grey)


def test_colour_end_points():
    x, one, zero = images(), torch.ones(16), torch.zeros(16)
    for change in (colour.brightness, colour.contrast, colour.saturation):
        torch.testing.assert_close(change(x, one), x)
    assert not colour.brightness(x, zero).any()
    assert torch.allclose(colour.contrast(x, zero).flatten(1).std(1), zero, atol=1e-6)
    grey = colour.saturation(x, zero)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])


def test_jitter_of_one_channel():
    x = images(c=1)
    assert augment.ColourJitter(0.3, 0.3)(x, seeded()).shape == x.shape
    with pytest.raises(ValueError, match=r"\[augment\] saturation and hue need 3 channels, got 1"):
        augment.ColourJitter(hue=0.1)(x, seeded())


def test_one_strength_does_not_move_the_others_numbers():
    x = images()
    plain = augment.ColourJitter(brightness=0.4)(x, seeded())
    more = augment.ColourJitter(brightness=0.4, hue=1e-9)(x, seeded())
    torch.testing.assert_close(plain, more)


def test_build():
    assert augment.build() is None
    made = augment.build(crop=4, flip=True, rotation=15, scale=(0.9, 1.1), hue=0.1)
    assert made is not None and [type(o).__name__ for o in made.ops] == [
        "RandomCrop",
        "RandomHorizontalFlip",
        "RandomRotation",
        "RandomScale",
        "ColourJitter",
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: augment.RandomCrop(-1),
        lambda: augment.RandomHorizontalFlip(2),
        lambda: augment.RandomRotation(-5),
        lambda: augment.RandomScale(0, 1),
        lambda: augment.ColourJitter(brightness=-1),
        lambda: augment.ColourJitter(hue=0.6),
        lambda: augment.RandomCrop(0, size=(99, 1))(images(), seeded()),
    ],
)
def test_bad_settings_are_one_line(make):
    with pytest.raises(ValueError, match=r"^\[augment\] .*, got ") as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, options", [
    ("crop4+rotate15+flip", {"crop": 4, "rotation": 15, "flip": True}),
    ("flip + rotate + crop", {"crop": 4, "rotation": 15, "flip": True}),
    ("scale0.8-1.25", {"scale": (0.8, 1.25)}),
    ("scale", {"scale": (0.9, 1.1)}),
    ("brightness0.4+contrast0.3+saturation0.2+hue0.1",
     {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}),
])
def test_by_name(text, options):
    made = augment.by_name(text)
    assert made is not None and made == augment.build(**options)
    x = images()
    assert torch.equal(made(x, seeded(1)), augment.build(**options)(x, seeded(1)))


def test_by_name_none():
    assert augment.by_name("none") is None and augment.by_name("crop0") is None


@pytest.mark.parametrize("text, message", [
    ("crp4", "expected words out of crop, flip, rotate, .*, joined by \\+, got 'crp4'"),
    ("", "joined by \\+, got ''"),
    ("crop4++flip", "got ''"),
    ("crop-4", "got 'crop-4'"),
    ("crop4.5", "whole number of pixels to crop, got 4.5"),
    ("crop4+crop2", "each word once, got 'crop4\\+crop2'"),
    ("flip0.3", "numbers after flip must be 0, got 'flip0.3'"),
    ("hue", "numbers after hue must be 1, got 'hue'"),
    ("scale0.9", "numbers after scale must be 2, got 'scale0.9'"),
    ("scale1.2-0.8", "need 0 < low <= high"),
    ("hue0.7", "hue must be in 0..0.5, got 0.7"),
    ("rotate" + "1" * 60 + "!", "joined by"),
])
def test_by_name_errors(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        augment.by_name(text)
    assert str(caught.value).startswith("[augment] ") and "\n" not in str(caught.value)

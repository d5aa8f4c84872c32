"""Pictures are read as viewers and transformers show them: EXIF orientation, every mode, every
form."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

import interp
from interp import vision
from interp.errors import InputError
from interp.vision.overlay import overlay

#: what each orientation does to the stored picture, by numpy: (turns counter-clockwise, mirrored
#: left to right before)
TURNS = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (3, 0), 7: (3, 1), 8: (1, 0)}


def pixels(height: int = 16, width: int = 24) -> np.ndarray:
    """Blocks of 8 with a colour each, which survive JPEG."""
    colours = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3))
    return np.kron(colours, np.ones((8, 8, 1))).astype(np.uint8)


def turned(a: np.ndarray, orientation: int) -> np.ndarray:
    turns, mirrored = TURNS[orientation]
    return np.rot90(a[:, ::-1] if mirrored else a, turns)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "tiff"])
def test_every_orientation_in_every_form(orientation: int, form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"phone.{form}"
    more: dict[str, Any] = dict(quality=100, subsampling=0) if form == "jpeg" else {}
    more = dict(lossless=True) if form == "webp" else more
    Image.fromarray(pixels()).save(file, exif=exif, **more)
    wanted = turned(pixels(), orientation).astype(int)
    assert np.array_equal(np.asarray(load_image(str(file))), np.asarray(vision.read_image(file)))
    sources = [file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes()), Image.open(file)]
    for source in sources:
        picture = vision.read_image(source)
        assert picture.mode == "RGB" and picture.getexif().get(0x0112, 1) == 1
        assert np.abs(np.asarray(picture).astype(int) - wanted).max() < 6  # JPEG
        # read once more nothing turns
        assert np.array_equal(np.asarray(vision.read_image(picture)), np.asarray(picture))


def test_the_model_and_the_overlay_see_it_upright(tmp_path: Path) -> None:
    model = interp.load("llava")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "phone.png"
    Image.fromarray(pixels(64, 96)).save(file, exif=exif)
    upright = np.ascontiguousarray(turned(pixels(64, 96), 6))
    wanted = vision.with_images(model, "describe the picture :", [upright])["pixel_values"]
    for source in (file, Image.open(file), file.read_bytes(), upright):
        found = vision.with_images(model, "describe the picture :", [source])["pixel_values"]
        assert torch.equal(found, wanted)
        drawn = overlay(model, source, "describe the picture :", "L1H0").image()
        assert np.array_equal(np.asarray(drawn), upright)


def test_modes_are_those_of_load_image(tmp_path: Path) -> None:
    rgb = Image.fromarray(pixels())
    grey = rgb.convert("L")
    opaque = rgb.copy()
    opaque.putalpha(255)
    made = dict(
        L=grey,
        P=rgb.quantize(16),
        RGBA=opaque,
        LA=grey.convert("LA"),
        CMYK=rgb.convert("CMYK"),
        one=grey.convert("1"),
        YCbCr=rgb.convert("YCbCr"),
    )
    for name, picture in made.items():
        file = tmp_path / f"{name}.{'tif' if name in ('CMYK', 'YCbCr') else 'png'}"
        picture.save(file)
        wanted = np.asarray(load_image(str(file)))
        for source in (file, picture, file.read_bytes()):
            assert np.array_equal(np.asarray(vision.read_image(source)), wanted), name


@pytest.mark.filterwarnings("ignore:.*transparent parts")
def test_transparent_parts_are_told(tmp_path: Path) -> None:
    clear = Image.fromarray(pixels())
    mask = np.full((16, 24), 255, np.uint8)
    mask[:8] = 0
    clear.putalpha(Image.fromarray(mask))
    clear.save(tmp_path / "clear.png")
    with pytest.warns(UserWarning, match=r"clear\.png has transparent parts"):
        found = vision.read_image(tmp_path / "clear.png")
    assert np.array_equal(np.asarray(found), np.asarray(load_image(str(tmp_path / "clear.png"))))
    palette = Image.fromarray(pixels()).quantize(8)
    palette.info["transparency"] = 0
    with pytest.warns(UserWarning, match="transparent parts"):
        vision.read_image(palette)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 16 * 24).reshape(16, 24).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.asarray(vision.read_image(tmp_path / "deep.png"))
    assert np.abs(found[..., 0] - values / 257).max() <= 0.5 and (found == found[..., :1]).all()
    with pytest.raises(InputError, match="mode I"):
        vision.read_image(Image.fromarray(values.astype(np.int32)))
    with pytest.raises(InputError, match="mode F"):
        vision.read_image(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (10, 120, 240)]
    for form in ("gif", "webp"):
        file = tmp_path / f"moving.{form}"
        frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
        found = np.asarray(vision.read_image(file))
        assert np.array_equal(found, np.asarray(load_image(str(file)))) and found.max() < 14
    second = Image.open(tmp_path / "moving.webp")
    second.seek(1)  # a PIL picture is the frame it stands at
    assert np.abs(np.asarray(vision.read_image(second)).astype(int) - 120).max() < 4


def test_arrays_and_tensors() -> None:
    a = pixels()
    wanted = np.asarray(vision.read_image(a))
    assert np.array_equal(wanted, a)
    forms = [a / 255.0, (a / 255).astype(np.float32), a.astype(np.int64), a.transpose(2, 0, 1),
             torch.from_numpy(a), torch.from_numpy(a).permute(2, 0, 1) / 255,
             np.dstack([a, np.full(a.shape[:2], 255, np.uint8)])]  # fmt: skip
    for form in forms:
        assert np.array_equal(np.asarray(vision.read_image(form)), a)
    assert np.array_equal(np.asarray(vision.read_image(a[..., 0]))[..., 1], a[..., 0])
    for bad in (a / 255 - 1, a.astype(int) * 2, a[None], np.zeros((0, 4, 3)), a / np.nan, "a" * 3):
        with pytest.raises(InputError):
            vision.read_image(bad)


def test_what_is_no_picture(tmp_path: Path) -> None:
    Image.fromarray(pixels(160, 240)).save(tmp_path / "whole.jpg")
    cut = (tmp_path / "whole.jpg").read_bytes()[:700]
    (tmp_path / "cut.jpg").write_bytes(cut)
    for source, says in (
        (tmp_path / "cut.jpg", "can't be read"),
        (cut, "700 bytes can't be read"),
        (b"", "can't be read"),
        (tmp_path, "can't be read"),
        ("http://example.org/a.png", "download it first"),
        (None, "NoneType"),
        (tmp_path / "none.png", "no image"),
    ):
        with pytest.raises(InputError, match=says):
            vision.read_image(source)

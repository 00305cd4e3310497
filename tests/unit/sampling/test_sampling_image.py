"""Reading the condition image, and fitting it as training clips are fitted."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import frame_pattern, make_video
from PIL import Image

from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.data.transforms import resize_and_crop
from megatron_flashi2v.runtime.logging import logging_to_stderr
from megatron_flashi2v.sampling.image import fit_image, load_image


def picture(height=6, width=10):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_is_read_exactly(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.dtype == torch.uint8 and image.shape == (3, 6, 10)
    assert np.array_equal(image.permute(1, 2, 0), picture())


def test_orientation_of_cameras_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to view"
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "a.png").permute(1, 2, 0), np.rot90(picture(), -1))


def test_transparent_pixels_lie_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255  # black above, transparent black below
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert not image[:, :2].any() and (image[:, 2:] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode, tmp_path):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new(mode, (5, 4)).save(tmp_path / name)
    assert load_image(tmp_path / name).shape == (3, 4, 5)


def test_sixteen_bit_levels_are_scaled(tmp_path):
    levels = np.array([[0, 256 * 100, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[0].tolist() == [[0, 100, 255]]


def test_first_frame_of_a_video_is_taken(tmp_path):
    image = load_image(make_video(tmp_path / "a.mp4", frames=3, height=32, width=48))
    assert image.shape == (3, 32, 48)
    difference = image.permute(1, 2, 0).numpy().astype(float) - frame_pattern(0, 32, 48)
    assert np.abs(difference).mean() < 6  # lossy


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "no such file"),
        ("text.png", b"not a picture", "neither a picture nor a video"),
        ("empty.jpg", b"", "neither a picture nor a video"),
    ],
)
def test_files_that_are_no_image_are_the_users_error(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        load_image(tmp_path / name)


def test_truncated_picture_is_the_users_error(tmp_path):
    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(DataError, match="a.png: damaged picture"):
        load_image(tmp_path / "a.png")


def test_an_address_given_for_a_file_keeps_its_key_to_itself():
    with pytest.raises(DataError, match="no such file") as caught:
        fit_image("https://user:word@host/a.png?X-Amz-Signature=SECRET", 16, 24)
    assert "SECRET" not in str(caught.value) and "word" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_an_array_that_cannot_be_written_is_an_image_too():
    array = picture(16, 24)
    array.flags.writeable = False
    assert torch.equal(fit_image(array, 16, 24), torch.from_numpy(array.copy()).permute(2, 0, 1))


def test_folder_is_no_image(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_image(tmp_path)


def test_fit_is_the_training_transform():
    frame = torch.from_numpy(picture(30, 70)).permute(2, 0, 1)
    fitted = fit_image(frame, 16, 24)
    assert fitted.dtype == torch.uint8 and torch.equal(fitted, resize_and_crop(frame[None], 16, 24)[0])
    assert torch.equal(fit_image(Image.fromarray(picture(30, 70)), 16, 24), fitted)


@pytest.mark.parametrize("kind", ["F", "I", "I;16", "RGBA", "LAB"])
def test_images_in_memory_are_read_as_files_are(kind, tmp_path):
    """What FlashI2VPipeline is given passes the same function as what prepare and sample read."""
    grey = np.linspace(0, 255, 30 * 70).reshape(30, 70)
    image = {
        "F": lambda: Image.fromarray((grey / 255).astype(np.float32)),
        "I": lambda: Image.fromarray((grey * 257).astype(np.int32)),
        "I;16": lambda: Image.fromarray((grey * 257).astype(np.uint16)),
        "RGBA": lambda: Image.fromarray(picture(30, 70)).convert("RGBA"),
        "LAB": lambda: Image.merge("LAB", [Image.fromarray(picture(30, 70)[..., band]) for band in range(3)]),
    }[kind]()
    image.save(tmp_path / "a.tif")
    fitted = fit_image(image, 16, 24)
    assert torch.equal(fitted, fit_image(tmp_path / "a.tif", 16, 24))
    assert fitted.min() < 60 and fitted.max() > 195


def test_images_without_a_white_are_the_users_error(tmp_path):
    Image.fromarray(np.array([[0.0, 1e7]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: the picture has floating levels of 0 to 1e\+07.*give another file"):
        load_image(tmp_path / "a.tif")
    with pytest.raises(DataError, match="^the picture has floating levels"):
        fit_image(Image.open(tmp_path / "a.tif"), 16, 24)


def test_fit_keeps_an_image_of_the_right_size():
    frame = torch.from_numpy(picture(16, 24)).permute(2, 0, 1)
    assert torch.equal(fit_image(frame, 16, 24), frame)


@pytest.mark.parametrize(("tensor", "words"), [
    (torch.zeros(3, 4, 4, dtype=torch.int16), "uint8"), (torch.zeros(4, 4, dtype=torch.uint8), "shape"),
])  # fmt: skip
def test_malformed_tensors_are_refused(tensor, words):
    with pytest.raises(ConfigError, match=words):
        fit_image(tensor, 16, 24)


def test_a_crop_is_told_once_with_its_loss(capsys):
    with logging_to_stderr():
        for _ in range(2):
            fit_image(torch.zeros((3, 60, 60), dtype=torch.uint8), 48, 80)
        fit_image(torch.zeros((3, 48, 81), dtype=torch.uint8), 48, 80)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a picture of 60 x 60 pixels is cropped at its centre to the shape of 80 x 48" in said
    assert "cuts off 40% of it" in said
    with logging_to_stderr():
        fit_image(torch.zeros((3, 48, 81), dtype=torch.uint8), 48, 80)
    assert capsys.readouterr().err == ""

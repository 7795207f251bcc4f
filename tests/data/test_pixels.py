"""Images of every kind become what a viewer shows, upright RGB with 8 bits per channel, or are refused."""

import io

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFile, features

from data.convert import Storage, encode
from data.originals import UNREADABLE
from data.pixels import open_image, upright_rgb
from data.sources import open_source
from tests.damage import bytes_of
from tests.pictures import photograph, write_class_folders

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
RAMP_8 = np.round(RAMP / 65535 * 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(contents: bytes) -> np.ndarray:
    image = upright_rgb(Image.open(io.BytesIO(contents)))
    assert image.mode == "RGB"
    return np.asarray(image)


def grays(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def claiming(jpeg: bytes, side: int) -> bytes:
    """The JPEG with a frame header that claims this many pixels per side."""
    frame = next(jpeg.find(bytes([0xFF, kind])) for kind in (0xC0, 0xC2) if bytes([0xFF, kind, 0]) in jpeg)
    return jpeg[: frame + 5] + side.to_bytes(2, "big") * 2 + jpeg[frame + 9 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [2000, 13000, 16000, 65535])
def test_a_jpeg_is_refused_by_its_header_where_its_bytes_cannot_hold_its_pixels(tmp_path, side):
    jpeg = saved(photograph(0, 16, 16), "JPEG", quality=10)
    assert len(jpeg) < 700
    (tmp_path / "bomb.jpg").write_bytes(claiming(jpeg, side))
    # Pillow refuses the largest by itself.
    with pytest.raises((ValueError, Image.DecompressionBombError), match="cannot hold|exceeds limit"):
        open_image(str(tmp_path / "bomb.jpg"))
    with pytest.raises((ValueError, Image.DecompressionBombError), match="cannot hold|exceeds limit"):
        open_image(io.BytesIO(claiming(jpeg, side)))


@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF"])
def test_fuzz_images(kind, data):
    """Either an image or an error with its reason, without memory for more pixels than the bytes can hold."""
    contents = data.draw(bytes_of(saved(photograph(0, 24, 32), kind)))
    try:
        seen = upright_rgb(open_image(io.BytesIO(contents)))
    except UNREADABLE as error:
        assert str(error)
        event("refused")
    else:
        event("read")
        assert seen.mode == "RGB"


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"quality": 1, "subsampling": "4:2:0"}])
def test_blank_images_are_not_refused(mode, options):
    """Nothing compresses better."""
    jpeg = saved(Image.new(mode, (3000, 3000), "white"), "JPEG", **options)
    assert open_image(io.BytesIO(jpeg)).size == (3000, 3000)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICO", "JPEG2000"])
def test_no_other_kind_of_file_is_opened_whatever_its_name(tmp_path, kind):
    """PostScript would be passed to an interpreter."""
    file = tmp_path / "picture.jpg"
    file.write_bytes(saved(photograph(0, 20, 20), kind))
    assert Image.open(file).format in (kind, "ICO")
    with pytest.raises(ValueError, match="^cannot identify image file$"):
        open_image(str(file))


# How each orientation is undone; comments: the sides at which row 0 and column 0 are seen, by the EXIF standard.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # row 0 at the top, column 0 at the right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_orientation(kind, orientation):
    image = photograph(1, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    contents = saved(image, kind, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(saved(image, kind))))
    np.testing.assert_array_equal(seen(contents), TURNED[orientation](stored))


def test_an_upright_rgb_image_is_unchanged():
    image = photograph(1, 20, 30)
    np.testing.assert_array_equal(np.asarray(upright_rgb(image)), np.asarray(image))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_unreadable_orientation_is_ignored():
    contents = saved(photograph(1, 20, 30), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03")
    assert seen(contents).shape == (20, 30, 3)


def test_gray_and_black_and_white():
    values = np.asarray(photograph(2, 20, 30).convert("L"))
    np.testing.assert_array_equal(seen(saved(Image.fromarray(values), "PNG")), grays(values))
    black = values > 128
    np.testing.assert_array_equal(seen(saved(Image.fromarray(black), "PNG")), grays(black * np.uint8(255)))


@pytest.mark.parametrize(
    "contents",
    [
        saved(Image.fromarray(RAMP), "PNG"),
        saved(Image.fromarray(RAMP), "TIFF"),
        saved(Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes()), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "big-endian tiff", "tiff of 32 bits", "pgm"],
)
def test_16_bits_of_gray_keep_their_whole_range(contents):
    np.testing.assert_array_equal(seen(contents), grays(RAMP_8))


def test_16_bits_of_colour_keep_their_whole_range():
    colours = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=2)
    expected = np.stack([RAMP_8, RAMP_8.T, RAMP_8[::-1]], axis=2).astype(int)
    shown = seen(b"P6 256 256 65535\n" + colours.astype(">u2").tobytes())
    assert np.abs(shown - expected).max() <= 1


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(4))), st.sampled_from("RL"))
def test_alpha_is_composited_on_white(pixels, which):
    if which == "R":
        image, rgb = Image.fromarray(pixels), pixels[..., :3]
    else:
        image, rgb = Image.fromarray(np.ascontiguousarray(pixels[..., [0, 3]])), grays(pixels[..., 0])
    shown = seen(saved(image, "PNG"))
    alpha = pixels[..., 3]
    assert np.abs(shown - on_white(rgb, alpha)).max() <= 1
    np.testing.assert_array_equal(shown[alpha == 255], rgb[alpha == 255])
    assert (shown[alpha == 0] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_a_palette(kind):
    image = photograph(3, 20, 30).quantize(16)
    np.testing.assert_array_equal(seen(saved(image, kind)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette(kind):
    image = photograph(3, 20, 30).quantize(16)
    expected = np.array(image.convert("RGB"))
    expected[np.asarray(image) == 5] = 255
    np.testing.assert_array_equal(seen(saved(image, kind, transparency=5)), expected)


def test_a_palette_with_an_alpha_for_each_entry():
    image = photograph(3, 20, 30).quantize(16)
    alphas = np.arange(16, dtype=np.uint8) * 17
    shown = seen(saved(image, "PNG", transparency=alphas.tobytes()))
    expected = on_white(np.asarray(image.convert("RGB")), alphas[np.asarray(image)])
    assert np.abs(shown - expected).max() <= 1


def test_a_palette_and_alpha():
    image = photograph(3, 20, 30).quantize(16)
    alpha = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8))
    both = image.convert("PA")
    both.putalpha(alpha)
    assert both.mode == "PA"
    expected = on_white(np.asarray(image.convert("RGB")), np.asarray(alpha))
    assert np.abs(np.asarray(upright_rgb(both)) - expected).max() <= 1


def test_the_one_transparent_colour_of_a_png():
    pixels = np.array(photograph(4, 20, 30))
    pixels[3:9, 5:11] = (10, 20, 30)
    shown = seen(saved(Image.fromarray(pixels), "PNG", transparency=(10, 20, 30)))
    clear = (pixels == (10, 20, 30)).all(axis=2)
    np.testing.assert_array_equal(shown, np.where(clear[..., None], 255, pixels))
    gray = pixels[..., 0]
    np.testing.assert_array_equal(
        seen(saved(Image.fromarray(gray), "PNG", transparency=10)), grays(np.where(gray == 10, 255, gray))
    )
    np.testing.assert_array_equal(
        seen(saved(Image.fromarray(RAMP), "PNG", transparency=700)), grays(np.where(RAMP == 700, 255, RAMP_8))
    )


def cmyk_picture() -> tuple[Image.Image, np.ndarray]:
    """Smooth in all four inks, with the colour that full inks on white paper give."""
    inks = np.asarray(photograph(5, 64, 64).resize((64, 64)), dtype=np.float64)
    black = np.repeat(np.linspace(0, 120, 64)[None], 64, axis=0)
    four = np.concatenate([inks, black[..., None]], axis=2).astype(np.uint8)
    rgb = (255.0 - four[..., :3]) * (255.0 - four[..., 3:]) / 255
    return Image.frombytes("CMYK", (64, 64), four.tobytes()), rgb


def test_cmyk_as_adobe_writes_it():
    image, rgb = cmyk_picture()
    contents = saved(image, "JPEG", quality=98)
    assert Image.open(io.BytesIO(contents)).info["adobe_transform"] == 0  # inks are inverted in the file
    assert np.abs(seen(contents) - rgb).mean() < 2
    np.testing.assert_allclose(seen(saved(image, "TIFF")), rgb, atol=1)


def test_ycck():
    image, rgb = cmyk_picture()
    cyan, magenta, yellow, black = image.split()
    # A reader converts YCC to RGB, takes that as inverted inks, and inverts once more, because Adobe inverts inks; so
    # the file holds the YCC of the inks themselves. Pillow inverts when it writes.
    ycc = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    inverted = [plane.point(lambda value: 255 - value) for plane in ycc]
    contents = saved(Image.merge("CMYK", (*inverted, black)), "JPEG", quality=98)
    marker = contents.index(b"Adobe\0")
    contents = contents[: marker + 11] + b"\x02" + contents[marker + 12 :]
    assert Image.open(io.BytesIO(contents)).info["adobe_transform"] == 2
    assert np.abs(seen(contents) - rgb).mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    contents = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(contents)), "n_frames", 1) == 3
    assert np.abs(seen(contents).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX"])
def test_other_modes(mode):
    image = Image.new(mode, (3, 2))
    np.testing.assert_array_equal(np.asarray(upright_rgb(image)), np.asarray(image.convert("RGB")))


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="^floating-point pixels"):
        seen(saved(Image.fromarray(np.zeros((3, 3), np.float32)), "TIFF"))
    for value in (-1, 65536):
        with pytest.raises(ValueError, match="^32-bit pixels"):
            seen(saved(Image.fromarray(np.full((3, 3), value, np.int32)), "TIFF"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@given(share=st.floats(0, 0.98))
def test_a_jpeg_cut_off_anywhere_is_refused(options, share):
    contents = saved(photograph(6, 60, 80), "JPEG", **options)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        seen(contents[: int(len(contents) * share)])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_other_files_cut_off_are_refused(kind):
    contents = saved(photograph(6, 60, 80), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises((OSError, SyntaxError, ValueError)):
            seen(contents[: int(len(contents) * share)])


def test_truncated_images_are_not_allowed_by_a_setting():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_format_is_read_from_contents_not_from_endings(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 2)
    colours = {
        "a.jpg": ("PNG", "red"),
        "b.png": ("WEBP", "lime"),
        "c.JPEG": ("GIF", "blue"),
        "d.jfif": ("JPEG", "white"),
        "e.JPE": ("JPEG", "black"),
    }
    if features.check("avif"):
        colours["f.avif"] = ("AVIF", "yellow")
    for name, (kind, colour) in colours.items():
        (root / "class0" / name).write_bytes(saved(Image.new("RGB", (40, 40), colour), kind))
    (root / "class0" / "without_an_ending").write_bytes(saved(photograph(0, 40, 40), "JPEG"))
    source = open_source(str(root))
    items = {item.rpartition("/")[2]: item for split in (source.train, source.val) for item in split.items}
    assert {name for name in items if not name[0].isdigit()} == set(colours)
    for name, (_, colour) in colours.items():
        shown = np.asarray(upright_rgb(source.train.read(items[name]))).astype(int)
        assert np.abs(shown - np.asarray(Image.new("RGB", (1, 1), colour))).max() <= 6


def test_conversion_composites_on_white():
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8))
    clear.putalpha(0)
    stored = encode(Image.open(io.BytesIO(saved(clear, "PNG"))), Storage("raw"))
    assert stored.data == b"\xff" * (64 * 64 * 3)

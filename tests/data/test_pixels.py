"""Files that viewers show alike decode alike, and plain files keep their exact pixels."""

import ast
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import rpo
from rpo.data.pixels import (
    CONVERTED,
    ON_WHITE,
    ROUNDED,
    TURNED,
    UNFIT_PROFILE,
    as_seen,
    decode_image,
    rgb,
    upright_size,
)
from tests.data.samples import noise

SIZE = (24, 16)


def stored(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(data):
    return np.asarray(decode_image(data, "an image").image)


def turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def shape_mask():
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[4:12, 6:20] = 255
    return mask


def shown():
    """What every viewer shows of the transparent files: noise within a rectangle, white around it."""
    return np.where(shape_mask()[..., None] == 255, np.asarray(noise(1, SIZE)), 255).astype(np.uint8)


def rgba(hidden):
    colours = np.where(shape_mask()[..., None] == 255, np.asarray(noise(1, SIZE)), hidden).astype(np.uint8)
    return Image.fromarray(np.dstack([colours, shape_mask()]))


def wide_profile(gamma=1.8, space=b"RGB ", kind=b"mntr"):
    """A matrix profile with the primaries of Display P3."""
    s15 = lambda *values: b"".join(struct.pack(">i", round(value * 65536)) for value in values)  # noqa: E731
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    xyz = lambda *values: b"XYZ \0\0\0\0" + s15(*values)  # noqa: E731
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1, 0.8249),
    }
    if space == b"RGB ":
        tags |= {b"rXYZ": xyz(0.5151, 0.2412, -0.0011), b"gXYZ": xyz(0.292, 0.6922, 0.0419)}
        tags |= {b"bXYZ": xyz(0.1571, 0.0666, 0.7841), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags |= {b"kTRC": curve}
    body, table, at = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", at, len(value))
        body, at = body + value, at + len(value)
    head = struct.pack(">I4sI4s4s4s", at, b"none", 0x02100000, kind, space, b"XYZ ") + b"\0" * 12 + b"acsp" + b"\0" * 28
    head += s15(0.9642, 1, 0.8249)
    return head + b"\0" * (128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(data, added, before):
    at = data.index(before) - 4
    return data[:at] + added + data[at:]


PLAIN = {
    "png": stored(noise(1, SIZE)),
    "webp": stored(noise(1, SIZE), "WEBP", lossless=True),
    "tiff": stored(noise(1, SIZE), "TIFF"),
    "bmp": stored(noise(1, SIZE), "BMP"),
    "opaque rgba": stored(noise(1, SIZE).convert("RGBA")),
    "sRGB profile": stored(
        noise(1, SIZE), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    "upright by its metadata": stored(noise(1, SIZE), exif=turned(1)),
    "orientation that means nothing": stored(noise(1, SIZE), exif=turned(9)),
    "metadata that cannot be read": with_chunk(stored(noise(1, SIZE)), chunk(b"eXIf", b"junk"), b"IDAT"),
    "half of its metadata": with_chunk(stored(noise(1, SIZE)), chunk(b"eXIf", turned(6).tobytes()[6:16]), b"IDAT"),
    "a raw profile that is none": with_chunk(
        stored(noise(1, SIZE)), chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzz"), b"IDAT"
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_images_keep_their_exact_pixels(name):
    seen = decode_image(PLAIN[name], name)
    assert seen.image.mode == "RGB" and not seen.changes
    assert np.array_equal(np.asarray(seen.image), np.asarray(noise(1, SIZE)))
    assert upright_size(PLAIN[name], name) == SIZE


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255), (255, 255, 255)])
@pytest.mark.parametrize("form", ["png", "webp", "tiff", "premultiplied", "avif"])
def test_what_is_transparent_is_white_whatever_it_hides(hidden, form):
    image = rgba(hidden)
    if form == "premultiplied":
        seen = as_seen(image.convert("RGBa"))
    elif form == "avif":
        seen = decode_image(stored(image, "AVIF", quality=100, subsampling="4:4:4"), form)
        assert abs(np.asarray(seen.image).astype(int) - shown()).max() < 16
        return
    else:
        options = {"lossless": True, "exact": True} if form == "webp" else {}
        seen = decode_image(stored(image, form.upper(), **options), form)
    assert np.array_equal(np.asarray(seen.image), shown()) and seen.changes == (ON_WHITE,)


def test_half_transparent_is_half_way_to_white():
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 51))
    assert pixels(stored(image))[0, 0].tolist() == [204, 224, 244]
    assert pixels(stored(Image.new("LA", (2, 2), (0, 51))))[0, 0].tolist() == [204, 204, 204]


@pytest.mark.parametrize("hidden", [0, 90, 255])
@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_transparent_colours_of_a_palette(hidden, form):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([hidden, 7, 9, 200, 30, 30])
    image.paste(1, (2, 2, 6, 6))
    found = pixels(stored(image, form, transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255] and found[3, 3].tolist() == [200, 30, 30]


def test_a_palette_of_many_opacities():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 0, 0])
    assert pixels(stored(image, transparency=bytes([0, 204])))[0, 0].tolist() == [51, 51, 51]


@pytest.mark.parametrize(
    ("image", "key", "clear", "kept"),
    [
        (Image.new("L", (4, 4), 9), 9, (0, 0), None),
        (Image.new("RGB", (4, 4), (1, 2, 3)), (1, 2, 3), (0, 0), None),
        (Image.new("1", (4, 4), 0), 0, (0, 0), None),
        (Image.fromarray(np.full((4, 4), 3000, np.uint16)), 3000, (0, 0), None),
    ],
)
def test_one_colour_that_is_declared_transparent(image, key, clear, kept):
    assert pixels(stored(image, transparency=key))[clear].tolist() == [255, 255, 255]


def test_16_bits_are_rounded_to_8_and_not_saturated():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for form in ("PNG", "TIFF"):
        seen = decode_image(stored(Image.fromarray(ramp), form), form)
        assert np.array_equal(np.asarray(seen.image)[..., 1].ravel(), np.arange(256)) and seen.changes == (ROUNDED,)


@pytest.mark.parametrize("values", [np.full((4, 4), 3000, np.int32), np.full((4, 4), 0.5, np.float32)])
def test_numbers_without_a_white_are_refused(values):
    with pytest.raises(ValueError, match=r"^one cannot be decoded \(TypeError: mode . does not say which number is wh"):
        decode_image(stored(Image.fromarray(values), "TIFF"), "one")


UPRIGHT = np.asarray(noise(1, SIZE))
BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", BACK)
@pytest.mark.parametrize("place", ["PNG", "WEBP", "TIFF", "late eXIf", "XMP", "late XMP", "element", "raw profile"])
def test_every_orientation_in_every_place_is_obeyed(orientation, place):
    lying = noise(1, SIZE).transpose(BACK[orientation])
    exif = turned(orientation).tobytes()
    xmp = f'<x><rdf:Description tiff:Orientation="{orientation}"/></x>'
    if place == "element":
        xmp = f"<x><tiff:Orientation>{orientation}</tiff:Orientation></x>"
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode())
    raw = chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode())
    )
    if place in ("PNG", "WEBP", "TIFF"):
        data = stored(lying, place, exif=turned(orientation), **({"lossless": True} if place == "WEBP" else {}))
    elif place == "late eXIf":
        data = with_chunk(stored(lying), chunk(b"eXIf", exif[6:]), b"IEND")
    else:
        data = with_chunk(
            stored(lying), raw if place == "raw profile" else text, b"IEND" if "late" in place else b"IDAT"
        )
    seen = decode_image(data, place)
    assert np.array_equal(np.asarray(seen.image), UPRIGHT)
    assert upright_size(data, place) == SIZE
    assert place == "TIFF" or seen.changes == (TURNED,)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_profile_is_converted_to_srgb(form):
    options = {"quality": 100} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    profile = wide_profile()
    flat = Image.new("RGB", (16, 16), (40, 200, 60))
    seen = decode_image(stored(flat, form, icc_profile=profile, **options), form)
    right = ImageCms.profileToProfile(flat, io.BytesIO(profile), ImageCms.createProfile("sRGB"))
    assert abs(np.asarray(seen.image).astype(int) - np.asarray(right)).max() <= 3
    assert abs(np.asarray(seen.image).astype(int) - np.asarray(flat)).max() > 30
    assert seen.changes == (CONVERTED,)


def test_profile_transparency_and_turning_go_together():
    image = Image.new("RGBA", SIZE, (40, 200, 60, 255))
    image.paste((1, 2, 3, 0), (0, 0, 12, 16))
    plain = pixels(stored(Image.new("RGB", SIZE, (40, 200, 60)), icc_profile=wide_profile()))
    seen = decode_image(stored(image, icc_profile=wide_profile(), exif=turned(3)), "all")
    assert set(seen.changes) == {TURNED, CONVERTED, ON_WHITE}
    found = np.asarray(seen.image)
    assert (found[:, 12:] == 255).all() and np.array_equal(found[:, :12], plain[:, :12])


def test_palettes_and_greys_with_profiles():
    flat = Image.new("RGB", (8, 8), (40, 200, 60))
    assert np.array_equal(
        pixels(stored(flat.quantize(2), icc_profile=wide_profile())), pixels(stored(flat, icc_profile=wide_profile()))
    )
    grey = decode_image(stored(Image.new("L", (4, 4), 100), icc_profile=wide_profile(1.0, b"GRAY")), "grey")
    assert grey.changes == (CONVERTED,)
    assert np.asarray(grey.image)[0, 0].tolist() == [168] * 3  # linear 100 / 255 as sRGB


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("RGB", b"junk"), ("RGB", wide_profile()[:200]), ("RGB", wide_profile(1.8, b"GRAY")), ("L", wide_profile())],
)
def test_a_profile_that_cannot_be_used_is_counted(mode, profile):
    image = noise(1, SIZE).convert(mode)
    seen = decode_image(stored(image, icc_profile=profile), "odd")
    assert seen.changes == (UNFIT_PROFILE,)
    assert np.array_equal(np.asarray(seen.image), np.asarray(image.convert("RGB")))


def test_an_image_that_is_too_large_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (decode_image, upright_size):
        with pytest.raises(
            ValueError, match=r"^metadata\.jsonl:3 is too large to be decoded safely \(.*; shrink it or rem"
        ):
            read(stored(noise(1, SIZE)), "metadata.jsonl:3")


def test_postscript_is_refused_before_ghostscript_runs_it(monkeypatch):
    runs = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given, **more: runs.append(given))
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    for read in (decode_image, upright_size):
        with pytest.raises(ValueError, match="page 7"):
            read(stream.getvalue(), "page 7")
    assert not runs


def test_an_open_image_is_read_like_a_file():
    with Image.open(io.BytesIO(stored(rgba((9, 9, 9)), exif=turned(3)))) as image:
        assert np.array_equal(np.asarray(rgb(image)), shown()[::-1, ::-1])
    assert np.array_equal(np.asarray(rgb(noise(1, SIZE))), np.asarray(noise(1, SIZE)))


def test_nothing_else_opens_or_converts_images():
    allowed = {
        "data/pixels.py": {"open", "convert"},
        "data/writers.py": {"open"},
        "reports/training.py": {"open", "convert"},
    }
    root = Path(rpo.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            is_open = ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
            is_convert = node.func.attr == "convert" and ast.unparse(node.args) in ("'RGB'", "'RGBA'", "'L'")
            if is_open or is_convert:
                assert node.func.attr in allowed.get(path.relative_to(root).as_posix(), set()), f"{path}:{node.lineno}"

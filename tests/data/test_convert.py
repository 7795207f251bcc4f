"""Conversion: stored images, skipped images listed by name, no incomplete sets, reproducible bytes."""

import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataError
from data.beton import Beton
from data.convert import Storage, convert_source, encode, ensure_converted
from data.sets import Unconverted, find_set, open_set
from data.sources import Split, open_source
from tests.paths import python_path
from tests.pictures import photograph, write_class_folders

ROOT = Path(__file__).parents[2]


def run_convert(*words, **options):
    command = [sys.executable, "-m", "data.convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def test_images_are_stored_upright_in_order(converted, image_folder):
    beton = Beton(converted.beton("train"))
    source = open_source(str(image_folder))
    assert beton.labels.tolist() == source.train.labels.tolist()
    for i in (0, 20, 47):
        original = np.asarray(Image.open(source.train.items[i]), dtype=float)
        stored = np.asarray(Image.open(io.BytesIO(beton.encoded(i).tobytes())), dtype=float)
        assert stored.shape == original.shape
        assert np.abs(stored - original).mean() < 4


def test_stored_as_baseline_420(converted):
    beton = Beton(converted.beton("train"))
    image = Image.open(io.BytesIO(beton.encoded(0).tobytes()))
    assert image.mode == "RGB"
    assert not image.info.get("progressive")
    assert [(h, v) for _, h, v, _ in image.layer] == [(2, 2), (1, 1), (1, 1)]


def test_the_set_describes_itself(converted):
    again = open_set(converted.folder)
    assert again == converted
    assert again.class_names == ("class0", "class1", "class2")
    assert again.resolution == 64
    assert again.made["rejects"] == 0


def test_a_set_of_the_previous_format_opens(converted, tmp_path):
    """In that format, the resolution was a part of the crop rule."""
    shutil.copytree(converted.folder, tmp_path / "set")
    described = json.loads((tmp_path / "set" / "set.json").read_text())
    described["crop"]["resolution"] = described.pop("resolution")
    (tmp_path / "set" / "set.json").write_text(json.dumps(described | {"format": 2}))
    before = open_set(tmp_path / "set")
    assert (before.resolution, before.crop) == (converted.resolution, converted.crop)
    assert before.fingerprint == converted.fingerprint
    (tmp_path / "set" / "set.json").write_text(json.dumps(described | {"format": 1}))
    with pytest.raises(DataError, match="written by another version; convert the set again"):
        open_set(tmp_path / "set")


def test_same_input_same_bytes(image_folder, converted, tmp_path):
    again = convert_source(open_source(str(image_folder)), tmp_path / "again", processes=2)
    for split in ("train", "val"):
        assert again.beton(split).read_bytes() == converted.beton(split).read_bytes()


def test_large_images_are_reduced_and_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    buffer = io.BytesIO()
    photograph(0, 300, 600).save(buffer, "JPEG", exif=exif)
    stored = encode(Image.open(buffer), Storage())
    assert (stored.height, stored.width) == (512, 256)
    assert Image.open(io.BytesIO(stored.data)).size == (256, 512)
    raw = encode(Image.open(buffer), Storage("raw", 64))
    assert (raw.height, raw.width, len(raw.data), raw.raw) == (64, 32, 64 * 32 * 3, True)


def test_broken_images_are_skipped_and_listed(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 6)
    (root / "class0" / "000.jpg").write_bytes((root / "class0" / "000.jpg").read_bytes()[:700])
    (root / "class1" / "text.png").write_text("not an image")
    done = run_convert("--data", root, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rejects = (tmp_path / "out" / "rejects.txt").read_text().splitlines()
    assert sorted(line.split(": ")[0] for line in rejects) == [f"{root}/class0/000.jpg", f"{root}/class1/text.png"]
    assert "2 images could not be read" in done.stdout
    assert "000.jpg" in done.stderr
    converted = open_set(tmp_path / "out")
    assert Beton(converted.beton("train")).num_samples + Beton(converted.beton("val")).num_samples == 11


def test_the_names_of_stored_images_are_kept_in_their_order(tmp_path):
    """Names of any bytes, without skipped images, and the same from an archive as from its folder."""
    root = tmp_path / "set"
    for part, seed in (("train", 0), ("val", 50)):
        write_class_folders(root / part, 2, 4, seed=seed)
    first = root / "train" / "class0"
    os.rename(first / "000.jpg", os.fsencode(first) + b"/caf\xe9.jpg")
    (first / "001.jpg").write_text("not an image")
    (first / "002.jpg").rename(first / "two\nlines.jpg")
    (first / "deeper").mkdir()
    (first / "003.jpg").rename(first / "deeper" / "003.JPEG")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(root, "set")
    of_folder, of_archive = (
        convert_source(open_source(str(path)), tmp_path / name, processes=1)
        for path, name in ((root, "folder"), (tmp_path / "set.tar", "archive"))
    )
    names = of_folder.image_names("train")
    assert names == [
        *("class0/caf\udce9.jpg", "class0/deeper/003.JPEG", "class0/two\nlines.jpg"),
        *(f"class1/{number:03}.jpg" for number in range(4)),
    ]
    assert of_archive.image_names("train") == names
    assert of_archive.fingerprint == of_folder.fingerprint
    assert of_folder.image_names("val")[0] == "class0/000.jpg"
    beton = Beton(of_folder.beton("train"))
    for index, name in enumerate(names):
        with Image.open(root / "train" / name) as image:
            assert beton.encoded(index).tobytes() == encode(image, Storage()).data


def test_a_set_without_image_names_opens_and_refuses_to_name_images(converted, tmp_path):
    """Sets of an earlier version, or of images that come from no files."""
    shutil.copytree(converted.folder, tmp_path / "set")
    (tmp_path / "set" / "train.names.json").unlink()
    before = open_set(tmp_path / "set")
    assert before.fingerprint == converted.fingerprint
    with pytest.raises(DataError, match="set: holds no file names of its images; remove it and convert the folder"):
        before.image_names("train")
    assert before.image_names("val") == converted.image_names("val")
    source = open_source("scenes")
    few = Split(source.train.items[:2], source.train.labels[:2], source.train.read)
    drawn = convert_source(replace(source, train=few, val=few), tmp_path / "scenes", processes=1)
    assert sorted(os.listdir(drawn.folder)) == ["rejects.txt", "set.json", "train.beton", "val.beton"]


@pytest.mark.parametrize(
    "harm", [lambda text: text[:-20], lambda text: '["class0/000.jpg"]', lambda text: f"{[1] * 48}"]
)
def test_damaged_names_are_refused(converted, tmp_path, harm):
    shutil.copytree(converted.folder, tmp_path / "set")
    path = tmp_path / "set" / "train.names.json"
    path.write_text(harm(path.read_text()))
    with pytest.raises(DataError, match=r"train.names.json: damaged; convert the set again"):
        open_set(tmp_path / "set").image_names("train")


def test_a_script_without_a_guard_converts_once(tmp_path):
    """Python runs the script again in each started process, unless this is prevented."""
    write_class_folders(tmp_path / "images" / "train", 2, 3)
    write_class_folders(tmp_path / "images" / "val", 2, 1)
    script = tmp_path / "script.py"
    script.write_text(
        "print('begun', flush=True)\nfrom data.convert import convert\nconvert('images', 'set', processes=2)\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1
    assert Beton(tmp_path / "set" / "train.beton").num_samples == 6


def test_a_split_without_a_readable_image_is_refused(tmp_path):
    root = tmp_path / "set"
    for label in "ab":
        (root / label).mkdir(parents=True)
        for name in "12":
            (root / label / f"{name}.jpg").write_text("nothing")
    done = run_convert("--data", root, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "none of its 2 images could be read" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ["set"]


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(image_folder, tmp_path):
    """A limit on file size simulates a full disk: the write fails in the same place."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = run_convert("--data", image_folder, "--out", tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: could not be written")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_existing_files_are_not_overwritten(image_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    done = run_convert("--data", image_folder, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_folder_is_converted_once_and_again_when_it_changes(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 4)
    first = find_set(str(root), cache=tmp_path / "cache")
    assert isinstance(first, Unconverted)
    assert not first.stale
    made = ensure_converted(first)
    assert find_set(str(root), cache=tmp_path / "cache") == made
    assert find_set(str(made.folder)) == made
    photograph(77, 70, 70).save(root / "class1" / "new.jpg")
    changed = find_set(str(root), cache=tmp_path / "cache")
    assert isinstance(changed, Unconverted)
    assert changed.stale
    assert Beton(ensure_converted(changed).beton("train")).fingerprint != ""
    assert not isinstance(find_set(str(root), cache=tmp_path / "cache"), Unconverted)


def test_two_folders_of_one_name_do_not_mix(tmp_path):
    for place in ("a", "b"):
        write_class_folders(tmp_path / place / "set", 2, 3)
    folders = [find_set(str(tmp_path / place / "set"), cache=tmp_path / "cache").folder for place in ("a", "b")]
    assert folders[0] != folders[1]


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', '{"format": 1, "name": 3}'])
def test_a_damaged_description_is_refused(tmp_path, text):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DataError, match="set.json"):
        open_set(tmp_path)


def test_options_are_checked(image_folder, tmp_path):
    for words, says in [
        (["--quality", "0"], "quality=0"),
        (["--max_resolution", "4"], "max_resolution=4"),
        (["--qualty", "3"], "unrecognized arguments: --qualty"),
        (["--quality", "best"], "quality"),
    ]:
        done = run_convert("--data", image_folder, "--out", tmp_path / "out", *words)
        assert done.returncode == 2
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert json.loads("[]") == os.listdir(tmp_path)


@pytest.mark.parametrize("spelling", ["--max-resolution", "--max_resolution"])
def test_options_are_spelled_with_hyphens_or_underscores(tmp_path, spelling):
    root = write_class_folders(tmp_path / "set", 2, 3)
    done = run_convert("--data", root, "--out", tmp_path / "out", "--storage", "raw", f"{spelling}=40")
    assert done.returncode == 0, done.stderr
    beton = Beton(tmp_path / "out" / "train.beton")
    assert beton.raw.all()
    assert (beton.sizes.max(axis=1) == 40).all()


def test_an_image_too_large_to_be_stored_is_skipped_and_listed(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 3)
    photograph(0, 1700, 1700).save(root / "class0" / "vast.png")
    done = run_convert("--data", root, "--out", tmp_path / "out", "--storage", "raw", "--max-resolution", 4000)
    assert done.returncode == 0, done.stderr
    assert "vast.png" in (tmp_path / "out" / "rejects.txt").read_text()


def test_images_of_more_pixels_than_allowed_are_skipped(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 4)
    photograph(0, 300, 300).save(root / "class0" / "large.jpg")
    done = run_convert("--data", root, "--out", tmp_path / "out", "--max_pixels", 89_998)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "out" / "rejects.txt").read_text().splitlines()
    assert line.startswith(f"{root}/class0/large.jpg: Image size (90000 pixels) exceeds limit of 89998 pixels")
    assert line.endswith("Convert with a larger --max_pixels to allow it.")
    convert_source(open_source(str(root)), tmp_path / "all", processes=1, max_pixels=90_000)
    assert not (tmp_path / "all" / "rejects.txt").read_text()
    refused = run_convert("--data", root, "--out", tmp_path / "none", "--max_pixels", 0)
    assert (refused.returncode, refused.stderr) == (2, "error: max_pixels=0: give 1 or more\n")


@pytest.mark.slow
def test_a_picture_above_pillows_limit_is_allowed_by_an_option(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 3)
    Image.new("L", (18_000, 10_000), 99).save(root / "class0" / "large.jpg")
    convert_source(open_source(str(root)), tmp_path / "usual", processes=1)
    assert "large.jpg" in (tmp_path / "usual" / "rejects.txt").read_text()
    convert_source(open_source(str(root)), tmp_path / "allowed", processes=1, max_pixels=180_000_000)
    assert not (tmp_path / "allowed" / "rejects.txt").read_text()


def test_too_small_an_address_space_is_one_line(image_folder, tmp_path):
    """The pool of processes waits forever for those that it could not start."""
    limit = 500 << 20
    done = run_convert(
        *("--data", image_folder, "--out", tmp_path / "out"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "limited to 500 MB (ulimit -v)" in line
    assert "needs 700 MB" in line
    assert os.listdir(tmp_path) == []

"""Archives: the same set as the folder they were made from, with random access, and refused inputs."""

import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DataError
from data.archives import MOST_BYTES, archive_name
from data.beton import Beton
from data.convert import convert_source, ensure_converted
from data.originals import UNREADABLE
from data.pixels import upright_rgb
from data.sets import Unconverted, find_set, open_set
from data.sources import open_source
from tests.damage import bytes_of
from tests.pictures import photograph, write_class_folders

ROOT = Path(__file__).parents[2]
TARS = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.xz": "w:xz", ".txz": "w:xz", ".tar.bz2": "w:bz2"}


def jpeg(seed: int, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    photograph(seed, side, side).save(buffer, "JPEG")
    return buffer.getvalue()


def flat(prefix: str = "", classes: str = "ab", count: int = 2) -> dict[str, bytes]:
    """Images by name, in class folders without splits."""
    return {f"{prefix}{label}/{i}.jpg": jpeg(10 * n + i) for n, label in enumerate(classes) for i in range(count)}


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    return path


def add(archive: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    archive.addfile(info, io.BytesIO(contents))


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, contents in members.items():
            add(archive, name, contents)
    return buffer.getvalue()


def packed(root: Path, path: Path, below: str) -> Path:
    """The folder as an archive of the type of path's extension, its images below a folder."""
    if path.suffix == ".zip":
        files = sorted(file for file in root.rglob("*") if file.is_file())
        return write_zip(path, {f"{below}{file.relative_to(root)}": file.read_bytes() for file in files})
    mode = next(TARS[ending] for ending in TARS if path.name.endswith(ending))
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(root, below or ".")
    return path


def pictures(split) -> list[np.ndarray]:
    return [np.asarray(split.read(item)) for item in split.items]


@pytest.mark.parametrize("below", ["", "set/", "home/me/set/"])
@pytest.mark.parametrize("ending", [".zip", *TARS])
def test_an_archive_holds_the_same_set_as_its_folder(tmp_path, ending, below):
    for layout in ("flat", "parts"):
        root = tmp_path / layout
        for part in ("train", "val") if layout == "parts" else ("",):
            write_class_folders(root / part, 2, 3, seed=len(part))
        folder = open_source(str(root))
        archive = open_source(str(packed(root, tmp_path / f"{layout}{ending}", below)))
        assert archive.name == folder.name
        assert archive.class_names == folder.class_names
        for one, other in ((archive.train, folder.train), (archive.val, folder.val)):
            assert one.labels.tolist() == other.labels.tolist()
            for seen, expected in zip(pictures(one), pictures(other), strict=True):
                np.testing.assert_array_equal(seen, expected)
        assert bool(archive.notes) == bool(folder.notes)


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
def test_converted_by_several_processes_to_the_same_bytes(image_folder, converted, tmp_path, ending):
    path = packed(image_folder, tmp_path / f"photos{ending}", "photos/")
    made = convert_source(open_source(str(path)), tmp_path / "out", processes=2)
    assert made.name == "photos"
    for split in ("train", "val"):
        assert made.beton(split).read_bytes() == converted.beton(split).read_bytes()


def _size(read, item) -> tuple[int, int]:
    return read(item).size


def test_items_are_small_and_can_be_read_in_any_process(tmp_path):
    root = write_class_folders(tmp_path / "set", 2, 3)
    for ending in (".zip", ".tar", ".tar.gz"):
        split = open_source(str(packed(root, tmp_path / f"set{ending}", ""))).train
        items = list(reversed(split.items))
        assert len(pickle.dumps(items[0])) < 300
        with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
            sizes = list(pool.map(_size, [split.read] * len(items), items))
        assert sizes == [split.read(item).size for item in items]


def test_an_unpacked_tar_is_removed_when_it_is_no_longer_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = tmp_path / "set.tar.gz"
    path.write_bytes(tar_of(flat(), "w:gz"))
    source = open_source(str(path))
    assert len(os.listdir(tmp_path / "temporary")) == 1
    # Deleting a copy in another process does not remove it.
    copy = pickle.loads(pickle.dumps(source))
    del copy
    assert source.val.read(source.val.items[0]).size == (40, 40)
    # Holding a split keeps it.
    train = source.train
    del source
    assert train.read(train.items[0]).size == (40, 40)
    del train
    assert os.listdir(tmp_path / "temporary") == []


def test_a_process_leaves_no_unpacked_tar_when_it_ends(tmp_path):
    path = tmp_path / "set.tar.gz"
    path.write_bytes(tar_of(flat(), "w:gz"))
    (tmp_path / "temporary").mkdir()
    script = "import os, sys; from data.sources import open_source; s = open_source(sys.argv[1])"
    script += "; print(os.listdir(os.environ['TMPDIR']))"
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ".tar']" in done.stdout, done.stderr
    assert os.listdir(tmp_path / "temporary") == []


def test_a_tar_for_each_class(tmp_path):
    """As ImageNet's training set is distributed."""
    classes = {
        f"{label}.tar": tar_of({f"{label}_{i}.JPEG": jpeg(10 * n + i) for i in range(3)})
        for n, label in enumerate(("n01", "n02"))
    }
    for ending, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        path = tmp_path / f"ILSVRC2012_img_train{ending}"
        path.write_bytes(tar_of(classes, mode))
        source = open_source(str(path))
        assert source.class_names == ("n01", "n02")
        assert str(source.train.items[0]).startswith(f"{path}:n01.tar/n01_")
        for split in (source.train, source.val):
            for item, label in zip(split.items, split.labels, strict=True):
                number = int(item.name[-6])
                expected = Image.open(io.BytesIO(jpeg(10 * int(label) + number)))
                np.testing.assert_array_equal(np.asarray(split.read(item)), np.asarray(expected))


def items_of(path: Path) -> list[str]:
    source = open_source(str(path))
    return sorted(item.name for split in (source.train, source.val) for item in split.items)


def test_hidden_files_and_links_are_skipped(tmp_path):
    more = {
        "README.txt": b"",
        "preview.jpg": b"",
        "__MACOSX/a/._0.jpg": b"",
        "a/.hidden.jpg": b"",
        ".cache/x/0.jpg": b"",
        "../../c/0.jpg": b"",
        "a/notes": b"",
        "folder.jpg/": b"",
    }
    assert items_of(write_zip(tmp_path / "set.zip", flat() | more)) == sorted(flat())
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, contents in (flat() | more).items():
            add(archive, name, contents)
        for name, kind in (("a/link.jpg", tarfile.SYMTYPE), ("a/folder.jpg", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert items_of(tmp_path / "set.tar") == sorted(flat())
    link = zipfile.ZipInfo("a/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert items_of(tmp_path / "set.zip") == sorted(flat())


def test_names_of_other_systems(tmp_path):
    root = write_zip(tmp_path / "windows.zip", {name.replace("/", "\\"): data for name, data in flat("set/").items()})
    assert open_source(str(root)).class_names == ("a", "b")
    (tmp_path / "dots.tar").write_bytes(tar_of(flat("./")))
    assert open_source(str(tmp_path / "dots.tar")).class_names == ("a", "b")
    (tmp_path / "slash.tar").write_bytes(tar_of(flat("/data/set/")))
    assert open_source(str(tmp_path / "slash.tar")).class_names == ("a", "b")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_the_later_of_two_members_with_the_same_name_is_used(tmp_path, ending):
    path = tmp_path / f"set{ending}"
    again = jpeg(1, side=77)
    if ending == ".zip":
        with zipfile.ZipFile(write_zip(path, flat()), "a") as archive:
            archive.writestr("a/0.jpg", again)
    else:
        path.write_bytes(tar_of(flat()))
        with tarfile.open(path, "a") as archive:
            add(archive, "a/0.jpg", again)
    source = open_source(str(path))
    sizes = {item.name: split.read(item).size for split in (source.train, source.val) for item in split.items}
    assert sizes == {name: (77, 77) if name == "a/0.jpg" else (40, 40) for name in flat()}


def test_a_stored_zip(tmp_path):
    stored = write_zip(tmp_path / "stored.zip", flat(), zipfile.ZIP_STORED)
    source = open_source(str(stored))
    assert all(item.size == len(flat()[item.name]) for item in source.train.items)
    assert source.train.read(source.train.items[0]).size == (40, 40)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photos.tar.gz", "photos"),
        ("photos.zip", "photos"),
        ("My.Photos.TGZ", "My.Photos"),
        ("photos", "photos"),
        ("v1.2.tar", "v1.2"),
        (".zip", ".zip"),
    ],
)
def test_names(name, expected):
    assert archive_name(Path("somewhere") / name) == expected


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        open_source(str(path))
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_the_layout_is_checked_as_for_folders(tmp_path):
    path = tmp_path / "set.zip"
    assert refusal(write_zip(path, {"a.txt": b""})).startswith(": no images in class folders below it")
    assert refusal(write_zip(path, {"1.jpg": b"", "2.jpg": b""})).startswith(": no images in class folders below it")
    assert refusal(write_zip(path, flat("set/", "a"))) == (
        ": only one class (a); a classifier needs class folders for two or more"
    )
    assert refusal(write_zip(path, flat(count=1))).startswith(": too few images to hold any out")
    assert refusal(write_zip(path, flat("set/train/"))).startswith(":set/val: no such folder, or no images in it")
    assert refusal(write_zip(path, flat("val/"))).startswith(":train: no such folder")
    assert refusal(write_zip(path, flat("set/train/") | flat("set/val/", "abc"))).startswith(
        f":set/val: 1 classes that {path}:set/train lacks (c)"
    )
    assert refusal(write_zip(path, flat("train/") | {"val/1.jpg": b""})).startswith(":val: no images in class folders")


def encrypted(contents: bytes) -> bytes:
    """The zip with the bit set that marks its members as encrypted."""
    found = contents
    for signature, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = -1
        while (at := found.find(signature, at + 1)) >= 0:
            found = found[: at + place] + bytes([found[at + place] | 1]) + found[at + place + 1 :]
    return found


def test_bad_inputs_are_refused(tmp_path):
    path = write_zip(tmp_path / "set.zip", flat())
    whole = path.read_bytes()
    path.write_bytes(encrypted(whole))
    assert refusal(path) == ": encrypted; unpack it with its password and give the folder"
    assert ": packed by method 14" in refusal(write_zip(path, flat(), zipfile.ZIP_LZMA))
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(500))
    assert ": Zstandard cannot be read" in refusal(path)
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a/0.jpg")
        info.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(info)
    assert ": a/0.jpg is stored as a sparse file" in refusal(path)
    path.write_bytes(b"")
    assert ": damaged, or neither a zip nor a tar archive" in refusal(path)
    path.write_bytes(jpeg(0))
    assert ": damaged, or neither a zip nor a tar archive" in refusal(path)
    assert ".tar.gz" in refusal(tmp_path / "absent.zip")


ARCHIVES = {
    ".zip": lambda members: write_zip(Path(tempfile.mkdtemp()) / "x.zip", members).read_bytes(),
    ".tar": tar_of,
    ".tar.gz": lambda members: tar_of(members, "w:gz"),
    ".tar.xz": lambda members: tar_of(members, "w:xz"),
    ".tar.bz2": lambda members: tar_of(members, "w:bz2"),
    "of tars.tar": lambda members: tar_of({"x.tar": tar_of(members), "y.tar": tar_of(members)}),
}


@pytest.mark.parametrize("ending", ARCHIVES)
def test_an_archive_cut_off_anywhere_is_refused(tmp_path, ending):
    contents = ARCHIVES[ending](flat())
    path = tmp_path / f"set{ending}"
    # The last blocks of a tar are padding.
    end = contents.rstrip(b"\0") + bytes(511) if ending.endswith("tar") else contents[:-1]

    @given(st.integers(0, len(end) - 1))
    def refused(length):
        path.write_bytes(end[:length])
        assert ": damaged, or neither a zip nor a tar archive" in refusal(path)

    refused()


@given(st.data())
def test_a_damaged_header_hides_nothing(data):
    members = flat()
    contents = bytearray(tar_of(members))
    headers = [at for at in range(0, len(contents), 512) if contents[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == len(members)
    at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 147))  # the checksum itself begins at 148
    contents[at] ^= data.draw(st.integers(1, 255))
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(contents)
        file.flush()
        refusal(Path(file.name))


def memory_of(read, item) -> tuple[str, int]:
    """The message of reading, and the bytes by which the process grew; run in a fresh process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(item)
        said = ""
    except ValueError as error:
        said = str(error)
    return said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def in_fresh_process(split) -> tuple[str, int]:
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(memory_of, split.read, next(item for item in split.items if "bomb" in item.name)).result()


def with_length(contents: bytes, name: str, length: int) -> bytes:
    """The zip whose index claims that the member has this many bytes."""
    at = contents.rindex(name.encode()) - 46
    assert contents[at : at + 4] == b"PK\x01\x02"
    return contents[: at + 24] + length.to_bytes(4, "little") + contents[at + 28 :]


def test_a_zip_member_is_not_inflated_beyond_its_declared_length(tmp_path):
    images = flat("train/") | flat("val/")
    path = write_zip(tmp_path / "bomb.zip", images | {"train/a/bomb.jpg": bytes(MOST_BYTES + 1)})
    assert path.stat().st_size < 1 << 20
    said, grown = in_fresh_process(open_source(str(path)).train)
    assert "268 MB; at most 268 MB of a file in an archive are read" in said
    assert grown < 20 << 20
    path.write_bytes(with_length(path.read_bytes(), "train/a/bomb.jpg", 100_000))
    said, grown = in_fresh_process(open_source(str(path)).train)
    assert "more bytes than the archive's index says" in said
    assert grown < 20 << 20


def test_a_file_of_a_tar_is_not_read_beyond_the_limit(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name, contents in flat().items():
            add(archive, name, contents)
        info = tarfile.TarInfo("a/bomb.jpg")
        info.size = MOST_BYTES + 1
        archive.addfile(info, open("/dev/zero", "rb"))  # noqa: SIM115
    said, grown = in_fresh_process(open_source(str(path)).train)
    assert "268 MB; at most 268 MB of a file in an archive are read" in said
    assert grown < 20 << 20


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.xz", ".tar.bz2"])
def test_unpacking_stops_if_a_tar_grows_more_than_images_can(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("data.archives._UNPACKED_ANYWAY", 5 << 20)
    (tmp_path / "temporary").mkdir()
    path = tmp_path / f"set{ending}"
    path.write_bytes(ARCHIVES[ending](flat() | {"a/bomb.jpg": bytes(20 << 20)}))
    assert refusal(path).startswith(": unpacks to more than 100 times its size")
    assert os.listdir(tmp_path / "temporary") == []
    # Small images in a tar are mostly headers and padding, which compress well.
    path.write_bytes(ARCHIVES[ending](flat("train/") | flat("val/") | {f"train/a/{i}.txt": b"" for i in range(5000)}))
    assert open_source(str(path)).class_names == ("a", "b")


def headers(count: int, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return (info.tobuf() + bytes(-(-size // 512) * 512)) * count


def test_headers_of_a_tar_that_would_fill_memory_are_refused(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(headers(1, 2 << 20) + tar_of(flat()))
    assert ": damaged, or neither a zip nor a tar archive (a header of 2097152 bytes)" in refusal(path)
    path.write_bytes(headers(5000, 512) + tar_of(flat()))
    assert ": damaged, or neither a zip nor a tar archive" in refusal(path)
    path.write_bytes(headers(1, 512) + tar_of(flat()))
    assert open_source(str(path)).class_names == ("a", "b")


SMALL = {f"{label}/{i}.jpg": jpeg(i, 16) for label in "ab" for i in range(3)}
CONTENTS = {ending: pack(SMALL) for ending, pack in ARCHIVES.items()}


@pytest.mark.filterwarnings("ignore")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("ending", ARCHIVES)
def test_fuzz_archives(tmp_path, monkeypatch, ending, data):
    """Refused in one line, or opened with images that are intact or cannot be read, each with its reason."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / f"set{ending}"
    path.write_bytes(data.draw(bytes_of(CONTENTS[ending])))
    try:
        source = open_source(str(path))
    except DataError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        event("refused")
        return
    whole = [np.asarray(Image.open(io.BytesIO(contents))) for contents in SMALL.values()]
    found = set()
    for split in (source.train, source.val):
        for item in split.items:
            try:
                seen = np.asarray(upright_rgb(split.read(item)))
                found.add("whole" if any(np.array_equal(seen, each) for each in whole) else "other pixels")
            except UNREADABLE as error:
                assert str(error)
                found.add("an image refused")
    event(", ".join(sorted(found)))
    # Each file in a zip has a checksum; none in a tar has.
    assert ending != ".zip" or "other pixels" not in found


def run_convert(*words, **options):
    command = [sys.executable, "-m", "data.convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz"])
def test_broken_images_are_skipped_and_listed(tmp_path, ending):
    members = flat("set/", count=3) | {"set/a/text.png": b"not an image", "set/b/half.jpg": jpeg(0)[:700]}
    path = tmp_path / f"set{ending}"
    path.write_bytes(ARCHIVES[ending](members))
    if ending == ".zip":  # and one whose bytes were damaged
        contents = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            contents[archive.getinfo("set/a/1.jpg").header_offset + 200] ^= 255
        path.write_bytes(contents)
    done = run_convert("--data", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rejects = sorted((tmp_path / "out" / "rejects.txt").read_text().splitlines())
    expected = ["set/a/1.jpg"] * (ending == ".zip") + ["set/a/text.png", "set/b/half.jpg"]
    assert [line.split(": ")[0] for line in rejects] == [f"{path}:{name}" for name in expected]
    assert f"{path}:set/a/text.png: cannot identify image file" in rejects
    assert open_set(tmp_path / "out").name == "set"


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path):
    """A limit on file size simulates a full disk: the write fails in the same place."""
    path = tmp_path / "set.tar.gz"
    path.write_bytes(tar_of(flat(count=20), "w:gz"))
    (tmp_path / "temporary").mkdir()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    done = run_convert("--data", path, "--out", tmp_path / "out", preexec_fn=limit, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: could not be unpacked to {tmp_path / 'temporary'} (File too large)")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path / "temporary") == []


def test_an_archive_larger_than_the_free_space_is_refused_at_once(tmp_path):
    path = tmp_path / "set.tar.gz"
    path.write_bytes(b"\x1f\x8b")
    size = 2 * shutil.disk_usage(tempfile.gettempdir()).free
    try:
        os.truncate(path, size)  # sparse: it takes no space
    except OSError:
        pytest.skip("this file system takes no file of that size")
    assert "do not fit in" in refusal(path)


def test_an_archive_is_converted_once_and_again_when_it_changes(tmp_path):
    path = write_zip(tmp_path / "photos.zip", flat())
    first = find_set(str(path), cache=tmp_path / "cache")
    assert isinstance(first, Unconverted)
    assert first.folder.name.startswith("photos-")
    made = ensure_converted(first)
    assert find_set(str(path), cache=tmp_path / "cache") == made
    write_zip(path, flat(count=3))
    changed = find_set(str(path), cache=tmp_path / "cache")
    assert isinstance(changed, Unconverted)
    assert changed.stale
    assert Beton(ensure_converted(changed).beton("train")).num_samples == 4

"""Sets as their authors distribute them, in small: each is converted as it is, or refused with a reason."""

import csv
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data import DataError
from data.beton import Beton, Encoded, write_beton
from data.convert import convert_source
from data.loader import open_loader
from data.sets import ConvertedSet, Unconverted, find_set
from data.sources import Source, open_source
from tests.pictures import photograph, write_class_folders

# Class names to colours: an image's colour shows its true class.
COLOURS = {"n01440764": (230, 20, 20), "n01443537": (20, 230, 20), "n01484850": (20, 20, 230)}


def picture(colour: tuple[int, int, int], number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.asarray(photograph(number, 40, 40)).astype(int) // 6 - 20 + np.array(colour)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, contents: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


def shown(source: Source, part: str) -> list[str]:
    """The class that each image shows by its colour, after checking that its label is the same."""
    split = getattr(source, part)
    wnids = [list(COLOURS)[int(np.asarray(split.read(item)).mean(axis=(0, 1)).argmax())] for item in split.items]
    assert [source.class_names[label] for label in split.labels] == wnids
    return wnids


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        open_source(str(path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- folders and archives with other names of val, and classes without images


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
@pytest.mark.parametrize("packed", [False, True])
def test_other_names_of_val(tmp_path, name, packed):
    root = tmp_path / "set"
    write_class_folders(root / "train", 2, 3)
    write_class_folders(root / name, 2, 2, seed=50)
    data, place = root, f"{root}/{name}"
    if packed:
        data = tmp_path / "set.tar"
        place = f"{data}:set/{name}"
        with tarfile.open(data, "w") as tar:
            tar.add(root, "set")
    source = open_source(str(data))
    assert (len(source.train.items), len(source.val.items)) == (6, 4)
    assert source.notes == (f"{place}: used for validation, as there is no val/",)


def test_val_is_used_rather_than_test(tmp_path):
    for name, count in (("train", 3), ("test", 4), ("valid", 2), ("val", 1)):
        write_class_folders(tmp_path / name, 2, count)
    assert (len(open_source(str(tmp_path)).val.items), open_source(str(tmp_path)).notes) == (2, ())
    (tmp_path / "val").rename(tmp_path / "other")
    assert len(open_source(str(tmp_path)).val.items) == 4


def test_classes_named_as_parts_are_classes_where_there_is_no_train(tmp_path):
    for name in ("test", "valid"):
        write_class_folders(tmp_path, 1, 4).joinpath("class0").rename(tmp_path / name)
    assert open_source(str(tmp_path)).class_names == ("test", "valid")


def test_classes_without_images_are_counted(tmp_path):
    write_class_folders(tmp_path / "train", 3, 2)
    write_class_folders(tmp_path / "val", 2, 1)
    for name in ("train/empty", "val/empty", "train/void", "val/class2", "train/.hidden", "train/__MACOSX"):
        (tmp_path / name).mkdir()
    source = open_source(str(tmp_path))
    assert source.class_names == ("class0", "class1", "class2")
    assert source.notes == (
        f"{tmp_path}: 2 folders hold no images and are not classes (empty, void)",
        f"{tmp_path}: 1 of 3 classes have no images in val (class2)",
    )


def test_files_added_by_operating_systems_are_ignored(tmp_path):
    write_class_folders(tmp_path, 2, 3)
    write(tmp_path / "class0" / "Thumbs.db", b"x")
    write(tmp_path / "class0" / ".DS_Store", b"x")
    write(tmp_path / "class0" / "._000.jpg", b"x")
    write(tmp_path / "__MACOSX" / "class0" / "000.jpg", b"x")
    source = open_source(str(tmp_path))
    assert source.class_names == ("class0", "class1")
    assert len(source.train.items) + len(source.val.items) == 6


def test_the_note_about_held_out_images_is_correct(tmp_path):
    write_class_folders(tmp_path, 3, 3)
    photograph(0, 40, 40).save(write(tmp_path / "lonely" / "0.jpg", b""))
    assert open_source(str(tmp_path)).notes == (
        f"{tmp_path} has no split for validation: 3 of its 10 images are held out for validation (10 % of each class "
        "and at least one image, always the same)",
        f"{tmp_path}: 1 of 4 classes have no images in val (lonely)",
    )


@pytest.mark.parametrize("packed", [False, True])
def test_val_images_that_are_also_in_train_are_counted(tmp_path, capsys, packed):
    root = tmp_path / "set"
    write_class_folders(root / "train", 2, 3)
    write_class_folders(root / "val", 2, 3, seed=50)
    data = root
    same = (root / "train" / "class1" / "001.jpg").read_bytes()
    write(root / "val" / "class0" / "001.jpg", same)
    write(root / "val" / "class1" / "copy.jpg", same)
    # Unreadable ones are not images.
    write(root / "train" / "class0" / "broken.jpg", same[:300])
    write(root / "val" / "class0" / "broken.jpg", same[:300])
    if packed:
        data = tmp_path / "set.zip"
        with zipfile.ZipFile(data, "w") as archive:
            for file in root.rglob("*.jpg"):
                archive.write(file, file.relative_to(root))
    convert_source(open_source(str(data)), tmp_path / "out", processes=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "as well" in line]
    assert line.startswith("val: 2 of its 8 images are in train as well, byte for byte (first: ")
    assert "val/class0/001.jpg" in line


def test_a_set_without_repeated_images_has_no_line_about_them(image_folder, tmp_path, capsys):
    convert_source(open_source(str(image_folder)), tmp_path / "out", processes=1)
    assert "as well" not in capsys.readouterr().out


# ---- Tiny-ImageNet


def tiny(root: Path) -> Path:
    lines = []
    for number, wnid in enumerate(COLOURS):
        for image in range(2):
            write(
                root / "train" / wnid / "images" / f"{wnid}_{image}.JPEG", picture(COLOURS[wnid], 10 * number + image)
            )
        write(root / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    # Not in the order of the classes.
    for number, wnid in enumerate([*reversed(COLOURS), list(COLOURS)[1]]):
        write(root / "val" / "images" / f"val_{number}.JPEG", picture(COLOURS[wnid], 50 + number))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    write(root / "val" / "val_annotations.txt", "".join(lines))
    write(root / "test" / "images" / "test_0.JPEG", picture((9, 9, 9), 0))
    write(root / "wnids.txt", "\n".join(COLOURS))
    return root


def packed_as(root: Path, path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(root.rglob("*")):
                archive.write(file, file.relative_to(root.parent))
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            tar.add(root, root.name)
    return path


@pytest.mark.parametrize("ending", ["", ".zip", ".tar", ".tar.gz"])
def test_tiny_imagenet(tmp_path, ending):
    root = tiny(tmp_path / "tiny-imagenet-200")
    source = open_source(str(packed_as(root, tmp_path / f"tiny-imagenet-200{ending}") if ending else root))
    assert source.class_names == tuple(COLOURS)
    assert shown(source, "train") == [wnid for wnid in COLOURS for _ in range(2)]
    assert shown(source, "val") == ["n01440764", "n01443537", "n01443537", "n01484850"]
    assert source.notes == ()
    assert source.val.names is not None
    assert source.val.names[0] == "n01440764/val_2.JPEG"


def test_tiny_imagenet_converted_again_when_its_annotations_change(tmp_path):
    root = tiny(tmp_path / "tiny")
    before = open_source(str(root)).fingerprint
    file = root / "val" / "val_annotations.txt"
    file.write_text(file.read_text().replace("val_1.JPEG\tn01443537", "val_1.JPEG\tn01440764"))
    assert open_source(str(root)).fingerprint != before


def test_tiny_imagenet_sorted_into_class_folders_by_its_user(tmp_path):
    root = tiny(tmp_path / "tiny")
    for file, wnid in zip(sorted((root / "val" / "images").iterdir()), [*reversed(COLOURS), "n01443537"], strict=True):
        (root / "val" / wnid).mkdir(exist_ok=True)
        file.rename(root / "val" / wnid / file.name)
    source = open_source(str(root))
    assert shown(source, "val") == ["n01440764", "n01443537", "n01443537", "n01484850"]


def test_tiny_imagenet_with_bad_annotations(tmp_path):
    root = tiny(tmp_path / "tiny")
    file = root / "val" / "val_annotations.txt"
    good = file.read_text()
    file.write_text(good.partition("\n")[2])
    assert refusal(root) == f"{file}: names no class for 1 of 4 images (val_0.JPEG)"
    file.write_text(good + "nonsense\n")
    assert f"{file}: line 5 is not a file and a class" in refusal(root)
    file.write_text(good.replace("val_1.JPEG\tn01443537", "val_1.JPEG\tn99999999"))
    assert f"{root}/val: 1 classes that {root}/train lacks (n99999999)" in refusal(root)
    file.write_text(good + "val_9.JPEG\tn01440764\t0\t0\t1\t1\n")
    assert open_source(str(root)).notes == (f"{file}: 1 of the images that it names are missing (val_9.JPEG)",)
    file.write_text(good)
    write(root / "val" / "val_0.JPEG", picture((9, 9, 9), 0))
    assert f"1 classes that {root}/train lacks (images)" in refusal(root)
    (root / "val" / "val_0.JPEG").unlink()
    file.unlink()
    assert f"1 classes that {root}/train lacks (images)" in refusal(root)


# ---- ILSVRC 2012

# Numbers of meta.mat, which are not the order of the sorted WordNet ids; 4 is of no class of images.
IDS = {"n01440764": 2, "n01443537": 3, "n01484850": 1, "n00001740": 4}
VAL = ["n01484850", "n01440764", "n01443537", "n01484850"]


def add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    tar.addfile(info, io.BytesIO(contents))


def ilsvrc(root: Path) -> Path:
    """The two tars, without a ground truth."""
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as train:
        for number, wnid in enumerate(COLOURS):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for image in range(2):
                    add(inner, f"{wnid}_{image}.JPEG", picture(COLOURS[wnid], 10 * number + image))
            add(train, f"{wnid}.tar", buffer.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as val:
        # The order in the tar is arbitrary.
        for number, wnid in reversed(list(enumerate(VAL, 1))):
            add(val, f"ILSVRC2012_val_{number:08}.JPEG", picture(COLOURS[wnid], 50 + number))
    return root


def devkit(root: Path) -> Path:
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    synsets = np.array([(number, wnid, "words", 0) for wnid, number in IDS.items()], dtype=fields)
    (root / "data").mkdir(parents=True)
    savemat(root / "data" / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    write(root / "data" / "ILSVRC2012_validation_ground_truth.txt", "".join(f"{IDS[wnid]}\n" for wnid in VAL))
    return root


@pytest.mark.parametrize("truth", ["list", "folder", "archive"])
def test_ilsvrc_tars(tmp_path, truth):
    root = ilsvrc(tmp_path / "imagenet")
    if truth == "list":
        write(root / "labels.txt", "\n".join(VAL) + "\n")
    else:
        devkit(root / "ILSVRC2012_devkit_t12")
    if truth == "archive":
        packed_as(root / "ILSVRC2012_devkit_t12", root / "ILSVRC2012_devkit_t12.tar.gz")
        (root / "ILSVRC2012_devkit_t12").rename(tmp_path / "elsewhere")
    source = open_source(str(root))
    assert source.class_names == tuple(COLOURS)
    assert shown(source, "train") == [wnid for wnid in COLOURS for _ in range(2)]
    assert shown(source, "val") == sorted(VAL)
    assert source.val.names is not None
    assert list(source.val.names)[:2] == [
        "n01440764/ILSVRC2012_val_00000002.JPEG",
        "n01443537/ILSVRC2012_val_00000003.JPEG",
    ]


def test_ilsvrc_tars_are_converted_once(tmp_path, monkeypatch):
    root = ilsvrc(tmp_path / "imagenet")
    truth = write(root / "labels.txt", "\n".join(VAL))
    found = find_set(str(root), cache=tmp_path / "cache")
    assert isinstance(found, Unconverted)
    made = convert_source(found.source, found.folder, processes=1)
    assert Beton(made.beton("val")).labels.tolist() == [0, 1, 2, 2]
    # Known by the files' sizes and times: listing the members of 150 GB takes a while.
    with monkeypatch.context() as patched:
        patched.setattr("data.archives.open_archive", None)
        assert find_set(str(root), cache=tmp_path / "cache") == made
    truth.write_text("\n".join(reversed(VAL)) + "\n")
    assert isinstance(find_set(str(root), cache=tmp_path / "cache"), Unconverted)


def test_ilsvrc_files_that_do_not_match_are_refused(tmp_path):
    root = ilsvrc(tmp_path / "imagenet")
    assert refusal(root).startswith(
        f"{root}: the classes of ILSVRC2012_img_val.tar are not known (no list of them); put"
    )
    truth = write(root / "labels.txt", "\n".join(VAL[:3]))
    assert refusal(root) == (f"{truth}: names the classes of 3 images, and {root}/ILSVRC2012_img_val.tar holds 4")
    truth.write_text("\n".join([*VAL[:3], "n99999999"]))
    assert refusal(root) == f"{truth}: image 4 is of class n99999999, which {root}/ILSVRC2012_img_train.tar lacks"
    truth.write_text("490\n361\n171\n1\n")
    assert refusal(root).startswith(f"{truth}: line 1 is '490', not a WordNet id as n01440764; numbers need")
    write(root / "more.txt", "")
    assert "the classes of ILSVRC2012_img_val.tar are not known (2 .txt files)" in refusal(root)
    kit = devkit(root / "ILSVRC2012_devkit_t12") / "data"
    assert open_source(str(root)).class_names == tuple(COLOURS)
    numbers = kit / "ILSVRC2012_validation_ground_truth.txt"
    numbers.write_text("1\n2\n3\n5\n")
    assert refusal(root) == f"{numbers}: line 4 is '5', which {kit}/meta.mat does not know"
    numbers.write_text("1\n2\n3\n4\n")
    assert "image 4 is of class n00001740, which" in refusal(root)
    write(kit / "meta.mat", b"nonsense")
    assert f"{kit}/meta.mat: damaged" in refusal(root)
    write(root / "ILSVRC2012_devkit_t12.tar.gz", b"nonsense")
    (kit / "meta.mat").unlink()
    assert f"{root}/ILSVRC2012_devkit_t12.tar.gz: damaged" in refusal(root)
    packed_as(root / "ILSVRC2012_devkit_t12", root / "ILSVRC2012_devkit_t12.tar.gz")
    assert "no data/meta.mat in it" in refusal(root)
    (root / "ILSVRC2012_img_train.tar").unlink()
    assert "ILSVRC2012_img_train.tar: no such file; it belongs to ILSVRC2012_img_val.tar" in refusal(root)


def test_ilsvrc_val_images_with_other_names_or_numbers(tmp_path):
    root = ilsvrc(tmp_path / "imagenet")
    write(root / "labels.txt", "\n".join(VAL[:2]))
    for names, said in (
        (["ILSVRC2012_val_00000001.JPEG", "other.JPEG"], "other.JPEG is not named as"),
        (["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG"], "are not numbered from 1 to 2"),
    ):
        with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as val:
            for name in names:
                add(val, name, picture((9, 9, 9), 0))
        assert said in refusal(root)


# ---- a CSV of file and class


def table(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def images(root: Path) -> list[list[str]]:
    """Nine images in one folder, and the rows that name their classes."""
    rows = []
    for number in range(9):
        wnid = list(COLOURS)[number % 3]
        write(root / "photos" / f"{number}, a.jpg", picture(COLOURS[wnid], number))
        rows.append([f"photos/{number}, a.jpg", wnid])
    return rows


@pytest.mark.parametrize("header", [["file", "class"], ["\ufeffFilename", " Label"], ["path", "class_name"]])
def test_a_csv_of_file_and_class(tmp_path, header):
    source = open_source(str(table(tmp_path / "labels.csv", header, images(tmp_path))))
    assert (source.name, source.class_names) == ("labels", tuple(COLOURS))
    assert sorted(shown(source, "train") + shown(source, "val")) == sorted([*COLOURS] * 3)
    assert len(shown(source, "val")) == 3
    assert "3 of its 9 images are held out" in source.notes[0]


def test_a_csv_with_splits(tmp_path):
    rows = [
        [*row, split] for row, split in zip(images(tmp_path), ["train"] * 5 + ["valid"] * 3 + ["Test"], strict=True)
    ]
    path = table(tmp_path / "labels.csv", ["file", "class", "split"], rows)
    source = open_source(str(path))
    assert shown(source, "train") == ["n01440764", "n01440764", "n01443537", "n01443537", "n01484850"]
    assert shown(source, "val") == ["n01440764", "n01443537", "n01484850"]
    assert source.notes == (
        f"{path}: split valid is used for validation",
        f"{path}: 1 images of split test are not used",
    )
    made = convert_source(source, tmp_path / "out", processes=1)
    assert made.image_names("val")[0] == "n01440764/photos/6, a.jpg"


def test_a_csv_of_files_elsewhere(tmp_path):
    (tmp_path / "tables").mkdir()
    rows = [
        [f"../{file}" if number % 2 else str(tmp_path / file), wnid]
        for number, (file, wnid) in enumerate(images(tmp_path))
    ]
    path = table(tmp_path / "tables" / "labels.csv", ["file", "class"], rows)
    source = open_source(str(path))
    shown(source, "train")
    made = convert_source(source, tmp_path / "out", processes=1)
    assert len(made.image_names("train")) == 6


def test_files_of_a_csv_in_folders_of_one_name_are_all_kept(tmp_path):
    rows = images(tmp_path / "tables") + [[f"../{file}", wnid] for file, wnid in images(tmp_path)]
    source = open_source(str(table(tmp_path / "tables" / "labels.csv", ["file", "class"], rows)))
    assert len(shown(source, "train") + shown(source, "val")) == 18


def test_a_csv_is_converted_again_when_it_changes(tmp_path):
    rows = images(tmp_path)
    path = table(tmp_path / "labels.csv", ["file", "class"], rows)
    found = find_set(str(path), cache=tmp_path / "cache")
    assert isinstance(found, Unconverted)
    made = convert_source(found.source, found.folder, processes=1)
    assert find_set(str(path), cache=tmp_path / "cache") == made
    # The same files, one of them with another class.
    rows[0][1] = rows[1][1]
    table(path, ["file", "class"], rows)
    assert isinstance(find_set(str(path), cache=tmp_path / "cache"), Unconverted)


def test_a_csv_that_is_refused(tmp_path):
    rows = images(tmp_path)
    path = tmp_path / "labels.csv"

    def said(header: list[str], rows: list[list[str]]) -> str:
        return refusal(table(path, header, rows)).removeprefix(f"{path}: ")

    assert said(["file", "kind"], rows).startswith("its first line names no column of the class (class, label,")
    assert said(rows[0], rows[1:]).startswith("its first line names no column of the file")
    assert said(["file", "class"], []) == "names no images"
    assert said(["file", "class"], [*rows, ["photos/10.jpg", "n01440764"], ["11.jpg", "n01440764"]]) == (
        f"2 of its 11 files are missing (line 11: {tmp_path}/photos/10.jpg)"
    )
    assert said(["file", "class"], [rows[0], [rows[1][0]]]) == "line 3 names no class"
    assert said(["file", "class"], [rows[0], ["", "n01440764"]]) == "line 3 names no file"
    assert said(["file", "class"], [*rows[:2], rows[0]]) == (
        "line 4 names photos/0, a.jpg, as line 2 does; name each file once"
    )
    assert said(["file", "class", "split"], [[*rows[0], "dev"]]).startswith("line 2: split 'dev' is none of train, val")
    assert said(["file", "class", "split"], [[*row, "train"] for row in rows]).startswith(
        "its column split names no image as val"
    )
    splits = ["train", "train", "val"]
    assert said(["file", "class", "split"], [[*row, split] for row, split in zip(rows[:3], splits, strict=True)]) == (
        f"val: 1 classes that {path}: train lacks (n01484850); remove them or add their training images"
    )
    assert "only one class (n01440764)" in said(["file", "class"], rows[::3])
    path.write_bytes(b"file,class\n\xff\xfe,b\n")
    assert "not a CSV file in UTF-8" in refusal(path)
    write(path, "")
    assert "it names: nothing" in refusal(path)


# ---- .beton files


def others_beton(path: Path, labels: list[int]) -> Path:
    """Without our seal, as files of other writers."""
    images = [Encoded(picture((9 * label, 90, 9), number), 40, 40, label) for number, label in enumerate(labels)]
    write_beton(path, images, at_most=len(images))
    contents = path.read_bytes()
    path.write_bytes(contents.replace(b"label-refinery 1", bytes(16)))
    return path


def test_a_folder_of_betons_of_other_writers_is_used(tmp_path):
    others_beton(tmp_path / "train.beton", [0, 1, 2, 2])
    others_beton(tmp_path / "val.beton", [2, 0])
    found = find_set(str(tmp_path))
    assert isinstance(found, ConvertedSet)
    assert (found.class_names, found.resolution, found.name) == (("0", "1", "2"), 32, tmp_path.name)
    (batch,) = open_loader(found.beton("val"), resolution=24, batch_size=2, decoder="torchvision", train=False).epoch(0)
    assert batch.labels.tolist() == [2, 0]
    before = found.source_fingerprint
    others_beton(tmp_path / "val.beton", [2, 1])
    assert find_set(str(tmp_path)).source_fingerprint != before
    assert "holds converted images (train.beton, val.beton); here, files of images are needed" in refusal(tmp_path)
    others_beton(tmp_path / "val.beton", [1, 0])
    with pytest.raises(
        DataError, match="val.beton: has classes below 2, and train.beton below 3; they must be the same"
    ):
        find_set(str(tmp_path))
    # An image folder that has them as well is an image folder.
    write_class_folders(tmp_path / "train", 2, 2)
    write_class_folders(tmp_path / "val", 2, 1)
    assert isinstance(find_set(str(tmp_path), cache=tmp_path / "cache"), Unconverted)


def test_other_betons_are_refused_with_a_description(tmp_path):
    alone = others_beton(tmp_path / "train.beton", [0, 4, 4])
    assert refusal(alone) == (
        f"DATA={alone}: is a .beton of 3 images of 2 classes; give the folder that it lies in, with train.beton and "
        f"val.beton: DATA={tmp_path}"
    )
    assert "holds .beton files (train.beton), but not both train.beton and val.beton; give" in refusal(tmp_path)
    write(alone, b"nonsense")
    assert "not a .beton file" in refusal(alone)
    # Beside class folders it is ignored.
    write_class_folders(tmp_path, 2, 2)
    assert open_source(str(tmp_path)).class_names == ("class0", "class1")

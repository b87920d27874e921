"""Sets that tensorflow-datasets prepared, read without TensorFlow: small ones that are written here, and CIFAR-10."""

import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedjax_qp.data import sources
from fedjax_qp.registry import ConfigurationError

SHARED = Path(__file__).resolve().parents[4] / "shared"
# As the user has set them; the tests of small sets change both.
USER_CACHE = os.environ.get("FEDJAX_QP_CACHE", "")
USER_FOLDER = os.environ.get("TFDS_DATA_DIR") or str(SHARED / "tfds")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside tensorflow-datasets and its format's package
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def serialise(example):
    """One example as tensorflow-datasets stores it: a tf.train.Example with PNG images."""
    proto = tf_example_pb2.Example()
    for key, value in example.items():
        feature = proto.features.feature[key]
        if isinstance(value, np.ndarray):
            png = io.BytesIO()
            Image.fromarray(value.squeeze()).save(png, "PNG")
            feature.bytes_list.value.append(png.getvalue())
        elif isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.append(int(value))
    return proto.SerializeToString()


def prepare(root, name, features, splits, supervised=("image", "label"), version="1.0.0", file_format="array_record"):
    """Writes a data set in the layout of tensorflow-datasets."""
    folder = root / name / version
    folder.mkdir(parents=True)
    tfds.features.FeaturesDict(features).save_config(str(folder))
    base, entries = name.split("/")[0], []
    for split, examples in splits.items():
        records = [serialise(example) for example in examples]
        writer = ArrayRecordWriter(str(folder / f"{base}-{split}.array_record-00000-of-00001"), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        entries.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(records))],
            }
        )
    info = {"name": base, "version": version, "fileFormat": file_format, "splits": entries}
    if "/" in name:
        info["configName"] = name.split("/")[1]
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def pictures(count, shape=(5, 4, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def cifar100_like(root):
    """Twelve training and four test examples in the features of cifar100, stored in shuffled order."""
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(5, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=100),
        "coarse_label": tfds.features.ClassLabel(names=[f"group {i}" for i in range(20)]),
    }
    splits, truth = {}, {}
    for split, count in (("train", 12), ("test", 4)):
        images, fine = pictures(count, seed=count), np.arange(count) * 7
        truth[split] = (images, fine, fine // 5)
        splits[split] = [
            {"id": f"{split}_{i:05d}".encode(), "image": images[i], "label": fine[i], "coarse_label": fine[i] // 5}
            for i in np.random.default_rng(1).permutation(count)
        ]
    prepare(root, "cifar100", features, splits)
    return truth


@pytest.mark.parametrize(("labels", "classes"), [("fine", 100), ("coarse", 20)])
def test_cifar100_in_original_order(tmp_path, labels, classes):
    truth = cifar100_like(tmp_path)
    for _ in range(2):  # decoded, then out of the cache
        dataset = sources.build("cifar100", folder=str(tmp_path), labels=labels)
        for part, split in ((dataset.train, "train"), (dataset.test, "test")):
            images, fine, coarse = truth[split]
            np.testing.assert_array_equal(part.inputs, images)
            np.testing.assert_array_equal(part.labels, fine if labels == "fine" else coarse)
        assert dataset.classes == len(dataset.class_names) == classes
        assert dataset.mean == (0.5, 0.5, 0.5)
    assert (dataset.class_names[1] == "group 1") == (labels == "coarse")
    assert "tensorflow" not in sys.modules


def test_the_folder_from_the_environment(tmp_path, monkeypatch):
    cifar100_like(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert sources.build("cifar100").train.inputs.shape == (12, 5, 4, 3)


def test_another_preparation_is_not_mistaken_for_the_cached_one(tmp_path):
    truth = cifar100_like(tmp_path)
    sources.build("cifar100", folder=str(tmp_path))
    for file in (tmp_path / "cifar100" / "1.0.0").iterdir():
        file.unlink()
    (tmp_path / "cifar100" / "1.0.0").rmdir()
    features = {"image": tfds.features.Image(shape=(5, 4, 3)), "label": tfds.features.ClassLabel(num_classes=100)}
    images = truth["train"][0]
    examples = [{"image": image, "label": 99} for image in images]
    prepare(tmp_path, "cifar100", features, {"train": examples, "test": examples})
    dataset = sources.build("cifar100", folder=str(tmp_path))
    assert dataset.train.labels.tolist() == [99] * 12
    np.testing.assert_array_equal(dataset.test.inputs, images)  # no ids: as stored


GREY = {"image": tfds.features.Image(shape=(6, 6, 1)), "label": tfds.features.ClassLabel(names=["no", "yes"])}


def grey(count, seed=0):
    return [{"image": image, "label": i % 2} for i, image in enumerate(pictures(count, (6, 6, 1), seed))]


def test_any_set_with_configs_versions_slices_and_grey_images(tmp_path):
    prepare(tmp_path, "letters/small", GREY, {"train": grey(10), "extra": grey(6, 1)}, version="1.9.0")
    prepare(tmp_path, "letters/small", GREY, {"train": grey(20, 2), "extra": grey(6, 1)}, version="1.10.0")
    options = {"folder": str(tmp_path), "train": "train[:70%]", "test": "extra"}
    newest = sources.build("tfds_images", dataset="letters/small", **options)
    assert newest.train.inputs.shape == (14, 6, 6, 1) and newest.class_names == ("no", "yes") and newest.mean == (0.5,)
    older = sources.build("tfds_images", dataset="letters/small:1.9.0", **options)
    np.testing.assert_array_equal(older.train.inputs, [example["image"] for example in grey(10)][:7])
    np.testing.assert_array_equal(older.test.labels, [0, 1] * 3)


def test_fashion_mnist_prepared_by_tensorflow_datasets(tmp_path):
    features = {"image": tfds.features.Image(shape=(6, 6, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    prepare(tmp_path, "fashion_mnist", features, {"train": grey(10), "test": grey(4, 1)})
    dataset = sources.build("fashion_mnist", folder=str(tmp_path))
    assert dataset.train.inputs.shape == (10, 6, 6, 1) and dataset.class_names[0] == "T-shirt/top"


def test_images_of_several_sizes_are_refused(tmp_path):
    examples = [{"image": pictures(1, (5, 5 + i, 3))[0], "label": 0} for i in range(2)]
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=2)}
    prepare(tmp_path, "mixed", features, {"train": examples, "test": examples[:1]})
    with pytest.raises(ConfigurationError, match="images must have one shape"):
        sources.build("tfds_images", dataset="mixed", folder=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "leters"}, r"did you mean letters.*pip install -e '.\[prepare\]'.*tfds build leters"),
        ({"dataset": "letters:2.0.0"}, "letters:1.0.0"),
        ({"dataset": "letters", "train": "training"}, "split 'training' .* cannot be read.*It has train, test"),
        ({"dataset": "letters", "label": "lable"}, "did you mean label"),
        ({"dataset": "tables"}, r"tables is no plain image-classification set: .* \[\]"),
        ({"dataset": "two"}, "one of each, or the option `label`"),
        ({"dataset": "deep"}, "uint16 images; only uint8"),
        ({"dataset": "records"}, "in the format tfrecord; array_record is needed"),
    ],
)
def test_sets_that_cannot_be_read(tmp_path, options, message):
    prepare(tmp_path, "letters", GREY, {"train": grey(4), "test": grey(2)})
    prepare(tmp_path, "records", GREY, {"train": grey(4), "test": grey(2)}, file_format="tfrecord")
    label = tfds.features.ClassLabel(num_classes=2)
    prepare(tmp_path, "tables", {"label": label}, {"train": [{"label": 0}], "test": [{"label": 1}]}, None)
    two = [{"image": pictures(1)[0], "age": 0, "sex": 1}]
    features = {"image": tfds.features.Image(shape=(5, 4, 3)), "age": label, "sex": label}
    prepare(tmp_path, "two", features, {"train": two, "test": two}, None)
    deep = {"image": tfds.features.Image(shape=(6, 6, 1), dtype=np.uint16), "label": label}
    prepare(tmp_path, "deep", deep, {"train": grey(2), "test": grey(2)})
    with pytest.raises(ConfigurationError, match=message):
        sources.build("tfds_images", folder=str(tmp_path), **options)
    assert sources.build("tfds_images", dataset="two", label="sex", folder=str(tmp_path)).train.labels.tolist() == [1]


def test_nothing_prepared(tmp_path):
    for folder in (str(tmp_path / "nowhere"), "~nosuchuser/x", "a" * 300):
        with pytest.raises(
            ConfigurationError, match=r"TFDS_DATA_DIR.*pip install -e '.\[prepare\]'.*tfds build cifar10"
        ) as error:
            sources.build("cifar10", folder=folder)
        assert "\n" not in str(error.value)


def refused(tmp_path, message, name="letters", **options):
    with pytest.raises(ConfigurationError, match=message) as error:
        sources.build("tfds_images", dataset=name, folder=str(tmp_path), **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("label", [2, -1, 2**31, 2**32 + 1, 2**63 - 1])
def test_labels_without_a_class_are_refused_before_they_are_narrowed(tmp_path, label):
    prepare(tmp_path, "letters", GREY, {"train": [*grey(3), {**grey(1)[0], "label": label}], "test": grey(2)})
    refused(tmp_path, rf"a label is {label}; with 2 classes" if label == 2 else f"train has the label {label}")


def test_absurd_numbers_of_classes_and_channels(tmp_path):
    image = tfds.features.Image(shape=(6, 6, 1))
    absurd = {"image": image, "label": tfds.features.ClassLabel(num_classes=10**9)}
    prepare(tmp_path, "letters", absurd, {"train": grey(4), "test": grey(2)})
    refused(tmp_path, "letters states 1000000000 classes for 'label'; there must be 1 to 100000")


def test_splits_without_examples(tmp_path):
    prepare(tmp_path, "letters", GREY, {"train": grey(4), "test": grey(2), "none": []})
    refused(tmp_path, r"split 'train\[:0%\]' of .* cannot be read.*It has train, test, none", train="train[:0%]")
    refused(tmp_path, r"split 'test\[2:\]' of .* cannot be read", test="test[2:]")
    refused(tmp_path, r"split 'none' of .* or is empty", test="none")
    refused(tmp_path, "split 'train\\[' of .* cannot be read", train="train[")


def test_only_a_fitting_kind_of_feature_is_read(tmp_path):
    features = {"image": tfds.features.Tensor(shape=(6, 6, 1), dtype=np.uint8), "label": tfds.features.Scalar(np.int64)}
    prepare(tmp_path, "letters", features, {"train": grey(4), "test": grey(2)})
    refused(tmp_path, r"letters is no plain image-classification set: .* image features \[\] and the class labels \[\]")


@pytest.mark.parametrize("damage", ["info", "features", "truncated", "garbage", "lost", "image", "link"])
def test_damaged_prepared_data_is_one_line(tmp_path, damage):
    folder = prepare(tmp_path, "letters", GREY, {"train": grey(4), "test": grey(2)})
    records = folder / "letters-train.array_record-00000-of-00001"
    content = records.read_bytes()
    if damage in ("info", "features"):
        (folder / {"info": "dataset_info.json", "features": "features.json"}[damage]).write_text('{"a": [')
    elif damage == "truncated":
        records.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        records.write_bytes(bytes(len(content)))
    elif damage == "lost":
        records.unlink()
    elif damage == "link":
        (folder / "gone").symlink_to("nowhere")
    else:
        (tmp_path / "letters" / "1.0.0").rename(tmp_path / "aside")
        wrong = [{"image": b"no picture", "label": 0}]
        prepare(tmp_path, "letters", GREY, {"train": wrong, "test": grey(2)})
    refused(tmp_path, "cannot be read")


def test_cifar10(monkeypatch):
    if not (Path(USER_FOLDER) / "cifar10").is_dir():
        pytest.skip("needs CIFAR-10, prepared by tensorflow-datasets")
    monkeypatch.setenv("FEDJAX_QP_CACHE", USER_CACHE)  # 60,000 images: decoded once a machine, not once a test run
    dataset = sources.build("cifar10", folder=USER_FOLDER)
    assert dataset.train.inputs.shape == (50_000, 32, 32, 3) and dataset.test.inputs.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    # The first labels of data_batch_1 of the original files: frog, truck, truck, deer, automobile.
    assert dataset.train.labels[:5].tolist() == [6, 9, 9, 4, 1] and dataset.class_names[6] == "frog"
    assert dataset.test.labels[:4].tolist() == [3, 8, 8, 0]
    # Per-channel means of the training images, as published with many reference implementations.
    np.testing.assert_allclose(dataset.train.inputs.mean(axis=(0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from optimizers.ablation import AblationError, TensorData, Workload, workload
from optimizers.ablation.data import FASHION_MNIST, MNIST, locate
from optimizers.ablation.workload import Data, Split
from optimizers.ablation.workloads import character_gpt, image_folder

PARAMETERS = {
    "digits": 6_570,
    "fashion-mnist-logistic": 7_850,
    "fashion-mnist": 1_336_610,
    "fashion-mnist-2c2d": 3_274_634,
    "mnist-autoencoder": 2_837_314,
    "mnist-conv-autoencoder": 80_151,
}
needs_data = pytest.mark.skipif(
    locate(FASHION_MNIST) is None or locate(MNIST) is None, reason="no data sets here"
)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    with torch.random.fork_rng():
        assert sum(p.numel() for p in workload.get(name).model().parameters()) == PARAMETERS[name]


def test_language_model_has_800_thousand_parameters_and_sees_no_future() -> None:
    problem = workload.get("character-gpt")
    with torch.random.fork_rng():
        model = problem.model()
    assert 0.79e6 < sum(p.numel() for p in model.parameters()) < 0.83e6
    inputs, target = next(iter(problem.data().evaluation("test")))
    assert torch.equal(inputs[:, 1:], target[:, :-1])
    changed = inputs.clone()
    changed[:, 40:] = 0
    before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_text_splits_do_not_overlap_and_evaluation_covers_one() -> None:
    text = "".join(chr(65 + i % 50) + str(i % 7) for i in range(5000))
    data = character_gpt.TextData(text)
    codes = torch.cat([data._splits[name] for name in ("train", "validation", "test")])
    assert "".join(data.characters[i] for i in codes) == text
    lengths = {name: len(codes) for name, codes in data._splits.items()}
    assert lengths == {"train": 9000, "validation": 500, "test": 500}
    windows = torch.cat([batch for batch, _ in data.evaluation("test")])
    parts = data._splits["test"][: 7 * 64].reshape(7, 64)
    assert sorted(windows.tolist()) == sorted(parts.tolist())
    assert sum(len(batch) for batch, _ in data.evaluation("train", limit=10)) == 10


@pytest.mark.parametrize("name", ["text", "tensors", "images"])
def test_a_limited_evaluation_is_the_beginning_of_a_longer_one(
    name: str, request: pytest.FixtureRequest
) -> None:
    data: Data
    if name == "text":
        data = character_gpt.TextData("".join(chr(65 + i * i % 53) for i in range(500 * 70)))
    elif name == "tensors":
        data = _tensor_data(30)
    else:
        data = image_folder.FolderData(request.getfixturevalue("images"))
    split: Split = "test" if name == "images" else "train"
    whole, longer, shorter = (
        [torch.cat(parts) for parts in zip(*data.evaluation(split, limit), strict=True)]
        for limit in (None, 9, 3)
    )
    assert len(shorter[0]) == 3
    assert len(longer[0]) == min(9, len(whole[0]))
    for ours, more, most in zip(shorter, longer, whole, strict=True):
        assert torch.equal(ours, more[:3])
        assert torch.equal(more, most[: len(more)])


def test_a_limited_evaluation_of_a_text_is_spread_over_it() -> None:
    text = character_gpt.TextData("a" * 40000 + "b" * 40000)
    (codes, _), *_ = text.evaluation("train", limit=100)
    # 72,000 characters, 32,000 of them b; 100 windows drawn without regard to place: standard error 5%
    assert 0.25 < codes.double().mean() < 0.65


def _tensor_data(count: int = 10) -> TensorData:
    rows = torch.arange(count)
    return TensorData((rows, rows), (rows + 100, rows), (rows + 200, rows), evaluation_batch=4)


def test_training_batches_are_epochs_without_repetition_and_a_function_of_the_generator() -> None:
    def epoch(seed: int) -> list[int]:
        batches = _tensor_data().batches(3, torch.Generator().manual_seed(seed))
        return [int(i) for _ in range(6) for i in next(batches)[0]]

    drawn = epoch(0)
    assert len(set(drawn[:9])) == len(set(drawn[9:])) == 9
    assert drawn == epoch(0)
    assert drawn != epoch(1)


def test_evaluation_reads_every_sample_of_its_split_once() -> None:
    seen = torch.cat([x for x, _ in _tensor_data().evaluation("validation")])
    assert seen.tolist() == list(range(100, 110))
    assert sum(len(x) for x, _ in _tensor_data().evaluation("test", limit=5)) == 5


def test_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(AblationError, match="10 training samples, got 11"):
        next(_tensor_data().batches(11, torch.Generator()))


@needs_data
@pytest.mark.parametrize("name", ["fashion-mnist", "mnist-conv-autoencoder"])
def test_image_splits_are_disjoint_and_of_the_stated_sizes(name: str) -> None:
    data = workload.get(name).data()
    assert isinstance(data, TensorData)
    sizes = {split: len(images) for split, (images, _) in data._splits.items()}
    assert sizes == {"train": 55_000, "validation": 5_000, "test": 10_000}
    images = data._splits["train"][0]
    assert images.min() == 0
    assert images.max() == 1


@needs_data
@pytest.mark.parametrize(
    "name", [n for n in workload.names() if n not in ("image-folder", "character-gpt-brown")]
)
def test_loss_and_metric_of_a_batch_are_finite_scalars_and_the_loss_is_a_mean(name: str) -> None:
    problem = workload.get(name)
    with torch.random.fork_rng():
        model = problem.model()
    inputs, target = next(problem.data().batches(8, torch.Generator().manual_seed(0)))
    outputs = model(inputs).double()
    target = target.double() if target.is_floating_point() else target
    loss, metric = problem.loss(outputs, target), problem.metric(outputs, target)
    assert loss.shape == metric.shape == ()
    assert loss.isfinite()
    halves = [problem.loss(outputs[s], target[s]) for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(loss, (halves[0] + halves[1]) / 2)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.Generator().manual_seed(0)
    for part, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                array = torch.randint(0, 256, (40, 60, 3), generator=pixels, dtype=torch.uint8).numpy()
                image.fromarray(array).save(folder / f"{i}.png")
    monkeypatch.setenv("SOAA_IMAGE_FOLDER", str(tmp_path))
    return tmp_path


def test_image_folder_is_read_with_seeded_crops(images: Path) -> None:
    data = image_folder.FolderData(image_folder.root())
    first, second = (next(data.batches(4, torch.Generator().manual_seed(1))) for _ in range(2))
    assert first[0].shape == (4, 3, 224, 224)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], next(data.batches(4, torch.Generator().manual_seed(2)))[0])
    assert [int(y) for _, ys in data.evaluation("test") for y in ys] == [0, 0, 1, 1]
    assert image_folder.resnet18(7)(first[0]).shape == (4, 7)


def test_image_folder_with_fewer_images_than_a_batch_is_refused(images: Path) -> None:
    with pytest.raises(AblationError, match=r"batch_size must be <= 9, the training images, got 10"):
        next(image_folder.FolderData(images).batches(10, torch.Generator()))


def test_image_folder_with_an_empty_part_is_named(images: Path) -> None:
    for path in (images / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(AblationError, match="no images for test"):
        image_folder.FolderData(images)


def test_image_folder_without_a_path_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOAA_IMAGE_FOLDER", raising=False)
    with pytest.raises(AblationError, match=r"SOAA_IMAGE_FOLDER.*train/CLASS"):
        workload.get("image-folder").prepare()


def test_resnet18_has_the_published_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in image_folder.resnet18(1000).parameters()) == 11_689_512


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "their_package.py").write_text(
        "import dataclasses\nfrom optimizers.ablation import workload\n"
        "WORKLOAD = dataclasses.replace(workload.get('digits'), name='theirs')\nOTHER = 3\n"
    )
    info = tmp_path / "their_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: their_package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[soaa.workloads]\ntheirs = their_package:WORKLOAD\nbroken = their_package:ABSENT\n"
        "other = their_package:OTHER\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    workload._third_party.cache_clear()
    importlib.invalidate_caches()
    yield
    workload._third_party.cache_clear()
    sys.modules.pop("their_package", None)


@pytest.mark.usefixtures("third_party")
def test_another_package_adds_a_workload_by_an_entry_point() -> None:
    assert {"theirs", "broken"} <= set(workload.names())
    assert workload.get("theirs").name == "theirs"
    with pytest.raises(AblationError, match="'broken'"):
        workload.get("broken")
    with pytest.raises(AblationError, match=r"must be an optimizers\.ablation\.Workload, got int"):
        workload.get("other")


def test_unknown_workload_names_the_nearest() -> None:
    with pytest.raises(AblationError, match="'fashion-mnist'"):
        workload.get("fashon-mnist")


def test_workload_is_a_frozen_value() -> None:
    problem = workload.get("digits")
    assert isinstance(problem, Workload)
    with pytest.raises(AttributeError):
        problem.steps = 3  # type: ignore[misc]
    assert isinstance(problem.model(), nn.Module)
